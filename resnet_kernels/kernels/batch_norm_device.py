"""Device functions of the BN kernels, forward and backward: tiles, sums over splits, rstd, BN of one channel.

Data is channels_last, seen as (rows = N*H*W, channels). A pass over data has a tile of rows and channels for each program. A
reduction over rows cuts them into splits: each program sums one split and writes it to `partial`, (2, n_splits, n_channels)
fp64, and a finishing kernel adds the splits up.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_tile(start, n_channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Indices of a tile whose first row is `start`, in the channels of program_id(1).

    Returns:
        lane (BLOCK_ROWS,), offs_c and mask_c (BLOCK_CHANNELS,), the offset of row `start`, and the tile's offsets from there.
    """
    lane = tl.arange(0, BLOCK_ROWS)
    offs_c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    # A scalar start and small offsets take half the registers of 64-bit pointers. int64: an activation of 64x112x112 passes
    # 2**31 elements at batch 2675.
    at = start.to(tl.int64) * n_channels
    return lane, offs_c, offs_c < n_channels, at, lane[:, None] * n_channels + offs_c[None, :]


@triton.jit
def lane_sum(lanes):
    """Sum over axis 0 in fp64. It is taken once a program, so fp64 is cheap even on GPUs with few units for it."""
    return tl.sum(lanes.to(tl.float64), 0)


@triton.jit
def store_partial(partial_ptr, first, second, n_channels, offs_c, mask_c):
    """Stores the two sums of a split, that of program_id(0), for each channel."""
    partial_ptrs = partial_ptr + tl.program_id(0) * n_channels + offs_c
    tl.store(partial_ptrs, first, mask=mask_c)
    tl.store(partial_ptrs + tl.num_programs(0) * n_channels, second, mask=mask_c)


@triton.jit
def load_partial(partial_ptr, n_splits, n_channels, BLOCK_SPLITS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Both sums of all splits, in the channels of program_id(0).

    Returns:
        The two sums and their mask, (BLOCK_SPLITS, BLOCK_CHANNELS) each, offs_s (BLOCK_SPLITS,), offs_c and mask_c
        (BLOCK_CHANNELS,).
    """
    offs_s = tl.arange(0, BLOCK_SPLITS)
    offs_c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask_c = offs_c < n_channels
    mask = (offs_s < n_splits)[:, None] & mask_c[None, :]
    partial_ptrs = partial_ptr + offs_s[:, None] * n_channels + offs_c[None, :]
    first = tl.load(partial_ptrs, mask=mask, other=0.0)
    second = tl.load(partial_ptrs + n_splits * n_channels, mask=mask, other=0.0)
    return first, second, mask, offs_s, offs_c, mask_c


@triton.jit
def rstd_of(variance, eps):
    """1 / sqrt(variance + eps)."""
    # Root and division round correctly: the approximate ones err by 2 ulp, for a whole channel at once.
    root = tl.sqrt_rn(variance + eps)
    return tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root)


@triton.jit
def load_affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, eps, offs_c, mask_c, VARIANCE: tl.constexpr):
    """Each channel's mean, weight * rstd and bias. With VARIANCE, rstd_ptr holds the variance (eval mode)."""
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    scale = tl.load(rstd_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float32)
    if VARIANCE:
        scale = rstd_of(scale, eps)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    bias = tl.zeros(mean.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return mean, scale, bias


@triton.jit
def normalize(centered, scale, bias):
    """centered * scale + bias, where centered is x - mean: x * scale - mean * scale would cancel at a mean of 1000.

    Forward and backward both call it: the backward's ReLU mask has to see the bits that the forward saw.
    """
    return tl.fma(centered, scale[None, :] + tl.zeros_like(centered), bias[None, :] + tl.zeros_like(centered))
