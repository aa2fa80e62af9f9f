"""Detection of changes in the tensors that a packed weight was made from.

A version counter is not enough: fused optimizers, BN's own running statistics, `p.data.mul_()` and NumPy write under the same
`_version` and `data_ptr` (PyTorch 2.13). So values are compared, too: small tensors in full, a weight at samples.

The tensors are the user's, so they are read where they are: an alias or a NumPy array of one could pin its storage, which
FSDP resizes. The address is read only after it, the storage's size, the shape and the strides were found as they were.
"""

from __future__ import annotations

import ctypes
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels.cpu import library
from ...ops.library import is_dense

# Weights up to this size are compared in full. A sample is a cache miss, and so are 64 bytes in a row.
_WHOLE_BYTES = 4096
_NAMES = ("weight", "bias", "running_mean", "running_var")
# A memoryview of an address. ctypes' arrays would need a type for each length.
_memory_at = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


class WatchedTensors:
    """Snapshot of the weights, biases and statistics of modules.

    Each question maps a C function over a list: in Python's bytecode they take twice as long, and each call asks them.
    """

    __slots__ = (
        "_addresses",
        "_attributes",
        "_compare",
        "_live",
        "_names",
        "_numels",
        "_readable",
        "_registries",
        "_shadows",
        "_sources",
        "_storage_sizes",
        "_storages",
        "_strides",
        "_tensors",
        "_then",
        "_versioned",
        "_versions",
        "_weights",
    )

    def __init__(self, modules: Sequence[nn.Module]):
        places = [
            (registry, name, module.__dict__)
            for module in modules
            for name in _NAMES
            if (registry := _registry_of(module, name)) is not None
        ]
        self._registries = [registry for registry, *_ in places]
        self._names = [name for _, name, _ in places]
        self._sources = [registry[name] for registry, name, _ in places]
        # A plain attribute hides a parameter of the same name.
        shadowed = [(attributes, name) for registry, name, attributes in places if registry is not attributes]
        self._attributes = [attributes for attributes, _ in shadowed]
        self._shadows = [name for _, name in shadowed]
        self._tensors = [source for source in self._sources if source is not None]
        self._readable = all(map(_is_readable, self._tensors)) and not any(
            isinstance(getattr(type(module), name, None), (property, Tensor)) for module in modules for name in _NAMES
        )
        self._compare: Callable[[], bool] | None = None
        if self._readable:
            self._look()

    @classmethod
    def of_all(cls, snapshots: Sequence[WatchedTensors]) -> WatchedTensors:
        """Several snapshots as one."""
        together = cls(())
        for name in cls.__slots__:
            if name not in ("_compare", "_readable"):
                setattr(together, name, [item for snapshot in snapshots for item in getattr(snapshot, name, ())])
        together._readable = all(snapshot._readable for snapshot in snapshots)
        return together

    def _look(self) -> None:
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]
        self._numels = [*map(Tensor.numel, self._tensors)]
        self._weights = [tensor for tensor in self._tensors if tensor.dim() > 1]
        self._storages = [*map(Tensor.untyped_storage, self._weights)]
        self._storage_sizes = [storage.nbytes() for storage in self._storages]
        self._strides = [*map(Tensor.stride, self._tensors)]
        # Of the others all values are compared. An inference tensor has no version, and asking for it raises.
        self._versioned = [tensor for tensor in self._weights if not tensor.is_inference()]
        self._versions = [*map(_version, self._versioned)]
        self._live = [*map(_live, self._tensors)]
        self._then = [live.tobytes() for live in self._live]

    def are_same(self) -> bool:
        """Whether the modules have the same tensor objects, whatever the values."""
        return all(map(operator.is_, map(dict.get, self._registries, self._names), self._sources)) and not any(
            map(dict.__contains__, self._attributes, self._shadows)
        )

    def are_unchanged(self) -> bool:
        """Whether the modules have the same tensors with the same values. False for tensors whose memory can't be read."""
        return self._readable and self.are_same() and self.have_same_values()

    def have_same_values(self) -> bool:
        """Whether the tensors of the snapshot have the values that they had; False where their memory can't be read."""
        return (
            self._readable
            and [*map(Tensor.data_ptr, self._tensors)] == self._addresses
            and [*map(Tensor.numel, self._tensors)] == self._numels
            and [*map(Tensor.stride, self._tensors)] == self._strides
            and [storage.nbytes() for storage in self._storages] == self._storage_sizes
            and [*map(_version, self._versioned)] == self._versions
            and self._have_values()
        )

    def _have_values(self) -> bool:
        """Whether the values that are compared are as they were; their memory must be where it was."""
        if self._compare is None:
            self._compare = _comparison(self._live, self._then)
        return self._compare()


_version = Tensor._version.__get__  # type: ignore[attr-defined]  # a property of C


def _comparison(live: Sequence[Any], then: Sequence[bytes]) -> Callable[[], bool]:
    """The function that compares memory with copies; in C it takes half the time, and more where caches are cold."""
    found = library.library_or_none()
    if found is None:
        return lambda: [part.tobytes() for part in live] == then
    views = [np.asarray(part) for part in live]
    sizes = (ctypes.c_int64 * (3 * len(views)))(
        *(view.size for view in views),
        *(view.itemsize for view in views),
        *(view.strides[0] if view.size > 1 else view.itemsize for view in views),
    )
    count, each = len(views), 8 * len(views)
    addresses = (ctypes.c_void_p * count)(*(view.ctypes.data for view in views))
    copies = (ctypes.c_char_p * count)(*then)
    items, start = found.calls.rk_is_same, ctypes.addressof(sizes)

    def compare() -> bool:
        return bool(items(count, addresses, copies, start, start + each, start + 2 * each))

    compare.keeps = sizes  # type: ignore[attr-defined]  # its address is above
    return compare


def _registry_of(module: nn.Module, name: str) -> dict[str, Any] | None:
    """The dict in which a module's attribute is found; None if it is in none."""
    # In this order Python and nn.Module look. Pruning and DataParallel's replicas have plain attributes.
    registries: tuple[dict[str, Any], ...] = (module.__dict__, module._parameters, module._buffers)
    return next((registry for registry in registries if name in registry), None)


def _is_readable(tensor: object) -> bool:
    """Whether a tensor's values are all of its memory, in the process's own memory."""
    if not isinstance(tensor, Tensor) or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False  # a DTensor, a fake tensor
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not is_dense(tensor):
        return False
    end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    return end <= tensor.untyped_storage().nbytes()


def _live(tensor: Tensor) -> Any:
    """Live bytes of a tensor, or samples of them; comparing them takes half a microsecond and sees NaN."""
    size = tensor.element_size()
    memory = _memory_at(tensor.data_ptr(), tensor.numel() * size, 0x100)  # PyBUF_READ
    if memory.nbytes <= _WHOLE_BYTES or tensor.dim() < 2:
        return memory
    # NumPy copies with a step twice as fast as a memoryview does.
    return np.frombuffer(memory, f"u{size}")[:: _step(tensor.shape, tensor.stride())]


@functools.lru_cache(4096)
def _step(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The largest step through a dense tensor's memory that hits each filter, and each tap in one filter or another."""
    numel = math.prod(shape)
    step = numel // shape[0]
    dimensions = [(size, by) for i, (size, by) in enumerate(zip(shape, strides)) if i != 1]
    while any(len(np.unique(np.arange(0, numel, step) // by % size)) < size for size, by in dimensions):
        step -= 1
    return step
