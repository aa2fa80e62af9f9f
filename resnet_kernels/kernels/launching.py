"""Launches of one plan, over and over: what Triton finds out and encodes in each `kernel[grid](...)` is kept.

At small batches the host is slower than the GPU, and `kernel[grid](...)` is most of its work: it looks at fifty arguments to
find the compiled kernel, encodes a tensor map for each descriptor, and spreads descriptors out into the kernel's arguments.
All of it depends on a plan, which never changes, and on where its tensors lie. So here

- the compiled kernel is kept. Of a tensor Triton's compiler heeds presence, dtype, and whether 16 divides its address.
- the arguments of Triton's C function are kept, with gaps for addresses, tensor maps and the stream. They are learned from
  Triton itself: its wrapper is run once around a function that only notes what it gets.
- tensor maps are kept by address. They say where and how large, not what, so none goes stale when memory changes hands.

Where Triton's wrapper is built in another way than in 3.6 to 3.9, the compiled kernel is launched as Triton's tutorials do it,
`compiled[grid](*arguments)`; so it is while a launch hook is set, as profilers of Triton's own set them.
Source: Triton's tutorial 02, fused softmax, and its triton/backends/nvidia/driver.py (3.6 and 3.9).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

# Tensor maps kept for one argument of a plan: a caching allocator hands out few addresses, in turn.
_MOST_MAPS = 256


class View(NamedTuple):
    """A tensor as a descriptor sees it, in elements; it begins at `offset`."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    offset: int = 0


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    tensors: Mapping[str, Tensor | None],
    fixed: Mapping[str, Any],
    prepared: dict[tuple, Prepared],
    views: Mapping[str, View] | None = None,
    **options: Any,
) -> None:
    """Launches a kernel.

    Args:
        kernel: a @triton.jit function; an interpreted one runs as ever.
        grid: programs, up to three numbers.
        device: of the tensors. It need not be the current one.
        tensors: what differs from call to call, by the kernel's argument; always the same arguments in the same order. They
            are alive until the launch because they are in here.
        fixed: all other arguments; `prepared` belongs to them and to the options.
        prepared: what earlier launches found; filled here.
        views: which tensors are handed over as descriptors, and how those see them; dense ones, 16 dividing the address.
        options: num_warps and so on.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, device, tensors, fixed, prepared, views, **options)
    values = tensors.values()
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in values]
    key = (
        kernel,
        grid,
        device,
        *[tensor if tensor is None else tensor.dtype for tensor in values],
        *[address % 16 == 0 for address in addresses],
    )
    known = prepared.get(key)
    if known is not None:
        return known.launch(device, tensors, addresses)
    views = views or {}
    describe = _descriptor if isinstance(kernel, triton.JITFunction) else _descriptor_for_the_interpreter
    arguments = {
        name: tensor if tensor is None or name not in views else describe(tensor, views[name])
        for name, tensor in tensors.items()
    }
    compiled = kernel[grid](**arguments, **fixed, **options)
    if compiled is not None:  # the interpreter compiles nothing
        prepared[key] = Prepared(compiled, kernel.arg_names, grid, tensors, fixed, views)


class Launcher:
    """A kernel with all that stays: grid, arguments that are no tensors, options. Called with a device and the tensors.

    Args:
        kernel, grid, fixed: as `launch` takes them.
        num_warps: of a program.
    """

    __slots__ = ("_fixed", "_grid", "_kernel", "_num_warps", "_prepared")

    def __init__(self, kernel: Any, grid: tuple[int, ...], fixed: Mapping[str, Any], num_warps: int):
        self._kernel, self._grid, self._fixed, self._num_warps = kernel, grid, fixed, num_warps
        self._prepared: dict[tuple, Prepared] = {}

    def __call__(self, device: torch.device, **tensors: Tensor | None) -> None:
        # Triton 3.10 has another default of enable_fp_fusion.
        launch(
            self._kernel, self._grid, device, tensors, self._fixed, self._prepared,
            num_warps=self._num_warps, enable_fp_fusion=True,
        )  # fmt: skip


class Prepared:
    """A compiled kernel with a grid and all arguments but its tensors, of which it knows presence and dtypes."""

    def __init__(
        self,
        compiled: Any,
        names: list[str],
        grid: tuple[int, ...],
        tensors: Mapping[str, Tensor | None],
        fixed: Mapping[str, Any],
        views: Mapping[str, View],
    ):
        self._compiled, self._grid, self._views = compiled, (*grid, 1, 1)[:3], views
        self._arguments = [fixed.get(name) for name in names]
        # The tensors that are there: number among all, name, place among the kernel's arguments; in the order of the latter.
        places = [
            (i, name, names.index(name)) for i, (name, tensor) in enumerate(tensors.items()) if tensor is not None
        ]
        self._tensors = sorted(places, key=lambda entry: entry[2])
        self._function: Callable[..., Any] | None = None
        self._has_learned = False

    @property
    def is_direct(self) -> bool:
        """Whether launches call Triton's C function, and nothing of Triton's around it; not before there was one."""
        return self._function is not None

    def launch(self, device: torch.device, tensors: Mapping[str, Tensor | None], addresses: list[int]) -> None:
        """Launches on the current stream; addresses: of all tensors, 0 for one that is not there."""
        if not self._has_learned:
            try:
                self._learn(tensors)
            except (AttributeError, LookupError, TypeError, ValueError):
                pass  # a Triton that launches in another way
            self._has_learned = True
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # A chain of hooks, which is there when it is empty, too; or a function in its place.
        if self._function is None or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            return self.launch_by_triton(tensors)
        arguments = self._known.copy()
        for place, which in self._pointers:
            arguments[place] = addresses[which]
        for place, which, maps in self._maps:
            tensor_map = maps.get(addresses[which])
            arguments[place] = self._encode(tensors, addresses, place) if tensor_map is None else tensor_map
        arguments[self._stream] = triton.runtime.driver.active.get_current_stream(device.index)
        if self._nested is None:
            self._function(*arguments)
        else:
            self._function(*arguments[: self._nested], tuple(arguments[self._nested :]))

    def launch_by_triton(self, tensors: Mapping[str, Tensor | None]) -> None:
        """The same by the compiled kernel's public launch."""
        self._compiled[self._grid](*self._in_order(tensors))

    def _in_order(self, tensors: Mapping[str, Tensor | None], marks: Mapping[str, Any] | None = None) -> list[Any]:
        """The kernel's arguments, with descriptors; marks go in the places of other tensors."""
        arguments = self._arguments.copy()
        for _, name, place in self._tensors:
            if name in self._views:
                arguments[place] = _descriptor(tensors[name], self._views[name])
            else:
                arguments[place] = tensors[name] if marks is None else marks[name]
        return arguments

    def _learn(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Finds Triton's C function, its arguments, and where in them stream, addresses and tensor maps are."""
        metadata = self._compiled.metadata
        if torch.version.hip is not None or metadata.global_scratch_size or metadata.profile_scratch_size:
            return  # memory of a launch's own would have to be allocated
        marks = {name: object() for _, name, _ in self._tensors}
        stream = object()
        function, known, self._nested = self._noted(stream, self._in_order(tensors, marks))
        at = {id(value): place for place, value in enumerate(known)}
        self._stream = at[id(stream)]
        self._pointers = [(at[id(marks[name])], i) for i, name, _ in self._tensors if name not in self._views]
        described = [i for i, name, _ in self._tensors if name in self._views]
        encoded = [place for place, value in enumerate(known) if _is_tensor_map(value)]
        self._maps = [(place, i, {}) for place, i in zip(encoded, described, strict=True)]
        self._known, self._function = known, function

    def _encode(self, tensors: Mapping[str, Tensor | None], addresses: list[int], place: int) -> Any:
        """The tensor map that belongs in a place, by Triton; those of all other places are kept along with it."""
        _, known, _ = self._noted(None, self._in_order(tensors))
        for other, which, maps in self._maps:
            if len(maps) >= _MOST_MAPS:
                maps.clear()
            maps[addresses[which]] = known[other]
        return known[place]

    def _noted(self, stream: Any, arguments: list[Any]) -> tuple[Callable[..., Any], list[Any], int | None]:
        """What Triton would call now: its C function, the arguments, and from where on they are a tuple of their own."""
        noted: list[tuple] = []
        run = copy.copy(self._compiled.run)
        function, run.launch = _around(run.launch, lambda *given: noted.append(given))
        run(*self._grid, stream, self._compiled.function, self._compiled.packed_metadata, None, None, None, *arguments)
        (given,) = noted
        if isinstance(given[-1], tuple | list):
            return function, [*given[:-1], *given[-1]], len(given) - 1
        return function, list(given), None


def _around(wrapper: Callable, instead: Callable) -> tuple[Callable, Callable]:
    """The C function that Triton's wrapper calls, and a wrapper like it that calls something else instead."""
    if not isinstance(wrapper, FunctionType):
        return wrapper, instead  # no descriptors, no wrapper
    place = wrapper.__code__.co_freevars.index("launcher")
    cells = list(wrapper.__closure__)
    function, cells[place] = cells[place].cell_contents, CellType(instead)
    return function, FunctionType(wrapper.__code__, wrapper.__globals__, closure=tuple(cells))


def _is_tensor_map(value: Any) -> bool:
    return type(value).__name__ == "PyCUtensorMap"


class _Address:
    """As much of a tensor as a descriptor asks for."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def _descriptor(tensor: Tensor, view: View) -> TensorDescriptor:
    """A descriptor of a view of a tensor that is dense in memory."""
    address = tensor.data_ptr() + view.offset * tensor.element_size()
    return TensorDescriptor(_Address(address, tensor.dtype), *map(list, view[:3]))


def _descriptor_for_the_interpreter(tensor: Tensor, view: View) -> TensorDescriptor:
    # It copies the tensors behind the arguments to and fro.
    base = torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + view.offset)
    return TensorDescriptor(base, *map(list, view[:3]))
