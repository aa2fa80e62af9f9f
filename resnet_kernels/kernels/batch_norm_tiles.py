"""Tiles of the BN kernels, forward and backward: how a reduction over rows is cut, and the programs of a launch."""

from __future__ import annotations

from typing import NamedTuple

import triton

from . import limits

# Bytes of a tile: two 16-byte loads for each thread of 8 warps. Where 16 does not divide the channels, elements are loaded one
# by one, and a tile is a quarter of that.
TILE_BYTES = 8192
RAGGED_TILE_BYTES = 2048
STAGES = 3  # tiles of a reduction that are loading or in use: two programs an SM then have at least 32 KiB loading
MOST_CHANNELS = 64  # in a tile: 128 bytes of bf16, a whole cache line of each row
NUM_WARPS = 8
# Programs of a reduction: four for each of an H200's 132 multiprocessors, rounded down to a power of two, so that one tile of
# the finishing kernel takes all splits of a channel. 64 channels are cut into 512 splits, 2048 channels into 16.
MOST_SPLITS = 512
FINISH_CHANNELS = 8
FINISH_WARPS = 16
CACHED = 512  # shapes and settings whose launchers are kept, for each kernel


class Split(NamedTuple):
    """How rows are cut: n_splits splits of `rows` rows each, in tiles of block_rows x block_channels."""

    block_rows: int
    block_channels: int
    rows: int
    n_splits: int


def choose_split(n_rows: int, n_channels: int, itemsize: int) -> Split:
    """Cuts rows so that few channels fill the machine as well as many do. itemsize: bytes of an element of x.

    Raises:
        ValueError: the kernels can't count so far.
    """
    block_channels = min(MOST_CHANNELS, triton.next_power_of_2(n_channels))
    block_rows = (RAGGED_TILE_BYTES if n_channels % 16 else TILE_BYTES) // itemsize // block_channels
    most = max(1, MOST_SPLITS // triton.cdiv(n_channels, block_channels))
    limits.check_rows(n_rows, n_channels, block_rows, block_channels, channels_in_y=True)
    rows = triton.cdiv(triton.cdiv(n_rows, most), block_rows) * block_rows
    return Split(block_rows, block_channels, rows, triton.cdiv(n_rows, rows))


def splits(split: Split, channels: int) -> tuple[int, int]:
    """Returns the grid of a reduction: splits of rows x tiles of channels."""
    return split.n_splits, triton.cdiv(channels, split.block_channels)


def tiles(split: Split, rows: int, channels: int) -> tuple[int, int]:
    """Returns the grid of an elementwise pass: tiles of rows x tiles of channels."""
    return triton.cdiv(rows, split.block_rows), triton.cdiv(channels, split.block_channels)


def blocks(split: Split) -> dict[str, int]:
    """Returns a tile's size as compile-time arguments of the kernels."""
    return dict(BLOCK_ROWS=split.block_rows, BLOCK_CHANNELS=split.block_channels)
