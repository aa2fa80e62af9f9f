"""Tiles of the BN kernels, forward and backward: how a reduction over rows is cut, and how many programs there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

# A tile is two 16-byte loads for each thread of 8 warps. Channels that 16 does not divide load one by one: a quarter of it.
TILE_BYTES = 8192
RAGGED_TILE_BYTES = 2048
STAGES = 3  # tiles of a reduction that are under way or in use: two programs an SM have 32 KiB or more on their way
MOST_CHANNELS = 64  # of a tile: 128 bytes of bf16, a whole cache line of each row
NUM_WARPS = 8
# Programs of a reduction: four for each of an H200's 132 multiprocessors, rounded down to a power of two, so that one tile
# of the finishing kernel takes all splits of a channel. 64 channels go in 512 splits, 2048 in 16.
MOST_SPLITS = 512
FINISH_CHANNELS = 8
FINISH_WARPS = 16
CACHED = 512  # launchers of a kernel, for as many shapes and settings


class Split(NamedTuple):
    """How a reduction over rows is cut: tiles of block_rows x block_channels, `count` splits of `rows` rows each."""

    block_rows: int
    block_channels: int
    rows: int
    count: int


def choose_split(n_rows: int, n_channels: int, itemsize: int) -> Split:
    """Cuts n_rows so that few and many channels both fill the machine. itemsize: of x, in bytes."""
    block_channels = min(MOST_CHANNELS, triton.next_power_of_2(n_channels))
    block_rows = (RAGGED_TILE_BYTES if n_channels % 16 else TILE_BYTES) // itemsize // block_channels
    most = max(1, MOST_SPLITS // triton.cdiv(n_channels, block_channels))
    rows = triton.cdiv(triton.cdiv(n_rows, most), block_rows) * block_rows
    return Split(block_rows, block_channels, rows, triton.cdiv(n_rows, rows))


def splits(split: Split, channels: int) -> tuple[int, int]:
    """Programs of a reduction over data: splits of rows x tiles of channels."""
    return split.count, triton.cdiv(channels, split.block_channels)


def tiles(split: Split, rows: int, channels: int) -> tuple[int, int]:
    """Programs of a pass over data: tiles of rows x tiles of channels."""
    return triton.cdiv(rows, split.block_rows), triton.cdiv(channels, split.block_channels)


def blocks(split: Split) -> dict[str, int]:
    return dict(BLOCK_ROWS=split.block_rows, BLOCK_CHANNELS=split.block_channels)


def channels_last(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous(memory_format=torch.channels_last)


def contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
