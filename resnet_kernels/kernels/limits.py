"""Limits of what kernels count in 32 bits, checked before a launch in Python's integers, where nothing overflows.

An offset that wraps around reads and writes memory of others: on a GPU an illegal access, in the interpreter a dead process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .geometry import Geometry

# The largest int32, and programs of a grid's first axis.
MOST = 2**31 - 1
# Programs of a grid's other axes.
MOST_IN_Y = 2**16 - 1
# What kernels/conv_bias_act.py counts in int32, up to a tile past the last one.
MOST_COUNTED = MOST - 128


def why_too_large(**sizes: tuple[int, int]) -> str | None:
    """Returns which size exceeds its limit, as the end of a sentence; None if none does. sizes: (size, limit) by name."""
    for name, (size, limit) in sizes.items():
        if size > limit:
            return f"takes at most {limit} {name.replace('_', ' ')}, got {size}"
    return None


def check_rows(n_rows: int, n_channels: int, block_rows: int, block_channels: int, *, channels_in_y: bool) -> None:
    """Checks the sizes of a pass over channels_last data, seen as (rows, channels).

    Args:
        n_rows: N * H * W.
        n_channels: C.
        block_rows: rows of a tile.
        block_channels: channels of a tile.
        channels_in_y: whether tiles of channels are the grid's second axis; else there is one axis for all tiles.

    Raises:
        ValueError: the kernel can't count so far.
    """
    tiles = -(-n_rows // block_rows), -(-n_channels // block_channels)
    reason = why_too_large(
        pixels=(n_rows, MOST - block_rows),
        elements_in_the_rows_of_a_tile=(block_rows * n_channels + block_channels, MOST),
        tiles_of_channels=(tiles[1], MOST_IN_Y if channels_in_y else MOST),
        tiles=(tiles[0] if channels_in_y else tiles[0] * tiles[1], MOST),
    )
    if reason is not None:
        raise ValueError(f'backend="triton" {reason}')


def why_not_convolution(x_shape: Sequence[int], weight_shape: Sequence[int], geometry: Geometry) -> str | None:
    """Returns why kernels/conv_bias_act.py can't run a convolution, as the end of a sentence, or None if it can.

    Args:
        x_shape: (N, C_in, H, W). The batch may have any size.
        weight_shape: (C_out, C_in / groups, kernel_h, kernel_w).
        geometry: stride, padding, dilation, groups.
    """
    top, bottom, left, right = geometry.padding
    return why_too_large(
        rows_of_the_padded_image=(x_shape[2] + top + bottom, MOST),
        columns_of_the_padded_image=(x_shape[3] + left + right, MOST),
        output_pixels_of_an_image=(math.prod(geometry.out_size(x_shape[2:], weight_shape[2:])), MOST_COUNTED),
        channels=(max(x_shape[1], weight_shape[0]), MOST_COUNTED),
        elements_of_a_filter=(math.prod(weight_shape[1:]), MOST_COUNTED),
        groups=(geometry.groups, MOST_IN_Y),
        elements_between_the_taps=(
            ((weight_shape[2] - 1) * geometry.dilation[0] * x_shape[3] + (weight_shape[3] - 1) * geometry.dilation[1])
            * x_shape[1]
            + x_shape[1],
            MOST,
        ),
    )


def with_near_elements(tensor: Tensor, first: int) -> Tensor:
    """Returns a tensor, or a dense copy where int32 can't hold the distances of its elements along dimensions `first` on."""
    spans = [(size - 1) * stride for size, stride in zip(tensor.shape[first:], tensor.stride()[first:])]
    return tensor.contiguous() if sum(spans) > MOST else tensor
