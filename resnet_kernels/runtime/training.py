"""Running a recipe with gradients or batch statistics: training, and eval mode while somebody asks for gradients.

A convolution is PyTorch's own (cuDNN, oneDNN), with its gradients; the BN behind it, the residual add and the ReLU are
ops.batch_norm_act, in the same two passes over data whether the statistics are the batch's or the running ones. Where a BN is
frozen and its weights are, too, it is a constant scale and shift: then the whole step is ops.conv_bias_act, as in inference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..graph import fusible
from ..graph.recipe import CallStep, NormStep, Recipe
from ..kernels.geometry import Geometry
from ..ops import add_relu, backends, onednn, reference
from ..ops.dtypes import autocast_dtype
from . import profiler_ranges
from .bn import bn_tensors
from .live_modules import needs_gradient
from .state import FusedState, Go

CHANNELS_LAST = torch.channels_last


def run_recipe(recipe: Recipe, state: FusedState, go: Go, x: Tensor) -> Tensor:
    """Runs a recipe on x, as `eligibility.decide` has said that it may. The output has the layout that eager would give."""
    backend, wiring = go.backend, go.wiring
    value, restore = x, False
    if not x.is_contiguous(memory_format=CHANNELS_LAST):
        value = x.contiguous(memory_format=CHANNELS_LAST)
        # Eager's convolution returns channels_last if its input or its weight is, and it stays so from there on.
        restore = all(conv.weight.is_contiguous() for conv in wiring.convs)
    values: dict[int, Tensor] = {0: value}
    del value
    for step, child, bn in profiler_ranges.around(wiring.steps, state.path):
        if isinstance(step, CallStep):
            y = _call(step, child, [values[i] for i in step.inputs], backend)
        else:
            residual = None if step.residual is None else values[step.residual]
            if isinstance(step, NormStep):
                y = _normalise(bn, values[step.x], residual, step.relu, backend)
            elif bn is not None and fusible.is_frozen(bn) and not needs_gradient(bn):
                y = _convolve_frozen(child, bn, values[step.x], residual, step.relu, backend)
            elif bn is not None:
                y = _normalise(bn, _convolve(child, values[step.x]), residual, step.relu, backend)
            else:
                y = _add_and_relu(_convolve(child, values[step.x]), residual, step.relu, backend)
            del residual
        values[step.out] = y
        del y
        for dead in step.frees:
            del values[dead]
    y = values[recipe.result]
    return y.contiguous() if restore else y


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    in_layout, weight = onednn.for_gradient(x, conv.weight, conv.stride)
    if in_layout is x and weight is conv.weight:
        return conv(x)
    return torch.conv2d(in_layout, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _normalise(bn: nn.Module, z: Tensor, residual: Tensor | None, relu: bool, backend: str) -> Tensor:
    """relu(bn(z) + residual), with all that nn.BatchNorm2d does to its buffers on the way."""
    frozen = fusible.is_frozen(bn)
    weight, bias, *running = bn_tensors(bn)
    if not (frozen or bn.track_running_stats):
        running = (None, None)
    # What eager's add would broadcast or promote is left to it.
    fits = residual is None or (residual.shape == z.shape and residual.dtype == z.dtype)
    y = torch.ops.resnet_kernels.batch_norm_act.default(
        z, residual if fits else None, weight, bias, *running, not frozen, 0.0 if frozen else _count_batch(bn), bn.eps,
        relu and fits, backend,
    )[0]  # fmt: skip
    return y if fits else _add_and_relu(y, residual, relu, backend)


def _count_batch(bn: nn.BatchNorm2d) -> float:
    """Counts a batch, and returns its share in the running statistics, as nn.BatchNorm2d.forward does."""
    if bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            return 1.0 / float(bn.num_batches_tracked)
    return 0.0 if bn.momentum is None else bn.momentum


def _convolve_frozen(
    conv: nn.Conv2d, bn: nn.Module, x: Tensor, residual: Tensor | None, relu: bool, backend: str
) -> Tensor:
    dtype = autocast_dtype(x) or x.dtype
    x, weight = x.to(dtype), conv.weight.to(dtype)
    geometry = Geometry.of_module(conv, x.shape[2:])
    scale, shift = reference.bn_scale_shift(*bn_tensors(bn), conv.bias, bn.eps)
    shape = geometry.out_shape(x.shape, weight.shape)
    fits = residual is None or (residual.shape == shape and residual.dtype == dtype)
    y = torch.ops.resnet_kernels.conv_bias_act.default(
        x, weight, shift, residual if fits else None, scale, *geometry, relu and fits, backend
    )
    return y if fits else _add_and_relu(y, residual, relu, backend)


def _add_and_relu(y: Tensor, residual: Tensor | None, relu: bool, backend: str) -> Tensor:
    if residual is None:
        return torch.relu(y) if relu else y
    if not relu:
        return y + residual
    if residual.shape != y.shape or residual.dtype != y.dtype or residual.stride() != y.stride():
        return torch.relu(y + residual)
    return add_relu(y, residual, backend=backends.as_requested(backend))


def _call(step: CallStep, child: nn.Module | None, inputs: list[Tensor], backend: str) -> Tensor:
    if child is not None:
        return child(*inputs)
    if step.what == "relu":
        return torch.relu(*inputs)
    return _add_and_relu(*inputs, step.what == "add_relu", backend)
