"""Device functions of both chains with specialized warps: how a residual comes, and how a block of channels leaves."""

from __future__ import annotations

from .gluon_names import async_load, async_store, fence_async_shared, gl, gluon, mbarrier, store_wait
from .specialized_device import box_of

# Channels that are worked on at a time.
_BLOCK = gl.constexpr(64)


@gluon.jit
def load_residuals(
    residual_desc, ys, loaded, stored, first, end, step, tiles_h, tiles_w, WHICH: gl.constexpr, OFFSET: gl.constexpr,
    BOX_N: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr,
    RESIDUALS: gl.constexpr, RESULTS: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """One warp: the residual of each box of a consumer, block by block, into the buffers that y will take.

    The boxes are those OFFSET behind each step-th one from `first` to `end`. With a projection it is the projection's input, a
    block a box. A box's last RESULTS blocks are z's: they get no residual.
    """
    use = 0
    for tile in range(first, end, step):
        n, h, w, _ = box_of(tile + OFFSET, tiles_h, tiles_w, 1, BOX_N, BOX_H, BOX_W, _BLOCK)
        for j in range(RESIDUALS + RESULTS):
            buffer = use % BUFFERS
            ready = loaded.index(WHICH * BUFFERS + buffer)
            mbarrier.wait(stored.index(WHICH * BUFFERS + buffer), (use // BUFFERS & 1) ^ 1)
            if j < RESIDUALS:
                mbarrier.expect(ready, residual_desc.block_type.nbytes)
                async_load(residual_desc, [n, h, w, j * _BLOCK], ready, ys.index(WHICH * BUFFERS + buffer))
            else:
                mbarrier.arrive(ready)
            use += 1


@gluon.jit
def affine(acc, scale_ptr, shift_ptr, first, n):
    """acc * scale + shift, with the vectors' elements from `first` on; of n channels, others are 0."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, acc.type.layout)
    offs = first + gl.arange(0, acc.shape[1], layout=LAYOUT)
    if scale_ptr is not None:
        acc *= gl.load(scale_ptr + offs, mask=offs < n, other=0.0).to(gl.float32)[None, :]
    if shift_ptr is not None:
        acc += gl.load(shift_ptr + offs, mask=offs < n, other=0.0).to(gl.float32)[None, :]
    return acc


@gluon.jit
def store_block(
    values, desc, ys, stored, use, n, h, w, channel, WHICH: gl.constexpr, BUFFERS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Stores a block from its buffer, and gives away the buffer that was stored from BUFFERS - 1 blocks ago."""
    out = ys.index(WHICH * BUFFERS + use % BUFFERS)
    out.reshape(values.shape).store(values)
    fence_async_shared()
    async_store(desc, [n, h, w, channel], out)
    store_wait(BUFFERS - 1)
    if HAS_RESIDUAL:
        mbarrier.arrive(stored.index(WHICH * BUFFERS + (use + 1) % BUFFERS), pred=use >= BUFFERS - 1)
