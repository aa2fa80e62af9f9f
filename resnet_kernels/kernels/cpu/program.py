"""Layers one after the other as one call into C: a whole network in one parallel region (program.c).

A program is a flat list of layers over numbered values. Values that don't live at the same time share memory, which is planned
once: a call maps no new pages but those of its outputs.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import large_pages, library
from .convolution import KINDS, Arguments, Kernel
from .library import Library

# Places: values inside a program, its input, and from here on its results.
_WORKSPACE, _INPUT, _RESULTS = 0, 1, 2
# Values begin at pages of their own, in floats; so does each thread's scratch memory, whose size is one of whole pages.
_PAGE = 1024


class _Place(ctypes.Structure):
    _fields_ = [("base", ctypes.c_int64), ("at", ctypes.c_int64)]


class _Layer(ctypes.Structure):
    """program.c's structure of this name."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        ("needs", ctypes.c_int64),
        ("tasks", ctypes.c_int64),
        ("x", _Place),
        ("residual", _Place),
        ("gates", _Place),
        ("y", _Place),
        ("convolution", Arguments),
    ]


class Slice(NamedTuple):
    """Some images of a value.

    Attributes:
        value: its number; 0 is the program's input.
        first: the first image.
    """

    value: int
    first: int = 0


class Layer(NamedTuple):
    """One kernel of a program, on some images.

    Attributes:
        kernel: with all but the addresses of x, residual and the result.
        x, residual, out: what it reads and writes, as many images as the kernel's shapes say. residual: None for none.
        label: for profilers.
        gates: what multiplies x, of a gate; None for other kernels.
    """

    kernel: Kernel
    x: Slice
    residual: Slice | None
    out: Slice
    label: str = ""
    gates: Slice | None = None


class _Value:
    """Where a value lies, and which layers use it.

    images: the number that it holds. size: floats of an image. base, at: its place. written: by (layer, first image, number).
    users: the layers that read or write it, in order.
    """

    def __init__(self, size: int, base: int):
        self.images, self.size, self.base, self.at = 0, size, base, 0
        self.written: list[tuple[int, int, int]] = []
        self.users: list[int] = []


class Program:
    """Layers that run as one call.

    Args:
        layers: in order; each value is written before it is read.
        x_shape: of the program's input, (N, C, H, W).
        results: the numbers of the values that a call returns, with their shapes.
        threads: that a call may use, and for which the kernels were cut into tasks.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        x_shape: tuple[int, ...],
        results: dict[int, tuple[int, ...]],
        threads: int,
    ):
        found = library.find()
        assert isinstance(found, Library), "there are kernels"
        self.layers, self.results, self.threads = tuple(layers), results, threads
        self.x_shape = x_shape
        self._found = found
        values, needs, workspace = _planned(layers, results)
        self._layers = (_Layer * len(layers))()
        for structure, layer, need in zip(self._layers, layers, needs):
            structure.kind, structure.needs, structure.tasks = KINDS.index(layer.kernel.kind), need, layer.kernel.tasks
            structure.convolution = layer.kernel.arguments
            for name in ("x", "residual", "gates", "out"):
                part = getattr(layer, name)
                place = _Place(-1, 0)
                if part is not None:
                    value = values[part.value]
                    place = _Place(value.base, value.at + part.first * value.size)
                setattr(structure, "y" if name == "out" else name, place)
        # One buffer: phases, each thread's scratch memory, values.
        each = max(layer.kernel.scratch for layer in layers)
        phases = -(-found.calls.rk_phase() * len(layers) // 4 // _PAGE) * _PAGE
        self._each, self._scratch_at, self._workspace_at = each, phases, phases + each * threads
        self.floats = self._workspace_at + workspace

    def __call__(self, x: Tensor, memory: Tensor, around: Callable[[int], object] | None = None) -> list[Tensor]:
        """Returns the results, channels_last.

        Args:
            x: fp32, of the program's input shape, in the layout that its first layers were made for.
            memory: at least `floats` floats, contiguous; nobody else may use them meanwhile.
            around: gives a context for a layer's number, for profilers: then layers run in a call each.

        Raises:
            RuntimeError: x's storage was freed.
        """
        # Native code would read there.
        if (x_address := x.data_ptr()) == 0:
            raise RuntimeError(f"x of shape {tuple(x.shape)} has no memory: its storage was freed")
        with torch._C.DisableTorchFunction():
            results = [
                torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
                for shape in self.results.values()
            ]
        start = memory.data_ptr()
        bases = (ctypes.c_void_p * (_RESULTS + len(results)))(
            start + 4 * self._workspace_at, x_address, *(result.data_ptr() for result in results)
        )
        if around is None:
            self._run(0, len(self.layers), bases, start)
        else:
            for i in range(len(self.layers)):
                with around(i):  # type: ignore[attr-defined]
                    self._run(i, i + 1, bases, start)
        return results

    def _run(self, first: int, end: int, bases: ctypes.Array, start: int) -> None:
        found = self._found
        found.calls.rk_run(
            found.number, self._layers, first, end, bases, start, self.threads, found.parallel,
            start + 4 * self._scratch_at, self._each,
        )  # fmt: skip


def _planned(layers: Sequence[Layer], results: dict[int, tuple[int, ...]]) -> tuple[dict[int, _Value], list[int], int]:
    """Returns the values with their places, how many first layers each layer needs, and floats of the workspace."""
    values: dict[int, _Value] = {0: _Value(0, _INPUT)}
    for i, layer in enumerate(layers):
        kernel = layer.kernel
        for part, shape in (
            (layer.x, kernel.x_shape),
            (layer.residual, kernel.out_shape),
            (layer.gates, kernel.gates_shape or ()),
            (layer.out, kernel.out_shape),
        ):
            if part is None:
                continue
            n, *image = shape
            size = torch.Size(image).numel()
            if part.value not in values:
                order = [*results]
                base = _RESULTS + order.index(part.value) if part.value in results else _WORKSPACE
                values[part.value] = _Value(size, base)
            value = values[part.value]
            value.size = value.size or size
            assert value.size == size, f"value {part.value} has images of {value.size} and of {size} floats"
            value.images = max(value.images, part.first + n)
            value.users.append(i)
        values[layer.out.value].written.append((i, layer.out.first, kernel.out_shape[0]))
    tenants: list[tuple[int, int, _Value]] = []  # (begin, end, value) of all that had a place, newest last
    needs: list[int] = []
    top = 0
    for i, layer in enumerate(layers):
        value = values[layer.out.value]
        need = 0
        if value.base == _WORKSPACE and value.users[0] == i:
            size = -(-value.size * value.images // _PAGE) * _PAGE
            value.at = _over_residual(values, layer, i)
            if value.at < 0:
                value.at = _free(size, [(begin, end) for begin, end, held in tenants if held.users[-1] >= i])
            for begin, end, held in tenants:
                if begin < value.at + size and value.at < end:
                    # Over the residual's memory, this very layer is one of its readers.
                    need = max(need, *(user + 1 for user in held.users if user < i), 0)
            tenants.append((value.at, value.at + size, value))
            top = max(top, value.at + size)
        elif value.base == _WORKSPACE:
            # Another slice of it: its memory is free since the first one was written.
            need = max((needs[user] for user in value.users if user < i), default=0)
        images = layer.kernel.out_shape[0]
        for part, n in ((layer.x, layer.kernel.x_shape[0]), (layer.residual, images), (layer.gates, images)):
            if part is not None:
                for writer, first, count in values[part.value].written:
                    if writer < i and first < part.first + n and part.first < first + count:
                        need = max(need, writer + 1)
        needs.append(need)
    return values, needs, top


def _over_residual(values: dict[int, _Value], layer: Layer, i: int) -> int:
    """The place of a layer's residual, if its result may be written over it; else -1."""
    if layer.residual is None or layer.kernel.arguments.adds_last:
        return -1
    residual, out, images = values[layer.residual.value], values[layer.out.value], layer.kernel.out_shape[0]
    is_dead = residual.users[-1] == i and residual.users.count(i) == 1
    is_whole = residual.images == out.images == images
    return residual.at if is_dead and is_whole and residual.base == _WORKSPACE else -1


def _free(size: int, taken: list[tuple[int, int]]) -> int:
    """The lowest place for so many floats among places that are taken."""
    at = 0
    for begin, end in sorted(taken):
        if at + size <= begin:
            break
        at = max(at, end)
    return at


class Memories(threading.local):
    """Memory of each thread for the programs of one model: as much as its largest call needed."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def of(self, floats: int) -> Tensor:
        """Memory of at least so many floats, for one call of the thread that asks."""
        if self.kept is None or self.kept.numel() < floats:
            self.kept = None  # its pages go before new ones come
            self.kept = large_pages.own(floats)
        return self.kept
