"""Residual add and ReLU in one pass.

y = relu(x + residual): two reads and one write; eager takes three reads and two writes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import elementwise, limits
from .launching import Launcher

# 1024 elements on 4 warps: a thread takes 8 fp32 of each operand, two 16-byte loads.
BLOCK_SIZE = 1024
NUM_WARPS = 4
_CACHED = 512


@triton.jit
def _add_relu_kernel(x_ptr, residual_ptr, y_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    # int64: an activation of 64x112x112 passes 2**31 elements at batch 2675.
    offs = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < n_elements
    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    residual = tl.load(residual_ptr + offs, mask=mask).to(tl.float32)
    y = elementwise.relu(x + residual)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def launch(x: Tensor, residual: Tensor) -> Tensor:
    """Returns relu(x + residual), in x's layout.

    Args:
        x: any shape, fp16, bf16 or fp32, dense in memory.
        residual: x's shape, dtype and strides.
    """
    y = torch.empty_like(x)
    if y.numel():
        _launcher(y.numel())(x.device, x_ptr=x, residual_ptr=residual, y_ptr=y)
    return y


@lru_cache(_CACHED)
def _launcher(n_elements: int) -> Launcher:
    # Programs: blocks of BLOCK_SIZE elements, in memory order.
    grid = (triton.cdiv(n_elements, BLOCK_SIZE),)
    if (reason := limits.why_too_large(elements=(n_elements, limits.MOST * BLOCK_SIZE))) is not None:
        raise ValueError(f'backend="triton" {reason}')
    return Launcher(_add_relu_kernel, grid, dict(n_elements=n_elements, BLOCK_SIZE=BLOCK_SIZE), NUM_WARPS)
