"""The parts of a report's section: a plot, a table, a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DIRECTIONS = {"forward": "inference", "forward-backward": "training step (forward and backward)"}
PARTS = {"conv": "convolution", "bn": "batch norm", "rest": "rest", "": "not told apart"}
# Whose kernels are drawn beside one another, of those that the file has.
PROFILED = ("eager", "compile", "fused")


@dataclass(frozen=True)
class Part:
    """A figure with its numbers. alt: what it shows, for who can't see it. figure: None where a table says it better."""

    title: str
    alt: str
    figure: Any
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """name: of its plots' files. missing: why there is no part, or what the parts leave out; "" if nothing."""

    name: str
    title: str
    intro: str
    parts: Sequence[Part]
    missing: str = ""
