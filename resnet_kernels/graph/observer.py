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
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .known_code import (
    AMBIENT,
    ASKS_FOR_TENSORS,
    ATTRIBUTES,
    DECORATORS,
    FREE,
    GLOBALS,
    IS_TENSOR,
    QUIET_CODE,
    QUIET_CONTEXT,
    TENSOR_CLASSES,
    WITH,
    instructions_of,
    is_impure,
    is_stateful,
    is_torch,
    origin_of,
    plain_asks_of,
)
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
    pieces,
    user_classes,
)
from .recipe import CannotRead
from .snapshot import Snapshot, collector


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
        self._states = [clone.__dict__ for _, clone in stand_ins]
        self._snapshot = Snapshot(self._states)
        self._classes = list(dict.fromkeys(cls for _, clone in stand_ins for cls in user_classes(type(clone))))
        self.ran_into = {""}  # paths of the modules whose own forward ran
        self._reason: str | None = None
        self._named: set[str] = set()  # by code that ran, whether or not the very instruction did
        self._read: set[str] = set()  # by instructions that ran
        # String constants that are read: getattr and hasattr may look for attributes that are not there.
        self._asked: set[str] = set()
        self._globals: dict[tuple[int, str], tuple[Any, str]] = {}
        self._cells: dict[int, tuple[Cell, str]] = {}
        self._holders: dict[int, Any] = {}  # Python modules and classes that code got as globals
        # The frame that is about to call isinstance with a class of tensors, and where.
        self._asking: tuple[types.FrameType, int] | None = None
        self._may_enter: types.FrameType | None = None  # the frame whose next context leaves everything as it was
        self._entered: set[types.CodeType] = set()
        self._functions: dict[types.CodeType, types.FunctionType] = {}
        for state in self._states:
            for name in state.keys() - INTERNAL:
                value = state[name]
                if is_plain(value) or type(value) is tuple:
                    continue
                self._snapshot.keep_attribute(name, value, self._named)
        for cls in self._classes:
            for value in vars(cls).values():
                self._note_function(value)
        self._note_function(forward)
        for function in self._functions.values():
            for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
                self._snapshot.keep(value, self._named)

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
        before = sys.gettrace()
        try:
            with collector.off(), _NoOperation(self.refuse):
                sys.settrace(self._on_call)
                try:
                    yield
                finally:
                    sys.settrace(before)
        finally:
            touched = self._snapshot.restore()
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
        origin = origin_of(code.co_filename)
        # Only what was just made for it may be entered.
        self._may_enter = frame.f_back if code is QUIET_CONTEXT else None
        if code in QUIET_CODE:
            return None
        if origin == "user":
            self._enter(frame)
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
            return self._on_instruction
        if code is IS_TENSOR and frame.f_back is not None and origin_of(frame.f_back.f_code.co_filename) == "user":
            self.refuse(ASKS_FOR_TENSORS)
        # A mode around the trace, such as `with torch.device(...)`, is called for each function: that is no call of forward's.
        is_mode = code.co_name == "__torch_function__"
        if origin != "ours" and is_stateful(code.co_filename) and frame.f_back is not None and not is_mode:
            # What PyTorch and Python call by themselves is their business.
            caller = frame.f_back.f_code.co_filename
            if caller.startswith(DECORATORS) or origin_of(caller) == "user":
                self.refuse(f"its forward calls {code.co_name} of {frame.f_globals.get('__name__')}")
        return None

    def _enter(self, frame: types.FrameType) -> None:
        """Keeps copies of what a code object can name, before it runs."""
        code = frame.f_code
        if code in self._entered:
            return
        self._entered.add(code)
        self._named.update(code.co_names)
        for state in self._states:
            for name in self._named & state.keys() - INTERNAL:
                self._snapshot.keep(state[name], self._named)
        reachable = [frame.f_globals[name] for name in self._named & frame.f_globals.keys()]
        if (function := self._functions.get(code)) is not None:
            for name, cell in zip(code.co_freevars, function.__closure__ or ()):
                if (value := Cell(cell).get(name, None)) is not None and name != "__class__":
                    reachable.append(value)
        for value in reachable:
            self._note_function(value)
            self._snapshot.keep(value, self._named)
        owners = [value for value in reachable if isinstance(value, (type, types.ModuleType)) and not is_torch(value)]
        for owner in (*self._classes, *owners):
            for name in self._named:
                self._snapshot.keep_entry(owner, name)
                self._snapshot.keep(vars(owner).get(name, MISSING), self._named)

    def _note_function(self, value: Any) -> None:
        """Remembers a function by its code, and the functions that it encloses, to find variables of enclosing functions."""
        value = getattr(value, "__func__", value)
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, types.FunctionType) and value.__code__ not in self._functions:
            self._functions[value.__code__] = value
            for cell in value.__closure__ or ():
                self._note_function(Cell(cell).get("", None))

    def on_class_asked(self) -> None:
        """Refuses isinstance(x, Tensor) of a value of the trace, which is none; of lists and the like the answer is right."""
        if self._asking is not None:
            self.refuse(ASKS_FOR_TENSORS)

    def _on_instruction(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        if self._asking is not None and (self._asking[0] is not frame or frame.f_lasti > self._asking[1]):
            self._asking = None
        if event == "opcode" and (found := instructions_of(frame.f_code).get(frame.f_lasti)) is not None:
            self._check(frame, *found)
        return self._on_instruction

    def _check(self, frame: types.FrameType, operation: str, argument: Any) -> None:
        if operation in ATTRIBUTES or operation in GLOBALS:
            # A torch.fx.Proxy is no Tensor, and can't claim to be one: PyTorch's C++ code would take it for one.
            asks = argument in TENSOR_CLASSES and not {"isinstance", "type"}.isdisjoint(frame.f_code.co_names)
            call = plain_asks_of(frame.f_code).get(frame.f_lasti) if asks else None
            if call is not None and "type" not in frame.f_code.co_names:
                self._asking = frame, call
            elif asks or argument == "is_tensor":
                self.refuse(ASKS_FOR_TENSORS)
        if operation in ATTRIBUTES:
            self._attribute(argument)
        elif operation in GLOBALS:
            self._global(frame, argument)
        elif operation in FREE:
            self._free(frame.f_code, argument)
        elif operation == "LOAD_CONST":
            if isinstance(argument, str) and argument.isidentifier():
                self._asked.add(argument)
                self._attribute(argument)
        elif operation in WITH or (operation == "LOAD_SPECIAL" and "enter" in str(argument)):
            if self._may_enter is not frame:
                self.refuse("its forward enters a context (a `with` statement)")
        elif operation in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            self.refuse(f"its forward sets the global {argument}")
        elif operation in ("STORE_DEREF", "DELETE_DEREF") and argument in frame.f_code.co_freevars:
            self.refuse(f"its forward sets {argument}, a variable of an enclosing function")

    def _attribute(self, name: str) -> None:
        self._read.add(name)
        if name in AMBIENT:
            self.refuse(f"its forward asks {name}")
        if name in self._snapshot.opaque:
            self.refuse(f"its forward uses {name}, a {self._snapshot.opaque[name]}, whose state can't be compared")
        for holder in list(self._holders.values()):
            value = vars(holder).get(name, MISSING)
            if isinstance(value, types.ModuleType) and not is_torch(value):
                self._holders[id(value)] = value
            elif not _is_followed(value):
                self.refuse(f"its forward uses {holder.__name__}.{name}")

    def _global(self, frame: types.FrameType, name: str) -> None:
        if name not in frame.f_globals:
            if is_impure(frame.f_builtins.get(name)):
                self.refuse(f"its forward calls {name}")
            if name == "vars":
                self._read.add(name)
            return
        value = frame.f_globals[name]
        if is_torch(value) and name in AMBIENT:
            self.refuse(f"its forward asks {name}")
        if self._is_read(name, value):
            self._globals[id(frame.f_globals), name] = frame.f_globals, name

    def _free(self, code: types.CodeType, name: str) -> None:
        function = self._functions.get(code)
        if function is None or name not in code.co_freevars or name == "__class__":
            return  # a variable of a function that ran in this very forward
        cell = (function.__closure__ or ())[code.co_freevars.index(name)]
        if self._is_read(name, Cell(cell).get(name, MISSING)):
            self._cells[id(cell)] = Cell(cell), name

    def _is_read(self, name: str, value: Any) -> bool:
        """Whether a variable itself is a read: of a class or a Python module only the attributes are, of PyTorch's nothing."""
        if is_torch(value):
            return False
        if isinstance(value, (type, types.ModuleType)):
            self._holders[id(value)] = value
            return False
        if not _is_followed(value):
            self.refuse(f"its forward uses {name}, a {type(value).__name__}")
        return True


def _is_followed(value: Any) -> bool:
    """Whether what code does with a value shows: by the instructions that run, or by comparing it afterwards."""
    return not is_impure(value) and (is_comparable(value) or callable(value))


def _described(label: str, value: Any, names: frozenset[str]) -> Any:
    try:
        return described(value, names)
    except CannotRead as error:
        raise CannotRead(f"{error} ({label})") from None
