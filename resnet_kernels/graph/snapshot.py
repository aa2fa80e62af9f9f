"""A snapshot of what code can reach, to see afterwards whether it is as it was, and to restore it."""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch

from ..ops import apart
from .known_code import is_impure
from .reads import MISSING, is_comparable, is_plain, is_plain_object

# Levels of objects inside of each other that are compared and restored.
_MOST_LEVELS = 5


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


collector = _GarbageCollector()


class Snapshot:
    """The states of modules, random generators and settings, and of the containers, objects and classes that are kept.

    Args:
        states: the __dict__ of each module.
    """

    def __init__(self, states: Sequence[dict[str, Any]]):
        self._states = [(state, dict(state)) for state in states]
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._entries: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._generators, self._settings = _generators(), _settings()
        self.opaque: dict[str, str] = {}  # attributes of objects whose use can't be followed, with their types

    def keep_entry(self, owner: Any, name: str) -> None:
        """Keeps an attribute of a class or a Python module, or that it has none."""
        self._entries.setdefault((id(owner), name), (owner, name, vars(owner).get(name, MISSING)))

    def keep_attribute(self, name: str, value: Any, names: Set[str]) -> None:
        """Keeps an attribute of a module, and notes whether code may use it; see `keep`."""
        self._note(name, value)
        self.keep(value, names)

    def _note(self, name: str, value: Any) -> None:
        if not is_comparable(value) or is_impure(value):
            self.opaque[name] = type(value).__name__

    def keep(self, value: Any, names: Set[str], levels: int = 0) -> None:
        """Copies a container or an object, and what is in it.

        Args:
            value: anything; other values than containers and objects stay as they are anyway.
            names: the attributes of objects that code can name.
            levels: containers and objects around it.
        """
        if levels > _MOST_LEVELS:
            return
        if isinstance(value, (list, deque, set, dict)):
            if id(value) in self._containers:
                return
            copy = dict(value) if isinstance(value, dict) else set(value) if isinstance(value, set) else list(value)
            self._containers[id(value)] = value, copy
            inner = [*copy.values()] if isinstance(copy, dict) else [] if isinstance(copy, set) else copy
        elif isinstance(value, tuple):
            inner = list(value)
        elif is_plain_object(value):
            state = vars(value)
            self._containers.setdefault(id(state), (state, dict(state)))
            inner = []
            for name in names & state.keys():
                inner.append(state[name])
                self._note(name, state[name])
        else:
            return
        for element in inner:
            if not is_plain(element):
                self.keep(element, names, levels + 1)

    def restore(self) -> str | None:
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
        if _generators() != self._generators:
            _restore_generators(self._generators)
            touched = touched or "its forward draws random numbers"
        if _settings() != self._settings:
            torch.set_grad_enabled(self._settings[0])
            touched = touched or "its forward changes a setting of PyTorch"
        return touched


def _same_elements(container: Any, copy: Any) -> bool:
    if isinstance(copy, dict):
        return [*container] == [*copy] and all(a is b for a, b in zip(dict.values(container), copy.values()))
    if isinstance(copy, set):
        return bool(container == copy)
    return len(container) == len(copy) and all(a is b for a, b in zip(container, copy))


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
