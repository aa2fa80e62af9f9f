"""conv_bias_act for Hopper (sm_90): tiles travel by TMA, products run on wgmma. Formula as in conv_bias_act.py.

An implicit GEMM like its portable sibling's, but a tile of pixels is a box of the image, [BOX_N, BOX_H, BOX_W] pixels by
BLOCK_K channels, so that one descriptor load fetches a whole operand: no pointers, no masks, no registers for either.
Outside the image a descriptor reads zeros, which is the padding; outside the output it stores nothing, which is the ragged
edge. conv_bias_act_tma_plan.py views 3x3, 1x1 and stride 2 so that one kernel does all three, and chooses the box for the
least waste (7x7: one pixel of 128 images, "batch as M"; 28x28: 4x4 pixels of 8 images). The weight is read where it is,
as (O, R*S*I). Programs are persistent: each walks over tiles a grid apart.

Cost: as conv_bias_act.py; a 3x3 reads its input from L2 once a tap. Nothing here was measured: it was compiled, and run in
the interpreter, and backend="auto" does not pick Triton. Registers, shared memory, programs an SM: tests/compile_kernels.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops.geometry import Geometry
from .conv_bias_act_tma_plan import TmaConfig, View, plan

# Descriptors kept: four a convolution, ResNet-152 has 155.
_CACHED = 1024


@triton.jit
def _store_part(
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
    RELU: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    FIRST: tl.constexpr,  # the part's first pixel in the box
    PARTS: tl.constexpr,
):
    if PARTS == 1:
        offs_c = channel + tl.arange(0, acc.shape[0])
        mask_c = offs_c < c_out
        if scale_ptr is not None:
            acc *= tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[:, None]
        at = [n + FIRST // (BOX_H * BOX_W), h + FIRST // BOX_W % BOX_H, w + FIRST % BOX_W, channel]
        acc = acc.T
        if residual_desc is not None:
            acc += residual_desc.load(at).reshape(acc.shape).to(tl.float32)
        if RELU:
            # propagate_nan: a plain maximum turns NaN into 0, which torch.relu keeps.
            acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y_desc.store(at, acc.to(y_desc.dtype).reshape(y_desc.block_shape))
    else:
        # In parts the residual takes less shared memory: at 128x128 104 KiB instead of 128, and two programs fit on an SM.
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1).split()
        _store_part(
            left, scale_ptr, bias_ptr, residual_desc, y_desc, c_out, n, h, w, channel,
            RELU, BOX_H, BOX_W, FIRST, PARTS // 2,
        )  # fmt: skip
        _store_part(
            right, scale_ptr, bias_ptr, residual_desc, y_desc, c_out, n, h, w, channel,
            RELU, BOX_H, BOX_W, FIRST + HALF, PARTS // 2,
        )  # fmt: skip


@triton.jit
def _conv_bias_act_tma_kernel(
    x_desc,  # (n, h, w, c_in), at STRIDE 2 (n, h / 2, 2, w / 2, 2 * c_in)
    w_desc,  # (c_out, KERNEL_H * KERNEL_W * c_in), if RAGGED (c_out, KERNEL_H * KERNEL_W, c_in)
    residual_desc,  # as y, or None
    y_desc,  # (n, out_h, out_w, c_out)
    scale_ptr,  # (c_out,) or None
    bias_ptr,  # (c_out,) or None
    n_tiles,
    tiles_h,
    tiles_w,
    tiles_c,
    c_out,
    lead_h,  # rows from a box's first output row up to its first input row; at STRIDE 2 pairs of rows
    lead_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    N_CHUNKS: tl.constexpr,  # steps of BLOCK_K over the input channels
    RAGGED: tl.constexpr,  # BLOCK_K does not divide c_in
    STRIDE: tl.constexpr,
    SKEW_H: tl.constexpr,  # at STRIDE 2: the row of its pair at which the first tap is
    SKEW_W: tl.constexpr,
    RELU: tl.constexpr,
    UPCAST: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        # Channels first: programs of one box of pixels, the larger operand, run at a time.
        channel = tile % tiles_c * BLOCK_N
        box = tile // tiles_c
        w = box % tiles_w * BOX_W
        h = box // tiles_w % tiles_h * BOX_H
        n = box // (tiles_w * tiles_h) * BOX_N
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for k in range(KERNEL_H * KERNEL_W * N_CHUNKS):
            tap = k // N_CHUNKS
            c = k % N_CHUNKS * BLOCK_K
            r = tap // KERNEL_W
            s = tap % KERNEL_W
            if STRIDE == 1:
                x = x_desc.load([n, h - lead_h + r, w - lead_w + s, c])
            else:
                # Counted from an even row at or above the first tap, so that no remainder is taken of a negative number.
                r += SKEW_H
                s += SKEW_W
                column = s % 2 * (N_CHUNKS * BLOCK_K)
                x = x_desc.load([n, h - lead_h + r // 2, r % 2, w - lead_w + s // 2, column + c])
            x = x.reshape(BLOCK_M, BLOCK_K)
            if RAGGED:
                weight = w_desc.load([channel, tap, c]).reshape(BLOCK_N, BLOCK_K)
            else:
                weight = w_desc.load([channel, k * BLOCK_K])
            if UPCAST:
                x = x.to(tl.float32)
                weight = weight.to(tl.float32)
            # Channels by pixels: Triton takes a reshaped left operand through registers, a right one from where it lies.
            acc = tl.dot(weight, x.T, acc)
        _store_part(
            acc, scale_ptr, bias_ptr, residual_desc, y_desc, c_out, n, h, w, channel, RELU, BOX_H, BOX_W, 0, PARTS
        )  # fmt: skip


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    geometry: Geometry,
    relu: bool,
    config: TmaConfig | None = None,
) -> Tensor:
    """Runs the kernel on checked operands that `why_not` lets pass; returns y, channels_last."""
    interpreted = is_interpreted()
    todo = plan(
        tuple(x.shape), tuple(weight.shape), geometry, relu, interpreted and x.dtype == torch.bfloat16, config
    )  # fmt: skip
    config = todo.config
    y = torch.empty(
        geometry.out_shape(x.shape, weight.shape), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    x, weight, residual = _aligned(x), _aligned(weight), None if residual is None else _aligned(residual)
    bias = None if bias is None else bias.contiguous()
    scale = None if scale is None else scale.contiguous()
    grid = (min(todo.integers["n_tiles"], multiprocessors(x.device) * config.programs_per_sm),)
    with torch.cuda.device_of(x):
        _conv_bias_act_tma_kernel[grid](
            described(x, todo.x), described(weight, todo.weight),
            None if residual is None else described(residual, todo.y), described(y, todo.y),
            scale, bias, **todo.integers, **todo.constants,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y


def is_interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter."""
    return not isinstance(_conv_bias_act_tma_kernel, triton.JITFunction)


def runs_on(device: torch.device) -> bool:
    """Whether a device has the instructions: compute capability 9."""
    return device.type == "cuda" and torch.version.hip is None and _capability(device)[0] == 9


class _Address:
    """As much of a tensor as a descriptor asks for, without keeping its memory."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def described(tensor: Tensor, view: View) -> TensorDescriptor:
    if is_interpreted():
        # It copies the tensors behind the arguments to and fro.
        return TensorDescriptor(tensor, *map(list, view))
    return _descriptor(tensor.data_ptr(), tensor.dtype, view)


@lru_cache(_CACHED)
def _descriptor(address: int, dtype: torch.dtype, view: View) -> TensorDescriptor:
    """A descriptor says where and how large, not what: a freed tensor's is right for whatever lies there next.

    Hence an entry can't go stale; it is made once for the addresses that PyTorch's allocator hands out again and again.
    """
    return TensorDescriptor(_Address(address, dtype), *map(list, view))


def _aligned(tensor: Tensor) -> Tensor:
    """channels_last, at an address that a descriptor takes: a multiple of 16 bytes, which a slice's need not be."""
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone(memory_format=torch.channels_last)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    # The interpreter has one processor.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
