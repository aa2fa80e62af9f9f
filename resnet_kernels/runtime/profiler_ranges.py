"""Profiler ranges named by a module's path: torch.profiler shows a fused step as `module:layer1.0.conv1+bn1+relu`.

The runtime opens the ranges itself, because a hook on an inner module would make its block run eager.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.autograd import profiler

# The profiler demangles names as C++: without the prefix it would show a Sequential's module 2.0 as ".0".
PREFIX = "module:"

_Entry = TypeVar("_Entry", bound=tuple[Any, ...])


def around(steps: Iterable[_Entry], path: str) -> Iterable[_Entry]:
    """Iterates over tuples that begin with a step; while a profiler is on, the loop's body runs inside the step's range.

    path: path of the steps' module.
    """
    if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
        return steps
    return _ranged(steps, path)


def _ranged(steps: Iterable[_Entry], path: str) -> Iterator[_Entry]:
    for entry in steps:
        # The generator is suspended here while the loop's body runs; an exception there closes it and the range.
        with profiler.record_function(f"{PREFIX}{path}{'.' if path else ''}{entry[0]}"):
            yield entry
