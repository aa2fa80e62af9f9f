"""The report of `fuse_` and `explain` and the result of `verify`: one row per block, and a text as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..runtime.normalize_images import Normalize
from .unfused import Unfused


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
        convolutions: how many the model has.
        unfused: those that are in no fused kernel, by what they lack.
    """

    rows: tuple[Row, ...]
    backend: str
    normalize: Normalize | None = None
    frozen: bool = False
    convolutions: int = 0
    unfused: tuple[Unfused, ...] = ()

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
            "convolutions": self.convolutions,
            "rows": [asdict(row) for row in self.rows],
            "unfused": [asdict(row) for row in self.unfused],
        }
        return json.dumps(values, **options)

    def __str__(self) -> str:
        counts = self._counts()
        if not self.rows:
            return f"nothing to fuse: no block of Conv2d and BatchNorm2d was found{counts}"
        cells = [
            (row.path or "(model)", row.kind, "fused" if row.fused else "skipped", _explanation(row))
            for row in self.rows
        ]
        summary = f'{len(self.fused)} fused, {len(self.skipped)} skipped, backend="{self.backend}"'
        summary += "" if self.normalize is None else f", {self.normalize}"
        summary += ", frozen" if self.frozen else ""
        return f"{table(('module', 'kind', '', 'kernels, or why not'), cells)}\n{summary}{counts}"

    def _counts(self) -> str:
        """Lines on the convolutions in fused kernels, and on what the others lack."""
        left = sum(row.convolutions for row in self.unfused)
        if not left:
            return ""
        lines = [f"\n{self.convolutions - left} of {self.convolutions} convolutions are in fused kernels. The others:"]
        for row in self.unfused:
            lines.append(f"  {row.convolutions:3}  {row.reason} (such as {row.example})")
            lines += [f"       -> {row.hint}"] if row.hint else []
        return "\n".join(lines)


def _explanation(row: Row) -> str:
    if row.fused and row.reason:
        return f"{row.steps} [runs eager now: {row.reason}]"
    if not row.fused:
        return row.reason
    notes = [f" [apart from its neighbors: {row.apart}]"] if row.apart else []
    notes += [f" [by a measured table: {row.table}]"] if row.table else []
    return row.steps + "".join(notes)


@dataclass(frozen=True)
class Parity:
    """One comparison: of a block, of a run, or of the whole model.

    Errors are ||y - fp64|| / ||fp64|| over the values that are finite in all three results.

    Args:
        path: the block's path; "" is the whole model.
        steps: the kernels that it runs as.
        max_abs: the largest |fused - eager|.
        error: the fused result's error.
        eager_error: eager's error.
        budget: 2 * eager_error + one rounding of the dtype.
        lost: number of values that are NaN or inf in fp64, but finite in the fused result.
        new: number of values that are finite in eager, but NaN or inf in the fused result.
    """

    path: str
    steps: str
    max_abs: float
    error: float
    eager_error: float
    budget: float
    lost: int
    new: int

    @property
    def ok(self) -> bool:
        """Whether the error is within the budget, and NaN and inf are where they should be."""
        return self.error <= self.budget and self.lost == 0 and self.new == 0


@dataclass(frozen=True)
class VerifyResult:
    """Parity of each fused block and of the whole model. It is true in a boolean context if all are within the budget.

    Args:
        blocks: one comparison per block or run, in the order of the calls.
        output: the comparison of the whole model.
        top1_agreement: share of images with the same largest logit; None if the output is no (N, classes).
        dtype: the output's dtype, such as "float32".
        device: the input's device, such as "cuda:0".
        tf32: whether eager's convolutions might round to TF32.
    """

    blocks: tuple[Parity, ...]
    output: Parity
    top1_agreement: float | None
    dtype: str
    device: str
    tf32: bool

    @property
    def first_over_budget(self) -> Parity | None:
        """The first comparison that fails; None if none does."""
        return next((parity for parity in (*self.blocks, self.output) if not parity.ok), None)

    @property
    def ok(self) -> bool:
        """Whether all comparisons are within the budget."""
        return self.first_over_budget is None

    def __bool__(self) -> bool:
        return self.ok

    def to_json(self, **options: Any) -> str:
        """Returns the result as a JSON object.

        Args:
            **options: arguments of json.dumps, such as indent.
        """
        rows = [{**asdict(parity), "ok": parity.ok} for parity in (*self.blocks, self.output)]
        values = {"ok": self.ok, "top1_agreement": self.top1_agreement, "dtype": self.dtype, "device": self.device}
        return json.dumps({**values, "tf32": self.tf32, "rows": rows}, **options)

    def __str__(self) -> str:
        head = ("module", "max |fused-eager|", "error", "eager's", "budget", "NaN/inf", "")
        cells = [
            (
                p.path or "(model)",
                *(f"{v:.2e}" for v in (p.max_abs, p.error, p.eager_error, p.budget)),
                "same" if p.lost == p.new == 0 else f"{p.lost} lost, {p.new} new",
                "ok" if p.ok else "OVER BUDGET",
            )
            for p in (*self.blocks, self.output)
        ]
        agreement = "" if self.top1_agreement is None else f", top-1 agreement {self.top1_agreement:.1%}"
        first = self.first_over_budget
        verdict = "parity holds" if first is None else f"PARITY FAILS, first at {first.path or '(model)'}"
        tf32 = "on" if self.tf32 else "off"
        return f"{table(head, cells)}\n{verdict}{agreement} ({self.dtype}, {self.device}, TF32 {tf32})"


def table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Lays out text in left-aligned columns under a head and a rule."""
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *cells)]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
