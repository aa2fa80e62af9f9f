"""The chain of specialized_chain.py where its weights don't fit into shared memory: 128 channels, or a projection and z.

Two consumers work on two boxes of 64 pixels at the same time, and share what passes through a ring: for the 3x3 a step of 64
input channels of both boxes and of the weight, then, for each 64 channels of y, the weights of the 1x1 convolutions. A stage
is empty when both have multiplied, so one may be up to a ring ahead of the other: while one waits for memory or adds its
residual, the other one works. All else is as in specialized_chain.py. There is no projection beside 128 channels.

Cost: as in chain.py. L2 provides all weights once for 128 pixels: in ResNet-50's second stage at batch 256 that is 0.87 GB a
block, beside 0.46 GB of the 3x3's input. Nothing of it has been measured on a GPU: only a measured table chooses it (`tune`
offers it). tests/helpers/gluon_interpreter.py runs this file's own source.
"""

from __future__ import annotations

from ..elementwise import relu
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
from .specialized_device import box_of, halves, load_pixels

# Channels of y, and of a step of the 3x3, that are worked on at a time.
_BLOCK = gl.constexpr(64)


@gluon.jit
def _load(
    x_desc, w2_desc, w3_desc, ws_desc, w1_desc, xs, ws, full, empty,
    n_tiles, tiles_h, tiles_w, n_blocks, lead_h, lead_w,
    BLOCK_WIDTH: gl.constexpr, KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr, N_CHUNKS: gl.constexpr,
    IN_PAIRS: gl.constexpr, SKEW_H: gl.constexpr, SKEW_W: gl.constexpr,
    BOX_N: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: for each pair of boxes the steps of the 3x3, then the weights of each block of y."""
    HALVES: gl.constexpr = BLOCK_WIDTH // _BLOCK
    # Of the weights that there are.
    WS_BYTES: gl.constexpr = 0 if ws_desc is None else ws_desc.block_type.nbytes
    W1_BYTES: gl.constexpr = 0 if w1_desc is None else w1_desc.block_type.nbytes
    step = 0
    for tile in range(2 * gl.program_id(0), n_tiles, 2 * gl.num_programs(0)):
        n, h, w, _ = box_of(tile, tiles_h, tiles_w, 1, BOX_N, BOX_H, BOX_W, _BLOCK)
        n_2, h_2, w_2, _ = box_of(tile + 1, tiles_h, tiles_w, 1, BOX_N, BOX_H, BOX_W, _BLOCK)
        for k in range(KERNEL_H * KERNEL_W * N_CHUNKS):
            r = k // (KERNEL_W * N_CHUNKS)
            s = k // N_CHUNKS % KERNEL_W
            c = k % N_CHUNKS * _BLOCK
            stage = step % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready, 2 * x_desc.block_type.nbytes + w2_desc.block_type.nbytes)
            async_load(w2_desc, [0, k * _BLOCK], ready, ws.index(stage))
            load_pixels(
                x_desc, ready, xs.index(2 * stage), n, h - lead_h, w - lead_w, r, s, c,
                N_CHUNKS * _BLOCK, IN_PAIRS, SKEW_H, SKEW_W,
            )  # fmt: skip
            load_pixels(
                x_desc, ready, xs.index(2 * stage + 1), n_2, h_2 - lead_h, w_2 - lead_w, r, s, c,
                N_CHUNKS * _BLOCK, IN_PAIRS, SKEW_H, SKEW_W,
            )  # fmt: skip
            step += 1
        for j in range(n_blocks):
            stage = step % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready, HALVES * w3_desc.block_type.nbytes + WS_BYTES + W1_BYTES)
            for half in gl.static_range(HALVES):
                async_load(w3_desc, [j * _BLOCK, half * _BLOCK], ready, xs.index(2 * stage + half))
            if ws_desc is not None:
                async_load(ws_desc, [j * _BLOCK, 0], ready, xs.index(2 * stage + 1))
            if w1_desc is not None:
                async_load(w1_desc, [0, j * _BLOCK], ready, ws.index(stage))
            step += 1


@gluon.jit
def _compute(
    y_desc, z_desc, scale2_ptr, shift2_ptr, scale3_ptr, shift3_ptr, shortcut_scale_ptr, shortcut_shift_ptr,
    norm_scale_ptr, norm_shift_ptr, scale1_ptr, shift1_ptr,
    xs, ws, hs, ys, x0s, full, empty, loaded, stored, n_tiles, tiles_h, tiles_w, n_blocks,
    WHICH: gl.constexpr, HAS_PROJECTION: gl.constexpr, BLOCK_WIDTH: gl.constexpr, STEPS: gl.constexpr, WIDTH: gl.constexpr,
    C_OUT: gl.constexpr, NEXT_WIDTH: gl.constexpr,
    RELU_2: gl.constexpr, RELU_3: gl.constexpr, RELU_1: gl.constexpr, KEEP_SUM: gl.constexpr,
    BOX_N: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """One consumer: the WHICH-th box of each pair. Behind the last box of all there may be one outside of the batch."""
    BLOCK_M: gl.constexpr = BOX_N * BOX_H * BOX_W
    Y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, _BLOCK, 16])
    Z: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_WIDTH, 16])
    DTYPE: gl.constexpr = y_desc.dtype
    HALVES: gl.constexpr = BLOCK_WIDTH // _BLOCK
    step = 0
    use = 0
    i = 0
    for pair in range(2 * gl.program_id(0), n_tiles, 2 * gl.num_programs(0)):
        n, h, w, _ = box_of(pair + WHICH, tiles_h, tiles_w, 1, BOX_N, BOX_H, BOX_W, _BLOCK)
        hidden = gl.zeros((BLOCK_M, BLOCK_WIDTH), gl.float32, layout=Z)
        for k in range(STEPS):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            product = warpgroup_mma(
                xs.index(2 * stage + WHICH), ws.index(stage).permute((1, 0)), warpgroup_mma_init(hidden), use_acc=k > 0,
                is_async=True,
            )  # fmt: skip
            # One product stays in flight: this consumer is done with the stage of the one before it.
            hidden = warpgroup_mma_wait(1, deps=(product,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        hidden = warpgroup_mma_wait(0, deps=(hidden,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        hidden = affine(hidden, scale2_ptr, shift2_ptr, 0, WIDTH)
        if RELU_2:
            hidden = relu(hidden)
        if HALVES == 1:
            hs.index(WHICH).store(gl.convert_layout(hidden.to(DTYPE), Y))
        else:
            left, right = halves(hidden.to(DTYPE))
            hs.index(2 * WHICH).store(left)
            hs.index(2 * WHICH + 1).store(right)
        fence_async_shared()
        zeros = gl.zeros((BLOCK_M, _BLOCK), gl.float32, layout=Y)
        z = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_WIDTH), gl.float32, layout=Z))
        if HAS_PROJECTION:
            mbarrier.wait(loaded.index(WHICH), i & 1)
        for j in range(n_blocks):
            channel = j * _BLOCK
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            y = warpgroup_mma_init(zeros)
            for half in gl.static_range(HALVES):
                y = warpgroup_mma(
                    hs.index(HALVES * WHICH + half), xs.index(2 * stage + half).permute((1, 0)), y, use_acc=half > 0,
                    is_async=True,
                )  # fmt: skip
            if HAS_PROJECTION:
                residual = warpgroup_mma(
                    x0s.index(WHICH).reshape([BLOCK_M, _BLOCK]), xs.index(2 * stage + 1).permute((1, 0)),
                    warpgroup_mma_init(zeros), use_acc=False, is_async=True,
                )  # fmt: skip
                y, residual, z = warpgroup_mma_wait(0, deps=(y, residual, z))
                residual = affine(residual, shortcut_scale_ptr, shortcut_shift_ptr, channel, C_OUT)
            else:
                y, z = warpgroup_mma_wait(0, deps=(y, z))
                mbarrier.wait(loaded.index(WHICH * BUFFERS + use % BUFFERS), use // BUFFERS & 1)
                out = ys.index(WHICH * BUFFERS + use % BUFFERS).reshape([BLOCK_M, _BLOCK])
                residual = out.load(Y).to(gl.float32)
            z = warpgroup_mma_init(z)
            # Of z's product of the block before, and of y's.
            if NEXT_WIDTH > 0:
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=j > 0)
            else:
                mbarrier.arrive(empty.index(stage))
            y = affine(y, scale3_ptr, shift3_ptr, channel, C_OUT) + residual
            if RELU_3:
                y = relu(y)
            y = y.to(DTYPE)
            p = y
            if norm_scale_ptr is not None:
                p = relu(affine(y.to(gl.float32), norm_scale_ptr, norm_shift_ptr, channel, C_OUT)).to(DTYPE)
            store_block(
                y if KEEP_SUM else p, y_desc, ys, stored, use, n, h, w, channel, WHICH, BUFFERS, not HAS_PROJECTION
            )
            use += 1
            if NEXT_WIDTH > 0:
                z = warpgroup_mma(
                    gl.convert_layout(p, gl.DotOperandLayout(0, Z, 2)), ws.index(stage).permute((1, 0)), z, is_async=True
                )  # fmt: skip
            step += 1
        z = warpgroup_mma_wait(0, deps=(z,))
        if HAS_PROJECTION:
            mbarrier.arrive(stored.index(WHICH))
        if NEXT_WIDTH > 0:
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
            z = affine(z, scale1_ptr, shift1_ptr, 0, NEXT_WIDTH)
            if RELU_1:
                z = relu(z)
            z = z.to(DTYPE)
            for half in gl.static_range(HALVES):
                if not HAS_PROJECTION:
                    mbarrier.wait(loaded.index(WHICH * BUFFERS + use % BUFFERS), use // BUFFERS & 1)
                store_block(
                    z if HALVES == 1 else halves(z)[half], z_desc, ys, stored, use, n, h, w, half * _BLOCK, WHICH, BUFFERS,
                    not HAS_PROJECTION,
                )  # fmt: skip
                use += 1
        i += 1
    store_wait(0)


@gluon.jit
def ring_chain_kernel(
    x_desc,  # as in specialized_chain.py, and so all others
    w2_desc,
    w3_desc,
    residual_desc,
    ws_desc,
    w1_desc,
    y_desc,
    z_desc,
    scale2_ptr,
    shift2_ptr,
    scale3_ptr,
    shift3_ptr,
    shortcut_scale_ptr,
    shortcut_shift_ptr,
    norm_scale_ptr,
    norm_shift_ptr,
    scale1_ptr,
    shift1_ptr,
    n_tiles,
    tiles_h,
    tiles_w,
    n_blocks,
    lead_h,
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
    BLOCK_WIDTH: gl.constexpr,  # channels of h and of z, 64 or 128
    RELU_2: gl.constexpr,
    RELU_3: gl.constexpr,
    RELU_1: gl.constexpr,
    KEEP_SUM: gl.constexpr,
    BOX_N: gl.constexpr,
    BOX_H: gl.constexpr,
    BOX_W: gl.constexpr,
    STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """The kernel; specialized_chain.py launches it."""
    STEPS: gl.constexpr = KERNEL_H * KERNEL_W * N_CHUNKS
    HAS_PROJECTION: gl.constexpr = ws_desc is not None
    HALVES: gl.constexpr = BLOCK_WIDTH // _BLOCK
    RESULTS: gl.constexpr = 0 if HAS_PROJECTION or w1_desc is None else HALVES
    gl.static_assert(not HAS_PROJECTION or HALVES == 1, "a stage has no room for the projection's weight")
    BLOCK_M: gl.constexpr = BOX_N * BOX_H * BOX_W
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    # A stage: pixels of two boxes and the 3x3's weight; or conv3's weight, its other half or the projection's, and conv1's.
    xs = gl.allocate_shared_memory(y_desc.dtype, [2 * STAGES, BLOCK_M, _BLOCK], OPERAND)
    ws = gl.allocate_shared_memory(y_desc.dtype, [STAGES, BLOCK_WIDTH, _BLOCK], OPERAND)
    hs = gl.allocate_shared_memory(y_desc.dtype, [2 * HALVES, BLOCK_M, _BLOCK], OPERAND)
    ys = gl.allocate_shared_memory(y_desc.dtype, [2 * BUFFERS, BOX_N, BOX_H, BOX_W, _BLOCK], y_desc.layout)
    residuals = ys
    if HAS_PROJECTION:
        residuals = gl.allocate_shared_memory(y_desc.dtype, [2, BOX_N, BOX_H, BOX_W, _BLOCK], residual_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    loaded = gl.allocate_shared_memory(gl.int64, [2 * BUFFERS, 1], BARRIER)
    stored = gl.allocate_shared_memory(gl.int64, [2 * BUFFERS, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2 * BUFFERS):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(stored.index(i), count=1)
    gl.warp_specialize([
        (_compute, (
            y_desc, z_desc, scale2_ptr, shift2_ptr, scale3_ptr, shift3_ptr, shortcut_scale_ptr, shortcut_shift_ptr,
            norm_scale_ptr, norm_shift_ptr, scale1_ptr, shift1_ptr,
            xs, ws, hs, ys, residuals, full, empty, loaded, stored, n_tiles, tiles_h, tiles_w, n_blocks,
            0, HAS_PROJECTION, BLOCK_WIDTH, STEPS, WIDTH, C_OUT, NEXT_WIDTH, RELU_2, RELU_3, RELU_1, KEEP_SUM,
            BOX_N, BOX_H, BOX_W, STAGES, BUFFERS,
        )),
        (_compute, (
            y_desc, z_desc, scale2_ptr, shift2_ptr, scale3_ptr, shift3_ptr, shortcut_scale_ptr, shortcut_shift_ptr,
            norm_scale_ptr, norm_shift_ptr, scale1_ptr, shift1_ptr,
            xs, ws, hs, ys, residuals, full, empty, loaded, stored, n_tiles, tiles_h, tiles_w, n_blocks,
            1, HAS_PROJECTION, BLOCK_WIDTH, STEPS, WIDTH, C_OUT, NEXT_WIDTH, RELU_2, RELU_3, RELU_1, KEEP_SUM,
            BOX_N, BOX_H, BOX_W, STAGES, BUFFERS,
        )),
        (_load, (
            x_desc, w2_desc, w3_desc, ws_desc, w1_desc, xs, ws, full, empty,
            n_tiles, tiles_h, tiles_w, n_blocks, lead_h, lead_w, BLOCK_WIDTH, KERNEL_H, KERNEL_W, N_CHUNKS,
            IN_PAIRS, SKEW_H, SKEW_W, BOX_N, BOX_H, BOX_W, STAGES,
        )),
        (load_residuals, (
            residual_desc, residuals, loaded, stored, 2 * gl.program_id(0), n_tiles, 2 * gl.num_programs(0),
            tiles_h, tiles_w, 0, 0, BOX_N, BOX_H, BOX_W,
            1 if HAS_PROJECTION else C_OUT // _BLOCK, RESULTS, 1 if HAS_PROJECTION else BUFFERS,
        )),
        (load_residuals, (
            residual_desc, residuals, loaded, stored, 2 * gl.program_id(0), n_tiles, 2 * gl.num_programs(0),
            tiles_h, tiles_w, 1, 1, BOX_N, BOX_H, BOX_W,
            1 if HAS_PROJECTION else C_OUT // _BLOCK, RESULTS, 1 if HAS_PROJECTION else BUFFERS,
        )),
    ], [4, 1, 1, 1], [232, 32, 32, 32])  # fmt: skip
