"""BN, residual add and ReLU, forward and backward, over channels_last data seen as (rows = N*H*W, channels).

    forward    y = act( (x - mean) * rstd * weight + bias + residual )
    backward   dz = dy where y > 0 (of ReLU), the residual's gradient
               dweight = sum(dz * (x - mean)) * rstd,    dbias = sum(dz)
               dx = weight * rstd * (dz - dbias / rows - (x - mean) * rstd * dweight / rows)

Passes over data, as reads + writes of one activation each: statistics 1, apply 2 (3 with a residual); reduce 2, apply 3.
Eager BN, add and ReLU apart take 6 (9) forward and 8 (9) backward. With a residual the backward needs y, which the next
layer holds anyway: reduce 3 and the write of dz, apply 3. Without one ReLU's mask is computed again from x, not read.

Statistics are sound at a mean of 1000 and a deviation of 1, and next to outliers: never E[x^2] - E[x]^2. Each lane sums in
fp32 around its own first value; lanes and splits are combined as in Chan et al. 1979, in fp64, which is a few thousand values
in all. Every sum has a fixed order, so results are deterministic; nothing is atomic.

Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 1 and section 3.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_tiles import (
    CACHED,
    FINISH_CHANNELS,
    FINISH_WARPS,
    MOST_SPLITS,
    NUM_WARPS,
    STAGES,
    Split,
    blocks,
    channels_last,
    choose_split,
    contiguous,
    splits,
    tiles,
)
from .launching import Launcher


@triton.jit
def _statistics_kernel(
    x_ptr,  # (n_rows, n_channels)
    partial_ptr,  # (2, n_splits, n_channels) fp64: sums, and sums of squares around their own mean
    n_rows,
    n_channels,
    rows_per_split,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask_c = offs_c < n_channels
    lane = tl.arange(0, BLOCK_ROWS)
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, n_rows)

    # A scalar start and small offsets: half the registers of 64-bit pointers. int64, as a 64x112x112 activation passes 2**31
    # elements at batch 2675.
    at = start.to(tl.int64) * n_channels
    offs = lane[:, None] * n_channels + offs_c[None, :]
    mask = (start + lane < end)[:, None] & mask_c[None, :]
    pivot = _finite(tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32))
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for row in tl.range(start, end, BLOCK_ROWS, num_stages=STAGES):
        mask = (row + lane < end)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        difference = tl.where(mask, x - pivot, 0.0)
        total += difference
        squares += difference * difference
        at += BLOCK_ROWS * n_channels

    count = (tl.maximum(end - start - lane + BLOCK_ROWS - 1, 0) // BLOCK_ROWS).to(tl.float32)[:, None]
    from_pivot = total / tl.maximum(count, 1.0)
    squares -= total * from_pivot
    # In fp64: a lane's mean of 1000 would lose in fp32 what its sum has kept.
    lane_mean = pivot.to(tl.float64) + from_pivot
    rows_sum = tl.sum(count * lane_mean, 0)
    off_centre = (lane_mean - (rows_sum / (end - start))[None, :]).to(tl.float32)
    rows_squares = _sum(squares + count * off_centre * off_centre)
    partial_ptrs = partial_ptr + split * n_channels + offs_c
    tl.store(partial_ptrs, rows_sum, mask=mask_c)
    tl.store(partial_ptrs + tl.num_programs(0) * n_channels, rows_squares, mask=mask_c)


@triton.jit
def _sum(lanes):
    # Once a program, so fp64 is cheap on GPUs with little of it, too; eager on the CPU sums in fp64 throughout.
    return tl.sum(lanes.to(tl.float64), 0)


@triton.jit
def _finite(x):
    # Around an infinite pivot the differences are NaN, and so the mean, which eager has as infinite.
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _finish_statistics_kernel(
    partial_ptr,  # as above
    mean_ptr,  # (n_channels,) fp32
    rstd_ptr,  # (n_channels,) fp32
    running_mean_ptr,  # (n_channels,) or None
    running_var_ptr,  # (n_channels,) or None
    n_rows,
    n_channels,
    rows_per_split,
    n_splits,
    momentum,
    eps,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    offs_s = tl.arange(0, BLOCK_SPLITS)
    offs_c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask_c = offs_c < n_channels
    mask = (offs_s < n_splits)[:, None] & mask_c[None, :]
    partial_ptrs = partial_ptr + offs_s[:, None] * n_channels + offs_c[None, :]
    sums = tl.load(partial_ptrs, mask=mask, other=0.0)
    squares = tl.load(partial_ptrs + n_splits * n_channels, mask=mask, other=0.0)
    count = tl.minimum(tl.maximum(n_rows - offs_s * rows_per_split, 0), rows_per_split).to(tl.float64)[:, None]

    rows = n_rows.to(tl.float64)
    mean = tl.sum(sums, 0) / rows
    off_centre = tl.where(mask, sums / tl.maximum(count, 1.0) - mean[None, :], 0.0)
    squares = tl.sum(squares + count * off_centre * off_centre, 0)
    mean = mean.to(tl.float32)
    # A rounding below zero, of a channel whose values are all the same, would be the root of a negative number.
    variance = tl.maximum((squares / rows).to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(rstd_ptr + offs_c, _rstd(variance, eps), mask=mask_c)
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        new = momentum * mean + (1 - momentum) * old
        tl.store(running_mean_ptr + offs_c, new.to(running_mean_ptr.dtype.element_ty), mask=mask_c)
    if running_var_ptr is not None:
        old = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        unbiased = (squares / (rows - 1)).to(tl.float32)
        new = momentum * unbiased + (1 - momentum) * old
        tl.store(running_var_ptr + offs_c, new.to(running_var_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _rstd(variance, eps):
    # Correctly rounded root and division: the approximate ones err by 2 ulp for a whole channel at once.
    root = tl.sqrt_rn(variance + eps)
    return tl.div_rn(tl.full(root.shape, 1.0, tl.float32), root)


@triton.jit
def _affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, eps, offs_c, mask_c, VARIANCE: tl.constexpr):
    """A channel's mean, rstd, weight * rstd and bias; with VARIANCE, rstd_ptr holds a variance (eval mode)."""
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float32)
    if VARIANCE:
        rstd = _rstd(rstd, eps)
    scale = rstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    bias = tl.zeros(mean.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return mean, rstd, scale, bias


@triton.jit
def _normalised(centred, scale, bias):
    """centred * scale + bias, in one place: the backward's ReLU mask has to see the bits that the forward saw.

    centred is x - mean: x * scale - mean * scale would cancel at a mean of 1000.
    """
    return tl.fma(centred, scale[None, :] + tl.zeros_like(centred), bias[None, :] + tl.zeros_like(centred))


@triton.jit
def _forward_kernel(
    x_ptr,  # (n_rows, n_channels), residual and y too
    residual_ptr,  # or None
    y_ptr,
    mean_ptr,  # (n_channels,)
    rstd_ptr,  # (n_channels,); with VARIANCE the running variance
    weight_ptr,  # (n_channels,) or None, bias too
    bias_ptr,
    n_rows,
    n_channels,
    eps,
    RELU: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_ROWS
    lane = tl.arange(0, BLOCK_ROWS)
    offs_c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask_c = offs_c < n_channels
    mask = (start + lane < n_rows)[:, None] & mask_c[None, :]
    at = start.to(tl.int64) * n_channels
    offs = lane[:, None] * n_channels + offs_c[None, :]
    mean, _, scale, bias = _affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, eps, offs_c, mask_c, VARIANCE)
    x = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    y = _normalised(x - mean[None, :], scale, bias)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        # propagate_nan: a plain maximum turns NaN into 0, which torch.relu keeps.
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + at + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Runs the forward passes on checked operands, at least one element; writes the running statistics in training.

    Returns:
        y, channels_last, and, in training, mean and rstd, both (C,) fp32; None in eval mode.
    """
    x, residual = channels_last(x), channels_last(residual)
    weight, bias = contiguous(weight), contiguous(bias)
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    y = torch.empty_like(x)
    if training:
        mean, rstd = _statistics(x, running_mean, running_var, momentum, eps)
    else:
        mean, rstd = running_mean.contiguous(), running_var.contiguous()
    _forward(rows, channels, x.element_size(), eps, relu, not training)(
        x.device,
        x_ptr=x,
        residual_ptr=residual,
        y_ptr=y,
        mean_ptr=mean,
        rstd_ptr=rstd,
        weight_ptr=weight,
        bias_ptr=bias,
    )
    return (y, mean, rstd) if training else (y, None, None)


def _statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    split, sums, finish = _statistics_of(rows, channels, x.element_size(), momentum, eps)
    partial = torch.empty((2, split.count, channels), dtype=torch.float64, device=x.device)
    # Not halves of one tensor: the outputs of an op share no memory.
    mean, rstd = (torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(2))
    running = (running_mean, running_var)
    dense = [contiguous(statistic) for statistic in running]
    sums(x.device, x_ptr=x, partial_ptr=partial)
    finish(
        x.device, partial_ptr=partial, mean_ptr=mean, rstd_ptr=rstd, running_mean_ptr=dense[0], running_var_ptr=dense[1]
    )
    for statistic, written in zip(running, dense):
        if statistic is not written:
            statistic.copy_(written)
    return mean, rstd


@lru_cache(CACHED)
def _statistics_of(
    rows: int, channels: int, itemsize: int, momentum: float, eps: float
) -> tuple[Split, Launcher, Launcher]:
    split = choose_split(rows, channels, itemsize)
    sums = Launcher(
        _statistics_kernel, splits(split, channels),
        dict(n_rows=rows, n_channels=channels, rows_per_split=split.rows, STAGES=STAGES, **blocks(split)), NUM_WARPS,
    )  # fmt: skip
    finish = Launcher(
        _finish_statistics_kernel, (triton.cdiv(channels, FINISH_CHANNELS),),
        dict(
            n_rows=rows, n_channels=channels, rows_per_split=split.rows, n_splits=split.count, momentum=float(momentum),
            eps=float(eps), BLOCK_SPLITS=MOST_SPLITS, BLOCK_CHANNELS=FINISH_CHANNELS,
        ), FINISH_WARPS,
    )  # fmt: skip
    return split, sums, finish


@lru_cache(CACHED)
def _forward(rows: int, channels: int, itemsize: int, eps: float, relu: bool, variance: bool) -> Launcher:
    split = choose_split(rows, channels, itemsize)
    fixed = dict(n_rows=rows, n_channels=channels, eps=float(eps), RELU=relu, VARIANCE=variance, **blocks(split))
    return Launcher(_forward_kernel, tiles(split, rows, channels), fixed, NUM_WARPS)
