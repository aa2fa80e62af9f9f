"""Observation of a forward while it is traced: what it reads, and whether it does anything besides computing its output.

A fused block doesn't run its forward's Python code. So it may be fused only if that code does nothing but call modules and
functions on values: no list grows, no attribute is set, nothing is printed, no random number is drawn, no tensor is made,
no context (torch.no_grad, autocast) is entered. `Observer` follows the running code with `sys.settrace`, in its own thread
alone, and refuses the forward at the first instruction that does more. What cannot be refused in advance is
compared afterwards and restored: the containers and objects that the code can name.

A TorchDispatchMode refuses operations on real tensors. Nothing is patched, so other threads see nothing of a trace.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import os
import random
import sys
import sysconfig
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import apart
from .reads import (
    INTERNAL,
    MISSING,
    Cell,
    Outside,
    OutsideRead,
    Read,
    Reads,
    class_values,
    described,
    is_comparable,
    is_plain,
    is_plain_object,
    pieces,
    user_classes,
)
from .recipe import CannotRead

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
# PyTorch's decorators, which call what they decorate: torch.no_grad as a decorator, and those for torch.compile.
_DECORATORS = tuple(_TORCH + name.replace("/", os.sep) for name in ("utils/_contextlib.py", "_compile.py", "_dynamo/"))
# PyTorch's Python code that changes a state of the process or of the thread.
_STATEFUL = tuple(
    _TORCH + name.replace("/", os.sep)
    for name in (
        "random.py", "cuda/random.py", "cuda/streams.py", "cuda/nvtx.py", "autograd/grad_mode.py", "autograd/profiler.py",
        "autograd/graph.py", "autograd/anomaly_mode.py", "amp/", "cuda/amp/", "cpu/amp/", "utils/_device.py",
        "profiler/", "distributed/", "backends/", "serialization.py",
    )
)  # fmt: skip
# Modules of Python's library whose functions leave everything as it is.
_PURE_MODULES = frozenset(
    {"collections", "_collections_abc", "functools", "typing", "enum", "abc", "_weakrefset", "dataclasses", "operator",
     "types", "copy", "copyreg", "numbers", "math", "itertools", "inspect", "re", "contextlib"}
)  # fmt: skip
_PURE_C = frozenset({"math", "_operator", "operator", "_functools", "_collections", "itertools", "cmath"})
_PURE_BUILTINS = frozenset(
    {"abs", "all", "any", "ascii", "bin", "callable", "chr", "dir", "divmod", "format", "getattr", "hasattr", "hash", "hex",
     "id", "isinstance", "issubclass", "iter", "len", "locals", "max", "min", "next", "oct", "ord", "pow", "repr", "round",
     "sorted", "sum", "vars", "__build_class__", "__import__"}
)  # fmt: skip
_WITH = frozenset({"BEFORE_WITH", "SETUP_WITH", "BEFORE_ASYNC_WITH", "SETUP_ASYNC_WITH"})
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "STORE_ATTR", "DELETE_ATTR"})
_GLOBALS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_FREE = frozenset({"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"})
_WATCHED = frozenset(
    {*_WITH, *_ATTRIBUTES, *_GLOBALS, *_FREE, "LOAD_SPECIAL", "LOAD_CONST", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF",
     "DELETE_DEREF", "IMPORT_NAME"}
)  # fmt: skip
# Functions of PyTorch that ask for a state of the thread or the process, which may be another one in the next call. Those that
# ask a tensor are not meant, nor those that are the same in all fused calls (is_scripting, is_tracing).
_ASKS_A_TENSOR = frozenset(
    {"is_tensor", "is_storage", "is_complex", "is_conj", "is_distributed", "is_floating_point", "is_inference", "is_neg",
     "is_nonzero", "is_same_size", "is_signed", "get_device"}
)  # fmt: skip
_AMBIENT = frozenset(
    name
    for name in (*vars(torch), *vars(torch._C))
    if name.lstrip("_").startswith(("is_", "are_", "get_")) and name not in _ASKS_A_TENSOR
)
_ASKS_FOR_TENSORS, _IS_TENSOR = "its forward asks whether a value is a Tensor", torch.is_tensor.__code__
_TENSOR_CLASSES = frozenset({"Tensor", "Parameter", "TensorType", "FloatTensor", "TensorBase"})
# Levels of objects inside of each other that are compared and restored.
_MOST_LEVELS = 5

_instructions: weakref.WeakKeyDictionary[types.CodeType, dict[int, tuple[str, Any]]] = weakref.WeakKeyDictionary()


@cache
def _origin(file: str) -> str:
    """Whose code a file holds: "user" (other libraries too), "torch", "ours" or "python"."""
    if file.startswith(_TORCH):
        return "torch"
    if file.startswith(_OURS):
        # Our networks are read as any user's are.
        return "user" if file.startswith(_OURS + "models" + os.sep) else "ours"
    if file.startswith("<frozen") or (file.startswith(_STDLIB) and "site-packages" not in file):
        return "python"
    return "user"


@cache
def _is_stateful(file: str) -> bool:
    """Whether functions of a file may do more than compute."""
    if file.startswith(_STDLIB):
        return file[len(_STDLIB) :].split(os.sep)[0].removesuffix(".py") not in _PURE_MODULES
    return file.startswith(_STATEFUL)


def _table(code: types.CodeType) -> dict[int, tuple[str, Any]]:
    """The instructions of a code object that an observer looks at, by offset."""
    if (found := _instructions.get(code)) is None:
        found = {i.offset: (i.opname, i.argval) for i in dis.get_instructions(code) if i.opname in _WATCHED}
        _instructions[code] = found
    return found


class _GarbageCollector:
    """Python's garbage collector, off while any thread observes.

    Finalizers and gc.callbacks would run in the middle of a forward and be taken for its code. And Python 3.11 crashes where a
    trace function is called for a gc callback: hypothesis installs one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._was_on = False

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Spans the time in which nothing is collected."""
        with self._lock:
            if not self._users:
                self._was_on = gc.isenabled()
                gc.disable()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._was_on:
                    gc.enable()


_collector = _GarbageCollector()


class _NoOperation(TorchDispatchMode):
    """Refuses every operation on a tensor with numbers."""

    def __init__(self, refuse: Callable[[str], None]):
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's has no types
        self._refuse = refuse

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._refuse(f"its forward runs {func} on a tensor of its own")


class Observer:
    """Follows one run of a forward.

    Args:
        stand_ins: (path, clone) of all modules whose attributes the forward may read: copies of the real ones.
        forward: the function that is run.
    """

    def __init__(self, stand_ins: Sequence[tuple[str, nn.Module]], forward: Callable[..., Any]):
        self._stand_ins = stand_ins
        self._states = [(clone.__dict__, dict(clone.__dict__)) for _, clone in stand_ins]
        self._classes = list(dict.fromkeys(cls for _, clone in stand_ins for cls in user_classes(type(clone))))
        self.ran_into = {""}  # paths of the modules whose own forward ran
        self._reason: str | None = None
        self._named: set[str] = set()  # by code that ran, whether or not the very instruction did
        self._read: set[str] = set()  # by instructions that ran
        self._asked: set[str] = (
            set()
        )  # string constants: getattr and hasattr may look for attributes that are not there
        self._globals: dict[tuple[int, str], tuple[Any, str]] = {}
        self._cells: dict[int, tuple[Cell, str]] = {}
        self._holders: dict[int, Any] = {}  # Python modules and classes that code got as globals
        self._entered: set[types.CodeType] = set()
        self._functions: dict[types.CodeType, types.FunctionType] = {}
        self._opaque: dict[str, str] = {}  # attributes whose use can't be followed, with their types
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._entries: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        for state, _ in self._states:
            for name in state.keys() - INTERNAL:
                value = state[name]
                if is_plain(value) or type(value) is tuple:
                    continue
                self._keep(value)
                if not is_comparable(value) or _is_impure(value):
                    self._opaque[name] = type(value).__name__
        for cls in self._classes:
            for value in vars(cls).values():
                self._note_function(value)
        self._note_function(forward)
        for function in self._functions.values():
            for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
                self._keep(value)

    def refuse(self, reason: str) -> None:
        """Ends the run, for good: the user's code may catch the exception, but not the reason.

        Raises:
            CannotRead: with the reason.
        """
        self._reason = self._reason or reason
        raise CannotRead(self._reason)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Spans the run of the forward.

        Raises:
            CannotRead: if the forward did more than compute. What it changed is as it was before.
        """
        generators, settings, before = _generators(), _settings(), sys.gettrace()
        try:
            with _collector.off(), _NoOperation(self.refuse):
                sys.settrace(self._on_call)
                try:
                    yield
                finally:
                    sys.settrace(before)
        finally:
            touched = self._restore()
            if _generators() != generators:
                _restore_generators(generators)
                touched = touched or "its forward draws random numbers"
            if _settings() != settings:
                torch.set_grad_enabled(settings[0])
                touched = touched or "its forward changes a setting of PyTorch"
            if self._reason or touched:
                raise CannotRead(self._reason or touched)

    def reads(self) -> Reads:
        """What the forward has read.

        Raises:
            CannotRead: if a value can't be compared.
        """
        names = frozenset(self._read)
        everything = not names.isdisjoint({"__dict__", "vars"})
        inside = []
        for path, clone in self._stand_ins:
            state = clone.__dict__
            found = (state.keys() if everything else names & state.keys()) - INTERNAL
            inside += [Read(path, name, _described(name, state[name], names)) for name in sorted(found)]
            if path in self.ran_into:
                absent = names - state.keys() - INTERNAL
                absent -= clone._modules.keys() | clone._parameters.keys() | clone._buffers.keys()
                absent = (absent & self._asked) | class_values(type(clone), frozenset(absent)).keys()
                inside += [Read(path, name, described(MISSING, names)) for name in sorted(absent)]
        outside: list[tuple[Any, str, str]] = [
            (vars(cls), name, f"{cls.__name__}.{name}")
            for cls in self._classes
            for name in (names | {"forward"}) & vars(cls).keys()
            if isinstance(vars(cls)[name], types.FunctionType) or not hasattr(vars(cls)[name], "__get__")
        ]
        outside += [(mapping, name, name) for mapping, name in self._globals.values()]
        outside += [(cell, name, name) for cell, name in self._cells.values()]
        for holder in self._holders.values():
            outside += [(mapping, name, f"{holder.__name__}.{name}") for mapping, name in pieces(names, holder)]
        return Reads(
            tuple(inside),
            Outside(OutsideRead(m, n, _described(label, m.get(n, MISSING), names), label) for m, n, label in outside),
            names,
        )

    def _on_call(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        origin = _origin(code.co_filename)
        if origin == "user":
            self._enter(frame)
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
            return self._on_instruction
        if code is _IS_TENSOR and frame.f_back is not None and _origin(frame.f_back.f_code.co_filename) == "user":
            self.refuse(_ASKS_FOR_TENSORS)
        # A mode around the trace, such as `with torch.device(...)`, is called for each function: that is no call of forward's.
        is_mode = code.co_name == "__torch_function__"
        if origin != "ours" and _is_stateful(code.co_filename) and frame.f_back is not None and not is_mode:
            # What PyTorch and Python call by themselves is their business.
            caller = frame.f_back.f_code.co_filename
            if caller.startswith(_DECORATORS) or _origin(caller) == "user":
                self.refuse(f"its forward calls {code.co_name} of {frame.f_globals.get('__name__')}")
        return None

    def _enter(self, frame: types.FrameType) -> None:
        """Keeps copies of what a code object can name, before it runs."""
        code = frame.f_code
        if code in self._entered:
            return
        self._entered.add(code)
        self._named.update(code.co_names)
        for state, _ in self._states:
            for name in self._named & state.keys() - INTERNAL:
                self._keep(state[name])
        reachable = [frame.f_globals[name] for name in self._named & frame.f_globals.keys()]
        if (function := self._functions.get(code)) is not None:
            for name, cell in zip(code.co_freevars, function.__closure__ or ()):
                if (value := Cell(cell).get(name, None)) is not None and name != "__class__":
                    reachable.append(value)
        for value in reachable:
            self._note_function(value)
            self._keep(value)
        owners = [value for value in reachable if isinstance(value, (type, types.ModuleType)) and not _is_torch(value)]
        for owner in (*self._classes, *owners):
            for name in self._named:
                value = vars(owner).get(name, MISSING)
                self._entries.setdefault((id(owner), name), (owner, name, value))
                self._keep(value)

    def _note_function(self, value: Any) -> None:
        """Remembers a function by its code, and the functions that it encloses, to find variables of enclosing functions."""
        value = getattr(value, "__func__", value)
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, types.FunctionType) and value.__code__ not in self._functions:
            self._functions[value.__code__] = value
            for cell in value.__closure__ or ():
                self._note_function(Cell(cell).get("", None))

    def _on_instruction(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        if event == "opcode" and (found := _table(frame.f_code).get(frame.f_lasti)) is not None:
            self._check(frame, *found)
        return self._on_instruction

    def _check(self, frame: types.FrameType, operation: str, argument: Any) -> None:
        if operation in _ATTRIBUTES or operation in _GLOBALS:
            # A torch.fx.Proxy is no Tensor, and can't claim to be one: PyTorch's C++ code would take it for one.
            asks = argument in _TENSOR_CLASSES and not {"isinstance", "type"}.isdisjoint(frame.f_code.co_names)
            if asks or argument == "is_tensor":
                self.refuse(_ASKS_FOR_TENSORS)
        if operation in _ATTRIBUTES:
            self._attribute(argument)
        elif operation in _GLOBALS:
            self._global(frame, argument)
        elif operation in _FREE:
            self._free(frame.f_code, argument)
        elif operation == "LOAD_CONST":
            if isinstance(argument, str) and argument.isidentifier():
                self._asked.add(argument)
                self._attribute(argument)
        elif operation in _WITH or (operation == "LOAD_SPECIAL" and "enter" in str(argument)):
            self.refuse("its forward enters a context (a `with` statement)")
        elif operation in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            self.refuse(f"its forward sets the global {argument}")
        elif operation in ("STORE_DEREF", "DELETE_DEREF") and argument in frame.f_code.co_freevars:
            self.refuse(f"its forward sets {argument}, a variable of an enclosing function")

    def _attribute(self, name: str) -> None:
        self._read.add(name)
        if name in _AMBIENT:
            self.refuse(f"its forward asks {name}")
        if name in self._opaque:
            self.refuse(f"its forward uses {name}, a {self._opaque[name]}, whose state can't be compared")
        for holder in list(self._holders.values()):
            value = vars(holder).get(name, MISSING)
            if isinstance(value, types.ModuleType) and not _is_torch(value):
                self._holders[id(value)] = value
            elif _is_impure(value) or not (is_comparable(value) or callable(value)):
                self.refuse(f"its forward uses {holder.__name__}.{name}")

    def _global(self, frame: types.FrameType, name: str) -> None:
        if name not in frame.f_globals:
            if _is_impure(frame.f_builtins.get(name)):
                self.refuse(f"its forward calls {name}")
            if name == "vars":
                self._read.add(name)
            return
        value = frame.f_globals[name]
        if _is_torch(value):
            if name in _AMBIENT:
                self.refuse(f"its forward asks {name}")
            return
        if _is_impure(value) or not (is_comparable(value) or callable(value)):
            self.refuse(f"its forward uses {name}, a {type(value).__name__}")
        if isinstance(value, (type, types.ModuleType)):
            self._holders[id(value)] = value
        else:
            self._globals[id(frame.f_globals), name] = frame.f_globals, name

    def _free(self, code: types.CodeType, name: str) -> None:
        function = self._functions.get(code)
        if function is None or name not in code.co_freevars or name == "__class__":
            return  # a variable of a function that ran in this very forward
        cell = (function.__closure__ or ())[code.co_freevars.index(name)]
        value = Cell(cell).get(name, MISSING)
        if _is_torch(value):
            return
        if isinstance(value, (type, types.ModuleType)):
            self._holders[id(value)] = value
        elif _is_impure(value) or not (is_comparable(value) or callable(value)):
            self.refuse(f"its forward uses {name}, a {type(value).__name__}")
        else:
            self._cells[id(cell)] = Cell(cell), name

    def _keep(self, value: Any, levels: int = 0) -> None:
        """Copies a container or an object, and what is in it, to see afterwards whether it is as it was."""
        if levels > _MOST_LEVELS:
            return
        if isinstance(value, (list, deque, set, dict)):
            if id(value) in self._containers:
                return
            copy = dict(value) if isinstance(value, dict) else set(value) if isinstance(value, set) else list(value)
            self._containers[id(value)] = value, copy
            inner = (
                list(dict.values(value)) if isinstance(value, dict) else [] if isinstance(value, set) else list(value)
            )
        elif isinstance(value, tuple):
            inner = list(value)
        elif is_plain_object(value):
            state = vars(value)
            self._containers.setdefault(id(state), (state, dict(state)))
            inner = []
            for name in self._named & state.keys():
                inner.append(state[name])
                if not is_comparable(state[name]) or _is_impure(state[name]):
                    self._opaque[name] = type(state[name]).__name__
        else:
            return
        for element in inner:
            if not is_plain(element):
                self._keep(element, levels + 1)

    def _restore(self) -> str | None:
        """Undoes all changes; returns the reason to refuse the forward, if there is one."""
        touched = None
        for container, copy in self._containers.values():
            if not _same_elements(container, copy):
                touched = f"its forward changes a {type(container).__name__} that outlives the call"
                container.clear()
                container.extend(copy) if isinstance(container, (list, deque)) else container.update(copy)
        for state, then in self._states:
            if not _same_elements(state, then):
                touched = "its forward sets attributes"
        for owner, name, value in self._entries.values():
            if vars(owner).get(name, MISSING) is not value:
                touched = f"its forward sets {owner.__name__}.{name}"
                delattr(owner, name) if value is MISSING else setattr(owner, name, value)
        return touched


def _described(label: str, value: Any, names: frozenset[str]) -> Any:
    try:
        return described(value, names)
    except CannotRead as error:
        raise CannotRead(f"{error} ({label})") from None


def _same_elements(container: Any, copy: Any) -> bool:
    if isinstance(copy, dict):
        return [*container] == [*copy] and all(a is b for a, b in zip(dict.values(container), copy.values()))
    if isinstance(copy, set):
        return bool(container == copy)
    return len(container) == len(copy) and all(a is b for a, b in zip(container, copy))


def _is_torch(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return isinstance(name, str) and name.split(".")[0] == "torch" and not isinstance(value, nn.Module)


def _is_impure(value: Any) -> bool:
    """Whether a value is a function written in C that may do more than compute."""
    if type(value).__name__ == "cython_function_or_method":
        return True
    if not isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
        return False
    owner = getattr(value, "__self__", None)
    if isinstance(owner, types.ModuleType) and owner.__name__ == "builtins":
        return value.__name__ not in _PURE_BUILTINS
    if not isinstance(owner, (types.ModuleType, type)):
        owner = type(owner)
    library = owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__
    return library not in _PURE_C and library.split(".")[0] != "torch"


def _generators() -> tuple[Any, ...]:
    """The states of the random generators that code can reach without holding one."""
    numpy = sys.modules.get("numpy")
    legacy = None if numpy is None else numpy.random.get_state()
    state = None if legacy is None else (legacy[0], legacy[1].tobytes(), *legacy[2:])
    return random.getstate(), state, apart.call(lambda: torch.get_rng_state().numpy().tobytes())


def _restore_generators(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    if states[1] is not None:
        numpy = sys.modules["numpy"]
        name, keys, *rest = states[1]
        numpy.random.set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))
    apart.call(lambda: torch.set_rng_state(torch.frombuffer(bytearray(states[2]), dtype=torch.uint8)))


def _settings() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
    )
