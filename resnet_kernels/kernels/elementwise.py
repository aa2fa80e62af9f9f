"""Device functions that keep a NaN as PyTorch does. Triton's plain maximum returns the other operand instead."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def maximum(a, b):
    """The larger of a and b; NaN if one of them is NaN, as in torch.max_pool2d."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN, as in torch.relu."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
