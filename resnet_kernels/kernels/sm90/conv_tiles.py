"""Tiles of conv.py as data, and the choice of a tile and its box for a layer.

The choice is not measured. What `tune` finds takes precedence.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class TmaConfig:
    """A tile's shape.

    Attributes:
        block_m: pixels.
        block_n: output channels.
        block_k: input channels of one step.
        num_warps: warps of a program.
        num_stages: steps that are loading or in use at a time.
        parts: pieces in which the epilogue goes over the tile.
        programs_per_sm: programs that an SM holds at a time.
        split_k: programs that share a tile's steps; the last one adds their sums, in one order, and stores.
        flatten: whether the compiler makes one loop of a program's tiles and their steps.
        early: whether programs start while the launch before them still runs, and wait for its end before they read or write
            (programmatic dependent launch).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int
    programs_per_sm: int
    split_k: int = 1
    flatten: bool = False
    early: bool = False

    @property
    def fits_four_loops(self) -> bool:
        """Whether the stages of four loops fit into shared memory: a tile of 128x256 would take 249 KiB of Hopper's 227."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k <= 3 * 256 * 64

    def __str__(self) -> str:
        """Name in a measured table, different for each of CONFIGS."""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        split = f" k{self.split_k}" if self.split_k > 1 else ""
        marks = "".join(f" {mark}" for mark, is_so in (("flat", self.flatten), ("early", self.early)) if is_so)
        return f"{tile} w{self.num_warps} s{self.num_stages} p{self.parts}{split}{marks}"


CONFIGS: tuple[TmaConfig, ...] = (
    # The least traffic from L2: for layers of many steps that fill the machine twice over.
    TmaConfig(128, 256, 64, num_warps=8, num_stages=4, parts=8, programs_per_sm=1),
    # Two programs on an SM: one multiplies while the other stores.
    TmaConfig(128, 128, 64, num_warps=8, num_stages=3, parts=4, programs_per_sm=2),
    # Stage 1: 64 output channels.
    TmaConfig(128, 64, 64, num_warps=4, num_stages=4, parts=2, programs_per_sm=2),
    # Few pixels: late stages at small batch.
    TmaConfig(64, 64, 64, num_warps=4, num_stages=4, parts=2, programs_per_sm=3),
    # Input channels that leave half of the last step of 64 empty.
    TmaConfig(64, 64, 32, num_warps=4, num_stages=4, parts=2, programs_per_sm=4),
    # So few pixels that most of the machine would idle: batch 1 from stage 2 on.
    *(TmaConfig(64, 64, 64, num_warps=4, num_stages=4, parts=2, programs_per_sm=3, split_k=n) for n in (4, 8, 16)),
    # Wide in pixels; only a table chooses it. An instruction multiplies 256 pixels, and weights come from L2 half as often.
    TmaConfig(256, 128, 64, num_warps=8, num_stages=4, parts=8, programs_per_sm=1),
    # The same for 64 output channels.
    TmaConfig(256, 64, 64, num_warps=4, num_stages=2, parts=4, programs_per_sm=2),
    # A program alone on its SM loads the next tile while it stores this one, with 3 to 9 more registers. Only a table chooses
    # it.
    TmaConfig(128, 256, 64, num_warps=8, num_stages=4, parts=8, programs_per_sm=1, flatten=True),
    TmaConfig(256, 128, 64, num_warps=8, num_stages=4, parts=8, programs_per_sm=1, flatten=True),
    # For so few tiles that a launch takes as long as its work: batch 1 and a few more. Only a table chooses them.
    TmaConfig(128, 64, 64, num_warps=4, num_stages=4, parts=2, programs_per_sm=2, early=True),
    *(
        TmaConfig(64, 64, 64, num_warps=4, num_stages=4, parts=2, programs_per_sm=3, split_k=n, early=True)
        for n in (1, 4, 8, 16)
    ),
)

# The fewest steps of a share of a split tile: with less, filling the pipeline and adding up would take most of the time.
_FEWEST_STEPS = 4
# Programs that a layer should have before its tiles may grow: an H200's multiprocessors.
FULL_MACHINE = 132
# The most shares of a launch: more would only wait for each other.
MOST_SHARES = 2 * FULL_MACHINE


def choose_config(
    n_pixels: int, taps: int, c_in: int, c_out: int, may_split: bool = False, four_loops: bool = False
) -> TmaConfig:
    """Picks a tile.

    Args:
        n_pixels: the output's pixels, over the batch.
        taps: the kernel's height x width.
        c_in: input channels.
        c_out: output channels.
        may_split: whether programs may share a tile's steps.
        four_loops: whether the steps are in four loops, one for each parity of rows and columns.
    """
    wide, large, tall, square, short_k, *others = CONFIGS
    if 0 < c_in % 64 <= 32:
        return short_k
    tiles = cdiv(n_pixels, 128)
    # Nothing multiplies while a program that is alone on its SM stores. Only a long loop makes up for that.
    long_loop = taps * cdiv(c_in, wide.block_k) >= 16
    if not four_loops and long_loop and c_out % 256 == 0 and tiles * (c_out // 256) >= 2 * FULL_MACHINE:
        return wide
    if c_out > 64 and tiles * cdiv(c_out, 128) >= FULL_MACHINE:
        return large
    if tiles * cdiv(c_out, 64) >= FULL_MACHINE:
        return tall
    tiles, steps = cdiv(n_pixels, 64) * cdiv(c_out, 64), taps * cdiv(c_in, 64)
    for split in reversed(others) if may_split and not four_loops else ():
        if (
            split.split_k > 1
            and not split.early
            and steps >= _FEWEST_STEPS * split.split_k
            and tiles * split.split_k <= MOST_SHARES
        ):
            return split
    return square


def choose_box(block_m: int, pixels: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns the box, (images, rows, columns), that covers pixels = (N, out_h, out_w) with the fewest pixels.

    Its sides are powers of two whose product is block_m. Among equals it has the longest rows: they are contiguous in memory.
    """
    powers = [2**i for i in range(block_m.bit_length())]
    boxes = [(block_m // (h * w), h, w) for h in powers for w in powers if h * w <= block_m]
    covered = {box: prod(cdiv(size, side) * side for size, side in zip(pixels, box)) for box in boxes}
    return min(boxes, key=lambda box: (covered[box], -box[2], -box[1]))


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up. triton.cdiv would import Triton, which layouts do without."""
    return -(-a // b)
