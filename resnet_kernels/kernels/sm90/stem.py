"""Stem of a ResNet: max_pool3x3/2(relu(conv7x7/2(x) * scale + shift)) in one kernel, after one that packs the image.

Packing: the image, of any dtype and layout, is normalized if asked to. It becomes rows of pixels of four channels in the
compute dtype; the fourth channel and the padding are zero. A row of a 7x7/2 window is then 7 pixels x 4 channels = 28 elements
that follow each other in memory, taken as 32, and the next window begins 16 bytes later. Elements 29 to 32 are the next
pixel's. They are read as zeros, like their weights, because its inf or NaN would spread (0 * inf is NaN).

Convolution and pool: a program owns a strip of pooled columns and walks down their rows. It computes even and odd columns of
the convolution separately, as channels x windows. So the pool's vertical maximum is elementwise, with the row above carried
along. Its horizontal maximum is elementwise too, except for the left neighbor's odd column: one exchange a pooled row. BN
comes before the maximum (its scale may be negative), ReLU after it. No row of the convolution ever reaches memory.

Cost: x once, the packed image twice (8 bytes a pixel), y once. At 224x224 in bf16 that is 1.5 MB an image, where eager moves
10. L2 provides 7 rows of 64 bytes for each pixel of the convolution. On an H200 the stem takes 0.65 ms for 256 images of
224x224 in bf16; separate convolution and pool take 2.1 ms. tests/compile_kernels.py prints registers and shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import elementwise, launching, limits
from ..layouts import contiguous
from ..target import dot_needs_fp32, multiprocessors
from .stem_layout import BLOCK_C, PACK_BLOCK, PACK_WARPS, Packing, StemConfig, plan

# Elements of a row of a window, 8 pixels x 4 channels, and of its 7 rows.
_WINDOW = tl.constexpr(32)
_FILTER = tl.constexpr(7 * 32)
# Layouts and normalizations of images for which a plan keeps the packing's launches.
_MOST_LAYOUTS = 16


@triton.jit
def _channel(x_ptr, mask, mean, std, NORMALIZE: tl.constexpr, UNIT: tl.constexpr):
    """Loads pixels of one channel, normalized; 0 where masked."""
    v = tl.load(x_ptr, mask=mask, other=0).to(tl.float32)
    if NORMALIZE:
        # div_rn rounds as PyTorch does; Triton's plain division does not.
        if UNIT:
            v = tl.div_rn(v, tl.zeros_like(v) + 255.0)
        v = tl.div_rn(v - mean, tl.zeros_like(v) + std)
    # The padding is zero after normalization.
    return tl.where(mask, v, 0.0)


@triton.jit
def _pack_kernel(
    x_ptr,  # (n, 3, in_h, in_w), any strides
    packed_ptr,  # (n, packed_h, packed_w, 4)
    w_ptr,  # (c_out, 3, 7, 7), any strides
    packed_w_ptr,  # (BLOCK_C, 7, 8, 4)
    image_programs,
    blocks_per_image,
    in_h,
    in_w,
    packed_h,
    packed_w,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    c_out,
    stride_o,
    stride_i,
    stride_r,
    stride_s,
    mean0,
    mean1,
    mean2,
    std0,
    std1,
    std2,
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,  # 0 to 255 stand for 0 to 1
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    if program < image_programs:
        # int64: 10,000 packed images pass 2**31 elements.
        image = (program // blocks_per_image).to(tl.int64)
        pixel = program % blocks_per_image * BLOCK + offs
        h = pixel // packed_w - 3
        column = pixel % packed_w - 3
        inside = (h >= 0) & (h < in_h) & (column >= 0) & (column < in_w)
        at = x_ptr + image * stride_n + (h.to(tl.int64) * stride_h + column * stride_w)
        red = _channel(at, inside, mean0, std0, NORMALIZE, UNIT)
        green = _channel(at + stride_c, inside, mean1, std1, NORMALIZE, UNIT)
        blue = _channel(at + 2 * stride_c, inside, mean2, std2, NORMALIZE, UNIT)
        packed = tl.join(tl.join(red, blue), tl.join(green, tl.zeros_like(green)))
        to = packed_ptr + image * (packed_h * packed_w * 4)
        offs_p = pixel[:, None, None] * 4 + tl.arange(0, 2)[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        tl.store(to + offs_p, packed.to(packed_ptr.dtype.element_ty), mask=(pixel < packed_h * packed_w)[:, None, None])
    else:
        offs += (program - image_programs) * BLOCK
        channel = offs // _FILTER
        r = offs // _WINDOW % 7
        s = offs // 4 % 8
        c = offs % 4
        mask = (channel < c_out) & (s < 7) & (c < 3)
        w = w_ptr + channel * stride_o + c * stride_i + r * stride_r + s * stride_s
        tl.store(packed_w_ptr + offs, tl.load(w, mask=mask, other=0))


@triton.jit
def _conv_row(
    x,  # (n, packed_h, 2, pairs, 28) described, or pointers to (BLOCK_W, 32): row 0, even columns
    w,  # pointers to (BLOCK_C, 32)
    scale,
    shift,
    n,
    column,
    h,
    out_h,
    packed_w,
    BLOCK_W: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
    CARRY: tl.constexpr,
):
    """Row h of the convolution with BN: even columns and odd ones, (BLOCK_C, BLOCK_W) each."""
    even = tl.zeros((w.shape[0], BLOCK_W), dtype=tl.float32)
    odd = tl.zeros((w.shape[0], BLOCK_W), dtype=tl.float32)
    # In place of a row outside of the image comes its neighbor inside, which the same pooling window holds anyway.
    top = 2 * tl.minimum(tl.maximum(h, 0), out_h - 1)
    for r in range(7):
        weight = tl.load(w + r * _WINDOW)
        if DESCRIPTOR:
            x_even = x.load([n, top + r, 0, column, 0]).reshape(BLOCK_W, _WINDOW)
            x_odd = x.load([n, top + r, 1, column, 0]).reshape(BLOCK_W, _WINDOW)
        else:
            # The eighth pixel reads as zero: its inf or NaN would spread through weights of zero.
            seven = (tl.arange(0, _WINDOW) < 28)[None, :]
            x_even = tl.load(x + (top + r) * (packed_w * 4), mask=seven, other=0.0)
            x_odd = tl.load(x + ((top + r) * (packed_w * 4) + 8), mask=seven, other=0.0)
        if UPCAST:
            weight, x_even, x_odd = weight.to(tl.float32), x_even.to(tl.float32), x_odd.to(tl.float32)
        even = tl.dot(weight, x_even.T, even)
        odd = tl.dot(weight, x_odd.T, odd)
    if scale is not None:
        even *= scale[:, None]
        odd *= scale[:, None]
    if shift is not None:
        even += shift[:, None]
        odd += shift[:, None]
    # Rounding before the maximum gives the same as after it, and takes half the registers.
    return even.to(CARRY), odd.to(CARRY)


# The arguments between its tensors and its constants.
_PACK_NUMBERS = _pack_kernel.arg_names[4:-3]


@triton.jit
def _stem_kernel(
    x,  # pointer to the packed image, (n, packed_h, packed_w, 4); if DESCRIPTOR a descriptor, (n, packed_h, 2, pairs, 28)
    w_ptr,  # (BLOCK_C, 7, 8, 4)
    scale_ptr,  # (c_out,) or None
    shift_ptr,  # (c_out,) or None
    y_ptr,  # (n, pooled_h, pooled_w, c_out)
    packed_h,
    packed_w,
    out_h,  # of the convolution
    out_w,
    pooled_h,
    pooled_w,
    pairs,  # of an even and an odd column
    c_out,
    tiles_w,
    segments,
    rows,  # pooled rows in a segment
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
):
    CARRY: tl.constexpr = tl.float32 if UPCAST else y_ptr.dtype.element_ty
    program = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    # Strips overlap by a column, which only the left one of two stores.
    column = program % tiles_w * (BLOCK_W - 1)
    program //= tiles_w
    first = program % segments * rows
    n = program // segments
    lane = tl.arange(0, BLOCK_W)
    j = column + lane
    w = w_ptr + offs_c[:, None] * _FILTER + tl.arange(0, _WINDOW)[None, :]
    if DESCRIPTOR:
        windows = x
    else:
        # Lanes past the end read the pixels of the last lane.
        image = x + n.to(tl.int64) * packed_h * packed_w * 4
        windows = image + tl.minimum(j, pairs - 1)[:, None] * 16 + tl.arange(0, _WINDOW)[None, :]
    scale = None
    shift = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_c, mask=offs_c < c_out, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + offs_c, mask=offs_c < c_out, other=0.0).to(tl.float32)
    # The first lane takes its own column: it lies in the first window anyway, or the lane is not stored.
    left_lane = tl.broadcast_to(tl.maximum(lane - 1, 0)[None, :], (BLOCK_C, BLOCK_W))
    has_odd = (2 * j + 1 < out_w)[None, :]
    to = y_ptr + n.to(tl.int64) * pooled_h * pooled_w * c_out + j[None, :] * c_out + offs_c[:, None]
    mask = ((j < pooled_w) & (lane >= tl.minimum(column, 1)))[None, :] & (offs_c < c_out)[:, None]
    above_even, above_odd = _conv_row(
        windows, w, scale, shift, n, column, 2 * first - 1, out_h, packed_w,
        BLOCK_W, DESCRIPTOR, UPCAST, CARRY,
    )  # fmt: skip
    for p in range(first, tl.minimum(first + rows, pooled_h)):
        even, odd = _conv_row(
            windows, w, scale, shift, n, column, 2 * p, out_h, packed_w,
            BLOCK_W, DESCRIPTOR, UPCAST, CARRY,
        )  # fmt: skip
        even = elementwise.maximum(above_even, even)
        odd = elementwise.maximum(above_odd, odd)
        above_even, above_odd = _conv_row(
            windows, w, scale, shift, n, column, 2 * p + 1, out_h, packed_w,
            BLOCK_W, DESCRIPTOR, UPCAST, CARRY,
        )  # fmt: skip
        even = elementwise.maximum(even, above_even)
        odd = elementwise.maximum(odd, above_odd)
        # The image's last column may be even: then there is no odd one. Later lanes are not stored.
        odd = tl.where(has_odd, odd, float("-inf")).to(CARRY)
        left = tl.gather(odd, left_lane, 1)
        y = elementwise.maximum(elementwise.maximum(elementwise.maximum(even, odd), left), tl.zeros_like(even))
        tl.store(to + p * (pooled_w * c_out), y.to(y_ptr.dtype.element_ty), mask=mask)


def launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    config: StemConfig | None = None,
) -> Tensor:
    """Computes max_pool(relu(conv(x) * scale + shift)) of operands that stem_layout.why_not lets pass.

    Args:
        x: (N, 3, H, W), float32, float16, bfloat16 or uint8, any strides.
        weight: (C_out, 3, 7, 7), float16 or bfloat16, any strides. Its dtype is computed in.
        scale: (C_out,), floating point, or None.
        shift: (C_out,), floating point, or None.
        mean: three numbers, or None. With mean and std the input is (x - mean) / std, computed in fp32; x is x / 255 if uint8.
        std: three numbers; None without a mean.
        config: the strip; None to choose one.

    Returns:
        (N, C_out, pooled_h, pooled_w) in weight's dtype, channels_last.
    """
    todo = plan(tuple(x.shape), weight.shape[0], multiprocessors(x.device), config)
    config = todo.config
    y = torch.empty(todo.y_shape, dtype=weight.dtype, device=x.device, memory_format=torch.channels_last)
    packed, packed_weight = pack(x, weight, mean, std, todo.packing)
    tensors = dict(x=packed, w_ptr=packed_weight, scale_ptr=contiguous(scale), shift_ptr=contiguous(shift), y_ptr=y)
    fixed = todo.integers | dict(
        BLOCK_W=config.block_w, BLOCK_C=BLOCK_C, DESCRIPTOR=config.descriptor,
        UPCAST=dot_needs_fp32(weight.dtype),
    )  # fmt: skip
    # Programs: strips, then segments of their rows, then images.
    launching.launch(
        _stem_kernel, (todo.programs,), x.device, tensors, fixed, todo.prepared,
        {"x": todo.windows} if config.descriptor else None,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def pack(
    x: Tensor, weight: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, todo: Packing
) -> tuple[Tensor, Tensor]:
    """Returns the image, (N * rows * columns * 4 + tail,), and the weight, (BLOCK_C, 7, 8, 4), both in the weight's dtype."""
    # Images are apart by int64.
    x, weight = limits.with_near_elements(x, 1), limits.with_near_elements(weight, 0)
    packed = torch.empty(prod(todo.image_shape) + todo.tail, dtype=weight.dtype, device=x.device)
    packed_weight = torch.empty(todo.weight_shape, dtype=weight.dtype, device=x.device)
    statistics = (0.0,) * 6 if mean is None or std is None else (*map(float, mean), *map(float, std))
    numbers = (*todo.integers, *x.stride(), weight.shape[0], *weight.stride(), *statistics)
    constants = dict(NORMALIZE=mean is not None, UNIT=x.dtype == torch.uint8, BLOCK=PACK_BLOCK)
    if len(todo.prepared) >= _MOST_LAYOUTS:
        todo.prepared.clear()
    # Programs: blocks of pixels, image after image, then blocks of the weight.
    launching.launch(
        _pack_kernel, (todo.programs,), x.device,
        dict(x_ptr=x, packed_ptr=packed, w_ptr=weight, packed_w_ptr=packed_weight),
        dict(zip(_PACK_NUMBERS, numbers, strict=True)) | constants, todo.prepared.setdefault((numbers, mean is None), {}),
        num_warps=PACK_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return packed, packed_weight
