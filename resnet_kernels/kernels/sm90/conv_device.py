"""Device functions of conv.py for one tile: multiply and add, park sums in memory, add them up, store.

Sums are [BLOCK_N channels, BLOCK_M pixels] fp32 in registers, so that the pixels are the right operand: Triton multiplies a
reshaped right operand where TMA left it, and copies a left one to registers first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import elementwise

# Beyond this ratio the smaller of two scales can't be factored out: its sums, so much larger than the other's, might overflow.
_MOST_RATIO = tl.constexpr(2.0**32)


@triton.jit
def multiply_add(
    acc,
    x_desc,
    w_desc,
    n,
    h,  # row of the input, a pair of rows if IN_PAIRS, that the box's first row sees through the first tap
    w,
    channel,
    N_CHUNKS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KERNEL_W: tl.constexpr = 1,
    ROWS: tl.constexpr = 1,  # rows and columns of taps in this loop
    COLUMNS: tl.constexpr = 1,
    FIRST_R: tl.constexpr = 0,  # the loop's first tap in the weight, and the step from one tap to the next
    FIRST_S: tl.constexpr = 0,
    TAP_STEP: tl.constexpr = 1,
    RAGGED: tl.constexpr = False,
    IN_PAIRS: tl.constexpr = False,
    SKEW_H: tl.constexpr = 0,
    SKEW_W: tl.constexpr = 0,
    SKIP: tl.constexpr = False,  # skip taps outside of the image: the box is one pixel of many images
    in_h=0,  # read if SKIP
    in_w=0,
    part=0,
    SPLIT_K: tl.constexpr = 1,
):
    """acc + x * w over a rectangle of taps and all input channels, or over the part-th of SPLIT_K shares of these steps.

    The defaults are those of a 1x1 convolution.
    """
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    if SKIP:
        skipped_r = tl.maximum(-h, 0)
        skipped_s = tl.maximum(-w, 0)
        columns = tl.maximum(tl.minimum(in_w - w, COLUMNS) - skipped_s, 0)
        steps = tl.maximum(tl.minimum(in_h - h, ROWS) - skipped_r, 0) * columns * N_CHUNKS
    else:
        skipped_r = 0
        skipped_s = 0
        columns = COLUMNS
        steps = ROWS * COLUMNS * N_CHUNKS
    for k in range(steps * part // SPLIT_K, steps * (part + 1) // SPLIT_K):
        tap = k // N_CHUNKS
        chunk = k % N_CHUNKS
        c = chunk * BLOCK_K
        r = tap // columns + skipped_r
        s = tap % columns + skipped_s
        tap = (FIRST_R + r * TAP_STEP) * KERNEL_W + FIRST_S + s * TAP_STEP
        if IN_PAIRS:
            # r and s count from an even row and column at or before the first tap: no remainder of a negative number is taken.
            r += SKEW_H
            s += SKEW_W
            column = s % 2 * (N_CHUNKS * BLOCK_K)
            x = x_desc.load([n, h + r // 2, r % 2, w + s // 2, column + c])
        else:
            x = x_desc.load([n, h + r, w + s, c])
        x = x.reshape(BLOCK_M, BLOCK_K)
        if RAGGED:
            weight = w_desc.load([channel, tap, c]).reshape(BLOCK_N, BLOCK_K)
        else:
            weight = w_desc.load([channel, tap * (N_CHUNKS * BLOCK_K) + c])
        if UPCAST:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(weight, x.T, acc)
    return acc


@triton.jit
def _multiply_add_parity(
    acc,
    x_desc,  # every second row and column of x, from row PARITY_H and column PARITY_W on
    w_desc,
    n,
    h,
    w,
    channel,
    in_h,
    in_w,
    PARITY_H: tl.constexpr,
    PARITY_W: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    N_CHUNKS: tl.constexpr,
    RAGGED: tl.constexpr,
    SKEW_H: tl.constexpr,
    SKEW_W: tl.constexpr,
    SKIP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + x * w over the taps that see one parity of rows and columns."""
    FIRST_R: tl.constexpr = (SKEW_H + PARITY_H) % 2
    FIRST_S: tl.constexpr = (SKEW_W + PARITY_W) % 2
    ROWS: tl.constexpr = (KERNEL_H - FIRST_R + 1) // 2
    COLUMNS: tl.constexpr = (KERNEL_W - FIRST_S + 1) // 2
    if ROWS * COLUMNS > 0:
        acc = multiply_add(
            acc, x_desc, w_desc, n, h + SKEW_H * (1 - PARITY_H), w + SKEW_W * (1 - PARITY_W), channel,
            N_CHUNKS, UPCAST, BLOCK_K, KERNEL_W, ROWS, COLUMNS, FIRST_R, FIRST_S, TAP_STEP=2, RAGGED=RAGGED, SKIP=SKIP,
            in_h=(in_h + 1 - PARITY_H) // 2, in_w=(in_w + 1 - PARITY_W) // 2,
        )  # fmt: skip
    return acc


@triton.jit
def convolve(
    x_descs,  # of x and three times None, or of x's four parities
    w_desc,
    n,
    h,
    w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    N_CHUNKS: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    SKEW_H: tl.constexpr,
    SKEW_W: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    channel=0,
    in_h=0,
    in_w=0,
    part=0,
    SPLIT_K: tl.constexpr = 1,
    RAGGED: tl.constexpr = False,
    SKIP: tl.constexpr = False,
):
    """A box's sums. With four parities, stride 2 is four convolutions at stride 1, each with every second tap."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if x_descs[1] is None:
        acc = multiply_add(
            acc, x_descs[0], w_desc, n, h, w, channel, N_CHUNKS, UPCAST, BLOCK_K, KERNEL_W, ROWS=KERNEL_H, COLUMNS=KERNEL_W,
            RAGGED=RAGGED, IN_PAIRS=IN_PAIRS, SKEW_H=SKEW_H, SKEW_W=SKEW_W, SKIP=SKIP, in_h=in_h, in_w=in_w,
            part=part, SPLIT_K=SPLIT_K,
        )  # fmt: skip
    else:
        for parity in tl.static_range(4):
            acc = _multiply_add_parity(
                acc, x_descs[parity], w_desc, n, h, w, channel, in_h, in_w,
                parity // 2, parity % 2, KERNEL_H, KERNEL_W, N_CHUNKS, RAGGED, SKEW_H, SKEW_W, SKIP, UPCAST, BLOCK_K,
            )  # fmt: skip
    return acc


@triton.jit
def prefetch_weight(
    w_ptr, channel, c_out, part, STEPS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Asks L2 for the weights of the part-th of SPLIT_K shares of a tile's STEPS steps: a row of them for each channel.

    Another launch may still write them. All writes go to L2, so what is read from there later is right.
    """
    first = STEPS * part // SPLIT_K
    steps = STEPS * (part + 1) // SPLIT_K - first
    row = tl.minimum(channel + tl.arange(0, BLOCK_N), c_out - 1)
    row_ptr = w_ptr + row.to(tl.int64) * (STEPS * BLOCK_K) + first * BLOCK_K
    size = tl.zeros_like(row) + steps * (BLOCK_K * w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    if steps > 0:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [row_ptr, size], tl.int32, False, 1
        )  # fmt: skip


@triton.jit
def _parked_ptrs(
    parked_ptr, n_channels: tl.constexpr, n_pixels: tl.constexpr, BLOCK_M: tl.constexpr, FIRST: tl.constexpr = 0
):
    channel = tl.arange(0, n_channels)
    pixel = FIRST + tl.arange(0, n_pixels)
    return parked_ptr + channel[:, None] * BLOCK_M + pixel[None, :]


@triton.jit
def park(acc, parked_ptr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr, FIRST: tl.constexpr = 0):
    """Stores the sums of a tile, or of its pixels from FIRST on, in memory, in PARTS pieces."""
    if PARTS == 1:
        tl.store(_parked_ptrs(parked_ptr, acc.shape[0], acc.shape[1], BLOCK_M, FIRST), acc)
    else:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1).split()
        park(left, parked_ptr, BLOCK_M, PARTS // 2, FIRST)
        park(right, parked_ptr, BLOCK_M, PARTS // 2, FIRST + HALF)


@triton.jit
def arrives_last(acc, parked_ptr, counter_ptr, share, SPLIT_K: tl.constexpr, PARTS: tl.constexpr):
    """Parks a share's sums and returns whether it is the last of its tile, which sets the counter to zero again."""
    park(acc, parked_ptr + share * (acc.shape[0] * acc.shape[1]), acc.shape[1], PARTS)
    # All threads park before one of them counts.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr + share // SPLIT_K, 1, sem="acq_rel") == SPLIT_K - 1
    if is_last:
        tl.store(counter_ptr + share // SPLIT_K, 0)
    return is_last


@triton.jit
def add_up(parked_ptr, N_SUMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sum of parked tiles that follow each other in memory, always in this order."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for i in range(N_SUMS):
        # .cg: other multiprocessors wrote the sums, and this one's L1 may hold older values.
        acc += tl.load(
            _parked_ptrs(parked_ptr + i * (BLOCK_N * BLOCK_M), BLOCK_N, BLOCK_M, BLOCK_M), cache_modifier=".cg"
        )  # fmt: skip
    return acc


@triton.jit
def load_scales(scale_ptr, shortcut_scale_ptr, channel, c_out, BLOCK_N: tl.constexpr):
    """Both scales of a tile with a merged shortcut; 1 for None."""
    offs_c = channel + tl.arange(0, BLOCK_N)
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    shortcut_scale = scale
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_c, mask=offs_c < c_out, other=1.0).to(tl.float32)
    if shortcut_scale_ptr is not None:
        shortcut_scale = tl.load(shortcut_scale_ptr + offs_c, mask=offs_c < c_out, other=1.0).to(tl.float32)
    return scale, shortcut_scale


@triton.jit
def must_park(scale_ptr, shortcut_scale_ptr, channel, c_out, BLOCK_N: tl.constexpr):
    """Whether a channel of a tile has a scale / shortcut_scale of inf or NaN, or one that _MOST_RATIO excludes."""
    scale, shortcut_scale = load_scales(scale_ptr, shortcut_scale_ptr, channel, c_out, BLOCK_N)
    ratio = tl.div_rn(scale, shortcut_scale)
    size = tl.abs(ratio)
    # NaN fails every comparison.
    will_do = ((size >= 1 / _MOST_RATIO) & (size <= _MOST_RATIO)) | ((scale == 0) & (ratio == 0))
    return tl.min(will_do.to(tl.int32), 0) == 0


@triton.jit
def store_part(
    acc,  # (BLOCK_N channels, pixels of the part)
    scale_ptr,
    bias_ptr,
    residual_desc,
    y_desc,
    c_out,
    n,
    h,
    w,
    channel,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    PARTS: tl.constexpr,
    FIRST: tl.constexpr = 0,  # the part's first pixel in the box
    shortcut_bias_ptr=None,
    parked_ptr=None,
    slopes_ptr=None,
):
    """Applies the epilogue to a tile, or a part of it, and stores it, in PARTS pieces."""
    if PARTS == 1:
        offs_c = channel + tl.arange(0, acc.shape[0])
        mask_c = offs_c < c_out
        if scale_ptr is not None:
            acc *= tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None]
        if parked_ptr is not None:
            acc += tl.load(_parked_ptrs(parked_ptr, acc.shape[0], acc.shape[1], BLOCK_M, FIRST))
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None]
        if shortcut_bias_ptr is not None:
            acc += tl.load(shortcut_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None]
        at = [n + FIRST // (BOX_H * BOX_W), h + FIRST // BOX_W % BOX_H, w + FIRST % BOX_W, channel]
        acc = acc.T
        if residual_desc is not None:
            acc += residual_desc.load(at).reshape(acc.shape).to(tl.float32)
        acc = elementwise.activate(acc, ACT, elementwise.slope_of(slopes_ptr, SLOPE, offs_c, mask_c))
        y_desc.store(at, acc.to(y_desc.dtype).reshape(y_desc.block_shape))
    else:
        # In parts the residual takes less shared memory: at 128x128 a program has 104 KiB, not 128, and two fit on an SM.
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1).split()
        store_part(
            left, scale_ptr, bias_ptr, residual_desc, y_desc, c_out, n, h, w, channel,
            ACT, SLOPE, BLOCK_M, BOX_H, BOX_W, PARTS // 2, FIRST, shortcut_bias_ptr, parked_ptr, slopes_ptr,
        )  # fmt: skip
        store_part(
            right, scale_ptr, bias_ptr, residual_desc, y_desc, c_out, n, h, w, channel,
            ACT, SLOPE, BLOCK_M, BOX_H, BOX_W, PARTS // 2, FIRST + HALF, shortcut_bias_ptr, parked_ptr, slopes_ptr,
        )  # fmt: skip
