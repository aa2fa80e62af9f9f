"""Profiler ranges that bear a module's path: a fused step is `module:layer1.0.conv1+bn1+relu` to torch.profiler.

A hook would show it, too, but a hook on an inner module has a block run eager: so ranges come from inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.autograd import profiler

# The profiler takes names for mangled C++ where it can: it would show the Sequential's module 2.0 as ".0".
PREFIX = "module:"

_Entry = TypeVar("_Entry", bound=tuple[Any, ...])


def around(steps: Iterable[_Entry], path: str) -> Iterable[_Entry]:
    """Returns tuples that begin with a step; while a profiler is on, the loop's body for each runs inside its range.

    path: of the module that the steps are of.
    """
    if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
        return steps
    return _ranged(steps, path)


def _ranged(steps: Iterable[_Entry], path: str) -> Iterator[_Entry]:
    for entry in steps:
        # A generator rests in here while its loop's body runs; an exception there closes it, and the range.
        with profiler.record_function(f"{PREFIX}{path}{'.' if path else ''}{entry[0]}"):
            yield entry
