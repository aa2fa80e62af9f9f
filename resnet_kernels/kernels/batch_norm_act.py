"""BN, residual add and activation, forward and backward, over channels_last data seen as (rows = N*H*W, channels).

    forward    y = act( (x - mean) * rstd * weight + bias + residual )
    backward   dz = dy * act'(z), where z is what act has read; of ReLU, dy where y > 0. It is the residual's gradient
               dweight = sum(dz * (x - mean)) * rstd,    dbias = sum(dz)
               dx = weight * rstd * (dz - dbias / rows - (x - mean) * rstd * dweight / rows)
               dslopes = sum(dy * z where z is not above 0), of PReLU

Cost in reads and writes of one activation each: forward 1 for the statistics and 2 to apply them (3 with a residual),
backward 2 to reduce and 3 to apply. Eager BN, add and ReLU take 6 (9) forward and 8 (9) backward. With a residual the
backward of ReLU reads y, which the next layer holds anyway: 3 and the write of dz to reduce, 3 to apply. That of other
activations reads the residual instead, as many bytes. Without a residual z is computed again from x.

Statistics are sound at a mean of 1000 and a deviation of 1, and next to outliers: they are never E[x^2] - E[x]^2. Each lane
sums in fp32 around its own first value. Lanes and splits are combined as in Chan et al. 1979, in fp64, a few thousand values
in all. Every sum has a fixed order and nothing is atomic, so results are deterministic.

Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 1 and section 3.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import elementwise
from .activations import Activation, Last, as_constexprs, slopes_by_channel, without_slopes
from .batch_norm_device import lane_sum, load_affine, load_partial, normalize, row_tile, rstd_of, store_partial
from .batch_norm_tiles import (
    CACHED,
    FINISH_CHANNELS,
    FINISH_WARPS,
    MOST_SPLITS,
    NUM_WARPS,
    STAGES,
    Split,
    blocks,
    choose_split,
    splits,
    tiles,
)
from .launching import Launcher
from .layouts import channels_last, contiguous


@triton.jit
def _statistics_kernel(
    x_ptr,  # (n_rows, n_channels)
    partial_ptr,  # (2, n_splits, n_channels) fp64: sums, and sums of squares around the split's own mean
    n_rows,
    n_channels,
    rows_per_split,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    start = tl.program_id(0) * rows_per_split
    end = tl.minimum(start + rows_per_split, n_rows)
    lane, offs_c, mask_c, at, offs = row_tile(start, n_channels, BLOCK_ROWS, BLOCK_CHANNELS)
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
    # fp64: in fp32 a lane's mean of 1000 would lose what its sum has kept.
    lane_mean = pivot.to(tl.float64) + from_pivot
    rows_sum = tl.sum(count * lane_mean, 0)
    off_center = (lane_mean - (rows_sum / (end - start))[None, :]).to(tl.float32)
    rows_squares = lane_sum(squares + count * off_center * off_center)
    store_partial(partial_ptr, rows_sum, rows_squares, n_channels, offs_c, mask_c)


@triton.jit
def _finite(x):
    """x, or 0 where it is not finite: around an infinite pivot the mean would be NaN, which eager has as infinite."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _finish_statistics_kernel(
    partial_ptr,  # as _statistics_kernel writes it
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
    sums, squares, mask, offs_s, offs_c, mask_c = load_partial(
        partial_ptr, n_splits, n_channels, BLOCK_SPLITS, BLOCK_CHANNELS
    )  # fmt: skip
    count = tl.minimum(tl.maximum(n_rows - offs_s * rows_per_split, 0), rows_per_split).to(tl.float64)[:, None]

    rows = n_rows.to(tl.float64)
    mean = tl.sum(sums, 0) / rows
    off_center = tl.where(mask, sums / tl.maximum(count, 1.0) - mean[None, :], 0.0)
    squares = tl.sum(squares + count * off_center * off_center, 0)
    mean = mean.to(tl.float32)
    # Never below zero, which the variance of equal values could be by a rounding: its root would be NaN.
    variance = elementwise.relu((squares / rows).to(tl.float32))
    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(rstd_ptr + offs_c, rstd_of(variance, eps), mask=mask_c)
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
def _forward_kernel(
    x_ptr,  # (n_rows, n_channels), residual and y too
    residual_ptr,  # or None
    y_ptr,
    mean_ptr,  # (n_channels,)
    rstd_ptr,  # (n_channels,); with VARIANCE the running variance
    weight_ptr,  # (n_channels,) or None, and so the next two
    bias_ptr,
    slopes_ptr,  # PReLU's
    n_rows,
    n_channels,
    eps,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_ROWS
    lane, offs_c, mask_c, at, offs = row_tile(start, n_channels, BLOCK_ROWS, BLOCK_CHANNELS)
    mask = (start + lane < n_rows)[:, None] & mask_c[None, :]
    mean, scale, bias = load_affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, eps, offs_c, mask_c, VARIANCE)
    x = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    y = normalize(x - mean[None, :], scale, bias)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    y = elementwise.activate(y, ACT, elementwise.slope_of(slopes_ptr, SLOPE, offs_c, mask_c))
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
    activation: Last,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Runs the forward on checked operands.

    Args:
        x: (N, C, H, W), fp16, bf16 or fp32, not empty.
        residual: x's shape and dtype, or None.
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        running_mean: (C,), written in training; None only in training.
        running_var: as running_mean.
        training: whether to normalize by the batch's own statistics.
        momentum: weight of the batch's statistics in the running ones.
        eps: added to the variance.
        activation: comes last; None for none.

    Returns:
        y, channels_last; and, in training, the batch's mean and rstd, each (C,) fp32, else None and None.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    y = torch.empty_like(x)
    mean, rstd = _statistics(x, running_mean, running_var, momentum, eps) if training else (None, None)
    _forward(rows, channels, x.element_size(), eps, without_slopes(activation), not training)(
        x.device,
        x_ptr=x,
        residual_ptr=channels_last(residual),
        y_ptr=y,
        mean_ptr=mean if training else contiguous(running_mean),
        rstd_ptr=rstd if training else contiguous(running_var),
        weight_ptr=contiguous(weight),
        bias_ptr=contiguous(bias),
        slopes_ptr=slopes_by_channel(activation, channels),
    )
    return y, mean, rstd


def _statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    split, sums, finish = _statistics_of(rows, channels, x.element_size(), momentum, eps)
    partial = torch.empty((2, split.n_splits, channels), dtype=torch.float64, device=x.device)
    # Two tensors, not halves of one: the outputs of an op share no memory.
    mean, rstd = (torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(2))
    new_mean, new_var = contiguous(running_mean), contiguous(running_var)
    sums(x.device, x_ptr=x, partial_ptr=partial)
    finish(
        x.device, partial_ptr=partial, mean_ptr=mean, rstd_ptr=rstd, running_mean_ptr=new_mean, running_var_ptr=new_var
    )
    for statistic, new in ((running_mean, new_mean), (running_var, new_var)):
        if statistic is not new and statistic is not None and new is not None:
            statistic.copy_(new)
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
            n_rows=rows, n_channels=channels, rows_per_split=split.rows, n_splits=split.n_splits, momentum=float(momentum),
            eps=float(eps), BLOCK_SPLITS=MOST_SPLITS, BLOCK_CHANNELS=FINISH_CHANNELS,
        ), FINISH_WARPS,
    )  # fmt: skip
    return split, sums, finish


@lru_cache(CACHED)
def _forward(
    rows: int, channels: int, itemsize: int, eps: float, activation: Activation | None, variance: bool
) -> Launcher:
    split = choose_split(rows, channels, itemsize)
    sizes = dict(n_rows=rows, n_channels=channels, eps=float(eps), VARIANCE=variance)
    fixed = {**sizes, **as_constexprs(activation), **blocks(split)}
    return Launcher(_forward_kernel, tiles(split, rows, channels), fixed, NUM_WARPS)
