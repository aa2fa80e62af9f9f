"""Checks of the sizes that the zoo's constructors take."""

from __future__ import annotations

import numbers


def at_least_one(**sizes: object) -> None:
    """Checks that sizes, given by name, are ints of at least 1.

    Raises:
        TypeError: if a size is no int.
        ValueError: if a size is below 1.
    """
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
