"""Gluon's names for Hopper, as all Triton versions from 3.6 on can give them. Nothing else imports Gluon's Hopper modules.

Triton 3.6.0 calls TMA's copies `async_copy_global_to_shared` and `async_copy_shared_to_global`. Later versions call them
`async_load` and `async_store`, and 3.9.0 keeps the older names for loads alone. Its `reinterpret` was `_reinterpret`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .descriptors import View

async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
store_wait = tma.store_wait
# Shared memory with another dtype, shape and layout: a method of it.
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


def tensor_descriptor(base: Any, view: View) -> TensorDescriptor:
    """Returns a descriptor of 16-bit numbers whose boxes lie in shared memory as `layout_of` says."""
    return TensorDescriptor(base, *map(list, view[:3]), layout_of(view.box))


def layout_of(box: Sequence[int]) -> gl.NVMMASharedLayout:
    """The layout of a box in shared memory: rows of 128, 64 or 32 bytes are swizzled as wgmma reads them, others are not."""
    row = 2 * box[-1]
    return gl.NVMMASharedLayout(row if row in (32, 64, 128) else 0, 16, len(box))


__all__ = [
    "async_load",
    "async_store",
    "fence_async_shared",
    "gl",
    "gluon",
    "layout_of",
    "mbarrier",
    "reinterpret",
    "store_wait",
    "tensor_descriptor",
    "warpgroup_mma",
    "warpgroup_mma_init",
    "warpgroup_mma_wait",
]
