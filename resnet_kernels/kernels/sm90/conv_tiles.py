"""conv.py's tiles as data, and which of them, of which shape, a layer gets.

None was chosen by a measurement; what `tune` finds goes over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class TmaConfig:
    """One tile shape. block_m: pixels, block_n: output channels, block_k: input channels of one step.

    parts: the epilogue goes over the tile in so many pieces; programs_per_sm: how many are resident at a time.
    split_k: so many programs share a tile's steps; the last of them adds their sums, in one order, and stores.
    flatten: the compiler makes one loop of a program's tiles and their steps.
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

    @property
    def fits_four_loops(self) -> bool:
        """Whether four loops' stages fit into shared memory: 128x256 pixels x channels take 249 KiB of Hopper's 227."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k <= 3 * 256 * 64

    def __str__(self) -> str:
        """What a measured table calls it: no two of CONFIGS may be called the same."""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        split = f" k{self.split_k}" if self.split_k > 1 else ""
        return f"{tile} w{self.num_warps} s{self.num_stages} p{self.parts}{split}{' flat' if self.flatten else ''}"


CONFIGS: tuple[TmaConfig, ...] = (
    # The least traffic from L2: layers of many steps that fill the machine twice over with it.
    TmaConfig(128, 256, 64, num_warps=8, num_stages=4, parts=8, programs_per_sm=1),
    # Two programs an SM: one multiplies while the other stores.
    TmaConfig(128, 128, 64, num_warps=8, num_stages=3, parts=4, programs_per_sm=2),
    # Stage 1: 64 output channels.
    TmaConfig(128, 64, 64, num_warps=4, num_stages=4, parts=2, programs_per_sm=2),
    # Few pixels: late stages at small batch.
    TmaConfig(64, 64, 64, num_warps=4, num_stages=4, parts=2, programs_per_sm=3),
    # Input channels of which steps of 64 would leave half empty.
    TmaConfig(64, 64, 32, num_warps=4, num_stages=4, parts=2, programs_per_sm=4),
    # So few pixels that most of the machine would idle: batch 1 from stage 2 on.
    *(TmaConfig(64, 64, 64, num_warps=4, num_stages=4, parts=2, programs_per_sm=3, split_k=n) for n in (4, 8, 16)),
    # Wide in pixels, for a table alone to choose: an instruction multiplies 256 of them, and the weights are read from L2
    # half as often.
    TmaConfig(256, 128, 64, num_warps=8, num_stages=4, parts=8, programs_per_sm=1),
    # The same where there are 64 output channels.
    TmaConfig(256, 64, 64, num_warps=4, num_stages=2, parts=4, programs_per_sm=2),
    # A program alone on its SM that loads the next tile while it stores this one; 3 to 9 registers more. For a table alone.
    TmaConfig(128, 256, 64, num_warps=8, num_stages=4, parts=8, programs_per_sm=1, flatten=True),
    TmaConfig(256, 128, 64, num_warps=8, num_stages=4, parts=8, programs_per_sm=1, flatten=True),
)

# Steps that a share of a split tile has at least: fewer would be spent on filling the pipeline and on adding up.
_FEWEST_STEPS = 4
# An H200's multiprocessors: how many programs a layer should give before its tiles may grow.
FULL_MACHINE = 132


# Shares of split tiles, beyond which they would only wait for each other.
MOST_SHARES = 2 * FULL_MACHINE


def choose_config(
    n_pixels: int, taps: int, c_in: int, c_out: int, may_split: bool = False, four_loops: bool = False
) -> TmaConfig:
    """Picks a tile: by the output's pixels over the batch, the kernel's taps, and channels.

    may_split: whether programs may share a tile's steps. four_loops: whether the steps are in four loops, one a parity.
    """
    wide, large, tall, square, short_k, *others = CONFIGS
    if 0 < c_in % 64 <= 32:
        return short_k
    tiles = cdiv(n_pixels, 128)
    # A program alone on its SM stores while nothing multiplies: worth it only where the loop is long.
    long_loop = taps * cdiv(c_in, wide.block_k) >= 16
    if not four_loops and long_loop and c_out % 256 == 0 and tiles * (c_out // 256) >= 2 * FULL_MACHINE:
        return wide
    if c_out > 64 and tiles * cdiv(c_out, 128) >= FULL_MACHINE:
        return large
    if tiles * cdiv(c_out, 64) >= FULL_MACHINE:
        return tall
    tiles, steps = cdiv(n_pixels, 64) * cdiv(c_out, 64), taps * cdiv(c_in, 64)
    for split in reversed(others) if may_split and not four_loops else ():
        if split.split_k > 1 and steps >= _FEWEST_STEPS * split.split_k and tiles * split.split_k <= MOST_SHARES:
            return split
    return square


def choose_box(block_m: int, pixels: tuple[int, int, int]) -> tuple[int, int, int]:
    """(images, rows, columns), powers of two of product block_m, that cover (N, out_h, out_w) with the fewest pixels.

    Of equals the one with the longest rows: its pixels are neighbours in memory.
    """
    powers = [2**i for i in range(block_m.bit_length())]
    boxes = [(block_m // (h * w), h, w) for h in powers for w in powers if h * w <= block_m]
    covered = {box: prod(cdiv(size, side) * side for size, side in zip(pixels, box)) for box in boxes}
    return min(boxes, key=lambda box: (covered[box], -box[2], -box[1]))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
