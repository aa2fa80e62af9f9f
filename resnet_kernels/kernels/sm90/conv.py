"""Convolution with its epilogue for Hopper (sm_90): tiles travel by TMA, products run on wgmma. Formula: ../conv_bias_act.py.

It is an implicit GEMM like the portable kernel's. But a tile of pixels is a box of the image, [BOX_N, BOX_H, BOX_W] pixels by
BLOCK_K channels, so that one descriptor load fetches a whole operand: no pointers, no masks, no registers for either. Outside
the image a descriptor reads zeros, which are the padding. Outside the output it stores nothing, which handles the ragged edge.
conv_layout.py views 3x3, 1x1 and stride 2 so that one kernel does all three, and chooses the box that wastes least (7x7: one
pixel of 128 images, "batch as M"; 28x28: 4x4 pixels of 8 images). The weight is read where it is, as (O, R*S*I). Programs are
persistent: each walks over tiles a grid apart. conv_device.py computes a tile.

A block's projection can be merged: y = act(scale * conv(h, w) + scale2 * conv(x, w2) + bias + bias2), as two loops into one
accumulator. The first sum is multiplied by scale / scale2, then both by scale2. If a channel's ratio is inf, NaN,
2**32 away from 1, or 0 by underflow, its tile parks the first sum in memory instead. So every scale gives the right result.

Few tiles with long loops are split (SPLIT_K): each share's sums go to memory, and the last share to finish adds all of them,
always in the same order. Where a launch takes as long as its work, programs may start EARLY, while the launch before them
still runs: CUDA's programmatic dependent launch (CUDA C++ Programming Guide, "Programmatic Dependent Launch"). They ask L2 for
their weights, which nobody has to have computed, and wait for that launch's end before they read or write anything. What is
saved is the time from one launch to the next, and the weights' way from HBM. Not measured on a GPU.

Cost: as in conv_bias_act.py; a 3x3 reads its input from L2 once a tap. On an H200, in bf16 at batch 256, it reaches 376
TFLOP/s in ResNet-50's 3x3 of stage 1 and 585 to 674 in those of stages 2 to 4; cuBLAS reaches 653 in the same run.
tests/compile_kernels.py prints registers, shared memory and programs an SM.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import launching
from ..activations import Activation, slopes_by_channel, without_slopes
from ..geometry import Geometry
from ..layouts import contiguous
from ..operands import ConvOperands
from ..target import dot_needs_fp32, is_interpreted, multiprocessors
from .conv_device import (
    add_up,
    arrives_last,
    convolve,
    load_scales,
    multiply_add,
    must_park,
    park,
    prefetch_weight,
    store_part,
)
from .conv_layout import ConvShape, plan
from .conv_tiles import TmaConfig
from .descriptors import aligned
from .split_k_counters import zeros


@triton.jit
def _conv_bias_act_tma_kernel(
    x_desc,  # (n, h, w, c_in), if IN_PAIRS (n, h / 2, 2, w / 2, 2 * c_in)
    x01_desc,  # the other three parities of stride 2, or None
    x10_desc,
    x11_desc,
    w_desc,  # (c_out, KERNEL_H * KERNEL_W * c_in), if RAGGED (c_out, KERNEL_H * KERNEL_W, c_in)
    shortcut_desc,  # (n, out_h, out_w, shortcut's c_in) or None
    shortcut_w_desc,  # (c_out, shortcut's c_in) or None
    residual_desc,  # as y, or None
    y_desc,  # (n, out_h, out_w, c_out)
    scale_ptr,  # (c_out,) or None, and so the next four
    bias_ptr,
    shortcut_scale_ptr,
    shortcut_bias_ptr,
    slopes_ptr,  # PReLU's
    parked_ptr,  # fp32, BLOCK_N * BLOCK_M numbers a program, or a share of a tile at SPLIT_K > 1; or None
    counter_ptr,  # int32 zeros, (n_tiles,), at SPLIT_K > 1
    w_ptr,  # w_desc's tensor, if EARLY
    n_tiles,
    tiles_h,
    tiles_w,
    tiles_c,
    c_out,
    in_h,
    in_w,
    lead_h,  # rows from a box's first output row up to its first input row; pairs of rows at stride 2
    lead_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    N_CHUNKS: tl.constexpr,  # steps of BLOCK_K over the input channels
    SHORTCUT_CHUNKS: tl.constexpr,
    RAGGED: tl.constexpr,  # BLOCK_K does not divide c_in
    IN_PAIRS: tl.constexpr,
    SKEW_H: tl.constexpr,  # at stride 2: the first tap's row in its pair
    SKEW_W: tl.constexpr,
    SKIP: tl.constexpr,  # skip taps outside of the image: the box is one pixel of many images
    SPLIT_K: tl.constexpr,  # programs that share a tile's steps
    FLATTEN: tl.constexpr,  # tiles and their steps are one loop, so that the next tile's loads go on behind this one's
    EARLY: tl.constexpr,  # launched while the launch before it may still run
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
    TILE: tl.constexpr = BLOCK_N * BLOCK_M
    PARKS: tl.constexpr = shortcut_desc is not None and shortcut_scale_ptr is not None
    if EARLY:
        # The next launch may start as well, now that all programs of this one have. Then wait for the end of the one before.
        gdc_launch_dependents()
        if not RAGGED:
            prefetch_weight(
                w_ptr, tl.program_id(0) // SPLIT_K % tiles_c * BLOCK_N, c_out, tl.program_id(0) % SPLIT_K,
                KERNEL_H * KERNEL_W * N_CHUNKS, SPLIT_K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        gdc_wait()
    for share in tl.range(tl.program_id(0), n_tiles * SPLIT_K, tl.num_programs(0), flatten=FLATTEN):
        tile = share // SPLIT_K
        # Channels first: programs of one box of pixels, the larger operand, run at the same time.
        channel = tile % tiles_c * BLOCK_N
        box = tile // tiles_c
        w = box % tiles_w * BOX_W
        h = box // tiles_w % tiles_h * BOX_H
        n = box // (tiles_w * tiles_h) * BOX_N
        x_descs = (x_desc, x01_desc, x10_desc, x11_desc)
        # Each branch holds a whole tile: a branch around the sums alone costs 60 registers.
        if PARKS and must_park(scale_ptr, shortcut_scale_ptr, channel, c_out, BLOCK_N):
            acc = convolve(
                x_descs, w_desc, n, h - lead_h, w - lead_w, KERNEL_H, KERNEL_W, N_CHUNKS, IN_PAIRS, SKEW_H, SKEW_W, UPCAST,
                BLOCK_M, BLOCK_N, BLOCK_K, channel, in_h, in_w, share % SPLIT_K, SPLIT_K, RAGGED, SKIP,
            )  # fmt: skip
            scale, _ = load_scales(scale_ptr, shortcut_scale_ptr, channel, c_out, BLOCK_N)
            own_ptr = parked_ptr + tl.program_id(0) * TILE
            park(acc * scale[:, None], own_ptr, BLOCK_M, PARTS)
            acc = multiply_add(
                tl.zeros_like(acc), shortcut_desc, shortcut_w_desc, n, h, w, channel, SHORTCUT_CHUNKS, UPCAST, BLOCK_K
            )  # fmt: skip
            # Another thread may have parked what this one reads.
            tl.debug_barrier()
            store_part(
                acc, shortcut_scale_ptr, bias_ptr, residual_desc, y_desc, c_out, n, h, w, channel,
                ACT, SLOPE, BLOCK_M, BOX_H, BOX_W, PARTS, shortcut_bias_ptr=shortcut_bias_ptr, parked_ptr=own_ptr,
                slopes_ptr=slopes_ptr,
            )  # fmt: skip
        else:
            acc = convolve(
                x_descs, w_desc, n, h - lead_h, w - lead_w, KERNEL_H, KERNEL_W, N_CHUNKS, IN_PAIRS, SKEW_H, SKEW_W, UPCAST,
                BLOCK_M, BLOCK_N, BLOCK_K, channel, in_h, in_w, share % SPLIT_K, SPLIT_K, RAGGED, SKIP,
            )  # fmt: skip
            if shortcut_desc is not None:
                scale, shortcut_scale = load_scales(scale_ptr, shortcut_scale_ptr, channel, c_out, BLOCK_N)
                acc *= tl.div_rn(scale, shortcut_scale)[:, None]
                acc = multiply_add(
                    acc, shortcut_desc, shortcut_w_desc, n, h, w, channel, SHORTCUT_CHUNKS, UPCAST, BLOCK_K
                )  # fmt: skip
            if SPLIT_K == 1 or arrives_last(acc, parked_ptr, counter_ptr, share, SPLIT_K, PARTS):
                if SPLIT_K > 1:
                    acc = add_up(parked_ptr + tile * (SPLIT_K * TILE), SPLIT_K, BLOCK_N, BLOCK_M)
                store_part(
                    acc, scale_ptr if shortcut_desc is None else shortcut_scale_ptr, bias_ptr, residual_desc, y_desc, c_out,
                    n, h, w, channel, ACT, SLOPE, BLOCK_M, BOX_H, BOX_W, PARTS, shortcut_bias_ptr=shortcut_bias_ptr,
                    slopes_ptr=slopes_ptr,
                )  # fmt: skip


class Shortcut(NamedTuple):
    """A block's projection: a 1x1 convolution of x, times scale, plus bias.

    Attributes:
        x: (N, C_in, H, W), the block's input.
        weight: (C_out, C_in, 1, 1).
        bias: (C_out,) or None.
        scale: (C_out,) or None.
        geometry: the projection's.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    geometry: Geometry


def launch(operands: ConvOperands, config: TmaConfig | None = None, shortcut: Shortcut | None = None) -> Tensor:
    """Launches the kernel on checked operands.

    Args:
        operands: `why_not` lets them pass.
        config: a tile; None lets `choose_config` pick one.
        shortcut: `why_not_merged` lets it pass. Its convolution is added before the activation; its sums are never rounded.

    Returns:
        y, channels_last.
    """
    return launch_as(Bound, operands, config, shortcut)


def launch_as(bound: type[Any], operands: ConvOperands, config: Any, shortcut: Shortcut | None) -> Tensor:
    """Runs a class of `Bound`'s interface on operands of shapes that it gets to know now."""
    x, weight, _, _, _, geometry, activation = operands
    conv = ConvShape(tuple(x.shape), tuple(weight.shape), geometry)
    projection = None
    if shortcut is not None:
        projection = ConvShape(tuple(shortcut.x.shape), tuple(shortcut.weight.shape), shortcut.geometry)
    slopes = slopes_by_channel(activation, weight.shape[0])
    return bound(conv, without_slopes(activation), x.dtype, x.device, config, projection)(
        *operands[:5], shortcut, slopes
    )


class Bound:
    """`launch` for operands of known shapes: all that follows from the shapes is computed once, here.

    Args:
        conv: shapes that `why_not` lets pass.
        activation: comes last; None for none.
        dtype: the operands' dtype.
        device: the operands' device.
        config: the tile; None to choose one by the shapes.
        projection: the shortcut's shapes, which `why_not_merged` lets pass, or None.
    """

    __slots__ = ("counters", "dtype", "grid", "options", "parked", "todo")

    def __init__(
        self,
        conv: ConvShape,
        activation: Activation | None,
        dtype: torch.dtype,
        device: torch.device,
        config: TmaConfig | None = None,
        projection: ConvShape | None = None,
    ):
        if config is not None and config.early and is_interpreted():
            config = replace(
                config, early=False
            )  # the interpreter runs one launch after the other, and has no such thing
        self.todo = todo = plan(conv, activation, dot_needs_fp32(dtype), config, projection)
        self.dtype, config = dtype, todo.config
        n_tiles, tile = todo.integers["n_tiles"], config.block_m * config.block_n
        programs = min(n_tiles * config.split_k, multiprocessors(device) * config.programs_per_sm)
        self.grid = (programs,)
        # fp32 numbers in memory: the sums of every share of every tile, or those that each program parks of its tile.
        self.parked = n_tiles * config.split_k * tile if config.split_k > 1 else programs * tile if projection else 0
        self.counters = n_tiles if config.split_k > 1 else 0
        self.options = dict(
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=todo.max_registers, enable_fp_fusion=True
        )  # fmt: skip
        if config.early:
            self.options["launch_pdl"] = True

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
        shortcut: Shortcut | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        """Runs the kernel on operands of the known shapes, checked; returns y, channels_last. slopes: (C_out,), of PRELU."""
        todo, device = self.todo, x.device
        y = torch.empty(todo.y_shape, dtype=self.dtype, device=device, memory_format=torch.channels_last)
        x, weight = aligned(x), aligned(weight)
        parity = x if "x01_desc" in todo.views else None
        x0, w0, bias0, scale0, _ = shortcut or (None,) * 5
        # Allocated in each call, so that the allocator knows which streams and graphs use it.
        parked = None
        if self.counters or (self.parked and scale0 is not None):
            parked = torch.empty(self.parked, dtype=torch.float32, device=device)
        tensors = dict(
            x_desc=x,
            x01_desc=parity,
            x10_desc=parity,
            x11_desc=parity,
            w_desc=weight,
            y_desc=y,
            residual_desc=None if residual is None else aligned(residual),
            scale_ptr=contiguous(scale),
            bias_ptr=contiguous(bias),
            shortcut_desc=None if x0 is None else aligned(x0),
            shortcut_w_desc=None if w0 is None else aligned(w0),
            shortcut_scale_ptr=contiguous(scale0),
            shortcut_bias_ptr=contiguous(bias0),
            slopes_ptr=slopes,
            parked_ptr=parked,
            counter_ptr=zeros(self.counters, device) if self.counters else None,
            w_ptr=weight if todo.config.early else None,
        )
        launching.launch(
            _conv_bias_act_tma_kernel, self.grid, device, tensors, todo.fixed, todo.prepared, todo.views, **self.options
        )
        return y
