"""Tensors as TMA descriptors see them: views in elements, and the alignment that a descriptor needs."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class View(NamedTuple):
    """Part of a tensor's memory, described in elements.

    Attributes:
        shape: what lies outside of it reads as zeros, and nothing is stored there.
        strides: from one index of an axis to the next.
        box: shape of one load or store.
        offset: elements from the tensor's first one to the view's.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    offset: int = 0


def dense_view(shape: tuple[int, ...], box: tuple[int, ...]) -> View:
    """Returns a view without gaps, its last axis innermost."""
    return View(shape, tuple(prod(shape[i + 1 :]) for i in range(len(shape))), box)


def aligned(x: Tensor) -> Tensor:
    """Returns x, or a copy: channels_last, at a multiple of 16 bytes. A slice need not be at one."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.channels_last)
