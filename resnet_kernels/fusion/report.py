"""The report of `fuse_` and `explain`: one row per block, and its text as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..runtime.normalize_images import Normalize


@dataclass(frozen=True)
class Row:
    """One block of the report.

    Args:
        path: the module's path; "" is the model itself.
        kind: the module's class, by name.
        fused: whether the module was swapped.
        steps: the kernels that it runs as, such as "conv1+bn1+relu -> conv2+bn2+add+relu".
        reason: why the block is not fused, or why a fused one runs eager as things stand; "" if neither.
        apart: why no kernel may reach from this block into its neighbors; "" if one may.
        table: what a measured table decides for it, such as "3 of 3 convolutions, from 56x56"; "" if nothing.
    """

    path: str
    kind: str
    fused: bool
    steps: str = ""
    reason: str = ""
    apart: str = ""
    table: str = ""


@dataclass(frozen=True)
class FuseReport:
    """The rows in the order of the model's modules. `print` shows them as a table, `to_json` writes them for a program.

    Iterating gives the rows, and `len` counts them.

    Args:
        rows: fused blocks and skipped ones.
        backend: the backend that was asked for.
        normalize: mean and std of the images, if the model was fused with `normalize`.
        frozen: whether the model was fused with freeze=True.
    """

    rows: tuple[Row, ...]
    backend: str
    normalize: Normalize | None = None
    frozen: bool = False

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fused(self) -> tuple[Row, ...]:
        """The rows of fused blocks."""
        return tuple(row for row in self.rows if row.fused)

    @property
    def skipped(self) -> tuple[Row, ...]:
        """The rows of blocks that are not fused, each with its reason."""
        return tuple(row for row in self.rows if not row.fused)

    def to_json(self, **options: Any) -> str:
        """Returns the report as a JSON object.

        Args:
            **options: arguments of json.dumps, such as indent.
        """
        values = {
            "backend": self.backend,
            "normalize": None if self.normalize is None else asdict(self.normalize),
            "frozen": self.frozen,
            "rows": [asdict(row) for row in self.rows],
        }
        return json.dumps(values, **options)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing to fuse: no block of Conv2d and BatchNorm2d was found"
        cells = [
            (row.path or "(model)", row.kind, "fused" if row.fused else "skipped", _explanation(row))
            for row in self.rows
        ]
        summary = f'{len(self.fused)} fused, {len(self.skipped)} skipped, backend="{self.backend}"'
        summary += "" if self.normalize is None else f", {self.normalize}"
        summary += ", frozen" if self.frozen else ""
        return f"{table(('module', 'kind', '', 'kernels, or why not'), cells)}\n{summary}"


def _explanation(row: Row) -> str:
    if row.fused and row.reason:
        return f"{row.steps} [runs eager now: {row.reason}]"
    if not row.fused:
        return row.reason
    notes = [f" [apart from its neighbors: {row.apart}]"] if row.apart else []
    notes += [f" [by a measured table: {row.table}]"] if row.table else []
    return row.steps + "".join(notes)


def table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Lays out text in left-aligned columns under a head and a rule."""
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *cells)]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
