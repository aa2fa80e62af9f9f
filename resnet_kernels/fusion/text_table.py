"""Text in columns."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Lays out text in left-aligned columns under a head and a rule."""
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *cells)]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
