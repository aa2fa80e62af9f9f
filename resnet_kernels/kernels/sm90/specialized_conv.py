"""Convolution with its epilogue for Hopper (sm_90) with specialized warps: some load, others multiply.

Formula: ../conv_bias_act.py. At the end of each tile conv.py's program does one thing after the other: it waits for its
products, loads the residual, stores, and begins to load for its next tile. Here these are different warps of one program,
which hand tiles of shared memory on by mbarriers:

    one warp       loads the operands of each step of 64 input channels into a ring of STAGES,
    one warp       loads the residual of each tile, ahead of time, into the buffer that the result will take,
    one or two     multiply. Each takes a tile of its own, adds the residual to it where it lies, and stores from there: of
    consumers      two, one stores while the other multiplies.

A ring's `full` mbarrier counts the bytes of a step, its `empty` one the consumer's word that it has multiplied. A buffer's
`loaded` counts the residual's bytes, its `stored` the consumer's word that the store has read it. The n-th use of a slot waits
for the end of its n-th phase, so all follows from the numbers of the step and of the tile.

It takes the views of conv_layout.py, with 64 input channels a step and without stride 2 on odd sizes. The sums are [pixels,
channels], since wgmma reads both operands where TMA left them. A merged shortcut is a second loop into the same sums, as in
conv.py. With RESIDENT the weight is loaded once a program.

Cost: as in conv.py. Nothing of it has been measured on a GPU: only a measured table chooses it (`tune` offers it).
tests/helpers/gluon_interpreter.py runs this file's own source; Triton's interpreter has no Gluon.
Source: CUTLASS's warp-specialized persistent kernels, cooperative and ping-pong (media/docs/cpp/efficient_gemm.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import launching
from ..activations import Activation
from ..layouts import contiguous
from ..operands import ConvOperands
from ..target import multiprocessors
from .conv import Shortcut, launch_as
from .conv_layout import ConvShape
from .descriptors import aligned
from .gluon_names import async_load, async_store, fence_async_shared, gl, gluon, mbarrier, store_wait
from .specialized_device import box_of, finish, load_tile, multiply_add, park, scale_ratio, taps_of, taps_of_tile
from .specialized_layout import MERGED, SpecializedConfig, plan


@gluon.jit
def _load(
    x_desc, w_desc, shortcut_desc, shortcut_w_desc, xs, ws, full, empty, ws_full,
    n_tiles, tiles_h, tiles_w, tiles_c, in_h, in_w, lead_h, lead_w,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr, N_CHUNKS: gl.constexpr, SHORTCUT_CHUNKS: gl.constexpr,
    IN_PAIRS: gl.constexpr, SKEW_H: gl.constexpr, SKEW_W: gl.constexpr, SKIP: gl.constexpr,
    BOX_N: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, RESIDENT: gl.constexpr,
):  # fmt: skip
    """One warp: the operands of each tile's steps, in order."""
    if RESIDENT:
        STEPS: gl.constexpr = KERNEL_H * KERNEL_W * N_CHUNKS
        mbarrier.expect(ws_full, STEPS * w_desc.block_type.nbytes)
        for k in range(STEPS):
            async_load(w_desc, [0, k * w_desc.block_shape[1]], ws_full, ws.index(k))
    step = 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        n, h, w, channel = box_of(tile, tiles_h, tiles_w, tiles_c, BOX_N, BOX_H, BOX_W, BLOCK_N)
        step = load_tile(
            step, x_desc, w_desc, xs, ws, full, empty, n, h - lead_h, w - lead_w, channel, in_h, in_w,
            N_CHUNKS, STAGES, KERNEL_H, KERNEL_W, IN_PAIRS, SKEW_H, SKEW_W, SKIP, RESIDENT,
        )  # fmt: skip
        if shortcut_desc is not None:
            step = load_tile(
                step, shortcut_desc, shortcut_w_desc, xs, ws, full, empty, n, h, w, channel, in_h, in_w,
                SHORTCUT_CHUNKS, STAGES, 1, 1, False, 0, 0, False, False,
            )  # fmt: skip


@gluon.jit
def _load_residuals(
    residual_desc, ys, loaded, stored, n_tiles, tiles_h, tiles_w, tiles_c,
    BOX_N: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr, BLOCK_N: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """One warp: each tile's residual, into the buffer that its result will take."""
    if residual_desc is not None:
        j = 0
        for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
            n, h, w, channel = box_of(tile, tiles_h, tiles_w, tiles_c, BOX_N, BOX_H, BOX_W, BLOCK_N)
            buffer = j % BUFFERS
            mbarrier.wait(stored.index(buffer), (j // BUFFERS & 1) ^ 1)
            mbarrier.expect(loaded.index(buffer), residual_desc.block_type.nbytes)
            async_load(residual_desc, [n, h, w, channel], loaded.index(buffer), ys.index(buffer))
            j += 1


@gluon.jit
def _compute(
    y_desc, scale_ptr, bias_ptr, shortcut_scale_ptr, shortcut_bias_ptr, slopes_ptr, parked_ptr,
    xs, ws, full, empty, ws_full, ys, loaded, stored, turns,
    n_tiles, tiles_h, tiles_w, tiles_c, c_out, in_h, in_w, lead_h, lead_w,
    WHICH: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr, N_CHUNKS: gl.constexpr, SHORTCUT_CHUNKS: gl.constexpr,
    SKIP: gl.constexpr, ACT: gl.constexpr, SLOPE: gl.constexpr,
    BOX_N: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, BUFFERS: gl.constexpr, RESIDENT: gl.constexpr, CONSUMERS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """One consumer: every CONSUMERS-th tile, from WHICH on."""
    BLOCK_M: gl.constexpr = BOX_N * BOX_H * BOX_W
    OWN_BUFFERS: gl.constexpr = BUFFERS // CONSUMERS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    if RESIDENT:
        mbarrier.wait(ws_full, 0)
    first = gl.program_id(0)
    step = 0
    if WHICH > 0:
        step = SHORTCUT_CHUNKS + N_CHUNKS * taps_of_tile(
            first, tiles_h, tiles_w, tiles_c, lead_h, lead_w, in_h, in_w,
            KERNEL_H, KERNEL_W, SKIP, BOX_N, BOX_H, BOX_W, BLOCK_N,
        )  # fmt: skip
    j = WHICH
    for tile in range(first + WHICH * gl.num_programs(0), n_tiles, CONSUMERS * gl.num_programs(0)):
        n, h, w, channel = box_of(tile, tiles_h, tiles_w, tiles_c, BOX_N, BOX_H, BOX_W, BLOCK_N)
        steps = N_CHUNKS * taps_of(h - lead_h, w - lead_w, in_h, in_w, KERNEL_H, KERNEL_W, SKIP)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout=LAYOUT)
        next_turn = None
        if CONSUMERS > 1:
            # A wait for a phase returns at once while the phase before it has not begun, so a consumer must not wait
            # for its steps before the other one has seen those in front of them.
            mbarrier.wait(turns.index(WHICH), (j // CONSUMERS & 1) ^ (WHICH == 0))
            next_turn = turns.index((WHICH + 1) % CONSUMERS)
        acc, step = multiply_add(
            acc, step, steps, xs, ws, full, empty, None if SHORTCUT_CHUNKS > 0 else next_turn, SKIP, STAGES, RESIDENT
        )  # fmt: skip
        parked = False
        own_ptr = parked_ptr
        if SHORTCUT_CHUNKS > 0:
            ratio, is_far = scale_ratio(
                scale_ptr, shortcut_scale_ptr, channel, c_out, BLOCK_N, gl.SliceLayout(0, LAYOUT)
            )  # fmt: skip
            if parked_ptr is not None:
                own_ptr = parked_ptr + (gl.program_id(0) * CONSUMERS + WHICH) * (BLOCK_M * BLOCK_N)
                parked = is_far
                if parked:
                    park(acc, own_ptr, scale_ptr, channel, c_out, BLOCK_N, PARTS)
                acc = gl.where(parked, 0.0, acc * ratio[None, :])
            else:
                acc *= ratio[None, :]
            acc, step = multiply_add(
                acc, step, SHORTCUT_CHUNKS, xs, ws, full, empty, next_turn, True, STAGES, False
            )  # fmt: skip
        buffer = j % BUFFERS
        y = ys.index(buffer)
        if HAS_RESIDUAL:
            mbarrier.wait(loaded.index(buffer), j // BUFFERS & 1)
        else:
            store_wait(OWN_BUFFERS - 1)
        finish(
            acc, y.reshape([BLOCK_M, BLOCK_N]), scale_ptr if SHORTCUT_CHUNKS == 0 else shortcut_scale_ptr, bias_ptr,
            shortcut_bias_ptr, slopes_ptr, own_ptr, parked, c_out, channel, HAS_RESIDUAL, ACT, SLOPE, PARTS,
        )  # fmt: skip
        fence_async_shared()
        async_store(y_desc, [n, h, w, channel], y)
        if HAS_RESIDUAL:
            # The store has read this consumer's buffer of OWN_BUFFERS - 1 tiles ago: the next residual may take it.
            store_wait(OWN_BUFFERS - 1)
            mbarrier.arrive(
                stored.index((j + CONSUMERS) % BUFFERS), pred=j >= BUFFERS - CONSUMERS
            )  # fmt: skip
        if CONSUMERS > 1:
            # The other consumer's steps.
            step += SHORTCUT_CHUNKS + N_CHUNKS * taps_of_tile(
                tile + gl.num_programs(0), tiles_h, tiles_w, tiles_c, lead_h, lead_w, in_h, in_w,
                KERNEL_H, KERNEL_W, SKIP, BOX_N, BOX_H, BOX_W, BLOCK_N,
            )  # fmt: skip
        j += CONSUMERS
    store_wait(0)


@gluon.jit
def _specialized_conv_kernel(
    x_desc,  # (n, h, w, c_in), if IN_PAIRS (n, h / 2, 2, w / 2, 2 * c_in)
    w_desc,  # (c_out, KERNEL_H * KERNEL_W * c_in)
    shortcut_desc,  # (n, out_h, out_w, shortcut's c_in) or None
    shortcut_w_desc,  # (c_out, shortcut's c_in) or None
    residual_desc,  # as y, or None
    y_desc,  # (n, out_h, out_w, c_out)
    scale_ptr,  # (c_out,) or None, and so the next four
    bias_ptr,
    shortcut_scale_ptr,
    shortcut_bias_ptr,
    slopes_ptr,  # PReLU's
    parked_ptr,  # fp32, BLOCK_M * BLOCK_N numbers a consumer; or None
    n_tiles,
    tiles_h,
    tiles_w,
    tiles_c,
    c_out,
    in_h,
    in_w,
    lead_h,  # rows from a box's first output row up to its first input row; pairs of rows at stride 2
    lead_w,
    KERNEL_H: gl.constexpr,
    KERNEL_W: gl.constexpr,
    N_CHUNKS: gl.constexpr,  # steps of BLOCK_K over the input channels
    SHORTCUT_CHUNKS: gl.constexpr,
    IN_PAIRS: gl.constexpr,
    SKEW_H: gl.constexpr,  # at stride 2: the first tap's row in its pair
    SKEW_W: gl.constexpr,
    # four if x is seen as four parities
    SKIP: gl.constexpr,  # skip taps outside of the image: the box is one pixel of many images
    ACT: gl.constexpr,
    SLOPE: gl.constexpr,
    BOX_N: gl.constexpr,
    BOX_H: gl.constexpr,
    BOX_W: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,  # tiles of results, or of residuals before them, in shared memory
    RESIDENT: gl.constexpr,  # all of the weight stays in shared memory
    CONSUMERS: gl.constexpr,
    PARTS: gl.constexpr,
):
    BLOCK_M: gl.constexpr = BOX_N * BOX_H * BOX_W
    WEIGHTS: gl.constexpr = KERNEL_H * KERNEL_W * N_CHUNKS if RESIDENT else STAGES
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    xs = gl.allocate_shared_memory(y_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], OPERAND)
    ws = gl.allocate_shared_memory(y_desc.dtype, [WEIGHTS, BLOCK_N, BLOCK_K], w_desc.layout)
    ys = gl.allocate_shared_memory(y_desc.dtype, [BUFFERS, BOX_N, BOX_H, BOX_W, BLOCK_N], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    stored = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    ws_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(stored.index(i), count=1)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    mbarrier.init(ws_full, count=1)
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_compute, (
                y_desc, scale_ptr, bias_ptr, shortcut_scale_ptr, shortcut_bias_ptr, slopes_ptr, parked_ptr,
                xs, ws, full, empty, ws_full, ys, loaded, stored, turns,
                n_tiles, tiles_h, tiles_w, tiles_c, c_out, in_h, in_w, lead_h, lead_w,
                0, residual_desc is not None, KERNEL_H, KERNEL_W, N_CHUNKS, SHORTCUT_CHUNKS, SKIP,
                ACT, SLOPE, BOX_N, BOX_H, BOX_W, BLOCK_N, STAGES, BUFFERS, RESIDENT, CONSUMERS, PARTS,
            )),
            (_load, (
                x_desc, w_desc, shortcut_desc, shortcut_w_desc, xs, ws, full, empty, ws_full,
                n_tiles, tiles_h, tiles_w, tiles_c, in_h, in_w, lead_h, lead_w,
                KERNEL_H, KERNEL_W, N_CHUNKS, SHORTCUT_CHUNKS, IN_PAIRS, SKEW_H, SKEW_W, SKIP,
                BOX_N, BOX_H, BOX_W, BLOCK_N, STAGES, RESIDENT,
            )),
            (_load_residuals, (
                residual_desc, ys, loaded, stored, n_tiles, tiles_h, tiles_w, tiles_c, BOX_N, BOX_H, BOX_W, BLOCK_N, BUFFERS,
            )),
        ], [1, 1], [24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_compute, (
                y_desc, scale_ptr, bias_ptr, shortcut_scale_ptr, shortcut_bias_ptr, slopes_ptr, parked_ptr,
                xs, ws, full, empty, ws_full, ys, loaded, stored, turns,
                n_tiles, tiles_h, tiles_w, tiles_c, c_out, in_h, in_w, lead_h, lead_w,
                0, residual_desc is not None, KERNEL_H, KERNEL_W, N_CHUNKS, SHORTCUT_CHUNKS, SKIP,
                ACT, SLOPE, BOX_N, BOX_H, BOX_W, BLOCK_N, STAGES, BUFFERS, RESIDENT, CONSUMERS, PARTS,
            )),
            (_compute, (
                y_desc, scale_ptr, bias_ptr, shortcut_scale_ptr, shortcut_bias_ptr, slopes_ptr, parked_ptr,
                xs, ws, full, empty, ws_full, ys, loaded, stored, turns,
                n_tiles, tiles_h, tiles_w, tiles_c, c_out, in_h, in_w, lead_h, lead_w,
                1, residual_desc is not None, KERNEL_H, KERNEL_W, N_CHUNKS, SHORTCUT_CHUNKS, SKIP,
                ACT, SLOPE, BOX_N, BOX_H, BOX_W, BLOCK_N, STAGES, BUFFERS, RESIDENT, CONSUMERS, PARTS,
            )),
            (_load, (
                x_desc, w_desc, shortcut_desc, shortcut_w_desc, xs, ws, full, empty, ws_full,
                n_tiles, tiles_h, tiles_w, tiles_c, in_h, in_w, lead_h, lead_w,
                KERNEL_H, KERNEL_W, N_CHUNKS, SHORTCUT_CHUNKS, IN_PAIRS, SKEW_H, SKEW_W, SKIP,
                BOX_N, BOX_H, BOX_W, BLOCK_N, STAGES, RESIDENT,
            )),
            (_load_residuals, (
                residual_desc, ys, loaded, stored, n_tiles, tiles_h, tiles_w, tiles_c, BOX_N, BOX_H, BOX_W, BLOCK_N, BUFFERS,
            )),
        ], [4, 1, 1], [240, 24, 24])  # fmt: skip


def launch(operands: ConvOperands, config: SpecializedConfig = MERGED, shortcut: Shortcut | None = None) -> Tensor:
    """Launches the kernel on checked operands.

    Args:
        operands: `specialized_layout.why_not` lets them pass.
        config: a tile that `why_not_tile` lets pass; with a shortcut it is MERGED.
        shortcut: `why_not_merged` lets it pass. Its convolution is added before the activation; its sums are never rounded.

    Returns:
        y, channels_last.
    """
    return launch_as(Bound, operands, config, shortcut)


class Bound:
    """`launch` for operands of known shapes: all that follows from the shapes is computed once, here.

    Args:
        conv: shapes that `why_not` lets pass.
        activation: comes last; None for none.
        dtype: the operands' dtype.
        device: the operands' device.
        config: the tile.
        projection: the shortcut's shapes, which `why_not_merged` lets pass, or None.
    """

    __slots__ = ("dtype", "grid", "parked", "todo")

    def __init__(
        self,
        conv: ConvShape,
        activation: Activation | None,
        dtype: torch.dtype,
        device: torch.device,
        config: SpecializedConfig,
        projection: ConvShape | None = None,
    ):
        assert projection is None or config == MERGED, f"{config} would spill with a merged shortcut"
        self.todo = plan(conv, activation, config, projection)
        self.dtype = dtype
        programs = min(self.todo.integers["n_tiles"], multiprocessors(device))
        self.grid = (programs,)
        # fp32 numbers in memory: the sums that each consumer parks of its tile.
        self.parked = programs * config.consumers * config.block_m * config.block_n

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
        x0, w0, bias0, scale0, _ = shortcut or (None,) * 5
        tensors = dict(
            x_desc=aligned(x),
            w_desc=aligned(weight),
            shortcut_desc=None if x0 is None else aligned(x0),
            shortcut_w_desc=None if w0 is None else aligned(w0),
            residual_desc=None if residual is None else aligned(residual),
            y_desc=y,
            scale_ptr=contiguous(scale),
            bias_ptr=contiguous(bias),
            shortcut_scale_ptr=contiguous(scale0),
            shortcut_bias_ptr=contiguous(bias0),
            slopes_ptr=slopes,
            # Allocated in each call, so that the allocator knows which streams and graphs use it.
            parked_ptr=None if scale0 is None else torch.empty(self.parked, dtype=torch.float32, device=device),
        )
        launching.launch(
            _specialized_conv_kernel, self.grid, device, tensors, todo.fixed, todo.prepared, todo.views,
            num_warps=todo.config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
        return y
