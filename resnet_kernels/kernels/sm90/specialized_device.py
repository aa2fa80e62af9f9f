"""Device functions of specialized_conv.py: what a producer loads for a tile, and what a consumer multiplies and stores."""

from __future__ import annotations

from .. import elementwise
from .conv_device import _MOST_RATIO
from .gluon_names import (
    async_load,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


@gluon.jit
def box_of(
    tile, tiles_h, tiles_w, tiles_c, BOX_N: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """First image, row, column and output channel of a tile."""
    # Channels first: programs of one box of pixels, the larger operand, run at the same time.
    channel = tile % tiles_c * BLOCK_N
    box = tile // tiles_c
    w = box % tiles_w * BOX_W
    h = box // tiles_w % tiles_h * BOX_H
    n = box // (tiles_w * tiles_h) * BOX_N
    return n, h, w, channel


@gluon.jit
def _taps(at, size, KERNEL: gl.constexpr, SKIP: gl.constexpr):
    """The first of KERNEL taps that is loaded, and the number of these, along one axis.

    Args:
        at: row (column) of the input that the box's first pixel sees through the first tap.
        size: the input's rows (columns).
        KERNEL: the filter's rows (columns).
        SKIP: whether only taps inside of the image are loaded.
    """
    first = 0
    count = KERNEL
    if SKIP:
        first = gl.maximum(-at, 0)
        count = gl.maximum(gl.minimum(size - at, KERNEL) - first, 0)
    return first, count


@gluon.jit
def taps_of(h, w, in_h, in_w, KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr, SKIP: gl.constexpr):
    """Number of taps that `load_tile` loads."""
    _, rows = _taps(h, in_h, KERNEL_H, SKIP)
    _, columns = _taps(w, in_w, KERNEL_W, SKIP)
    return rows * columns


@gluon.jit
def taps_of_tile(
    tile, tiles_h, tiles_w, tiles_c, lead_h, lead_w, in_h, in_w, KERNEL_H: gl.constexpr, KERNEL_W: gl.constexpr,
    SKIP: gl.constexpr, BOX_N: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """`taps_of` a tile by its number."""
    _, h, w, _ = box_of(tile, tiles_h, tiles_w, tiles_c, BOX_N, BOX_H, BOX_W, BLOCK_N)
    return taps_of(h - lead_h, w - lead_w, in_h, in_w, KERNEL_H, KERNEL_W, SKIP)


@gluon.jit
def load_pixels(
    x_desc, ready, x, n, h, w, r, s, c, C_IN: gl.constexpr, IN_PAIRS: gl.constexpr, SKEW_H: gl.constexpr, SKEW_W: gl.constexpr
):  # fmt: skip
    """Loads a box's pixels for the tap (r, s), from input channel c on."""
    if IN_PAIRS:
        # r and s count from an even row and column at or before the first tap.
        row = r + SKEW_H
        column = s + SKEW_W
        at = [n, h + row // 2, row % 2, w + column // 2, c + column % 2 * C_IN]
    else:
        at = [n, h + r, w + s, c]
    async_load(x_desc, at, ready, x.reshape(x_desc.block_shape))


@gluon.jit
def load_tile(
    step,
    x_desc,
    w_desc,
    xs,
    ws,
    full,
    empty,
    n,
    h,
    w,
    channel,
    in_h,
    in_w,
    N_CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    KERNEL_H: gl.constexpr,
    KERNEL_W: gl.constexpr,
    IN_PAIRS: gl.constexpr,
    SKEW_H: gl.constexpr,
    SKEW_W: gl.constexpr,
    SKIP: gl.constexpr,
    RESIDENT: gl.constexpr,
):
    """Loads the steps of a tile, each as soon as its stage is empty; returns the number of the step behind them."""
    BLOCK_K: gl.constexpr = w_desc.block_shape[1]
    first_r, rows = _taps(h, in_h, KERNEL_H, SKIP)
    first_s, columns = _taps(w, in_w, KERNEL_W, SKIP)
    for r in range(first_r, first_r + rows):
        for s in range(first_s, first_s + columns):
            for chunk in range(N_CHUNKS):
                c = chunk * BLOCK_K
                stage = step % STAGES
                ready = full.index(stage)
                mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                if RESIDENT:
                    mbarrier.expect(ready, x_desc.block_type.nbytes)
                else:
                    mbarrier.expect(ready, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
                    k = (r * KERNEL_W + s) * (N_CHUNKS * BLOCK_K) + c
                    async_load(w_desc, [channel, k], ready, ws.index(stage))
                load_pixels(
                    x_desc, ready, xs.index(stage), n, h, w, r, s, c, N_CHUNKS * BLOCK_K, IN_PAIRS, SKEW_H, SKEW_W
                )  # fmt: skip
                step += 1
    return step


@gluon.jit
def multiply_add(
    acc, step, n_steps, xs, ws, full, empty, done, ADDS: gl.constexpr, STAGES: gl.constexpr, RESIDENT: gl.constexpr
):  # fmt: skip
    """acc (0 unless ADDS) + x * w over the next n_steps steps; and the number of the step behind them.

    Arrives at the mbarrier `done`, if there is one, as soon as the last product has begun.
    """
    for k in range(n_steps):
        stage = step % STAGES
        weight = ws.index(k if RESIDENT else stage)
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        product = warpgroup_mma(
            xs.index(stage), weight.permute((1, 0)), warpgroup_mma_init(acc), use_acc=ADDS or k > 0, is_async=True
        )  # fmt: skip
        # One product stays in flight: the stage of the one before it is empty now.
        acc = warpgroup_mma_wait(1, deps=(product,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
        step += 1
    if done is not None:
        mbarrier.arrive(done)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=n_steps > 0)
    return acc, step


@gluon.jit
def _load_vector(pointer, offs, mask, other: gl.constexpr):
    return gl.load(pointer + offs, mask=mask, other=other).to(gl.float32)


@gluon.jit
def scale_ratio(scale_ptr, shortcut_scale_ptr, channel, c_out, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """scale / shortcut_scale of a tile's channels, in LAYOUT; and whether conv_device.must_park one of them."""
    # A division takes some twenty instructions. In LAYOUT each thread would have a quarter of the channels to divide.
    BLOCK: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    offs = channel + gl.arange(0, BLOCK_N, layout=BLOCK)
    mask = offs < c_out
    scale = gl.full((BLOCK_N,), 1.0, gl.float32, layout=BLOCK)
    shortcut_scale = scale
    if scale_ptr is not None:
        scale = _load_vector(scale_ptr, offs, mask, 1.0)
    if shortcut_scale_ptr is not None:
        shortcut_scale = _load_vector(shortcut_scale_ptr, offs, mask, 1.0)
    ratio = gl.div_rn(scale, shortcut_scale)
    size = gl.abs(ratio)
    # NaN fails every comparison.
    will_do = ((size >= 1 / _MOST_RATIO) & (size <= _MOST_RATIO)) | ((scale == 0) & (ratio == 0))
    return gl.convert_layout(ratio, LAYOUT), gl.min(will_do.to(gl.int32), 0) == 0


@gluon.jit
def _parked_at(
    parked_ptr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, BLOCK_N: gl.constexpr, FIRST: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    # int64: an address is then one register and a constant, where the sign of an int32 sum would have to be extended.
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)).to(gl.int64)
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)).to(gl.int64)
    return parked_ptr + FIRST + row[:, None] * BLOCK_N + column[None, :]


@gluon.jit
def halves(acc):
    """The left and the right half of a tile's channels."""
    return acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute(0, 2, 1).split()


@gluon.jit
def park(
    acc, parked_ptr, scale_ptr, channel, c_out, BLOCK_N: gl.constexpr, PARTS: gl.constexpr, FIRST: gl.constexpr = 0
):  # fmt: skip
    """Stores acc * scale of a tile, or of its channels from FIRST on, in memory, in PARTS pieces.

    `finish` loads them in the same pieces, so each thread finds its own numbers, and nobody has to wait for others.
    """
    COLUMNS: gl.constexpr = acc.shape[1]
    if PARTS == 1:
        LAYOUT: gl.constexpr = acc.type.layout
        if scale_ptr is not None:
            offs = channel + FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
            acc *= _load_vector(scale_ptr, offs, offs < c_out, 1.0)[None, :]
        gl.store(_parked_at(parked_ptr, acc.shape[0], COLUMNS, BLOCK_N, FIRST, LAYOUT), acc)
    else:
        left, right = halves(acc)
        park(left, parked_ptr, scale_ptr, channel, c_out, BLOCK_N, PARTS // 2, FIRST)
        park(right, parked_ptr, scale_ptr, channel, c_out, BLOCK_N, PARTS // 2, FIRST + COLUMNS // 2)


@gluon.jit
def finish(
    acc,  # (pixels, channels of the part)
    out,  # the tile in shared memory, (pixels, channels); with HAS_RESIDUAL it holds the residual
    scale_ptr,
    bias_ptr,
    shortcut_bias_ptr,
    slopes_ptr,
    parked_ptr,
    parked,  # whether the first sums, with their scale, are parked
    c_out,
    channel,
    HAS_RESIDUAL: gl.constexpr,
    ACT: gl.constexpr,
    SLOPE: gl.constexpr,
    PARTS: gl.constexpr,
    FIRST: gl.constexpr = 0,  # the part's first channel in the tile
):
    """Applies the epilogue to a tile, or a part of it, in PARTS pieces, and writes it to shared memory."""
    COLUMNS: gl.constexpr = acc.shape[1]
    if PARTS == 1:
        LAYOUT: gl.constexpr = acc.type.layout
        offs = channel + FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        mask = offs < c_out
        if scale_ptr is not None:
            acc *= _load_vector(scale_ptr, offs, mask, 0.0)[None, :]
        if parked_ptr is not None:
            if parked:
                acc += gl.load(_parked_at(parked_ptr, acc.shape[0], COLUMNS, out.shape[1], FIRST, LAYOUT))
        if bias_ptr is not None:
            acc += _load_vector(bias_ptr, offs, mask, 0.0)[None, :]
        if shortcut_bias_ptr is not None:
            acc += _load_vector(shortcut_bias_ptr, offs, mask, 0.0)[None, :]
        part = out.slice(FIRST, COLUMNS, dim=1)
        if HAS_RESIDUAL:
            acc += part.load(LAYOUT).to(gl.float32)
        acc = elementwise.activate(acc, ACT, elementwise.slope_of(slopes_ptr, SLOPE, offs, mask))
        part.store(acc.to(out.dtype))
    else:
        left, right = halves(acc)
        finish(
            left, out, scale_ptr, bias_ptr, shortcut_bias_ptr, slopes_ptr, parked_ptr, parked, c_out, channel,
            HAS_RESIDUAL, ACT, SLOPE, PARTS // 2, FIRST,
        )  # fmt: skip
        finish(
            right, out, scale_ptr, bias_ptr, shortcut_bias_ptr, slopes_ptr, parked_ptr, parked, c_out, channel,
            HAS_RESIDUAL, ACT, SLOPE, PARTS // 2, FIRST + COLUMNS // 2,
        )  # fmt: skip
