"""The backward of BN, residual add and ReLU; formulas, cost and tiles are batch_norm_act.py's."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_act import _affine, _normalised, _rstd, _sum
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
def _through_relu(dy, y_ptr, at, offs, mask, centred, scale, bias, DTYPE: tl.constexpr):
    """dy where ReLU let its input through: by y where it was kept, else by y computed again, rounded as it was stored."""
    if y_ptr is not None:
        y = tl.load(y_ptr + at + offs, mask=mask, other=0.0)
    else:
        y = _normalised(centred, scale, bias).to(DTYPE)
    # By `<=`, as PyTorch does: a NaN lets its gradient through.
    return tl.where(y.to(tl.float32) <= 0, 0.0, dy)


@triton.jit
def _reduce_kernel(
    dy_ptr,  # (n_rows, n_channels), x, y and dz too
    x_ptr,
    y_ptr,  # or None: ReLU's mask is computed again
    dz_ptr,  # or None
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,  # (2, n_splits, n_channels) fp64: sums of dz and of dz * (x - mean)
    n_rows,
    n_channels,
    rows_per_split,
    eps,
    RELU: tl.constexpr,
    VARIANCE: tl.constexpr,
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
    mean, _, scale, bias = _affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, eps, offs_c, mask_c, VARIANCE)
    at = start.to(tl.int64) * n_channels
    offs = lane[:, None] * n_channels + offs_c[None, :]
    sum_dz = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    sum_dz_x = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for row in tl.range(start, end, BLOCK_ROWS, num_stages=STAGES):
        mask = (row + lane < end)[:, None] & mask_c[None, :]
        dz = tl.load(dy_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - mean[None, :], 0.0)
        if RELU:
            dz = _through_relu(dz, y_ptr, at, offs, mask, centred, scale, bias, x_ptr.dtype.element_ty)
        if dz_ptr is not None:
            tl.store(dz_ptr + at + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        sum_dz += dz
        sum_dz_x += dz * centred
        at += BLOCK_ROWS * n_channels
    partial_ptrs = partial_ptr + split * n_channels + offs_c
    tl.store(partial_ptrs, _sum(sum_dz), mask=mask_c)
    tl.store(partial_ptrs + tl.num_programs(0) * n_channels, _sum(sum_dz_x), mask=mask_c)


@triton.jit
def _finish_reduce_kernel(
    partial_ptr,  # (2, n_splits, n_channels)
    rstd_ptr,
    dweight_ptr,  # (n_channels,) or None, dbias too
    dbias_ptr,
    coefficient_ptr,  # (2, n_channels) fp32 or None: what to take off dz, constant and per unit of x - mean
    n_rows,
    n_channels,
    n_splits,
    eps,
    VARIANCE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    offs_s = tl.arange(0, BLOCK_SPLITS)
    offs_c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask_c = offs_c < n_channels
    mask = (offs_s < n_splits)[:, None] & mask_c[None, :]
    partial_ptrs = partial_ptr + offs_s[:, None] * n_channels + offs_c[None, :]
    rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float32)
    if VARIANCE:
        rstd = _rstd(rstd, eps)
    dbias = tl.sum(tl.load(partial_ptrs, mask=mask, other=0.0), 0)
    dweight = tl.sum(tl.load(partial_ptrs + n_splits * n_channels, mask=mask, other=0.0), 0) * rstd
    # Through fp32: the interpreter turns fp64 into NaN on its way to bf16 (Triton 3.9).
    if dweight_ptr is not None:
        tl.store(dweight_ptr + offs_c, dweight.to(tl.float32).to(dweight_ptr.dtype.element_ty), mask=mask_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs_c, dbias.to(tl.float32).to(dbias_ptr.dtype.element_ty), mask=mask_c)
    if coefficient_ptr is not None:
        rows = n_rows.to(tl.float64)
        tl.store(coefficient_ptr + offs_c, (dbias / rows).to(tl.float32), mask=mask_c)
        tl.store(coefficient_ptr + n_channels + offs_c, (rstd * dweight / rows).to(tl.float32), mask=mask_c)


@triton.jit
def _backward_kernel(
    dy_ptr,  # (n_rows, n_channels), x, y and dx too
    x_ptr,
    y_ptr,  # or None: ReLU's mask is computed again
    dx_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    coefficient_ptr,  # (2, n_channels), or None in eval mode
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
    dz = tl.load(dy_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    centred = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    if RELU:
        dz = _through_relu(dz, y_ptr, at, offs, mask, centred, scale, bias, x_ptr.dtype.element_ty)
    if coefficient_ptr is not None:
        constant = tl.load(coefficient_ptr + offs_c, mask=mask_c, other=0.0)
        slope = tl.load(coefficient_ptr + n_channels + offs_c, mask=mask_c, other=0.0)
        dz -= constant[None, :] + centred * slope[None, :]
    tl.store(dx_ptr + at + offs, (dz * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)


def launch(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Runs the backward passes.

    Args:
        y: the output, where a ReLU came after a residual; else None.
        mean, rstd: as `launch` returned them; in eval mode the running mean and variance.
        needs: whether dx, dz (the residual's gradient), dweight and dbias are asked for.

    Returns:
        dx, dz, dweight, dbias; None where not asked for.
    """
    dy, x, y = channels_last(dy), channels_last(x), channels_last(y)
    weight, bias, mean, rstd = (contiguous(vector) for vector in (weight, bias, mean, rstd))
    needs_x, needs_dz, needs_weight, needs_bias = needs
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    split, reduce, finish, apply = _launchers(rows, channels, x.element_size(), eps, relu, not training, needs_dz)
    dz = torch.empty_like(x) if needs_dz else None
    dx = torch.empty_like(x) if needs_x else None
    vector = torch.float32 if weight is None else weight.dtype
    dweight, dbias = (
        torch.empty(channels, dtype=vector, device=x.device) if needed else None
        for needed in (needs_weight, needs_bias)
    )
    coefficients = torch.empty((2, channels), dtype=torch.float32, device=x.device) if training and needs_x else None
    affine = dict(mean_ptr=mean, rstd_ptr=rstd, weight_ptr=weight, bias_ptr=bias)
    if any(value is not None for value in (dz, dweight, dbias, coefficients)):
        partial = torch.empty((2, split.count, channels), dtype=torch.float64, device=x.device)
        reduce(x.device, dy_ptr=dy, x_ptr=x, y_ptr=y, dz_ptr=dz, **affine, partial_ptr=partial)
        finish(
            x.device, partial_ptr=partial, rstd_ptr=rstd, dweight_ptr=dweight, dbias_ptr=dbias,
            coefficient_ptr=coefficients,
        )  # fmt: skip
    if dx is not None:
        # Where there is a dz, ReLU's mask has been applied to it.
        upper, mask = (dy, y) if dz is None else (dz, None)
        apply(x.device, dy_ptr=upper, x_ptr=x, y_ptr=mask, dx_ptr=dx, **affine, coefficient_ptr=coefficients)
    return dx, dz, dweight, dbias


@lru_cache(CACHED)
def _launchers(
    rows: int, channels: int, itemsize: int, eps: float, relu: bool, variance: bool, masked: bool
) -> tuple[Split, Launcher, Launcher, Launcher]:
    """The split, and the three kernels' launchers; masked: the last one reads dz, not dy."""
    split = choose_split(rows, channels, itemsize)
    sizes = dict(n_rows=rows, n_channels=channels, eps=float(eps), VARIANCE=variance)
    reduce = Launcher(
        _reduce_kernel, splits(split, channels),
        dict(sizes, rows_per_split=split.rows, RELU=relu, STAGES=STAGES, **blocks(split)), NUM_WARPS,
    )  # fmt: skip
    finish = Launcher(
        _finish_reduce_kernel, (triton.cdiv(channels, FINISH_CHANNELS),),
        dict(sizes, n_splits=split.count, BLOCK_SPLITS=MOST_SPLITS, BLOCK_CHANNELS=FINISH_CHANNELS), FINISH_WARPS,
    )  # fmt: skip
    apply = Launcher(
        _backward_kernel,
        tiles(split, rows, channels),
        dict(sizes, RELU=relu and not masked, **blocks(split)),
        NUM_WARPS,
    )
    return split, reduce, finish, apply
