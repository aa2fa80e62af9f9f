"""Calls apart from the caller's thread: probes whose answers are kept must not depend on what the thread has set.

A default device, autocast, inference mode, a profiler, function modes, dispatch modes and transforms belong to a thread. The
first call of a process may be made under any of them, and its answer holds for all later calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def call(function: Callable[[], Result]) -> Result:
    """Calls a function in a fresh thread, waits for it, and returns what it returns or raises what it raises."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
