"""Convolution 3x3 at stride 1 for Hopper whose taps share loads. Formula: ../conv_bias_act.py.

conv.py loads its input from L2 once a tap, nine times. Here a program owns two neighboring columns of pixels, and a step is a
row of the filter: four columns of x and three taps of the weight feed six products. With 128 pixels a column, 64 channels and
steps of 32 a step loads 44 KiB; a load for each product would be 72.

x, y and the residual are seen as their even and their odd columns, each (N, H, W/2, C), so W has to be even. A box of one lies
beside the box of the other. A descriptor reads zeros outside the image, which are the padding.

On an H200, at batch 256 in bf16, this kernel is the fastest for 64 channels at 56x56 (149 us; conv.py 157, cuDNN 155), and for
no other layer of ResNet-50. Only a measured table chooses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launching
from ..activations import Activation, as_constexprs, slopes_by_channel, without_slopes
from ..geometry import Geometry
from ..layouts import contiguous
from ..operands import ConvOperands
from ..target import dot_needs_fp32, multiprocessors
from .conv_device import store_part
from .conv_layout import LaunchPlan, first_part
from .conv_layout import why_not as why_not_by_tap
from .conv_tiles import TmaConfig, cdiv, choose_box
from .descriptors import View, aligned, dense_view

CONFIGS: tuple[TmaConfig, ...] = (
    # Stage 1: 64 output channels. With a third stage one program would fit on an SM, and eight warps would take 221 registers.
    TmaConfig(128, 64, 32, num_warps=4, num_stages=2, parts=4, programs_per_sm=2),
    # The least traffic from L2.
    TmaConfig(128, 128, 32, num_warps=8, num_stages=3, parts=4, programs_per_sm=1),
    # Few pixels.
    TmaConfig(64, 64, 32, num_warps=4, num_stages=3, parts=2, programs_per_sm=2),
)
_SAME = Geometry(padding=(1, 1, 1, 1))
# Plans kept: a net has four such layers, times a few batch and image sizes.
_CACHED = 128


@triton.jit
def _column(x_desc, n, h, w, c, UPCAST: tl.constexpr):
    """Loads a box of every second column, [BLOCK_K channels, BLOCK_M pixels]."""
    x = x_desc.load([n, h, w, c])
    x = x.reshape(x.shape[0] * x.shape[1] * x.shape[2], x.shape[3])
    return (x.to(tl.float32) if UPCAST else x).T


@triton.jit
def _tap(w_desc, channel, k, UPCAST: tl.constexpr):
    weight = w_desc.load([channel, k])
    return weight.to(tl.float32) if UPCAST else weight


@triton.jit
def _tap_sharing_tma_kernel(
    even_desc,  # x's columns 0, 2, 4, ...: (n, h, w / 2, c_in)
    odd_desc,
    w_desc,  # (c_out, 9 * c_in)
    even_residual_desc,  # as y's, or None
    odd_residual_desc,
    even_y_desc,  # (n, h, w / 2, c_out)
    odd_y_desc,
    scale_ptr,  # (c_out,) or None
    bias_ptr,
    slopes_ptr,  # PReLU's
    n_tiles,
    tiles_h,
    tiles_w,
    tiles_c,
    c_out,
    N_CHUNKS: tl.constexpr,  # steps of BLOCK_K over the input channels
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    UPCAST: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    C_IN: tl.constexpr = N_CHUNKS * BLOCK_K
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        # Channels first: programs of one box of pixels, the larger operand, run at the same time.
        channel = tile % tiles_c * BLOCK_N
        box = tile // tiles_c
        w = box % tiles_w * BOX_W
        h = box // tiles_w % tiles_h * BOX_H
        n = box // (tiles_w * tiles_h) * BOX_N
        even = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        odd = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for k in range(3 * N_CHUNKS):
            r = k // N_CHUNKS
            c = k % N_CHUNKS * BLOCK_K
            first = 3 * r * C_IN + c
            left = _tap(w_desc, channel, first, UPCAST)
            middle = _tap(w_desc, channel, first + C_IN, UPCAST)
            right = _tap(w_desc, channel, first + 2 * C_IN, UPCAST)
            x0 = _column(odd_desc, n, h - 1 + r, w - 1, c, UPCAST)
            x1 = _column(even_desc, n, h - 1 + r, w, c, UPCAST)
            x2 = _column(odd_desc, n, h - 1 + r, w, c, UPCAST)
            x3 = _column(even_desc, n, h - 1 + r, w + 1, c, UPCAST)
            # In turns: products into the same accumulator wait for each other.
            even = tl.dot(left, x0, even)
            odd = tl.dot(left, x1, odd)
            even = tl.dot(middle, x1, even)
            odd = tl.dot(middle, x2, odd)
            even = tl.dot(right, x2, even)
            odd = tl.dot(right, x3, odd)
        store_part(
            even, scale_ptr, bias_ptr, even_residual_desc, even_y_desc, c_out, n, h, w, channel,
            ACT, SLOPE, BLOCK_M, BOX_H, BOX_W, PARTS, slopes_ptr=slopes_ptr,
        )  # fmt: skip
        store_part(
            odd, scale_ptr, bias_ptr, odd_residual_desc, odd_y_desc, c_out, n, h, w, channel,
            ACT, SLOPE, BLOCK_M, BOX_H, BOX_W, PARTS, slopes_ptr=slopes_ptr,
        )  # fmt: skip


def why_not(
    x_shape: Sequence[int], weight_shape: Sequence[int], geometry: Geometry, dtype: torch.dtype
) -> str | None:  # fmt: skip
    """Returns why this kernel can't run a convolution, or None if it can. Arguments: conv_layout.why_not."""
    if (reason := why_not_by_tap(x_shape, weight_shape, geometry, dtype)) is not None:
        return reason
    if tuple(weight_shape[2:]) != (3, 3) or geometry != _SAME:
        return f"only 3x3 at stride 1 with padding 1 shares taps, got {tuple(weight_shape[2:])}, {geometry}"
    if x_shape[3] % 2:
        return f"the width must be even, got {x_shape[3]}"
    if x_shape[1] % 32:
        return f"C_in must be a multiple of 32, got {x_shape[1]}"
    return None


@lru_cache(_CACHED)
def plan(
    x_shape: tuple[int, ...], c_out: int, activation: Activation | None, upcast: bool = False, config: TmaConfig = CONFIGS[0]
) -> LaunchPlan:  # fmt: skip
    """Lays out a convolution that `why_not` lets pass, for the launcher and the compile-only tests."""
    batch, c_in, height, width = x_shape
    pixels = (batch, height, width // 2)
    box = choose_box(config.block_m, pixels)
    tiles = [cdiv(size, side) for size, side in zip((*pixels, c_out), (*box, config.block_n))]

    def columns(channels: int, sides: tuple[int, ...], odd: int) -> View:
        strides = (height * width * channels, width * channels, 2 * channels, 1)
        return View((*pixels, channels), strides, sides, odd * channels)

    views = {"w_desc": dense_view((c_out, 9 * c_in), (config.block_n, config.block_k))}
    for odd, name in enumerate(("even", "odd")):
        views[f"{name}_desc"] = columns(c_in, (*box, config.block_k), odd)
        part = columns(c_out, (*first_part(box, config.parts), config.block_n), odd)
        views |= {f"{name}_y_desc": part, f"{name}_residual_desc": part}
    return LaunchPlan(
        views,
        dict(n_tiles=prod(tiles), tiles_h=tiles[1], tiles_w=tiles[2], tiles_c=tiles[3], c_out=c_out),
        dict(
            N_CHUNKS=c_in // config.block_k, **as_constexprs(activation), UPCAST=upcast,
            BOX_N=box[0], BOX_H=box[1], BOX_W=box[2], BLOCK_N=config.block_n, BLOCK_K=config.block_k, PARTS=config.parts,
        ),
    )  # fmt: skip


def launch(operands: ConvOperands, config: TmaConfig = CONFIGS[0]) -> Tensor:
    """Launches the kernel on checked operands that `why_not` lets pass.

    Returns:
        y, channels_last.
    """
    x, weight, bias, residual, scale, geometry, activation = operands
    todo = plan(tuple(x.shape), weight.shape[0], without_slopes(activation), dot_needs_fp32(x.dtype), config)
    y = torch.empty(
        geometry.out_shape(x.shape, weight.shape), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    x, residual = aligned(x), None if residual is None else aligned(residual)
    tensors = dict(
        even_desc=x, odd_desc=x, w_desc=aligned(weight), even_residual_desc=residual, odd_residual_desc=residual,
        even_y_desc=y, odd_y_desc=y, scale_ptr=contiguous(scale), bias_ptr=contiguous(bias),
        slopes_ptr=slopes_by_channel(activation, weight.shape[0]),
    )  # fmt: skip
    # Programs: tiles of channels, then of pairs of columns, rows and images.
    programs = min(todo.integers["n_tiles"], multiprocessors(x.device) * config.programs_per_sm)
    launching.launch(
        _tap_sharing_tma_kernel, (programs,), x.device, tensors, todo.fixed, todo.prepared, todo.views,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y
