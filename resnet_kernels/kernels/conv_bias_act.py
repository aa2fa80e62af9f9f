"""Convolution, per-channel scale and shift, residual add and activation in one kernel for any GPU, without TMA and wgmma.

    y[n, p, q, o] = act( scale[o] * sum_{r, s, c} x[n, p*stride + r*dil - pad, q*stride + s*dil - pad, c] * w[o, r, s, c]
                         + bias[o] + residual[n, p, q, o] )

It is an implicit GEMM over channels_last data: M = N*out_h*out_w pixels, N = output channels of one group, K = kernel_h *
kernel_w * c_in taps and channels. Nothing is gathered into memory first: im2col would write and read K / c_in = 9 copies of
the input for a 3x3.

Cost: 2*M*N*K FLOP. HBM moves x, w, y and the residual, each once. Eager convolution, BN, add and ReLU read and write y four
times more. Each tap of a 3x3 reads its input tile from L2 anew: (BLOCK_M + BLOCK_N) * BLOCK_K elements a step.

BN comes as a live fp32 scale and shift. So the kernel reads the user's weight itself, not a folded copy that could go stale,
and rounds once, at the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import elementwise, launching, limits, target
from .activations import Activation, as_constexprs, slopes_by_channel, without_slopes
from .geometry import Geometry
from .layouts import channels_last, contiguous
from .operands import ConvOperands

# Plans kept: a net has some 25 layers that differ, times a few batch and image sizes.
_CACHED = 512


@dataclass(frozen=True)
class ConvConfig:
    """A tile's shape.

    Attributes:
        block_m: pixels.
        block_n: output channels.
        block_k: taps x input channels of one step.
        num_warps: warps of a program.
        num_stages: steps that are loading or in use at a time.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        """Name in a measured table, different for each of CONFIGS."""
        return f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"


# tests/test_compile.py holds that every tile compiles, fits and does not spill, and prints its registers. None is measured
# yet, which is why backend="auto" never picks this kernel.
CONFIGS: tuple[ConvConfig, ...] = (
    ConvConfig(128, 128, 64, num_warps=8, num_stages=3),  # stages 2 to 4 at large batch
    ConvConfig(128, 64, 64, num_warps=4, num_stages=3),  # stage 1: 64 output channels
    ConvConfig(64, 64, 64, num_warps=4, num_stages=3),  # few pixels: late stages at small batch
    ConvConfig(64, 64, 32, num_warps=4, num_stages=3),  # the stem (K = 147), and channels that 64 does not divide
    ConvConfig(64, 32, 32, num_warps=4, num_stages=3),  # up to 32 output channels
    ConvConfig(64, 64, 16, num_warps=8, num_stages=3),  # fp32, on the FMA units: 64x64x32 on 4 warps spills
    ConvConfig(64, 16, 16, num_warps=2, num_stages=3),  # groups of a few channels, depthwise, d2l's 3 and 6 channels
)

# A larger batch is halved.
_MOST_PIXELS = limits.MOST_COUNTED

# Programs that fill the machine: a larger tile has to leave so many. An H200 has 132 multiprocessors.
_FULL_MACHINE = 132


def choose_config(n_pixels: int, c_in: int, c_out: int, dtype: torch.dtype) -> ConvConfig:
    """Picks a tile for a convolution.

    Args:
        n_pixels: the output's pixels, over the batch.
        c_in: input channels of a group.
        c_out: output channels of a group.
        dtype: the operands' dtype.
    """
    large, tall, square, short_k, narrow, fp32, tiny = CONFIGS
    if dtype == torch.float32 and c_out > 32:
        return fp32
    if c_out <= 16 or c_in < 16:
        return tiny if c_out <= 16 else short_k if c_out > 32 else narrow
    if c_out <= 32:
        return narrow
    if c_in % 64:
        return short_k
    if triton.cdiv(n_pixels, 128) * triton.cdiv(c_out, 128) >= _FULL_MACHINE and c_out >= 128:
        return large
    return tall if triton.cdiv(n_pixels, 128) * triton.cdiv(c_out, 64) >= _FULL_MACHINE else square


@triton.jit
def _conv_bias_act_kernel(
    x_ptr,  # (n, in_h, in_w, groups * c_in)
    w_ptr,  # (groups * c_out, KERNEL_H, KERNEL_W, c_in)
    scale_ptr,  # (groups * c_out,) or None
    bias_ptr,  # (groups * c_out,) or None
    slopes_ptr,  # (groups * c_out,) or None: PReLU's
    residual_ptr,  # as y, or None
    y_ptr,  # (n, out_h, out_w, groups * c_out)
    n_pixels,  # n * out_h * out_w, below 2**31
    in_h,
    in_w,
    out_h,
    out_w,
    c_in,  # per group
    c_out,  # per group
    groups,
    pad_top,
    pad_left,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    IN_BOUNDS: tl.constexpr,  # no tap leaves the image
    WHOLE_CHUNKS: tl.constexpr,  # BLOCK_K divides c_in
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ROUND_TO_TF32: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs of the same pixels are neighbors: all read their input, the larger operand, while it is in L2.
    n_tiles_n = tl.cdiv(c_out, BLOCK_N)
    pid = tl.program_id(0)
    group = tl.program_id(1)
    pid_m = pid // n_tiles_n
    pid_n = pid % n_tiles_n

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < n_pixels
    mask_n = offs_n < c_out
    n = offs_m // (out_h * out_w)
    pixel = offs_m % (out_h * out_w)
    h_start = (pixel // out_w) * STRIDE_H - pad_top
    w_start = (pixel % out_w) * STRIDE_W - pad_left
    # int64: an activation of 64x112x112 passes 2**31 elements at batch 2675.
    row_offset = ((n.to(tl.int64) * in_h + h_start) * in_w + w_start) * (groups * c_in) + group * c_in
    w_row_offset = (group * c_out + offs_n).to(tl.int64) * (KERNEL_H * KERNEL_W * c_in)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    k_total = KERNEL_H * KERNEL_W * c_in
    for k_start in range(0, k_total, BLOCK_K):
        offs_k = k_start + tl.arange(0, BLOCK_K)
        if WHOLE_CHUNKS:
            # The step lies in one tap, whose row and column are scalars.
            tap = k_start // c_in
            r = tap // KERNEL_W
            s = tap % KERNEL_W
            h = h_start + r * DILATION_H
            w = w_start + s * DILATION_W
            channel = k_start - tap * c_in + tl.arange(0, BLOCK_K)
            x_ptrs = x_ptr + row_offset[:, None] + (r * DILATION_H * in_w + s * DILATION_W) * (groups * c_in) + channel
            mask_x = mask_m[:, None]
            if not IN_BOUNDS:
                mask_x = mask_x & ((h >= 0) & (h < in_h) & (w >= 0) & (w < in_w))[:, None]
            x = tl.load(x_ptrs, mask=mask_x, other=0.0)
            weight = tl.load(w_ptr + offs_k[:, None] + w_row_offset[None, :], mask=mask_n[None, :], other=0.0)
        else:
            # With few or odd channels each element of the step has its own tap, and the last step is ragged.
            mask_k = offs_k < k_total
            tap = offs_k // c_in
            r = tap // KERNEL_W
            s = tap % KERNEL_W
            h = h_start[:, None] + (r * DILATION_H)[None, :]
            w = w_start[:, None] + (s * DILATION_W)[None, :]
            offset_k = (r * DILATION_H * in_w + s * DILATION_W) * (groups * c_in) + offs_k - tap * c_in
            mask_x = mask_m[:, None] & mask_k[None, :]
            if not IN_BOUNDS:
                mask_x = mask_x & (h >= 0) & (h < in_h) & (w >= 0) & (w < in_w)
            x = tl.load(x_ptr + row_offset[:, None] + offset_k[None, :], mask=mask_x, other=0.0)
            weight = tl.load(
                w_ptr + offs_k[:, None] + w_row_offset[None, :], mask=mask_k[:, None] & mask_n[None, :], other=0.0
            )
        if UPCAST:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        if ROUND_TO_TF32:
            x = elementwise.to_tf32(x)
            weight = elementwise.to_tf32(weight)
        acc = tl.dot(x, weight, acc, input_precision=INPUT_PRECISION)

    offs_c = group * c_out + offs_n
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + offs_c, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_c, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_offset = offs_m.to(tl.int64)[:, None] * (groups * c_out) + offs_c[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + y_offset, mask=mask_y, other=0.0).to(tl.float32)
    acc = elementwise.activate(acc, ACT, elementwise.slope_of(slopes_ptr, SLOPE, offs_c, mask_n))
    tl.store(y_ptr + y_offset, acc.to(y_ptr.dtype.element_ty), mask=mask_y)


def launch(operands: ConvOperands, config: ConvConfig | None = None) -> Tensor:
    """Launches the kernel on checked operands.

    Args:
        operands: in fp16, bf16 or fp32. What is not channels_last yet is converted.
        config: a tile; None lets `choose_config` pick one.

    Returns:
        y, channels_last.

    Raises:
        ValueError: the kernel can't count so far.
    """
    x, weight, bias, residual, scale, geometry, activation = operands
    if (reason := _why_not(tuple(x.shape), tuple(weight.shape), geometry)) is not None:
        raise ValueError(f'backend="triton" {reason}')
    out_h, out_w = geometry.out_size(x.shape[2:], weight.shape[2:])
    batch, c_out = x.shape[0], weight.shape[0]
    y = torch.empty((batch, c_out, out_h, out_w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y
    if batch > 1 and batch * out_h * out_w > _MOST_PIXELS:
        half = batch // 2
        for part in (slice(0, half), slice(half, batch)):
            added = None if residual is None else residual[part]
            y[part] = launch(operands._replace(x=x[part], residual=added), config)
        return y
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    config, grid, fixed, prepared = _plan(
        x.shape, weight.shape, geometry, without_slopes(activation), x.dtype, target.allows_tf32(x.dtype), config
    )  # fmt: skip
    tensors = dict(
        x_ptr=x, w_ptr=weight, scale_ptr=contiguous(scale), bias_ptr=contiguous(bias),
        slopes_ptr=slopes_by_channel(activation, c_out), residual_ptr=channels_last(residual), y_ptr=y,
    )  # fmt: skip
    launching.launch(
        _conv_bias_act_kernel, grid, x.device, tensors, fixed, prepared,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y


_why_not = lru_cache(_CACHED)(limits.why_not_convolution)


@lru_cache(_CACHED)
def _plan(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: Geometry, activation: Activation | None,
    dtype: torch.dtype, tf32: bool, config: ConvConfig | None,
) -> tuple[ConvConfig, tuple[int, int], dict[str, object], launching.PreparedByKey]:  # fmt: skip
    """Returns the tile, the grid, all arguments but tensors, and a dict for launching.launch to fill.

    tf32 is not read. It is part of the cache's key because `constexprs` asks for the setting.
    """
    (batch, _, in_h, in_w), (c_out, c_in_group, *kernel), groups = x_shape, weight_shape, geometry.groups
    out_h, out_w = geometry.out_size((in_h, in_w), kernel)
    n_pixels, c_out_group = batch * out_h * out_w, c_out // groups
    config = config or choose_config(n_pixels, c_in_group, c_out_group, dtype)
    # Programs: tiles of pixels x tiles of one group's output channels, then groups.
    grid = (triton.cdiv(n_pixels, config.block_m) * triton.cdiv(c_out_group, config.block_n), groups)
    integers = dict(
        n_pixels=n_pixels, in_h=in_h, in_w=in_w, out_h=out_h, out_w=out_w, c_in=c_in_group, c_out=c_out_group,
        groups=groups, pad_top=geometry.padding[0], pad_left=geometry.padding[2],
    )  # fmt: skip
    return config, grid, integers | constexprs(dtype, weight_shape, geometry, activation, config), {}


def constexprs(
    dtype: torch.dtype,
    weight_shape: Sequence[int],
    geometry: Geometry,
    activation: Activation | None,
    config: ConvConfig,
) -> dict[str, object]:
    """Returns the kernel's compile-time arguments, for the launcher and the compile-only tests."""
    return dict(
        KERNEL_H=weight_shape[2],
        KERNEL_W=weight_shape[3],
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        DILATION_H=geometry.dilation[0],
        DILATION_W=geometry.dilation[1],
        IN_BOUNDS=geometry.padding == (0, 0, 0, 0),
        WHOLE_CHUNKS=weight_shape[1] % config.block_k == 0,
        **as_constexprs(activation),
        INPUT_PRECISION="tf32" if target.allows_tf32(dtype) else "ieee",
        ROUND_TO_TF32=target.allows_tf32(dtype) and not target.is_interpreted(),  # the interpreter multiplies in fp32
        UPCAST=target.dot_needs_fp32(dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
