"""Steps that our CPU kernels take along with a convolution: a BN and ReLU before it, a max-pool behind it.

A pre-activation unit's BN and ReLU are computed while x is read, and a stem's max-pool while its rows are in the cache:
neither needs a pass over memory of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...graph.recipe import CallStep
from ...kernels.activations import RELU
from ...kernels.cpu.convolution import GATES, Bound, Preactivation
from ...kernels.cpu.plans import Pool
from ...models.same_padding import MaxPool2dSame
from ..parts import CallPart, ConvPart, NormPart, Part, window_of
from .packed_conv import PackedConv
from .packed_norm import PackedNorm


def norms_on_load(parts: Sequence[Part], result: int) -> set[int]:
    """Returns the numbers of the values that a BN, with or without a ReLU, makes for nobody but convolutions."""
    made = {
        part.step.out
        for part in parts
        if isinstance(part, NormPart) and part.step.residual is None and part.step.activation in (None, RELU)
    }
    for part in parts:
        reads = set(part.step.inputs)
        if isinstance(part, ConvPart):
            reads.discard(part.step.x)
            if part.step.residual == part.step.x:
                reads.add(part.step.x)
        made -= reads
    return made - {result}


def pools_behind(parts: Sequence[Part], result: int) -> dict[int, nn.MaxPool2d]:
    """Returns max-pools by the number of the value that they alone read, and that a convolution makes without a residual."""
    readers: dict[int, list[Part]] = {}
    for part in parts:
        for value in part.step.inputs:
            readers.setdefault(value, []).append(part)
    found = {}
    for part in parts:
        if isinstance(part, ConvPart) and part.step.residual is None and part.step.out != result:
            (reader, *more) = readers.get(part.step.out, [part])
            if not more and isinstance(reader, CallPart) and isinstance(reader.child, nn.MaxPool2d):
                found[part.step.out] = reader.child
    return found


def adds_behind(parts: Sequence[Part], result: int) -> dict[int, CallPart]:
    """Returns adds by the number of a value that they alone read, the later one of the two, whose kernel can add the other.

    A convolution or a BN without a residual of its own can add it behind an activation, and a gate whatever follows the add.
    """
    readers = Counter(value for part in parts for value in part.step.inputs)
    order = {part.step.out: i for i, part in enumerate(parts)}
    found = {}
    for part in parts:
        if not isinstance(part, CallPart) or part.child is not None or not part.step.what.startswith("add"):
            continue
        value = max(part.step.inputs, key=lambda number: order.get(number, -1))
        if readers[value] == 1 and value != result and value in order and _adds_behind(parts[order[value]], part.step):
            found[value] = part
    return found


def _adds_behind(maker: Part, add: CallStep) -> bool:
    if isinstance(maker, CallPart):
        return maker.child is None and maker.step.what in GATES
    return add.activation is None and maker.step.activation is not None and maker.step.residual is None


def slopes_of(child: nn.Module, channels: int) -> Tensor | None:
    """Returns a PReLU's slopes as our kernels take them; None for others, where eager may have an error."""
    slopes = child._parameters.get("weight")
    if slopes is None or type(slopes) is not nn.Parameter or slopes.layout is not torch.strided or slopes.is_neg():
        return None
    if slopes.device.type != "cpu" or slopes.dtype != torch.float32 or slopes.dim() != 1 or not slopes.is_contiguous():
        return None
    if slopes.numel() == 1:
        return slopes.detach() if bool(slopes.isfinite()) else None
    return slopes.detach() if slopes.numel() == channels and slopes.data_ptr() else None


def preactivation_of(pack: object, part: NormPart, channels: int) -> Preactivation | None:
    """Returns what a BN before a convolution does to its input; None if its vectors don't fit, where eager has an error.

    Of activations behind the BN it has ReLU alone.

    Args:
        pack: the BN's, if there is one.
        part: the BN's step.
        channels: of the input.
    """
    found = pack.preactivation if isinstance(pack, PackedNorm) else None
    if found is None or found.scale.numel() != channels:
        return None
    return found._replace(relu=part.step.activation == RELU)


def pooled(pack: PackedConv, child: nn.MaxPool2d, x_shape: torch.Size) -> Bound | None:
    """Returns a convolution with the max-pool behind it in one pass; None where no kernel of ours does that."""
    if pack.own(x_shape) is None:
        return None
    pool = pool_of(child, pack.out_shape(x_shape)[2:])
    return None if pool is None else pack.pooled(x_shape, pool)


def pool_of(child: nn.MaxPool2d, size: Sequence[int]) -> Pool | None:
    """Returns a max-pool on images of this (h, w) as our kernels take it; None for windows that they don't."""
    if type(child) not in (nn.MaxPool2d, MaxPool2dSame):
        return None
    kernel, stride, padding, dilation, ceil_mode = window_of(child)
    if type(kernel) is not int or type(stride) is not int or dilation != 1 or ceil_mode or child.return_indices:
        return None
    if isinstance(child, MaxPool2dSame):
        return Pool(kernel, stride, child.same_padding(*size))
    if type(padding) is not int or not 0 <= 2 * padding <= kernel or min(kernel, stride) < 1:
        return None
    if min(size) + 2 * padding < kernel:
        return None  # eager raises
    return Pool(kernel, stride, (padding,) * 4)
