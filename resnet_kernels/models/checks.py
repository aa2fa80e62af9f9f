"""What the zoo's constructors ask of a size."""

from __future__ import annotations

import numbers


def at_least_one(**sizes: object) -> None:
    """Raises TypeError for a size that is no int, ValueError for one below 1; both name it."""
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
