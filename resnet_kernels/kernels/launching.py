"""Repeated launches of one plan, which keep what Triton would find out anew in each `kernel[grid](...)`.

At small batches the host is slower than the GPU, and `kernel[grid](...)` is most of its work. It looks at fifty arguments to
find the compiled kernel, encodes a tensor map for each descriptor, and unpacks descriptors into the kernel's arguments. All of
that depends only on the plan, which never changes, and on the addresses of its tensors. So this module keeps

- the compiled kernel. Triton's compiler looks at a tensor's presence, its dtype, and whether 16 divides its address.
- the arguments of Triton's C function, with gaps for addresses, tensor maps and the stream. They are learned from Triton
  itself: its wrapper runs once around a function that only records what it gets.
- tensor maps, by address. They hold address, shape and strides but no data, so none goes stale when memory is reused.

If Triton's wrapper is built in another way than in 3.6 to 3.9, the compiled kernel is launched as in Triton's tutorials:
`compiled[grid](*arguments)`. The same happens while a launch hook is set, which Triton's own profilers do.
Source: Triton's tutorial 02, fused softmax, and its triton/backends/nvidia/driver.py (3.6 and 3.9).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any, TypeAlias

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .sm90.descriptors import View

# Tensor maps kept for one argument of a plan: a caching allocator hands out a few addresses in turn.
_MOST_MAPS = 256


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    tensors: Mapping[str, Tensor | None],
    fixed: Mapping[str, Any],
    prepared: PreparedByKey,
    views: Mapping[str, View] | None = None,
    **options: Any,
) -> None:
    """Launches a kernel.

    Args:
        kernel: a @triton.jit function, compiled or interpreted.
        grid: numbers of programs, up to three.
        device: the tensors' device. It need not be the current one.
        tensors: the arguments that differ from call to call, by name; always the same names in the same order. The mapping
            keeps them alive until the launch.
        fixed: all other arguments by name.
        prepared: what earlier launches with the same `fixed`, `views` and options found out; filled here.
        views: how descriptors see the tensors that the kernel takes as descriptors, by name. These tensors are dense in
            memory, at multiples of 16 bytes.
        options: num_warps and so on.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, device, tensors, fixed, prepared, views, **options)
    values = tensors.values()
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in values]
    key = (
        kernel.fn,  # Triton's own object takes a microsecond to hash
        grid,
        device,
        *[tensor if tensor is None else tensor.dtype for tensor in values],
        *[address % 16 == 0 for address in addresses],
    )
    known = prepared.get(key)
    if known is not None:
        return known.launch(device, tensors, addresses)
    views = views or {}
    describe = _descriptor_of(kernel) if isinstance(kernel, triton.JITFunction) else _descriptor_for_the_interpreter
    arguments = {
        name: tensor if tensor is None or name not in views else describe(tensor, views[name])
        for name, tensor in tensors.items()
    }
    compiled = kernel[grid](**arguments, **fixed, **options)
    if compiled is not None:  # the interpreter compiles nothing
        prepared[key] = Prepared(compiled, kernel, grid, tensors, fixed, views)


class Launcher:
    """`launch` with all arguments but the device and the tensors.

    Args:
        kernel: as in `launch`.
        grid: as in `launch`.
        fixed: as in `launch`.
        num_warps: warps of a program.
    """

    __slots__ = ("_fixed", "_grid", "_kernel", "_num_warps", "_prepared")

    def __init__(self, kernel: Any, grid: tuple[int, ...], fixed: Mapping[str, Any], num_warps: int):
        self._kernel, self._grid, self._fixed, self._num_warps = kernel, grid, fixed, num_warps
        self._prepared: PreparedByKey = {}

    def __call__(self, device: torch.device, **tensors: Tensor | None) -> None:
        """Launches; arguments as in `launch`."""
        # enable_fp_fusion: its default changes in Triton 3.10.
        launch(
            self._kernel, self._grid, device, tensors, self._fixed, self._prepared,
            num_warps=self._num_warps, enable_fp_fusion=True,
        )  # fmt: skip


class Prepared:
    """Compiled kernel with its grid and all arguments but the tensors, whose presence and dtypes are fixed."""

    def __init__(
        self,
        compiled: Any,
        kernel: Any,
        grid: tuple[int, ...],
        tensors: Mapping[str, Tensor | None],
        fixed: Mapping[str, Any],
        views: Mapping[str, View],
    ):
        self._compiled, self._grid, self._views = compiled, (*grid, 1, 1)[:3], views
        self._describe, names = _descriptor_of(kernel), kernel.arg_names
        self._arguments = [fixed.get(name) for name in names]
        # The tensors that are not None, in the order of the kernel's arguments: number among `tensors`, name, place in the
        # kernel.
        places = [
            (i, name, names.index(name)) for i, (name, tensor) in enumerate(tensors.items()) if tensor is not None
        ]
        self._tensors = sorted(places, key=lambda entry: entry[2])
        self._function: Callable[..., Any] | None = None
        self._has_learned = False

    @property
    def is_direct(self) -> bool:
        """Whether launches call Triton's C function directly; False before the first one."""
        return self._function is not None

    def launch(self, device: torch.device, tensors: Mapping[str, Tensor | None], addresses: list[int]) -> None:
        """Launches on the device's current stream. addresses: those of all tensors, 0 for None."""
        if not self._has_learned:
            try:
                self._learn(tensors)
            except (AttributeError, LookupError, TypeError, ValueError):
                pass  # this Triton launches in another way
            self._has_learned = True
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # A hook is a function, or a chain of hooks in `calls`, which may be empty.
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
        """Launches by the compiled kernel's public interface."""
        self._compiled[self._grid](*self._in_order(tensors))

    def _in_order(self, tensors: Mapping[str, Tensor | None], marks: Mapping[str, Any] | None = None) -> list[Any]:
        """Returns the kernel's arguments in order, with descriptors. `marks`, if given, take the place of other tensors."""
        arguments = self._arguments.copy()
        for _, name, place in self._tensors:
            tensor = tensors[name]
            if tensor is not None and name in self._views:
                arguments[place] = self._describe(tensor, self._views[name])
            else:
                arguments[place] = tensor if marks is None else marks[name]
        return arguments

    def _learn(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Finds Triton's C function, its arguments, and the places of stream, addresses and tensor maps among them."""
        metadata = self._compiled.metadata
        if torch.version.hip is not None or metadata.global_scratch_size or metadata.profile_scratch_size:
            return  # each launch would have to allocate memory
        marks = {name: object() for _, name, _ in self._tensors}
        stream = object()
        function, known, self._nested = self._call_of(stream, self._in_order(tensors, marks))
        at = {id(value): place for place, value in enumerate(known)}
        self._stream = at[id(stream)]
        self._pointers = [(at[id(marks[name])], i) for i, name, _ in self._tensors if name not in self._views]
        described = [i for i, name, _ in self._tensors if name in self._views]
        encoded = [place for place, value in enumerate(known) if _is_tensor_map(value)]
        self._maps: list[tuple[int, int, dict[int, Any]]] = [
            (p, i, {}) for p, i in zip(encoded, described, strict=True)
        ]
        self._known, self._function = known, function

    def _encode(self, tensors: Mapping[str, Tensor | None], addresses: list[int], place: int) -> Any:
        """Returns the tensor map of a place, encoded by Triton. Those of all other places are kept as well."""
        _, known, _ = self._call_of(None, self._in_order(tensors))
        for other, which, maps in self._maps:
            if len(maps) >= _MOST_MAPS:
                maps.clear()
            maps[addresses[which]] = known[other]
        return known[place]

    def _call_of(self, stream: Any, arguments: list[Any]) -> tuple[Callable[..., Any], list[Any], int | None]:
        """Returns what Triton would call for a launch: C function, arguments, and the first that goes in a nested tuple."""
        calls: list[tuple[Any, ...]] = []
        run = copy.copy(self._compiled.run)
        function, run.launch = _around(run.launch, lambda *given: calls.append(given))
        run(*self._grid, stream, self._compiled.function, self._compiled.packed_metadata, None, None, None, *arguments)
        (given,) = calls
        if isinstance(given[-1], tuple | list):
            return function, [*given[:-1], *given[-1]], len(given) - 1
        return function, list(given), None


# By presence and dtypes of the tensors, alignment of their addresses, kernel, grid and device.
PreparedByKey: TypeAlias = dict[tuple[Any, ...], Prepared]


def _around(wrapper: Callable[..., Any], instead: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the C function that Triton's wrapper calls, and a copy of the wrapper that calls `instead`."""
    if not isinstance(wrapper, FunctionType):
        return wrapper, instead  # without descriptors there is no wrapper
    place = wrapper.__code__.co_freevars.index("launcher")
    cells = list(wrapper.__closure__ or ())
    function, cells[place] = cells[place].cell_contents, CellType(instead)
    return function, FunctionType(wrapper.__code__, wrapper.__globals__, closure=tuple(cells))


def _is_tensor_map(value: Any) -> bool:
    return type(value).__name__ == "PyCUtensorMap"


class _Address:
    """The part of a tensor that a descriptor asks for."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def _descriptor_of(kernel: Any) -> Callable[[Tensor, View], Any]:
    """Returns the function that makes a kernel's descriptors, for views of tensors that are dense in memory."""
    if not kernel.is_gluon():
        return _descriptor
    from .sm90.gluon_names import tensor_descriptor

    return lambda tensor, view: tensor_descriptor(_address(tensor, view), view)


def _address(tensor: Tensor, view: View) -> _Address:
    return _Address(tensor.data_ptr() + view.offset * tensor.element_size(), tensor.dtype)


def _descriptor(tensor: Tensor, view: View) -> TensorDescriptor:
    return TensorDescriptor(_address(tensor, view), *map(list, view[:3]))


def _descriptor_for_the_interpreter(tensor: Tensor, view: View) -> TensorDescriptor:
    # The interpreter copies the tensors of its arguments, so it needs a real one.
    base = torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + view.offset)
    return TensorDescriptor(base, *map(list, view[:3]))
