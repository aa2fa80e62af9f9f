"""A bottleneck's 3x3, its last 1x1 and the next bottleneck's first 1x1 for Hopper, with specialized warps.

Here is the kernel whose weights all stay in shared memory, and the launch of both. Where they don't fit, with 128 channels or
with a projection and z, the kernel is specialized_chain_ring.py's.

Formulas: chain.py, whose result this kernel gives, bit for bit but for the order of sums. There a program loads, multiplies
and stores in turns, and reads its weights from L2 again for each box of pixels. Here all weights stay in shared memory (139
KiB in ResNet-50's first stage), and warps are specialized as in specialized_conv.py:

    one warp         loads the weights once, then the 3x3's input, a step of 64 channels at a time,
    two warps        load the residual, 64 channels of it at a time, each for one of the consumers and ahead of it,
    two consumers    each take a box of 64 pixels: the 3x3, whose result h goes to shared memory; then, for each 64 channels of
                     y: the product, the residual from where it lies, the store from there, and y, from registers, as the
                     left operand of z's product. While one waits for memory, the other one works.

A projection takes the residual's place: its input is loaded once a box, its weight stays, too.

Cost: as in chain.py, without the weights. By counting, ResNet-50's first stage is bound by HBM then: at batch 256 a chain
moves 1.03 GB and multiplies 112 GFLOP. Nothing of it has been measured on a GPU: only a measured table chooses it (`tune`
offers it). tests/helpers/gluon_interpreter.py runs this file's own source; Triton's interpreter has no Gluon.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import launching
from ..elementwise import relu
from ..geometry import Geometry
from ..layouts import contiguous
from ..target import multiprocessors
from .chain import Layer, Shortcut
from .conv_tiles import cdiv
from .descriptors import aligned
from .gluon_names import (
    async_load,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from .specialized_chain_device import affine, load_residuals, store_block
from .specialized_chain_ring import ring_chain_kernel
from .specialized_device import box_of, halves, load_tile, multiply_add
from .specialized_layout import plan_chain

# Channels of y, and of a step of the 3x3, that are worked on at a time.
_BLOCK = gl.constexpr(64)


@gluon.jit
def _load(
    x_desc, w2_desc, w3_desc, ws_desc, w1_desc, xs, w2s, w3s, wss, w1s, full, empty, ws_full,
    n_tiles, tiles_h, tiles_w, in_h, in_w, lead_h, lead_w,
    KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr, N_CHUNKS: gl.constexpr, C_OUT: gl.constexpr,
    IN_PAIRS: gl.constexpr, SKEW_H: gl.constexpr, SKEW_W: gl.constexpr,
    BOX_N: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: all weights, and the 3x3's input of each box."""
    STEPS: gl.constexpr = KERNEL_H * KERNEL_W * N_CHUNKS
    BLOCKS: gl.constexpr = C_OUT // _BLOCK
    # Of the weights that there are.
    WS_BYTES: gl.constexpr = 0 if ws_desc is None else ws_desc.block_type.nbytes
    W1_BYTES: gl.constexpr = 0 if w1_desc is None else w1_desc.block_type.nbytes
    BLOCK_BYTES: gl.constexpr = w3_desc.block_type.nbytes + WS_BYTES + W1_BYTES
    mbarrier.expect(ws_full, STEPS * w2_desc.block_type.nbytes + BLOCKS * BLOCK_BYTES)
    for k in range(STEPS):
        async_load(w2_desc, [0, k * _BLOCK], ws_full, w2s.index(k))
    for j in range(BLOCKS):
        async_load(w3_desc, [j * _BLOCK, 0], ws_full, w3s.index(j))
        if ws_desc is not None:
            async_load(ws_desc, [j * _BLOCK, 0], ws_full, wss.index(j))
        if w1_desc is not None:
            async_load(w1_desc, [0, j * _BLOCK], ws_full, w1s.index(j))
    step = 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        n, h, w, channel = box_of(tile, tiles_h, tiles_w, 1, BOX_N, BOX_H, BOX_W, _BLOCK)
        step = load_tile(
            step, x_desc, w2_desc, xs, w2s, full, empty, n, h - lead_h, w - lead_w, channel, in_h, in_w,
            N_CHUNKS, STAGES, KERNEL_H, KERNEL_W, IN_PAIRS, SKEW_H, SKEW_W, False, True,
        )  # fmt: skip


@gluon.jit
def _compute(
    y_desc, z_desc, scale2_ptr, shift2_ptr, scale3_ptr, shift3_ptr, shortcut_scale_ptr, shortcut_shift_ptr,
    norm_scale_ptr, norm_shift_ptr, scale1_ptr, shift1_ptr,
    xs, w2s, w3s, wss, w1s, hs, ys, x0s, full, empty, ws_full, loaded, stored, turns, n_tiles, tiles_h, tiles_w, n_blocks,
    WHICH: gl.constexpr, HAS_PROJECTION: gl.constexpr, STEPS: gl.constexpr, WIDTH: gl.constexpr, C_OUT: gl.constexpr,
    NEXT_WIDTH: gl.constexpr, BLOCK_NEXT: gl.constexpr, RELU_2: gl.constexpr, RELU_3: gl.constexpr, RELU_1: gl.constexpr,
    KEEP_SUM: gl.constexpr, BOX_N: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr,
    STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """One consumer: every second box, from WHICH on."""
    BLOCK_M: gl.constexpr = BOX_N * BOX_H * BOX_W
    Y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, _BLOCK, 16])
    Z: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_NEXT, 16])
    DTYPE: gl.constexpr = y_desc.dtype
    mbarrier.wait(ws_full, 0)
    step = WHICH * STEPS
    use = 0
    i = 0
    for tile in range(gl.program_id(0) + WHICH * gl.num_programs(0), n_tiles, 2 * gl.num_programs(0)):
        n, h, w, _ = box_of(tile, tiles_h, tiles_w, 1, BOX_N, BOX_H, BOX_W, _BLOCK)
        # As in specialized_conv.py: a consumer waits for its steps when the other one has seen those in front of them.
        mbarrier.wait(turns.index(WHICH), (i & 1) ^ (WHICH == 0))
        hidden, step = multiply_add(
            gl.zeros((BLOCK_M, _BLOCK), gl.float32, layout=Y), step, STEPS, xs, w2s, full, empty, turns.index(1 - WHICH),
            False, STAGES, True,
        )  # fmt: skip
        step += STEPS
        hidden = affine(hidden, scale2_ptr, shift2_ptr, 0, WIDTH)
        if RELU_2:
            hidden = relu(hidden)
        # Not in registers: the ptxas of Triton 3.6.0 lets a left operand that later turns of a loop need be overwritten by
        # another one, z's (tests/compile_kernels.py looks for this in every chain).
        left = hs.index(WHICH)
        left.store(hidden.to(DTYPE))
        fence_async_shared()
        zeros = gl.zeros((BLOCK_M, _BLOCK), gl.float32, layout=Y)
        z = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_NEXT), gl.float32, layout=Z))
        if HAS_PROJECTION:
            mbarrier.wait(loaded.index(WHICH), i & 1)
        for j in range(n_blocks):
            channel = j * _BLOCK
            y = warpgroup_mma(
                left, w3s.index(j).permute((1, 0)), warpgroup_mma_init(zeros), use_acc=False, is_async=True
            )
            if HAS_PROJECTION:
                residual = warpgroup_mma(
                    x0s.index(WHICH).reshape([BLOCK_M, _BLOCK]), wss.index(j).permute((1, 0)), warpgroup_mma_init(zeros),
                    use_acc=False, is_async=True,
                )  # fmt: skip
                y, residual, z = warpgroup_mma_wait(0, deps=(y, residual, z))
                residual = affine(residual, shortcut_scale_ptr, shortcut_shift_ptr, channel, C_OUT)
            else:
                y, z = warpgroup_mma_wait(0, deps=(y, z))
                mbarrier.wait(loaded.index(WHICH * BUFFERS + use % BUFFERS), use // BUFFERS & 1)
                out = ys.index(WHICH * BUFFERS + use % BUFFERS).reshape([BLOCK_M, _BLOCK])
                residual = out.load(Y).to(gl.float32)
            z = warpgroup_mma_init(z)
            y = affine(y, scale3_ptr, shift3_ptr, channel, C_OUT) + residual
            if RELU_3:
                y = relu(y)
            y = y.to(DTYPE)
            p = y
            if norm_scale_ptr is not None:
                p = relu(affine(y.to(gl.float32), norm_scale_ptr, norm_shift_ptr, channel, C_OUT)).to(DTYPE)
            store_block(
                y if KEEP_SUM else p, y_desc, ys, stored, use, n, h, w, channel, WHICH, BUFFERS, not HAS_PROJECTION
            )  # fmt: skip
            use += 1
            if NEXT_WIDTH > 0:
                z = warpgroup_mma(
                    gl.convert_layout(p, gl.DotOperandLayout(0, Z, 2)), w1s.index(j).permute((1, 0)), z,
                    is_async=True,
                )  # fmt: skip
        z = warpgroup_mma_wait(0, deps=(z,))
        if HAS_PROJECTION:
            mbarrier.arrive(stored.index(WHICH))
        if NEXT_WIDTH > 0:
            z = affine(z, scale1_ptr, shift1_ptr, 0, NEXT_WIDTH)
            if RELU_1:
                z = relu(z)
            z = z.to(DTYPE)
            if BLOCK_NEXT == _BLOCK:
                if not HAS_PROJECTION:
                    mbarrier.wait(loaded.index(WHICH * BUFFERS + use % BUFFERS), use // BUFFERS & 1)
                store_block(z, z_desc, ys, stored, use, n, h, w, 0, WHICH, BUFFERS, not HAS_PROJECTION)
                use += 1
            else:
                for half in gl.static_range(2):
                    if not HAS_PROJECTION:
                        mbarrier.wait(loaded.index(WHICH * BUFFERS + use % BUFFERS), use // BUFFERS & 1)
                    store_block(
                        halves(z)[half], z_desc, ys, stored, use, n, h, w, half * _BLOCK, WHICH, BUFFERS,
                        not HAS_PROJECTION,
                    )  # fmt: skip
                    use += 1
        i += 1
    store_wait(0)


@gluon.jit
def _specialized_chain_kernel(
    x_desc,  # (n, h, w, c_in), if IN_PAIRS (n, h / 2, 2, w / 2, 2 * c_in)
    w2_desc,  # (WIDTH, KERNEL_H * KERNEL_W * c_in)
    w3_desc,  # (C_OUT, WIDTH)
    residual_desc,  # as y; with ws_desc the projection's input (n, out_h, out_w, c_shortcut)
    ws_desc,  # (C_OUT, c_shortcut), or None: no projection
    w1_desc,  # (NEXT_WIDTH, C_OUT), or None: no z
    y_desc,  # (n, out_h, out_w, C_OUT)
    z_desc,  # (n, out_h, out_w, NEXT_WIDTH) or None
    scale2_ptr,  # (WIDTH,) or None, as all vectors
    shift2_ptr,
    scale3_ptr,  # (C_OUT,), down to norm_shift_ptr
    shift3_ptr,
    shortcut_scale_ptr,
    shortcut_shift_ptr,
    norm_scale_ptr,
    norm_shift_ptr,
    scale1_ptr,  # (NEXT_WIDTH,)
    shift1_ptr,
    n_tiles,
    tiles_h,
    tiles_w,
    n_blocks,  # C_OUT / 64, as a number that the compiler doesn't know: an unrolled loop takes all registers
    in_h,
    in_w,
    lead_h,  # as in conv.py, down to SKEW_W
    lead_w,
    KERNEL_H: gl.constexpr,
    KERNEL_W: gl.constexpr,
    N_CHUNKS: gl.constexpr,
    IN_PAIRS: gl.constexpr,
    SKEW_H: gl.constexpr,
    SKEW_W: gl.constexpr,
    WIDTH: gl.constexpr,
    C_OUT: gl.constexpr,
    NEXT_WIDTH: gl.constexpr,
    BLOCK_NEXT: gl.constexpr,  # 64 or 128; 64 without a z
    RELU_2: gl.constexpr,
    RELU_3: gl.constexpr,
    RELU_1: gl.constexpr,
    KEEP_SUM: gl.constexpr,  # what is written is y, not p
    BOX_N: gl.constexpr,
    BOX_H: gl.constexpr,
    BOX_W: gl.constexpr,
    STAGES: gl.constexpr,  # steps of the 3x3 that are loading or in use
    BUFFERS: gl.constexpr,  # blocks of y, or of residuals before them, for each consumer
):
    BLOCK_M: gl.constexpr = BOX_N * BOX_H * BOX_W
    STEPS: gl.constexpr = KERNEL_H * KERNEL_W * N_CHUNKS
    BLOCKS: gl.constexpr = C_OUT // _BLOCK
    HAS_PROJECTION: gl.constexpr = ws_desc is not None
    RESULTS: gl.constexpr = 0 if HAS_PROJECTION or w1_desc is None else BLOCK_NEXT // _BLOCK
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    xs = gl.allocate_shared_memory(y_desc.dtype, [STAGES, BLOCK_M, _BLOCK], OPERAND)
    w2s = gl.allocate_shared_memory(y_desc.dtype, [STEPS, _BLOCK, _BLOCK], OPERAND)
    w3s = gl.allocate_shared_memory(y_desc.dtype, [BLOCKS, _BLOCK, _BLOCK], OPERAND)
    hs = gl.allocate_shared_memory(y_desc.dtype, [2, BLOCK_M, _BLOCK], OPERAND)
    # Those that are absent take the place of others, and nobody reads them.
    wss = w3s
    w1s = w3s
    ys = gl.allocate_shared_memory(y_desc.dtype, [2 * BUFFERS, BOX_N, BOX_H, BOX_W, _BLOCK], y_desc.layout)
    residuals = ys
    if HAS_PROJECTION:
        wss = gl.allocate_shared_memory(y_desc.dtype, [BLOCKS, _BLOCK, _BLOCK], OPERAND)
        residuals = gl.allocate_shared_memory(y_desc.dtype, [2, BOX_N, BOX_H, BOX_W, _BLOCK], residual_desc.layout)
    if w1_desc is not None:
        w1s = gl.allocate_shared_memory(y_desc.dtype, [BLOCKS, BLOCK_NEXT, _BLOCK], OPERAND)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    loaded = gl.allocate_shared_memory(gl.int64, [2 * BUFFERS, 1], BARRIER)
    stored = gl.allocate_shared_memory(gl.int64, [2 * BUFFERS, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    ws_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2 * BUFFERS):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(stored.index(i), count=1)
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    mbarrier.init(ws_full, count=1)
    gl.warp_specialize([
        (_compute, (
            y_desc, z_desc, scale2_ptr, shift2_ptr, scale3_ptr, shift3_ptr, shortcut_scale_ptr, shortcut_shift_ptr,
            norm_scale_ptr, norm_shift_ptr, scale1_ptr, shift1_ptr,
            xs, w2s, w3s, wss, w1s, hs, ys, residuals, full, empty, ws_full, loaded, stored, turns,
            n_tiles, tiles_h, tiles_w, n_blocks,
            0, HAS_PROJECTION, STEPS, WIDTH, C_OUT, NEXT_WIDTH, BLOCK_NEXT, RELU_2, RELU_3, RELU_1, KEEP_SUM,
            BOX_N, BOX_H, BOX_W, STAGES, BUFFERS,
        )),
        (_compute, (
            y_desc, z_desc, scale2_ptr, shift2_ptr, scale3_ptr, shift3_ptr, shortcut_scale_ptr, shortcut_shift_ptr,
            norm_scale_ptr, norm_shift_ptr, scale1_ptr, shift1_ptr,
            xs, w2s, w3s, wss, w1s, hs, ys, residuals, full, empty, ws_full, loaded, stored, turns,
            n_tiles, tiles_h, tiles_w, n_blocks,
            1, HAS_PROJECTION, STEPS, WIDTH, C_OUT, NEXT_WIDTH, BLOCK_NEXT, RELU_2, RELU_3, RELU_1, KEEP_SUM,
            BOX_N, BOX_H, BOX_W, STAGES, BUFFERS,
        )),
        (_load, (
            x_desc, w2_desc, w3_desc, ws_desc, w1_desc, xs, w2s, w3s, wss, w1s, full, empty, ws_full,
            n_tiles, tiles_h, tiles_w, in_h, in_w, lead_h, lead_w, KERNEL_H, KERNEL_W, N_CHUNKS, C_OUT,
            IN_PAIRS, SKEW_H, SKEW_W, BOX_N, BOX_H, BOX_W, STAGES,
        )),
        (load_residuals, (
            residual_desc, residuals, loaded, stored, gl.program_id(0), n_tiles, 2 * gl.num_programs(0), tiles_h, tiles_w,
            0, 0, BOX_N, BOX_H, BOX_W,
            1 if HAS_PROJECTION else BLOCKS, RESULTS, 1 if HAS_PROJECTION else BUFFERS,
        )),
        (load_residuals, (
            residual_desc, residuals, loaded, stored, gl.program_id(0) + gl.num_programs(0), n_tiles,
            2 * gl.num_programs(0), tiles_h, tiles_w, 1, 0, BOX_N, BOX_H, BOX_W,
            1 if HAS_PROJECTION else BLOCKS, RESULTS, 1 if HAS_PROJECTION else BUFFERS,
        )),
    ], [4, 1, 1, 1], [232, 32, 32, 32])  # fmt: skip


def launch(
    x: Tensor,
    conv2: Layer,
    geometry: Geometry,
    conv3: Layer,
    residual: Tensor | Shortcut,
    next_norm: tuple[Tensor, Tensor] | None = None,
    next_conv1: Layer | None = None,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Runs the kernel on checked operands that specialized_layout.why_not_chain lets pass.

    Args:
        x: as in chain.launch, and so all others.
        conv2: the 3x3.
        geometry: conv2's.
        conv3: the block's last 1x1.
        residual: y's shape, or a Shortcut.
        next_norm: scale and shift of the BN that starts the next block in pre-activation nets (v2), or None.
        next_conv1: the next block's first 1x1, or None.
        keep_sum: whether to return the sum as y.

    Returns:
        y and z, channels_last; z is None without next_conv1.
    """
    shortcut = residual if isinstance(residual, Shortcut) else None
    projection = shortcut.layer if shortcut else None
    todo = plan_chain(
        tuple(x.shape), tuple(conv2.weight.shape), geometry, conv3.weight.shape[0],
        shortcut.shape if shortcut else None, tuple(next_conv1.weight.shape) if next_conv1 else None,
        (conv2.relu, conv3.relu, next_conv1 is not None and next_conv1.relu), keep_sum,
    )  # fmt: skip
    batch, _, *size = geometry.out_shape(x.shape, conv2.weight.shape)

    def empty(layer: Layer) -> Tensor:
        shape = (batch, layer.weight.shape[0], *size)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    y, z = empty(conv3), None if next_conv1 is None else empty(next_conv1)
    described = dict(
        x_desc=x, w2_desc=conv2.weight, w3_desc=conv3.weight,
        residual_desc=residual.x if isinstance(residual, Shortcut) else residual,
        ws_desc=projection and projection.weight, w1_desc=next_conv1 and next_conv1.weight, y_desc=y, z_desc=z,
    )  # fmt: skip
    vectors = dict(
        scale2_ptr=conv2.scale, shift2_ptr=conv2.shift, scale3_ptr=conv3.scale, shift3_ptr=conv3.shift,
        shortcut_scale_ptr=projection and projection.scale, shortcut_shift_ptr=projection and projection.shift,
        norm_scale_ptr=next_norm and next_norm[0], norm_shift_ptr=next_norm and next_norm[1],
        scale1_ptr=next_conv1 and next_conv1.scale, shift1_ptr=next_conv1 and next_conv1.shift,
    )  # fmt: skip
    tensors = {name: None if tensor is None else aligned(tensor) for name, tensor in described.items()}
    tensors |= {name: contiguous(vector) for name, vector in vectors.items()}
    programs = min(todo.integers["n_tiles"], multiprocessors(x.device))
    kernel = _specialized_chain_kernel
    if todo.in_ring:  # a program has two boxes at a time
        kernel, programs = ring_chain_kernel, min(cdiv(todo.integers["n_tiles"], 2), multiprocessors(x.device))
    launching.launch(
        kernel, (programs,), x.device, tensors, todo.fixed, todo.prepared, todo.views, num_warps=4, enable_fp_fusion=True
    )  # fmt: skip
    return y, z
