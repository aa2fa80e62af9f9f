"""The attributes, flags and globals that a forward reads: data that is compared in each call.

A forward is traced once, and its recipe stands for all calls. A flag that it asks (`if self.active`) is therefore a part of
the recipe. `Observer` in observer.py collects the names that the traced code reads; `Reads` holds the values behind them.
"""

from __future__ import annotations

import enum
import functools
import numbers
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import CannotRead

# nn.Module's own attributes. Modes, hooks and registries are checked by themselves in each call.
INTERNAL = frozenset(nn.Module().__dict__) | {"_rk_state"}


class _Missing(enum.Enum):
    """The value of an attribute that is not there."""

    MISSING = "missing"


MISSING = _Missing.MISSING

_PLAINEST = frozenset({bool, int, float, str, type(None)})
_PLAIN = (
    numbers.Number, str, bytes, enum.Enum, range, slice, torch.dtype, torch.device, torch.memory_format, torch.layout
)  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodWrapperType)
_METHODS_OF_C = (types.MethodDescriptorType, types.WrapperDescriptorType, types.BuiltinFunctionType)
_CONTAINERS = (list, tuple, set, frozenset, deque, dict, types.MappingProxyType)
# Assumptions about calls: the forward asked whether its input wants gradients, or whether it is empty; or it adds its input to
# something, by an add that promotes dtypes, so that autocast may not narrow the input.
WITHOUT_GRADIENTS, NOT_EMPTY, NOT_NARROWED = "without gradients", "not empty", "not narrowed"
# Elements of a container, and containers inside of each other, that are compared in each call at most.
_MOST_ELEMENTS, _MOST_LEVELS = 256, 5


def is_plain(value: object) -> bool:
    """Whether a value is immutable and compares by `==`."""
    # The exact types first: asking for the abstract class Number takes half a microsecond.
    return type(value) in _PLAINEST or isinstance(value, _PLAIN)


def is_plain_object(value: object) -> bool:
    """Whether a value is an instance of a class written in Python, whose state is its __dict__."""
    if isinstance(value, types.SimpleNamespace):
        return True
    if isinstance(value, (type, types.ModuleType, nn.Module, Tensor, *_FUNCTIONS)) or not hasattr(value, "__dict__"):
        return False
    # A class written in C has methods of C, and state beside the __dict__.
    return not any(isinstance(v, _METHODS_OF_C) for cls in type(value).__mro__[:-1] for v in vars(cls).values())


def is_comparable(value: object) -> bool:
    """Whether `described` can tell a value from another one."""
    kinds = (*_FUNCTIONS, *_CONTAINERS, type, types.ModuleType, nn.Module, Tensor, functools.partial)
    return is_plain(value) or isinstance(value, kinds) or is_plain_object(value)


def described(value: Any, names: frozenset[str], levels: int = 0) -> Any:
    """A value as plain data that is equal for two values only if code that reads `names` can't tell them apart.

    Raises:
        CannotRead: for a value with state that can't be seen, such as a file or a random generator.
    """
    if value is MISSING or is_plain(value):
        return type(value).__name__, value
    if isinstance(value, nn.Module):
        return ("module",)  # which one it is shows in the registries
    if isinstance(value, Tensor):
        return ("tensor",)
    if isinstance(value, _FUNCTIONS):
        return _described_function(value)
    if isinstance(value, type):
        return "class", value.__module__, value.__qualname__
    if levels >= _MOST_LEVELS:
        raise CannotRead(
            f"its forward reads a {type(value).__name__} that is nested too deeply to be compared in each call"
        )
    if isinstance(value, _CONTAINERS):
        if len(value) > _MOST_ELEMENTS:
            raise CannotRead(f"its forward reads a {type(value).__name__} that is too long to be compared in each call")
        items: Iterable[Any] = value.items() if isinstance(value, Mapping) else value
        if isinstance(value, (set, frozenset)):
            items = sorted(value, key=repr)
        return type(value).__name__, tuple(described(item, names, levels + 1) for item in items)
    if isinstance(value, types.ModuleType):
        return "python module", value.__name__
    if isinstance(value, functools.partial):
        return "partial", *(described(v, names, levels + 1) for v in (value.func, value.args, value.keywords))
    if is_plain_object(value):
        state = {**class_values(type(value), names), **vars(value)}
        seen = tuple((name, described(state[name], names, levels + 1)) for name in sorted(names & state.keys()))
        return type(value).__qualname__, seen
    raise CannotRead(f"its forward uses a {type(value).__name__}, whose state can't be compared in each call")


def _described_function(function: Any) -> tuple[Any, ...]:
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    name = getattr(function, "__module__", None), function.__qualname__
    # Two lambdas bear one name.
    return (
        ("function", *name) if code is None else ("function", *name, code.co_code, code.co_names, repr(code.co_consts))
    )


def class_values(cls: type, names: frozenset[str]) -> dict[str, Any]:
    """The class attributes that a lookup of these names on an instance finds, without those of PyTorch's own classes."""
    found: dict[str, Any] = {}
    for base in reversed(user_classes(cls)):
        found.update((name, vars(base)[name]) for name in names & vars(base).keys())
    return found


def user_classes(cls: type) -> list[type]:
    """The classes of an MRO that are neither PyTorch's nor Python's."""
    return [base for base in cls.__mro__ if base.__module__.split(".")[0] not in ("torch", "builtins", "typing", "abc")]


class Cell:
    """A variable of an enclosing function, as a mapping of one name."""

    def __init__(self, cell: types.CellType):
        self._cell = cell

    def get(self, name: str, default: Any) -> Any:
        """The variable's value."""
        try:
            return self._cell.cell_contents
        except ValueError:
            return default


@dataclass(frozen=True)
class Read:
    """An attribute of a module inside the one that was read.

    path: of the module. name: of the attribute. value: `described`.
    """

    path: str
    name: str
    value: Any


@dataclass(frozen=True)
class OutsideRead:
    """A global, a class attribute or a variable of an enclosing function. mapping: what holds it. label: for messages."""

    mapping: Any
    name: str
    value: Any
    label: str


class Outside:
    """The outside reads of a forward. Copies of a model share them, and a pickle leaves them behind: see `UNREAD`."""

    def __init__(self, reads: Iterable[OutsideRead]):
        self.reads = tuple(reads)

    def __deepcopy__(self, memo: Any) -> Outside:
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        return _unread, ()


NOTHING = Outside(())
# Of a recipe that came from a pickle: the module has to be read again.
UNREAD = Outside(())


def _unread() -> Outside:
    return UNREAD


@dataclass(frozen=True)
class Reads:
    """All that a forward reads besides its input and its modules.

    names: of all attributes that the traced code reads, for `described`.
    assumes: what a call has to be like, besides: WITHOUT_GRADIENTS, NOT_EMPTY, NOT_NARROWED.
    """

    inside: tuple[Read, ...] = ()
    outside: Outside = UNREAD
    names: frozenset[str] = frozenset()
    assumes: frozenset[str] = frozenset()

    def __add__(self, other: Reads) -> Reads:
        inside = dict.fromkeys((*self.inside, *other.inside))
        outside = Outside((*self.outside.reads, *other.outside.reads))
        return Reads(tuple(inside), outside, self.names | other.names, self.assumes | other.assumes)

    def below(self, path: str) -> Reads:
        """The same reads, seen from a module that has this one at `path`."""
        inside = tuple(Read(f"{path}.{read.path}".rstrip("."), read.name, read.value) for read in self.inside)
        return replace(self, inside=inside)


# What holds a value (None for the module itself), its name, what it was, and its name in messages.
_Bound = tuple[Any, str, Any, str]


class LiveReads:
    """Reads bound to a live module: what they give now is compared with what they gave when the forward was traced."""

    def __init__(self, module: nn.Module, owners: Mapping[str, nn.Module], reads: Reads):
        self._module = weakref.ref(module)
        self._names = reads.names
        # The module's own attributes aren't held: they hold its state, which holds these reads.
        bound: list[_Bound] = [
            (owners[r.path].__dict__ if r.path else None, r.name, r.value, f"{r.path}.{r.name}".lstrip("."))
            for r in reads.inside
            if r.path in owners  # without it the registries differ, too
        ]
        bound += [(r.mapping, r.name, r.value, r.label) for r in reads.outside.reads]
        self._slow: list[_Bound] = []
        self._fast: list[_Bound] = []
        self._own: list[tuple[str, Any]] = []
        # How to get what is not in the module's own __dict__, under which name, and what it was.
        self.outside: list[tuple[Any, str, Any]] = []
        for entry in bound:
            mapping, name, value, _ = entry
            now = (module.__dict__ if mapping is None else mapping).get(name, MISSING)
            is_fast = now is MISSING or is_plain(now) or isinstance(now, _FUNCTIONS)
            if not is_fast or described(now, self._names) != value:
                self._slow.append(entry)
                continue
            self._fast.append(entry)
            if mapping is None:
                self._own.append((name, now))
            else:
                self.outside.append((mapping.get, name, now))

    def is_of(self, module: nn.Module) -> bool:
        """Whether they are bound to this very module."""
        return self._module() is module

    def changed(self, module: nn.Module) -> str | None:
        """The name of something that is another than it was; None if nothing is. module: the one that they are of."""
        own = module.__dict__
        for name, then in self._own:
            if own.get(name, MISSING) is not then:
                return self._differs(own, self._fast + self._slow)
        return self.changed_outside(module)

    def changed_outside(self, module: nn.Module) -> str | None:
        """As `changed`, for a module in whose __dict__ nothing was replaced."""
        own = module.__dict__
        for get, name, then in self.outside:
            if get(name, MISSING) is not then:
                return self._differs(own, self._fast + self._slow)
        return self._differs(own, self._slow) if self._slow else None

    @property
    def identity_tells(self) -> bool:
        """Whether `changed_outside` can only be None where all `outside` are the objects that they were."""
        return not self._slow

    def _differs(self, own: dict[str, Any], bound: list[_Bound]) -> str | None:
        for mapping, name, value, label in bound:
            try:
                if described((own if mapping is None else mapping).get(name, MISSING), self._names) != value:
                    return label
            except CannotRead:
                return label
        return None


def pieces(names: Iterable[str], value: Any) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The attributes of a class or a Python module with one of these names that code may read as flags."""
    attributes = vars(value)
    for name in names:
        if name in attributes and (is_plain(attributes[name]) or isinstance(attributes[name], _CONTAINERS)):
            yield attributes, name
