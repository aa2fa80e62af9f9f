"""Running a recipe with gradients or batch statistics: training, and eval mode while gradients are on.

A convolution is PyTorch's own (cuDNN, oneDNN), with its gradients; on the CPU ops.conv_training runs those that a table names.
The BN behind it, the residual add and the activation are ops.batch_norm_act, which on a GPU passes over the data twice
whether the statistics are the batch's or the running ones. A frozen BN whose weights need no gradient is a constant scale and
shift: the whole step is ops.conv_bias_act, as in inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..graph import fusible
from ..graph.recipe import Recipe
from ..kernels import activations
from ..kernels.geometry import Geometry, plain_pair
from ..ops import conv_training, onednn
from ..ops.dtypes import autocast_dtype
from ..ops.layouts import CHANNELS_LAST, as_contiguous, has_channels_last_strides, is_channels_last
from . import run_steps
from .live_modules import needs_gradient
from .parts import ConvPart, Part, last_of, scale_shift
from .run_steps import Values
from .state import FusedRun, FusedState


def run_recipe(recipe: Recipe, state: FusedState[Any], run: FusedRun, x: Tensor) -> Tensor:
    """Runs a recipe on x, as `eligibility.decide` has said that it may. The output has the layout that eager would give."""
    restore = False
    values = {0: x}
    if not is_channels_last(x):
        values[0] = x.contiguous(memory_format=CHANNELS_LAST)
        # Eager's convolution returns channels_last if its input or its weight is, and it stays so from there on.
        restore = not has_channels_last_strides(x) and not any(is_channels_last(conv.weight) for conv in run.live.convs)

    def run_part(part: Part, values: Values) -> Tensor:
        return run_steps.run_part(part, values, run.backend, convolve)

    def convolve(part: ConvPart, x: Tensor, residual: Tensor | None) -> Tensor:
        return _convolve_part(part, x, residual, run.backend)

    y = run_steps.run_steps(run.live.parts, values, recipe.result, state.path, run_part)
    return as_contiguous(y) if restore else y


def _convolve_part(part: ConvPart, x: Tensor, residual: Tensor | None, backend: str) -> Tensor:
    conv, bn, activation = part.conv, part.bn, last_of(part)
    if bn is not None and fusible.is_frozen(bn) and not needs_gradient(bn):
        dtype = autocast_dtype(x) or x.dtype
        scale, shift = scale_shift(conv.bias, bn)
        return run_steps.convolve(conv, x.to(dtype), conv.weight.to(dtype), scale, shift, residual, activation, backend)
    y = _convolve(conv, x, backend)
    if bn is not None:
        return run_steps.normalize(bn, y, residual, activation, backend)
    if residual is not None:
        return run_steps.add(y, residual, activation, backend)
    return activations.apply(activation, y)


def _convolve(conv: nn.Conv2d, x: Tensor, backend: str) -> Tensor:
    if backend == "cpu":
        y = conv_training.convolve(x, conv.weight, conv.bias, Geometry.of_module(conv, x.shape[2:]))
        if y is not None:
            return y
    stride = plain_pair(conv.stride) or (1, 1)  # eager rejects anything else
    in_layout, weight = onednn.for_gradient(x, conv.weight, stride)
    if in_layout is x and weight is conv.weight:
        return conv(x)
    return torch.conv2d(in_layout, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
