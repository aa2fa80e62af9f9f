"""Backward of BN, residual add and activation. Formulas and cost: batch_norm_act.py."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import elementwise
from .activations import RELU, Activation, Last, as_constexprs, slopes_by_channel, slopes_of, without_slopes
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
def _through(
    dy, kept_ptr, at, offs, mask, centered, scale, bias, DTYPE: tl.constexpr, ACT: tl.constexpr, slope
):  # fmt: skip
    """dz from dy: through the activation; and what its slope's gradient is the sum of, or dy itself without PReLU.

    ReLU needs y's sign alone: kept_ptr holds y, and without it y is computed again and rounded to DTYPE. Other activations
    need what they have read, which is computed again: kept_ptr holds the residual in it.
    """
    at_slope = dy
    if ACT == "relu":
        if kept_ptr is not None:
            y = tl.load(kept_ptr + at + offs, mask=mask, other=0.0)
        else:
            y = normalize(centered, scale, bias).to(DTYPE)
        # `<=` as in PyTorch: a NaN lets its gradient through.
        dy = tl.where(y.to(tl.float32) <= 0, 0.0, dy)
    elif ACT is not None:
        z = normalize(centered, scale, bias)
        if kept_ptr is not None:
            z += tl.load(kept_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        if ACT == "prelu":
            # Outside of the data dy is 0, and 0 * inf would be NaN: an infinite slope or bias must not meet it.
            z = tl.where(mask, z, 1.0)
            # Not `z <= 0`, which would leave a NaN out that PyTorch has in its sum.
            at_slope = tl.where(z > 0, 0.0, dy * z)
        dy = elementwise.activation_gradient(z, dy, ACT, slope)
    return dy, at_slope


@triton.jit
def _reduce_kernel(
    dy_ptr,  # (n_rows, n_channels), x, what is kept and dz too
    x_ptr,
    kept_ptr,  # what the forward has kept for `_through`, or None
    dz_ptr,  # or None
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    slopes_ptr,
    partial_ptr,  # (2, n_splits, n_channels) fp64: sums of dz and of dz * (x - mean)
    slopes_partial_ptr,  # (n_splits, n_channels) fp64, or None: sums for the slopes' gradient
    n_rows,
    n_channels,
    rows_per_split,
    eps,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    start = tl.program_id(0) * rows_per_split
    end = tl.minimum(start + rows_per_split, n_rows)
    lane, offs_c, mask_c, at, offs = row_tile(start, n_channels, BLOCK_ROWS, BLOCK_CHANNELS)
    mean, scale, bias = load_affine(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, eps, offs_c, mask_c, VARIANCE)
    sum_dz = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    sum_dz_x = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    sum_at_slope = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    slope = elementwise.slope_of(slopes_ptr, SLOPE, offs_c, mask_c)
    for row in tl.range(start, end, BLOCK_ROWS, num_stages=STAGES):
        mask = (row + lane < end)[:, None] & mask_c[None, :]
        dz = tl.load(dy_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
        centered = tl.where(mask, x - mean[None, :], 0.0)
        dz, at_slope = _through(
            dz, kept_ptr, at, offs, mask, centered, scale, bias, x_ptr.dtype.element_ty, ACT, slope
        )  # fmt: skip
        if dz_ptr is not None:
            tl.store(dz_ptr + at + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        sum_dz += dz
        sum_dz_x += dz * centered
        if slopes_partial_ptr is not None:
            sum_at_slope += at_slope
        at += BLOCK_ROWS * n_channels
    store_partial(partial_ptr, lane_sum(sum_dz), lane_sum(sum_dz_x), n_channels, offs_c, mask_c)
    if slopes_partial_ptr is not None:
        slopes_ptrs = slopes_partial_ptr + tl.program_id(0) * n_channels + offs_c
        tl.store(slopes_ptrs, lane_sum(sum_at_slope), mask=mask_c)


@triton.jit
def _finish_reduce_kernel(
    partial_ptr,  # as _reduce_kernel writes it
    slopes_partial_ptr,  # as _reduce_kernel writes it, or None
    rstd_ptr,
    dweight_ptr,  # (n_channels,) or None, dbias too
    dbias_ptr,
    dslopes_ptr,  # (n_channels,), with slopes_partial_ptr
    coefficient_ptr,  # (2, n_channels) fp32 or None: _backward_kernel subtracts the first + the second * (x - mean) from dz
    n_rows,
    n_channels,
    n_splits,
    eps,
    VARIANCE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    sums_dz, sums_dz_x, mask, offs_s, offs_c, mask_c = load_partial(
        partial_ptr, n_splits, n_channels, BLOCK_SPLITS, BLOCK_CHANNELS
    )  # fmt: skip
    rstd = tl.load(rstd_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float32)
    if VARIANCE:
        rstd = rstd_of(rstd, eps)
    dbias = tl.sum(sums_dz, 0)
    dweight = tl.sum(sums_dz_x, 0) * rstd
    # Through fp32: the interpreter of Triton 3.9 turns fp64 into NaN on its way to bf16.
    if dweight_ptr is not None:
        tl.store(dweight_ptr + offs_c, dweight.to(tl.float32).to(dweight_ptr.dtype.element_ty), mask=mask_c)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs_c, dbias.to(tl.float32).to(dbias_ptr.dtype.element_ty), mask=mask_c)
    if slopes_partial_ptr is not None:
        slopes_ptrs = slopes_partial_ptr + offs_s[:, None] * n_channels + offs_c[None, :]
        dslopes = tl.sum(tl.load(slopes_ptrs, mask=mask, other=0.0), 0)
        if dslopes_ptr.dtype.element_ty != tl.float64:
            dslopes = dslopes.to(tl.float32)
        tl.store(dslopes_ptr + offs_c, dslopes.to(dslopes_ptr.dtype.element_ty), mask=mask_c)
    if coefficient_ptr is not None:
        rows = n_rows.to(tl.float64)
        tl.store(coefficient_ptr + offs_c, (dbias / rows).to(tl.float32), mask=mask_c)
        tl.store(coefficient_ptr + n_channels + offs_c, (rstd * dweight / rows).to(tl.float32), mask=mask_c)


@triton.jit
def _backward_kernel(
    dy_ptr,  # (n_rows, n_channels), x, what is kept and dx too
    x_ptr,
    kept_ptr,  # what the forward has kept for `_through`, or None
    dx_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    slopes_ptr,
    coefficient_ptr,  # (2, n_channels), or None in eval mode
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
    dz = tl.load(dy_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    centered = tl.load(x_ptr + at + offs, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    slope = elementwise.slope_of(slopes_ptr, SLOPE, offs_c, mask_c)
    dz, _ = _through(dz, kept_ptr, at, offs, mask, centered, scale, bias, x_ptr.dtype.element_ty, ACT, slope)
    if coefficient_ptr is not None:
        constant = tl.load(coefficient_ptr + offs_c, mask=mask_c, other=0.0)
        factor = tl.load(coefficient_ptr + n_channels + offs_c, mask=mask_c, other=0.0)
        dz -= constant[None, :] + centered * factor[None, :]
    tl.store(dx_ptr + at + offs, (dz * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)


def launch(
    dy: Tensor,
    x: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    eps: float,
    activation: Last,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Runs the backward.

    Args:
        dy: y's gradient, of y's shape and dtype.
        x: the forward's input, (N, C, H, W).
        kept: of a forward with a residual, its output if a ReLU came last, the residual if another activation did; else None.
        weight: the forward's, (C,) or None.
        bias: the forward's, (C,) or None.
        mean: (C,), the batch's mean; in eval mode the running mean.
        rstd: (C,), the batch's rstd; in eval mode the running variance.
        training: whether mean and rstd are the batch's, so that dx has to account for them.
        eps: the forward's.
        activation: the forward's.
        needs: which of dx, dz (the residual's gradient), dweight, dbias and dslopes to compute.

    Returns:
        dx, dz, dweight, dbias, and dslopes as the slopes are; None for each that `needs` leaves out.
    """
    dy, x = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (dy, x))
    kept = channels_last(kept)
    needs_x, needs_dz, needs_weight, needs_bias, needs_slopes = needs
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    split, reduce, finish, apply = _launchers(
        rows, channels, x.element_size(), eps, without_slopes(activation), not training, needs_dz
    )
    dz = torch.empty_like(x) if needs_dz else None
    dx = torch.empty_like(x) if needs_x else None
    dtype = torch.float32 if weight is None else weight.dtype
    dweight, dbias = (
        torch.empty(channels, dtype=dtype, device=x.device) if needed else None for needed in (needs_weight, needs_bias)
    )
    coefficients = torch.empty((2, channels), dtype=torch.float32, device=x.device) if training and needs_x else None
    slopes, dslopes, slopes_partial = slopes_by_channel(activation, channels), None, None
    own_slopes = slopes_of(activation)
    has_one_slope = own_slopes is not None and own_slopes.shape[0] == 1 != channels
    if needs_slopes:
        assert slopes is not None, "PReLU alone has slopes"
        # One slope's gradient is the sum of all channels', and a sum of rounded ones would err more than eager's.
        dslopes = torch.empty_like(slopes, dtype=torch.float64 if has_one_slope else slopes.dtype)
        slopes_partial = torch.empty((split.n_splits, channels), dtype=torch.float64, device=x.device)
    affine = dict(
        mean_ptr=contiguous(mean), rstd_ptr=contiguous(rstd), weight_ptr=contiguous(weight), bias_ptr=contiguous(bias)
    )
    if any(value is not None for value in (dz, dweight, dbias, dslopes, coefficients)):
        partial = torch.empty((2, split.n_splits, channels), dtype=torch.float64, device=x.device)
        reduce(
            x.device, dy_ptr=dy, x_ptr=x, kept_ptr=kept, dz_ptr=dz, **affine, slopes_ptr=slopes, partial_ptr=partial,
            slopes_partial_ptr=slopes_partial,
        )  # fmt: skip
        finish(
            x.device, partial_ptr=partial, slopes_partial_ptr=slopes_partial, rstd_ptr=affine["rstd_ptr"],
            dweight_ptr=dweight, dbias_ptr=dbias, dslopes_ptr=dslopes, coefficient_ptr=coefficients,
        )  # fmt: skip
    if dx is not None:
        # dz has come through the activation already.
        upper, kept, own = (dy, kept, slopes) if dz is None else (dz, None, None)
        apply(
            x.device, dy_ptr=upper, x_ptr=x, kept_ptr=kept, dx_ptr=dx, **affine, slopes_ptr=own,
            coefficient_ptr=coefficients,
        )  # fmt: skip
    if slopes is not None and dslopes is not None and has_one_slope:
        dslopes = dslopes.sum(0, keepdim=True).to(slopes.dtype)
    return dx, dz, dweight, dbias, dslopes


def split_of(rows: int, channels: int, itemsize: int, activation: Activation | None) -> Split:
    """Returns how a backward cuts rows. itemsize: bytes of an element of x.

    Raises:
        ValueError: the kernels can't count so far.
    """
    # On 4096 elements of 16 bits the gradient of GELU takes 165 registers a thread (sm_90), and no two programs fit on a
    # multiprocessor. A tile of fp32's 2048 elements leaves room for them.
    return choose_split(rows, channels, itemsize if activation in (None, RELU) else max(itemsize, 4))


@lru_cache(CACHED)
def _launchers(
    rows: int, channels: int, itemsize: int, eps: float, activation: Activation | None, variance: bool, has_dz: bool
) -> tuple[Split, Launcher, Launcher, Launcher]:
    """Returns the split and the launchers of the three kernels. has_dz: the last one reads dz in place of dy."""
    split = split_of(rows, channels, itemsize, activation)
    sizes = dict(n_rows=rows, n_channels=channels, eps=float(eps), VARIANCE=variance)
    reduce = Launcher(
        _reduce_kernel, splits(split, channels),
        dict(sizes, rows_per_split=split.rows, **as_constexprs(activation), STAGES=STAGES, **blocks(split)), NUM_WARPS,
    )  # fmt: skip
    finish = Launcher(
        _finish_reduce_kernel, (triton.cdiv(channels, FINISH_CHANNELS),),
        dict(sizes, n_splits=split.n_splits, BLOCK_SPLITS=MOST_SPLITS, BLOCK_CHANNELS=FINISH_CHANNELS), FINISH_WARPS,
    )  # fmt: skip
    apply = Launcher(
        _backward_kernel,
        tiles(split, rows, channels),
        dict(sizes, **as_constexprs(None if has_dz else activation), **blocks(split)),
        NUM_WARPS,
    )
    return split, reduce, finish, apply
