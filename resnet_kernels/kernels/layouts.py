"""Operands in the layouts that kernels read: channels_last images and contiguous vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(x: Tensor | None) -> Tensor | None:
    """Returns x, or a channels_last copy if it has another layout; None for None."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def contiguous(vector: Tensor | None) -> Tensor | None:
    """Returns the vector, or a contiguous copy if its elements do not follow each other in memory; None for None."""
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()
