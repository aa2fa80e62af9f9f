"""Stem of a ResNet for Hopper with specialized warps: stem.py's result, bit for bit but for the order of sums.

stem.py's kernel loads a window's row at a time, eight bytes a thread, so each byte of the packed image comes 14 times. Here a
row of the packed image comes once, by TMA, four copies of it, and the tensor cores find all its windows in them:

- A cell is 16 bytes: two pixels of four channels. A row of the window of column c of the convolution is the cells c to c + 3.
  So a row that lies in shared memory four times, each time shifted by a cell, is the matrix of all windows, [cells, 4 x 8], as
  wgmma reads it without a swizzle: groups of 8 cells, 128 bytes each, follow each other, and so do the copies.
- A window's eighth pixel has weights of zero, but must be zero itself: 0 * inf is NaN. So the fourth copy is loaded through a
  descriptor that ends after the first pixel of each cell, and TMA fills the rest of its box with zeros.
- Two warps load, each a ring of rows for one of two consumers. A consumer walks down a strip. A row of the convolution is the
  sum of seven products, of weights, [channels, 32], and a row's windows, [128, 32] transposed. It needs two rows of the image
  that the row above did not need.

The pool's vertical maximum is between rows of sums in registers. Then they are rounded and transposed, in shared memory, since
channels are next to each other in y. The horizontal maximum and ReLU come last.

Cost: as in stem.py, but L2 provides each byte of the packed image 4 times instead of 14. At 224x224 products have 128 columns
for 112, and 32 elements for 21: the tensor cores do 1.74 times the multiplications of the definition. Nothing of it has been
measured on a GPU: only a measured table chooses it (`tune` offers it). tests/helpers/gluon_interpreter.py runs this file's own
source; Triton's interpreter has no Gluon.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import elementwise, launching
from ..layouts import contiguous
from ..target import multiprocessors
from .gluon_names import (
    async_load,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from .specialized_layout import STEM_BOX, STEM_CELL, STEM_COLUMNS, plan_stem
from .stem import pack

_COLUMNS, _CELL, _BOX = gl.constexpr(STEM_COLUMNS), gl.constexpr(STEM_CELL), gl.constexpr(STEM_BOX)
# Copies of a row in shared memory, rows of a window.
_COPIES, _TAPS = gl.constexpr(4), gl.constexpr(7)


@gluon.jit
def _strip(item, tiles_w, segments, per_image, rows, out_h, pooled_h):
    """Image, strip and first pooled row of an item of work; its first row of the convolution, and the one behind the last."""
    first = item // tiles_w % segments * rows
    end = gl.minimum(first + rows, pooled_h)
    # Of a segment's first window the row above is computed again.
    return item // per_image, item % tiles_w, first, gl.maximum(2 * first - 1, 0), gl.minimum(2 * end, out_h)


@gluon.jit
def _load(
    rows_desc, last_desc, w_desc, xs, ws, full, empty, ws_full,
    items, tiles_w, segments, per_image, rows, out_h, pooled_h, packed_h, WHICH: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One warp: the packed rows of a consumer's strips, in order; the first one also loads the weights."""
    WHOLE: gl.constexpr = rows_desc.layout
    PADDED: gl.constexpr = last_desc.layout
    if WHICH == 0:
        mbarrier.expect(ws_full, _TAPS * w_desc.block_type.nbytes)
        for r in range(_TAPS):
            async_load(w_desc, [0, r * (_COPIES * _CELL)], ws_full, ws.index(r))
    use = 0
    for item in range(gl.program_id(0) + WHICH * gl.num_programs(0), items, 2 * gl.num_programs(0)):
        n, tile, _, top, bottom = _strip(item, tiles_w, segments, per_image, rows, out_h, pooled_h)
        cell = tile * (_COLUMNS - 2)
        first = n * packed_h + 2 * top
        for row in range(first, first + 2 * (bottom - top) + _TAPS - 2):
            slot = WHICH * ROWS + use % ROWS
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), (use // ROWS & 1) ^ 1)
            mbarrier.expect(ready, _COPIES * _COLUMNS * _CELL * 2)
            copies = reinterpret(xs.index(slot), xs.dtype, [_COPIES, 1, _COLUMNS * _CELL // _BOX, _BOX], WHOLE)
            for copy in gl.static_range(_COPIES - 1):
                at = (cell + copy) * _CELL
                async_load(rows_desc, [row, at // _BOX, at % _BOX], ready, copies.index(copy))
            copies = reinterpret(xs.index(slot), xs.dtype, [_COPIES, 1, _COLUMNS, _CELL], PADDED)
            async_load(last_desc, [row, cell + _COPIES - 1, 0], ready, copies.index(_COPIES - 1))
            use += 1


@gluon.jit
def _conv_row(use, xs, ws, full, empty, scale, shift, WHICH: gl.constexpr, ROWS: gl.constexpr):
    """Row of the convolution with BN, (channels, columns), from the ring's rows `use` to use + 6; and the next one's `use`."""
    CHANNELS: gl.constexpr = ws.shape[1]
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, _COLUMNS, 16])
    acc = warpgroup_mma_init(gl.zeros((CHANNELS, _COLUMNS), gl.float32, layout=L))
    for r in gl.static_range(_TAPS):
        slot = WHICH * ROWS + (use + r) % ROWS
        # The others are there: the row of the convolution above needed them.
        if r >= _TAPS - 2:
            mbarrier.wait(full.index(slot), (use + r) // ROWS & 1)
        acc = warpgroup_mma(ws.index(r), xs.index(slot).permute((1, 0)), acc, use_acc=r > 0, is_async=True)
    row = warpgroup_mma_wait(0, deps=(acc,))
    for r in gl.static_range(2):
        mbarrier.arrive(empty.index(WHICH * ROWS + (use + r) % ROWS))
    return row * scale[:, None] + shift[:, None], use + 2


@gluon.jit
def _load_vector(pointer, offs, n, default: gl.constexpr):
    if pointer is None:
        return gl.full(offs.shape, default, gl.float32, layout=offs.type.layout)
    else:
        return gl.load(pointer + offs, mask=offs < n, other=0.0).to(gl.float32)


@gluon.jit
def _compute(
    scale_ptr, shift_ptr, y_ptr, xs, ws, ys, full, empty, ws_full,
    items, tiles_w, segments, per_image, rows, out_h, out_w, pooled_h, pooled_w, c_out, y_image, y_row,
    WHICH: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One consumer: every second strip, from WHICH on."""
    DTYPE: gl.constexpr = xs.dtype
    CHANNELS: gl.constexpr = ws.shape[1]
    LANES: gl.constexpr = _COLUMNS // 2
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, _COLUMNS, 16])
    # To store: 16 bytes a thread, so a warp stores four whole pixels.
    Y: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    PAIRS: gl.constexpr = gl.BlockedLayout([2, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    columns = ys.index(WHICH)
    mbarrier.wait(ws_full, 0)
    channel = gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, L))
    scale = _load_vector(scale_ptr, channel, c_out, 1.0)
    shift = _load_vector(shift_ptr, channel, c_out, 0.0)
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(1, Y))
    offs_c = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, Y))
    # The first lane takes its own column: it lies in the first window anyway, or the lane is not stored.
    left_lane = gl.maximum(lane - 1, 0)[:, None] + gl.zeros_like(offs_c)[None, :]
    use = 0
    for item in range(gl.program_id(0) + WHICH * gl.num_programs(0), items, 2 * gl.num_programs(0)):
        n, tile, first, top, bottom = _strip(item, tiles_w, segments, per_image, rows, out_h, pooled_h)
        # Strips overlap by a pooled column, which only the left one of two stores.
        j = tile * (LANES - 1) + lane
        has_odd = (2 * j + 1 < out_w)[:, None]
        to = y_ptr + gl.cast(n, gl.int64) * y_image + j[:, None] * c_out + offs_c[None, :]
        mask = ((j < pooled_w) & (lane >= gl.minimum(tile, 1)))[:, None] & (offs_c < c_out)[None, :]
        for r in gl.static_range(_TAPS - 2):
            mbarrier.wait(full.index(WHICH * ROWS + (use + r) % ROWS), (use + r) // ROWS & 1)
        highest = gl.full((CHANNELS, _COLUMNS), float("-inf"), gl.float32, layout=L)
        for h in range(top, bottom):
            row, use = _conv_row(use, xs, ws, full, empty, scale, shift, WHICH, ROWS)
            highest = elementwise.maximum(highest, row)
            # An odd row ends a window, and begins the next one. The last row may be even.
            if (h >= 2 * first) & ((h % 2 == 1) | (h == bottom - 1)):
                columns.store(highest.to(DTYPE).permute((1, 0)))
                even, odd = columns.load(PAIRS).reshape([LANES, 2, CHANNELS]).permute((0, 2, 1)).split()
                even = gl.convert_layout(even, Y)
                odd = gl.convert_layout(odd, Y)
                # The last column may be even, too. Later lanes are not stored.
                odd = gl.where(has_odd, odd, float("-inf")).to(DTYPE)
                left = gl.gather(odd, left_lane, 0)
                y = elementwise.maximum(elementwise.maximum(even, odd), elementwise.maximum(left, gl.zeros_like(left)))
                gl.store(to + h // 2 * y_row, y, mask=mask)
            if h % 2 == 1:
                highest = row
        # The last window's other rows.
        for r in gl.static_range(_TAPS - 2):
            mbarrier.arrive(empty.index(WHICH * ROWS + (use + r) % ROWS))
        use += _TAPS - 2


# A segment that is known to be the only one of its image makes Triton 3.6.0 compile another loop, with spills.
@gluon.jit(do_not_specialize=["tiles_w", "segments", "per_image", "rows"])
def _specialized_stem_kernel(
    rows_desc,  # (n * packed_h, 4 * packed_w), boxes of 256 elements of a row
    last_desc,  # (n * packed_h, packed_w / 2, 4), boxes of (1, 128, 8): the first pixel of each cell, and zeros
    w_desc,  # (BLOCK_C, 7 * 32)
    scale_ptr,  # (c_out,) or None
    shift_ptr,  # (c_out,) or None
    y_ptr,  # (n, pooled_h, pooled_w, c_out)
    items,  # strips of segments of images
    tiles_w,
    segments,
    per_image,  # items of an image
    rows,  # pooled rows in a segment
    packed_h,
    out_h,  # of the convolution
    out_w,
    pooled_h,
    pooled_w,
    c_out,
    y_image,  # elements of y from an image to the next one
    y_row,
    ROWS: gl.constexpr,  # of the packed image that a consumer holds
):
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    # Offset in the order of memory: 8 elements, 128 cells, 4 copies. As a matrix: a cell's row, and 8 columns for each copy.
    WINDOWS: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [8, 0], [16, 0], [32, 0], [64, 0], [0, 8], [0, 16]],
        alignment=128,
    )
    xs = gl.allocate_shared_memory(w_desc.dtype, [2 * ROWS, _COLUMNS, _COPIES * _CELL], WINDOWS)
    ws = gl.allocate_shared_memory(w_desc.dtype, [_TAPS, w_desc.block_shape[0], _COPIES * _CELL], w_desc.layout)
    ys = gl.allocate_shared_memory(w_desc.dtype, [2, _COLUMNS, w_desc.block_shape[0]], gl.NVMMASharedLayout(128, 16))
    full = gl.allocate_shared_memory(gl.int64, [2 * ROWS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [2 * ROWS, 1], BARRIER)
    ws_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    for i in gl.static_range(2 * ROWS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(ws_full, count=1)
    gl.warp_specialize([
        (_compute, (
            scale_ptr, shift_ptr, y_ptr, xs, ws, ys, full, empty, ws_full,
            items, tiles_w, segments, per_image, rows, out_h, out_w, pooled_h, pooled_w, c_out, y_image, y_row, 0, ROWS,
        )),
        (_compute, (
            scale_ptr, shift_ptr, y_ptr, xs, ws, ys, full, empty, ws_full,
            items, tiles_w, segments, per_image, rows, out_h, out_w, pooled_h, pooled_w, c_out, y_image, y_row, 1, ROWS,
        )),
        (_load, (
            rows_desc, last_desc, w_desc, xs, ws, full, empty, ws_full,
            items, tiles_w, segments, per_image, rows, out_h, pooled_h, packed_h, 0, ROWS,
        )),
        (_load, (
            rows_desc, last_desc, w_desc, xs, ws, full, empty, ws_full,
            items, tiles_w, segments, per_image, rows, out_h, pooled_h, packed_h, 1, ROWS,
        )),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


def launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Computes max_pool(relu(conv(x) * scale + shift)). Operands and result: stem.launch."""
    todo = plan_stem(tuple(x.shape), weight.shape[0], multiprocessors(x.device))
    y = torch.empty(todo.y_shape, dtype=weight.dtype, device=x.device, memory_format=torch.channels_last)
    packed, packed_weight = pack(x, weight, mean, std, todo.packing)
    tensors = dict(
        rows_desc=packed, last_desc=packed, w_desc=packed_weight,
        scale_ptr=contiguous(scale), shift_ptr=contiguous(shift), y_ptr=y,
    )  # fmt: skip
    launching.launch(
        _specialized_stem_kernel, (todo.programs,), x.device, tensors, todo.fixed, todo.prepared, todo.views,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y
