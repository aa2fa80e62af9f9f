"""Seeing that nobody has written to Python objects, without reading them.

A network has hundreds of modules with eight dicts each. Comparing all of them in each call takes as long as a small network
does, most of it cache misses. CPython itself keeps note of writes:

    3.10, 3.11    each write to a dict gives it a number that no dict had before (PEP 509, `ma_version_tag`)
    3.12 on       PyDict_AddWatcher: Python calls a function at each write to a dict that it was told of

The class of an object is a pointer in it. So there is a list of words of memory, and one call into the compiled library says
whether they are what they were. Where changes can't be seen this way (no compiled library, another Python, one without its
global lock), a watch says each time that there may have been one.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from ..kernels.cpu import library

# Where CPython's PyObject has its class, and PyDictObject the number of PEP 509.
_CLASS, _VERSION = 8, 24


class ObjectWatch:
    """Objects whose class nobody has changed since `renew`, and dicts to which nobody has written.

    What lies deeper is not seen: an element of a list in a dict, the values of a tensor.

    Args:
        objects: of any class.
        dicts: dicts and OrderedDicts. Where one is a mapping of another kind, as in TorchScript's modules, nothing is seen.
        around: objects that are watched with their __dict__, but not kept, since they may hold the watch.
    """

    __slots__ = ("_around", "_kept", "_sight", "_then", "_words")

    def __init__(self, objects: Iterable[object], dicts: Iterable[dict[Any, Any]], around: Iterable[object] = ()):
        # Kept, so that no other object gets one of their addresses.
        self._kept = [*objects], [*dicts]
        self._around = [(weakref.ref(o), id(o), id(vars(o))) for o in around]
        self._sight: _Sight | None = None
        self._words = self._then = (ctypes.c_uint64 * 0)()

    def renew(self) -> None:
        """Begins anew. Call it before reading what is watched, so that no write falls in between."""
        if self._sight is None:
            self._sight = _sight() if all(isinstance(d, dict) for d in self._kept[1]) else None
            if self._sight is None:
                return
            objects, dicts = ([*map(id, kept)] for kept in self._kept)
            objects += [address for _, address, _ in self._around]
            dicts += [address for _, _, address in self._around]
            self._words = _array([*(address + _CLASS for address in objects), *self._sight.words_of(dicts)])
            self._then = type(self._words)()
        self._sight.calls.rk_read_words(len(self._words), self._words, self._then)

    def are_unchanged(self) -> bool:
        """Whether nobody has written since `renew`; False if that can't be seen, before `renew`, and after `forget`."""
        return (
            self._sight is not None
            and all(
                (o := to_object()) is not None and id(vars(o)) == its_dict for to_object, _, its_dict in self._around
            )
            and bool(self._sight.calls.rk_are_words(len(self._words), self._words, self._then))
        )

    def forget(self) -> None:
        """Undoes `renew`: what is watched is not as it should be."""
        self._sight = None


class _Sight(NamedTuple):
    """How writes to dicts are seen.

    calls: the compiled library, called without letting other threads run: they could wait longer than a call takes.
    watcher: Python's number of it; None where dicts have numbers.
    """

    calls: ctypes.PyDLL
    watcher: int | None

    def words_of(self, dicts: list[int]) -> list[int]:
        """Addresses of words one of which changes when somebody writes to one of the dicts at these addresses."""
        if self.watcher is None:
            return [address + _VERSION for address in dicts]
        watch = _python_function("PyDict_Watch", ctypes.c_int, ctypes.c_void_p)
        for address in dicts:
            watch(self.watcher, address)
        return [self.calls.rk_dict_writes()]


def _array(values: list[int]) -> ctypes.Array[ctypes.c_uint64]:
    return (ctypes.c_uint64 * len(values))(*values)


def _python_function(name: str, *arguments: type) -> Any:
    """A function of Python's that returns an int, negative with an exception set."""
    return ctypes.PYFUNCTYPE(ctypes.c_int, *arguments)((name, ctypes.pythonapi))


@functools.cache
def _sight() -> _Sight | None:
    found = library.library_or_none()
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    if found is None or sys.implementation.name != "cpython" or not has_lock or sys.maxsize < 2**32:
        return None
    calls, watcher = ctypes.PyDLL(str(found.path)), None
    calls.rk_dict_writes.restype = ctypes.c_void_p
    if sys.version_info >= (3, 12):
        try:
            add = _python_function("PyDict_AddWatcher", ctypes.c_void_p)
            watcher = add(ctypes.cast(calls.rk_dict_written, ctypes.c_void_p))
        except (RuntimeError, AttributeError):
            return None  # others have taken all of them
    sight = _Sight(calls, watcher)
    return sight if _sees(sight) else None


class _Object:
    pass


class _Other:
    pass


_WRITES: tuple[Callable[[dict[Any, Any]], Any], ...] = (
    lambda d: d.__setitem__("a", 1),
    lambda d: d.__setitem__("a", 2),
    lambda d: d.setdefault("b", 3),
    lambda d: d.update(c=4),
    lambda d: d.pop("c"),
    lambda d: d.__delitem__("b"),
    lambda d: d.clear(),
)


def _sees(sight: _Sight) -> bool:
    """Whether writes are seen in this very Python, and nothing else is: its structures may differ from the ones above."""
    value = _Object()
    kept: list[dict[Any, Any]] = [value.__dict__, {}, OrderedDict()]
    words = _array([id(value) + _CLASS, *sight.words_of([*map(id, kept)])])
    then = type(words)()
    if sys.getsizeof({}) < _VERSION + 8 or ctypes.c_uint64.from_address(words[0]).value != id(_Object):
        return False

    def is_seen(run: Callable[[], Any]) -> bool:
        sight.calls.rk_read_words(len(words), words, then)
        run()
        return not sight.calls.rk_are_words(len(words), words, then)

    writes: list[Callable[[], Any]] = [
        lambda: setattr(value, "a", 1),
        lambda: setattr(value, "a", 2),
        lambda: delattr(value, "a"),
        lambda: setattr(value, "__class__", _Other),
        *(partial(write, d) for d in kept for write in _WRITES),
    ]
    return all(map(is_seen, writes)) and not is_seen(lambda: [dict(d) for d in kept])
