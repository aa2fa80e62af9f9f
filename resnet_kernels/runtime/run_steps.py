"""Steps of a recipe, one by one, on PyTorch's operations and on our ops: what no backend does in a way of its own.

A kernel reads a residual of the output's shape and dtype. Eager's add also broadcasts and promotes, so where a residual
differs the add and the activation follow by themselves: `with_residual` is the only place that decides this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph import fusible
from ..graph.fusible import BatchNorm
from ..kernels import activations
from ..kernels.activations import RELU, Last
from ..kernels.geometry import Geometry
from ..ops import add_relu, backends
from ..ops.batch_norm_act import undispatched
from ..ops.conv_bias_act import run_checked
from . import profiler_ranges
from .parts import CallPart, ConvPart, NormPart, Part, bn_tensors, last_of

Values = dict[int, Tensor]

# Of squeeze-and-excitation, by the name of a CallStep: the average of whole images, and what multiplies them.
CALLS: dict[str, Callable[..., Tensor]] = {
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "mul": torch.mul,
    "sigmoid_mul": lambda x, gate: x * torch.sigmoid(gate),
    "hardsigmoid_mul": lambda x, gate: x * F.hardsigmoid(gate),
}


def run_steps(
    parts: Sequence[Part], values: Values, result: int, path: str, run: Callable[[Part, Values], Tensor]
) -> Tensor:
    """Runs parts in order, and drops each value as soon as it is dead: peak memory is eager's.

    Args:
        parts: the steps of a recipe with their modules.
        values: the input, by its number 0; the caller must hold no other reference to it.
        result: the number of the output.
        path: of the module that the steps are of, for profilers.
        run: computes one part's output from the values.
    """
    for part in profiler_ranges.around(parts, path):
        values[part.step.out] = run(part, values)
        for dead in part.step.frees:
            del values[dead]
    return values[result]


def run_part(
    part: Part, values: Values, backend: str, convolve: Callable[[ConvPart, Tensor, Tensor | None], Tensor]
) -> Tensor:
    """Computes one part's output.

    Args:
        part: a step with its modules.
        values: the values that the step reads.
        backend: resolved.
        convolve: runs a convolution and what follows it, given its part, input and residual.
    """
    if isinstance(part, CallPart):
        return _call(part, values, backend)
    x, residual = values[part.step.x], residual_of(part, values)
    if isinstance(part, NormPart):
        return normalize(part.bn, x, residual, last_of(part), backend)
    return convolve(part, x, residual)


def residual_of(part: ConvPart | NormPart, values: Values) -> Tensor | None:
    """The tensor that a part adds; None if it adds none."""
    return None if part.step.residual is None else values[part.step.residual]


def with_residual(
    run: Callable[[Tensor | None, Last], Tensor],
    shape: Callable[[], Sequence[int]],
    dtype: torch.dtype,
    residual: Tensor | None,
    activation: Last,
    backend: str,
) -> Tensor:
    """run(residual, activation) where a kernel can add the residual; else run(None, None), and both follow.

    Args:
        run: an operation that can end in an add and an activation.
        shape: gives the shape of its output; asked only where there is a residual.
        dtype: of its output.
        residual: None for no add.
        activation: comes last; None for none.
        backend: resolved.
    """
    if residual is None or (residual.shape == shape() and residual.dtype == dtype):
        return run(residual, activation)
    return add(run(None, None), residual, activation, backend)


def add(x: Tensor, residual: Tensor, activation: Last, backend: str) -> Tensor:
    """x + residual and what follows, channels_last. Shapes broadcast and dtypes promote as in eager."""
    return add_as_it_lies(x, residual, activation, backend).contiguous(memory_format=torch.channels_last)


def add_as_it_lies(x: Tensor, residual: Tensor, activation: Last, backend: str) -> Tensor:
    """`add`, in the layout that eager's add gives."""
    same = x.shape == residual.shape and x.dtype == residual.dtype and x.stride() == residual.stride()
    if activation == RELU and same:
        return add_relu(x, residual, backend=backends.as_requested(backend))
    y = torch.add(x, residual)
    # Nobody else has the sum, but what computes gradients may need it.
    writes = activation == RELU or not y.requires_grad
    return activations.apply_over(activation, y) if writes else activations.apply(activation, y)


def convolve(
    conv: nn.Conv2d,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: Last,
    backend: str,
) -> Tensor:
    """ops.conv_bias_act with a module's geometry: act(conv(x, weight) * scale + shift + residual)."""
    geometry = Geometry.of_module(conv, x.shape[2:])

    def run(residual: Tensor | None, activation: Last) -> Tensor:
        return run_checked(x, weight, shift, residual, scale, geometry, activation, backend)

    return with_residual(
        run, lambda: geometry.out_shape(x.shape, weight.shape), x.dtype, residual, activation, backend
    )  # fmt: skip


def normalize(bn: BatchNorm, x: Tensor, residual: Tensor | None, activation: Last, backend: str) -> Tensor:
    """ops.batch_norm_act: act(bn(x) + residual), with all that nn.BatchNorm2d does to its buffers on the way."""
    frozen = fusible.is_frozen(bn)
    weight, bias, mean, var = bn_tensors(bn)
    if not (frozen or bn.track_running_stats):
        mean = var = None
    momentum = 0.0 if frozen else _count_batch(bn)

    def run(residual: Tensor | None, activation: Last) -> Tensor:
        return undispatched(
            x, residual, weight, bias, mean, var, not frozen, momentum, fusible.eps_of(bn), activation, backend
        )

    return with_residual(run, lambda: x.shape, x.dtype, residual, activation, backend)


def _count_batch(bn: BatchNorm) -> float:
    """Counts a batch, and returns its share in the running statistics, as nn.BatchNorm2d.forward does."""
    if bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            return 1.0 / float(bn.num_batches_tracked)
    return 0.0 if bn.momentum is None else bn.momentum


def _call(part: CallPart, values: Values, backend: str) -> Tensor:
    """A child module, an add, an activation or both, an average or a gate."""
    inputs = [values[i] for i in part.step.inputs]
    if part.child is not None:
        # PyTorch goes by strides, and those of a batch of one may be anything.
        return part.child(*inputs).contiguous(memory_format=torch.channels_last)
    if part.step.what in CALLS:
        return CALLS[part.step.what](*inputs).contiguous(memory_format=torch.channels_last)
    if len(inputs) == 1:
        return activations.apply(part.step.activation, inputs[0])
    return add(inputs[0], inputs[1], part.step.activation, backend)
