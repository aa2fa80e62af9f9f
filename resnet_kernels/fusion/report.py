"""What `fuse_` and `explain` tell: a row per block, fused or the reason why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ..runtime.normalize_images import Normalize
from .text_table import table


@dataclass(frozen=True)
class Row:
    """One block.

    path: module path, "" for the model itself. kind: class name. fused: whether it was swapped.
    steps: the kernels it runs as, e.g. "conv1+bn1+relu -> conv2+bn2+add+relu". reason: why it is not fused, or why a fused
    one runs eager as things stand; "" if neither. apart: why no kernel may reach from it into the blocks next to it.
    table: what a measured table decides of it, as in "3 of 3 convolutions, from 56x56"; "" if none does.
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
    """Rows in the order of the model's modules; `print` it for a table, `to_json` for a machine."""

    rows: tuple[Row, ...]
    backend: str
    normalize: Normalize | None = None  # what the model does to its images, if it was fused with normalize
    frozen: bool = False  # whether it was fused with freeze=True

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fused(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.fused)

    @property
    def skipped(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.fused)

    def to_json(self, **options) -> str:
        """The report as a JSON object; options go to json.dumps."""
        normalize = None if self.normalize is None else asdict(self.normalize)
        values = {"backend": self.backend, "normalize": normalize, "frozen": self.frozen}
        values["rows"] = [asdict(row) for row in self.rows]
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
    notes = [f" [apart from its neighbours: {row.apart}]"] if row.apart else []
    notes += [f" [by a measured table: {row.table}]"] if row.table else []
    return row.steps + "".join(notes)
