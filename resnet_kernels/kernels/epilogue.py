"""BN as scale and shift, bias, residual add and activation in one pass over a convolution's output.

    y = act( x * scale + shift + residual * residual_scale + residual_shift )

Data is channels_last, seen as (rows = N*H*W, channels). The kernel computes in fp32 and rounds once, at the end. It reads x
and the residual once and writes y, over x if the caller owns it. PyTorch takes two passes for BN, three for the add and two
for the ReLU. The residual's scale and shift are the BN of a projection, whose convolution then needs no epilogue.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import elementwise, limits
from .activations import RELU, Activation, Last, as_constexprs, slopes_by_channel, without_slopes
from .launching import Launcher
from .layouts import channels_last, contiguous

# Bytes of a tile: each of 4 warps' threads takes four 16-byte loads of each operand. Where 16 does not divide the channels,
# elements are loaded one by one, and a tile is a quarter of that.
TILE_BYTES = 8192
RAGGED_TILE_BYTES = 2048
MOST_CHANNELS = 128  # in a tile: a row is then 256 bytes of bf16, and few programs load the same scale and shift
NUM_WARPS = 4
_CACHED = 512


@triton.jit
def _affine(x, scale_ptr, shift_ptr, offs_c, mask_c):
    """x * scale + shift; without a factor or a summand that is None."""
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        x += tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _epilogue_kernel(
    x_ptr,  # (n_rows, n_channels), residual and y too; y may be x
    scale_ptr,  # (n_channels,) or None, and so the four below
    shift_ptr,
    residual_ptr,  # or None
    residual_scale_ptr,
    residual_shift_ptr,
    slopes_ptr,  # PReLU's
    y_ptr,
    n_rows,
    n_channels,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    # Programs of the same rows are neighbors: together they read whole rows.
    n_tiles = tl.cdiv(n_channels, BLOCK_CHANNELS)
    start = (tl.program_id(0) // n_tiles) * BLOCK_ROWS
    offs_c = (tl.program_id(0) % n_tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    lane = tl.arange(0, BLOCK_ROWS)
    mask_c = offs_c < n_channels
    mask = (start + lane < n_rows)[:, None] & mask_c[None, :]
    # int64: an activation of 64x112x112 passes 2**31 elements at batch 2675.
    at = start.to(tl.int64) * n_channels
    offs = lane[:, None] * n_channels + offs_c[None, :]

    x = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    y = _affine(x, scale_ptr, shift_ptr, offs_c, mask_c)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        y += _affine(residual, residual_scale_ptr, residual_shift_ptr, offs_c, mask_c)
    y = elementwise.activate(y, ACT, elementwise.slope_of(slopes_ptr, SLOPE, offs_c, mask_c))
    tl.store(y_ptr + at + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def choose_tile(n_channels: int, itemsize: int) -> dict[str, int]:
    """Returns a tile's rows and channels as compile-time arguments of the kernel. itemsize: bytes of an element of x."""
    block_channels = min(MOST_CHANNELS, triton.next_power_of_2(n_channels))
    tile_bytes = RAGGED_TILE_BYTES if n_channels % 16 else TILE_BYTES
    return dict(BLOCK_ROWS=tile_bytes // itemsize // block_channels, BLOCK_CHANNELS=block_channels)


def launch(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    activation: Last = RELU,
    *,
    overwrite: bool = False,
) -> Tensor:
    """Returns act(x * scale + shift + residual * residual_scale + residual_shift), channels_last.

    Args:
        x: (N, C, H, W), a convolution's output; fp16, bf16 or fp32. Layouts other than channels_last are converted.
        scale: (C,), fp32 or x's dtype; None for ones.
        shift: (C,), fp32 or x's dtype; None for zeros.
        residual: shape and dtype of x, or None.
        residual_scale: as scale, for the residual; None without one.
        residual_shift: as shift, for the residual; None without one.
        activation: comes last; None for none.
        overwrite: whether y may take x's memory, which nobody reads again. The residual must not overlap it.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    y = x if overwrite else torch.empty_like(x)
    if y.numel():
        _launcher(x.numel() // x.shape[1], x.shape[1], x.element_size(), without_slopes(activation))(
            x.device, x_ptr=x, scale_ptr=contiguous(scale), shift_ptr=contiguous(shift),
            residual_ptr=channels_last(residual), residual_scale_ptr=contiguous(residual_scale),
            residual_shift_ptr=contiguous(residual_shift), slopes_ptr=slopes_by_channel(activation, x.shape[1]), y_ptr=y,
        )  # fmt: skip
    return y


@lru_cache(_CACHED)
def _launcher(rows: int, channels: int, itemsize: int, activation: Activation | None) -> Launcher:
    tile = choose_tile(channels, itemsize)
    limits.check_rows(rows, channels, tile["BLOCK_ROWS"], tile["BLOCK_CHANNELS"], channels_in_y=False)
    # Programs: tiles of rows x tiles of channels, in one dimension, because there may be more than 65535 tiles of rows.
    programs = triton.cdiv(rows, tile["BLOCK_ROWS"]) * triton.cdiv(channels, tile["BLOCK_CHANNELS"])
    fixed = dict(n_rows=rows, n_channels=channels, **as_constexprs(activation), **tile)
    return Launcher(_epilogue_kernel, (programs,), fixed, NUM_WARPS)
