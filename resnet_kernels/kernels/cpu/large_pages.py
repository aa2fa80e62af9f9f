"""Memory in pages of 2 MB, for what many calls read: packed weights, and the workspace of programs.

A processor keeps the addresses of a few thousand pages at most (its TLB). In pages of 4 KB the packed weights of ResNet-18
are 18,600 of them, ResNet-101's 57,400, and Winograd reads 16 planes of weights at once. On Linux a process may ask for large
pages where /sys/kernel/mm/transparent_hugepage/enabled says "always" or "madvise". Elsewhere this is memory like any other.
"""

from __future__ import annotations

import mmap
import threading

import torch
from torch import Tensor

_LARGE_PAGE = 2 << 20
_CHUNK = 2 * _LARGE_PAGE
_CACHE_LINE = 64


def own(floats: int) -> Tensor:
    """Returns (floats,) in fp32 on the CPU, of any values, in memory of its own: as many large pages as it fills."""
    found = _map(4 * floats) if 4 * floats >= _LARGE_PAGE else None
    if found is None:
        with torch._C.DisableTorchFunction(), torch.inference_mode(False):
            return torch.empty(floats, dtype=torch.float32, device="cpu")
    return _floats(*found, floats)


def shared(floats: int) -> Tensor:
    """Like `own`; small pieces of a thread share large pages, which are freed with the last piece in them."""
    size = -(-4 * floats // _CACHE_LINE) * _CACHE_LINE
    if size > _CHUNK // 2:
        return own(floats)
    if _chunk.mapped is None or _chunk.used + size > _chunk.end:
        found = _map(_CHUNK)
        if found is None:
            return own(floats)
        _chunk.mapped, _chunk.used = found
        _chunk.end = _chunk.used + _CHUNK
    begin = _chunk.used
    _chunk.used += size
    return _floats(_chunk.mapped, begin, floats)


class _Chunk(threading.local):
    """What `shared` cuts its next piece from; one of each thread needs no lock, which a fork could leave locked."""

    def __init__(self) -> None:
        self.mapped: mmap.mmap | None = None
        self.used = self.end = 0


_chunk = _Chunk()


def _map(size: int) -> tuple[mmap.mmap, int] | None:
    """Maps so many bytes, and says where they begin: at a large page. The mapping ends with its last tensor.

    None where the system has no large pages, or no such memory: PyTorch's own error says that better.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        # Longer, so that a large page can begin in it. What is never touched takes no memory.
        mapped = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    begin = -_floats(mapped, 0, 1).data_ptr() % _LARGE_PAGE
    try:
        # Whole pages alone: the rest would take up to 2 MB more than it fills.
        mapped.madvise(mmap.MADV_HUGEPAGE, begin, size // _LARGE_PAGE * _LARGE_PAGE)
    except OSError:
        pass  # this kernel has none
    return mapped, begin


def _floats(mapped: mmap.mmap, begin: int, floats: int) -> Tensor:
    with torch._C.DisableTorchFunction(), torch.inference_mode(False):
        return torch.frombuffer(mapped, dtype=torch.float32, count=floats, offset=begin)
