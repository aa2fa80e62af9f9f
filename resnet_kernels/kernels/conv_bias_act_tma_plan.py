"""How conv_bias_act_tma.py lays a convolution out: which it takes, tiles as data, boxes of pixels, views of the tensors.

Three views of the input, one kernel:

    R x S, stride 1   (N, H, W, C), as it lies in memory; a tap moves the box.
    1x1, any stride   (N, out_h, out_w, C) with the strides multiplied; without a stride (1, 1, N*H*W, C): a plain GEMM.
    R x S, stride 2   (N, H/2, 2, W/2, 2C) of even sizes: the row's parity is a coordinate, the column's an offset of C
                      channels, so a tap's pixels are neighbours again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from ..ops.geometry import Geometry


@dataclass(frozen=True)
class TmaConfig:
    """One tile shape. block_m: pixels, block_n: output channels, block_k: input channels of one step.

    parts: the epilogue goes over the tile in so many pieces; programs_per_sm: how many are resident at a time.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int
    programs_per_sm: int

    def __str__(self) -> str:
        """What a measured table calls it: no two of CONFIGS may be called the same."""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile} w{self.num_warps} s{self.num_stages} p{self.parts}"


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
)

# Coordinates are int32, up to a box past the last pixel.
_MOST_PIXELS = 2**31 - 1 - 128
# An H200's multiprocessors: how many programs a layer should give before its tiles may grow.
_FULL_MACHINE = 132
# Plans kept: a net has some 25 layers that differ, times a few batch and image sizes.
_CACHED = 512


def why_not(x_shape, weight_shape, geometry: Geometry, dtype: torch.dtype) -> str | None:
    """What keeps a convolution from this kernel; None if nothing does.

    Args:
        x_shape: (N, C_in, H, W). weight_shape: (C_out, C_in / groups, kernel_h, kernel_w).
        dtype: of x and weight.
    """
    batch, c_in, in_h, in_w = x_shape
    c_out, _, *kernel = weight_shape
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype must be float16 or bfloat16, got {dtype}"
    if geometry.groups != 1:
        return f"groups must be 1, got {geometry.groups}"
    if geometry.dilation != (1, 1):
        return f"dilation must be 1, got {geometry.dilation}"
    if prod(x_shape) == 0:
        return f"x must not be empty, got shape {tuple(x_shape)}"
    if c_in % 8 or c_out % 8:
        # A descriptor's strides are multiples of 16 bytes.
        return f"channels must be multiples of 8, got C_in={c_in}, C_out={c_out}"
    if batch * prod(geometry.out_size((in_h, in_w), kernel)) > _MOST_PIXELS:
        return f"the output must have at most {_MOST_PIXELS} pixels"
    if geometry.stride == (1, 1) or _is_pointwise(kernel, geometry):
        return None
    if geometry.stride != (2, 2):
        return f"stride must be 1 or 2, got {geometry.stride} with a kernel of {kernel[0]}x{kernel[1]}"
    if in_h % 2 or in_w % 2:
        return f"stride 2 needs an even height and width, got {in_h}x{in_w}"
    if c_in % 32:
        # A ragged last step would reach into the other column's channels: times zero, but NaN and inf stay NaN.
        return f"stride 2 needs C_in to be a multiple of 32, got {c_in}"
    return None


def choose_config(n_pixels: int, taps: int, c_in: int, c_out: int) -> TmaConfig:
    """Picks a tile: by the output's pixels over the batch, the kernel's taps, and channels."""
    wide, large, tall, square, short_k = CONFIGS
    if 0 < c_in % 64 <= 32:
        return short_k
    tiles = cdiv(n_pixels, 128)
    # A program alone on its SM stores while nothing multiplies: worth it only where the loop is long.
    long_loop = taps * cdiv(c_in, wide.block_k) >= 16
    if long_loop and c_out % 256 == 0 and tiles * (c_out // 256) >= 2 * _FULL_MACHINE:
        return wide
    if c_out > 64 and tiles * cdiv(c_out, 128) >= _FULL_MACHINE:
        return large
    return tall if tiles * cdiv(c_out, 64) >= _FULL_MACHINE else square


class View(NamedTuple):
    """A tensor as a descriptor sees it, in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A launch without its pointers: what depends on shapes only. integers: the kernel's run-time numbers by name."""

    config: TmaConfig
    x: View
    weight: View
    y: View
    integers: dict[str, int]
    constants: dict[str, object]


@lru_cache(_CACHED)
def plan(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    geometry: Geometry,
    relu: bool,
    upcast: bool = False,
    config: TmaConfig | None = None,
) -> Plan:
    """Lays out a convolution that `why_not` lets pass; shared by the launcher and the compile-only tests."""
    batch, c_in, in_h, in_w = x_shape
    c_out, _, kernel_h, kernel_w = weight_shape
    pixels = (batch, *geometry.out_size((in_h, in_w), (kernel_h, kernel_w)))
    pad_h, pad_w = geometry.padding[0], geometry.padding[2]
    config = config or choose_config(prod(pixels), kernel_h * kernel_w, c_in, c_out)
    image, row, stride = in_h * in_w * c_in, in_w * c_in, 1
    if _is_pointwise((kernel_h, kernel_w), geometry):
        step_h, step_w = geometry.stride
        x_shape, x_strides = (*pixels, c_in), (image, step_h * row, step_w * c_in, 1)
        if geometry.stride == (1, 1):
            pixels = (1, 1, prod(pixels))
            x_shape, x_strides = (*pixels, c_in), (pixels[2] * c_in, pixels[2] * c_in, c_in, 1)
    elif geometry.stride == (1, 1):
        x_shape, x_strides = (batch, in_h, in_w, c_in), (image, row, c_in, 1)
    else:
        stride = 2
        x_shape, x_strides = (batch, in_h // 2, 2, in_w // 2, 2 * c_in), (image, 2 * row, row, 2 * c_in, 1)
    box = choose_box(config.block_m, pixels)
    x_box = (*box[:2], 1, box[2], config.block_k) if stride == 2 else (*box, config.block_k)
    tiles = [cdiv(size, side) for size, side in zip((*pixels, c_out), (*box, config.block_n))]
    # In a ragged last step the weight must not reach into the next tap: zeros there, as in x, so that inf leaks from neither.
    taps, ragged = kernel_h * kernel_w, c_in % config.block_k != 0
    assert not (ragged and stride == 2), f"{config} has ragged steps on {c_in} channels at stride 2"
    return Plan(
        config,
        View(x_shape, x_strides, x_box),
        View((c_out, taps, c_in), (taps * c_in, c_in, 1), (config.block_n, 1, config.block_k))
        if ragged
        else View((c_out, taps * c_in), (taps * c_in, 1), (config.block_n, config.block_k)),
        View(
            (*pixels, c_out),
            (pixels[1] * pixels[2] * c_out, pixels[2] * c_out, c_out, 1),
            (*_first_part(box, config.parts), config.block_n),
        ),
        dict(
            n_tiles=prod(tiles),
            tiles_h=tiles[1],
            tiles_w=tiles[2],
            tiles_c=tiles[3],
            c_out=c_out,
            lead_h=cdiv(pad_h, stride),
            lead_w=cdiv(pad_w, stride),
        ),
        dict(
            KERNEL_H=kernel_h,
            KERNEL_W=kernel_w,
            N_CHUNKS=cdiv(c_in, config.block_k),
            RAGGED=ragged,
            STRIDE=stride,
            SKEW_H=pad_h % stride,
            SKEW_W=pad_w % stride,
            RELU=relu,
            UPCAST=upcast,
            BOX_N=box[0],
            BOX_H=box[1],
            BOX_W=box[2],
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            PARTS=config.parts,
        ),
    )


def choose_box(block_m: int, pixels: tuple[int, int, int]) -> tuple[int, int, int]:
    """(images, rows, columns), powers of two of product block_m, that cover (N, out_h, out_w) with the fewest pixels.

    Of equals the one with the longest rows: its pixels are neighbours in memory.
    """
    powers = [2**i for i in range(block_m.bit_length())]
    boxes = [(block_m // (h * w), h, w) for h in powers for w in powers if h * w <= block_m]
    covered = {box: prod(cdiv(size, side) * side for size, side in zip(pixels, box)) for box in boxes}
    return min(boxes, key=lambda box: (covered[box], -box[2], -box[1]))


def _first_part(box: tuple[int, int, int], parts: int) -> tuple[int, ...]:
    """The first of so many equal pieces of a box, in the order of its pixels: images are parted first, then rows."""
    sides = []
    for side in box:
        sides.append(max(side // parts, 1))
        parts = max(parts // side, 1)
    return tuple(sides)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _is_pointwise(kernel, geometry: Geometry) -> bool:
    return tuple(kernel) == (1, 1) and geometry.padding == (0, 0, 0, 0)
