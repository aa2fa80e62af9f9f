"""A bottleneck's 3x3, its last 1x1 and the next bottleneck's first 1x1 in one kernel, for Hopper (sm_90).

    h = relu(conv2(x) * scale2 + shift2)                 3x3; stays on the chip
    y = relu(conv3(h) * scale3 + shift3 + residual)      1x1; written
    z = relu(conv1'(y) * scale1 + shift1)                1x1 of the next block; written, if wanted

The residual is a tensor, a subsampled tensor, or a projection conv(x0) * scale + shift (the stage's first block). In
pre-activation nets y has no ReLU, and conv1' reads p = relu(y * norm_scale + norm_shift) in place of y. h, y and p are rounded
to the tensors' dtype at the points where kernels of single layers would write them.

All layers between two 3x3s are pointwise, so a program that owns a box of pixels and ALL channels of h needs nothing of its
neighbors. It sums h as (channels, pixels), both operands multiplied where TMA left them (see conv_device.py), and transposes
it through shared memory once: then h is a left operand in registers. It computes BLOCK_C channels of y at a time. Such a block
is in registers too, and is the left operand of z's sums next.

Cost: reads x (once a tap, from L2), the residual and the weights; writes y and z. Eager and the kernels of single layers also
write and read h, and read y again. On an H200 a chain of ResNet-50's stage 1 takes 428 us at batch 256, its separate layers
544. Stage 2's chains gain nothing (docs/decisions.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launching
from ..elementwise import relu
from ..geometry import Geometry
from ..layouts import contiguous
from ..target import dot_needs_fp32, multiprocessors
from .chain_layout import BLOCK_VECTORS, ChainConfig, ShortcutShape, plan
from .conv_device import convolve
from .descriptors import aligned


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr, acc=None):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _affine(acc, scale_ptr, shift_ptr, n, AXIS: tl.constexpr):
    """acc * scale + shift, with vectors of n channels that are broadcast along AXIS."""
    offs = tl.arange(0, acc.shape[1 - AXIS])
    if scale_ptr is not None:
        acc *= tl.expand_dims(tl.load(scale_ptr + offs, mask=offs < n, other=0.0).to(tl.float32), AXIS)
    if shift_ptr is not None:
        acc += tl.expand_dims(tl.load(shift_ptr + offs, mask=offs < n, other=0.0).to(tl.float32), AXIS)
    return acc


@triton.jit
def _affine_block(acc, scale_desc, shift_desc, channel):
    """acc * scale + shift for a block of columns. Vectors by pointer would take 10 registers and a copy a column."""
    if scale_desc is not None:
        acc *= scale_desc.load([channel]).to(tl.float32)[None, :]
    if shift_desc is not None:
        acc += shift_desc.load([channel]).to(tl.float32)[None, :]
    return acc


@triton.jit
def _chain_tma_kernel(
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
    scale3_desc,  # (C_OUT,), down to norm_shift_desc
    shift3_desc,
    shortcut_scale_desc,
    shortcut_shift_desc,
    norm_scale_desc,
    norm_shift_desc,
    scale1_ptr,  # (NEXT_WIDTH,)
    shift1_ptr,
    n_tiles,
    tiles_h,
    tiles_w,
    lead_h,  # as in conv.py, down to SKEW_W
    lead_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    N_CHUNKS: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    SKEW_H: tl.constexpr,
    SKEW_W: tl.constexpr,
    WIDTH: tl.constexpr,
    C_OUT: tl.constexpr,
    NEXT_WIDTH: tl.constexpr,
    RELU_2: tl.constexpr,
    RELU_3: tl.constexpr,
    RELU_1: tl.constexpr,
    KEEP_SUM: tl.constexpr,  # what is written is y, not p
    UPCAST: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_NEXT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        w = tile % tiles_w * BOX_W
        h = tile // tiles_w % tiles_h * BOX_H
        n = tile // (tiles_w * tiles_h) * BOX_N

        hidden = convolve(
            (x_desc, None, None, None), w2_desc, n, h - lead_h, w - lead_w, KERNEL_H, KERNEL_W, N_CHUNKS,
            IN_PAIRS, SKEW_H, SKEW_W, UPCAST, BLOCK_M, BLOCK_WIDTH, BLOCK_K,
        )  # fmt: skip
        hidden = _affine(hidden, scale2_ptr, shift2_ptr, WIDTH, AXIS=1)
        if RELU_2:
            hidden = relu(hidden)
        left = hidden.to(y_desc.dtype).T

        if ws_desc is not None:
            # It stays in registers for all blocks: loading it for each would read more from L2 than the 3x3 does.
            x0 = residual_desc.load([n, h, w, 0]).reshape(BLOCK_M, ws_desc.block_shape[1])
        if w1_desc is not None:
            z = tl.zeros((BLOCK_M, BLOCK_NEXT), dtype=tl.float32)
        for j in tl.range(C_OUT // BLOCK_C, num_stages=TAIL_STAGES):
            channel = j * BLOCK_C
            if ws_desc is not None:
                residual = _dot(x0, ws_desc.load([channel, 0]).T, UPCAST)
                residual = _affine_block(residual, shortcut_scale_desc, shortcut_shift_desc, channel)
            else:
                residual = residual_desc.load([n, h, w, channel]).reshape(BLOCK_M, BLOCK_C).to(tl.float32)
            y = _dot(left, w3_desc.load([channel, 0]).T, UPCAST)
            y = _affine_block(y, scale3_desc, shift3_desc, channel) + residual
            if RELU_3:
                y = relu(y)
            y = y.to(y_desc.dtype)
            p = y
            if norm_scale_desc is not None:
                p = relu(_affine_block(y.to(tl.float32), norm_scale_desc, norm_shift_desc, channel)).to(y_desc.dtype)
            y_desc.store([n, h, w, channel], (y if KEEP_SUM else p).reshape(y_desc.block_shape))
            if w1_desc is not None:
                z = _dot(p, w1_desc.load([0, channel]).T, UPCAST, z)
        if w1_desc is not None:
            z = _affine(z, scale1_ptr, shift1_ptr, NEXT_WIDTH, AXIS=0)
            if RELU_1:
                z = relu(z)
            z_desc.store([n, h, w, 0], z.to(z_desc.dtype).reshape(z_desc.block_shape))


class Layer(NamedTuple):
    """A convolution with its scale, shift and ReLU.

    Attributes:
        weight: (C_out, C_in, kernel_h, kernel_w).
        scale: (C_out,), the weight's dtype or fp32, or None.
        shift: as scale.
        relu: whether a ReLU follows.
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    relu: bool


class Shortcut(NamedTuple):
    """A residual that the kernel computes: a 1x1 convolution of x, or without a layer x subsampled by the stride.

    Attributes:
        x: (N, C, H, W).
        layer: the convolution, without a ReLU, or None.
        geometry: the convolution's or the subsampling's.
    """

    x: Tensor
    layer: Layer | None
    geometry: Geometry

    @property
    def shape(self) -> ShortcutShape:
        """The shapes, as chain_layout.why_not takes them."""
        return ShortcutShape(
            tuple(self.x.shape), None if self.layer is None else tuple(self.layer.weight.shape), self.geometry
        )


def launch(
    x: Tensor,
    conv2: Layer,
    geometry: Geometry,
    conv3: Layer,
    residual: Tensor | Shortcut,
    next_norm: tuple[Tensor, Tensor] | None = None,
    next_conv1: Layer | None = None,
    config: ChainConfig | None = None,
    keep_sum: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Runs the kernel on checked operands that chain_layout.why_not lets pass.

    Args:
        x: (N, C_in, H, W), conv2's input.
        conv2: the 3x3.
        geometry: conv2's.
        conv3: the block's last 1x1, without stride or padding.
        residual: y's shape, or a Shortcut.
        next_norm: scale and shift of the BN that starts the next block in pre-activation nets (v2), or None.
        next_conv1: the next block's first 1x1, without stride or padding, or None.
        config: the tile; None to choose one.
        keep_sum: whether to return the sum as y. If not, y is relu(sum * scale + shift) with next_norm, which is all that a
        next
            block with a projection reads.

    Returns:
        y and z, channels_last; z is None without next_conv1.
    """
    shortcut = residual if isinstance(residual, Shortcut) else None
    projection = shortcut.layer if shortcut else None
    assert projection is None or not projection.relu, "a shortcut's layer has no ReLU"
    assert next_norm is not None or keep_sum, "without next_norm there is nothing to keep but the sum"
    todo = plan(
        tuple(x.shape), tuple(conv2.weight.shape), geometry, conv3.weight.shape[0],
        shortcut.shape if shortcut else None, tuple(next_conv1.weight.shape) if next_conv1 else None,
        (conv2.relu, conv3.relu, next_conv1 is not None and next_conv1.relu), keep_sum,
        dot_needs_fp32(x.dtype), config,
    )  # fmt: skip
    config = todo.config
    hidden_shape = geometry.out_shape(x.shape, conv2.weight.shape)
    y, z = _empty(x, hidden_shape, conv3), next_conv1 and _empty(x, hidden_shape, next_conv1)
    described: dict[str, Tensor | None] = dict(
        x_desc=x, w2_desc=conv2.weight, w3_desc=conv3.weight,
        residual_desc=residual.x if isinstance(residual, Shortcut) else residual,
        ws_desc=projection and projection.weight, w1_desc=next_conv1 and next_conv1.weight, y_desc=y, z_desc=z,
    )  # fmt: skip
    vectors = (conv3.scale, conv3.shift, *(projection or 4 * (None,))[1:3], *(next_norm or (None, None)))
    described |= dict(zip(BLOCK_VECTORS, vectors))
    tensors = {name: None if tensor is None else _aligned(tensor) for name, tensor in described.items()}
    tensors |= dict(
        scale2_ptr=contiguous(conv2.scale), shift2_ptr=contiguous(conv2.shift),
        scale1_ptr=contiguous(next_conv1 and next_conv1.scale), shift1_ptr=contiguous(next_conv1 and next_conv1.shift),
    )  # fmt: skip
    programs = min(todo.integers["n_tiles"], multiprocessors(x.device) * config.programs_per_sm)
    launching.launch(
        _chain_tma_kernel, (programs,), x.device, tensors, todo.fixed, todo.prepared, todo.views,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y, z


def _empty(x: Tensor, hidden_shape: tuple[int, ...], layer: Layer) -> Tensor:
    batch, _, *size = hidden_shape
    return torch.empty(
        (batch, layer.weight.shape[0], *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def _aligned(tensor: Tensor) -> Tensor:
    if tensor.dim() == 4:
        return aligned(tensor)
    # fp32: TMA writes to multiples of 128 bytes of shared memory, and stages of 32 numbers of 16 bits would be 64 bytes apart
    # (an H200 stopped with a misaligned address).
    tensor = tensor.float().contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
