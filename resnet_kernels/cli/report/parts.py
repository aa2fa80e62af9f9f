"""The parts of the report: sections, and in each of them plots with their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DIRECTIONS = {"forward": "inference", "forward-backward": "training step (forward and backward)"}
PARTS = {"conv": "convolution", "bn": "batch norm", "rest": "rest", "": "not told apart"}
# The contenders whose kernels are drawn beside one another, if the file has them.
PROFILED = ("eager", "compile", "fused")


@dataclass(frozen=True)
class Part:
    """A figure with its numbers.

    Args:
        title: the heading.
        alt: a text that describes the figure to readers who can't see it.
        figure: a matplotlib Figure; None where a table says it better.
        head: the table's head.
        rows: the table's rows.
        note: a sentence below the figure; "" if there is none.
    """

    title: str
    alt: str
    figure: Any
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Args:
        name: a name for the files of its plots.
        title: the heading.
        intro: sentences below the heading.
        parts: its figures and tables.
        missing: why there is no part, or what the parts leave out; "" if nothing.
    """

    name: str
    title: str
    intro: str
    parts: Sequence[Part]
    missing: str = ""
