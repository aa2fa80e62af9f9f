"""A results file of `pytest benchmarks --benchmark-json=FILE`, read and checked.

The report, `--against` and the README's tables see results through this module alone. Files that were written before a
field existed are read, too: what is absent is None or empty, and whoever shows it says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class ResultsError(ValueError):
    """A file that can't be used: its path and the reason, in one line."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a profiled call.

    path: the module that it works for, "" outside of any. kind: "conv", "bn", ... seconds: in one call. flops, hbm_bytes:
    what it has to do and move at least, None if unknown.
    """

    path: str
    name: str
    kind: str
    seconds: float
    flops: float | None
    hbm_bytes: float | None


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at most, FLOP/s and bytes/s, either None if unknown; source: how that is known."""

    flops_per_s: float | None
    bytes_per_s: float | None
    source: str


@dataclass(frozen=True)
class Measurement:
    """A contender's time on a case.

    ours: whether it is this package's. label: its name in words. version: its package and version. median, samples: seconds.
    ratios: its time over that of "eager" and "fused", medians over rounds in which they took turns, where there were such
    rounds. parity_error and parity_budget: None where nothing was compared. parity_failure: "" unless the error is over the
    budget. roofline_share: the least time by the machine's ceilings over the median, None if unknown.
    """

    contender: str
    ours: bool
    label: str
    settings: str
    version: str
    median: float
    samples: tuple[float, ...]
    ratios: Mapping[str, float]
    parity_error: float | None
    parity_budget: float | None
    parity_failure: str
    roofline_share: float | None
    kernels: tuple[Kernel, ...]
    ceilings: Ceilings | None


@dataclass(frozen=True)
class CaseResults:
    """What was measured on a case, by contender.

    level: op, block, stage or model. size: pixels of the input's height and width. dtype: "float32". platform: cpu or cuda.
    interleaved: whether samples of one index are of one round, in all contenders. busy_elsewhere: cores that other
    processes kept busy meanwhile, None if unknown.
    """

    name: str
    level: str
    direction: str
    system: str
    subject: str
    size: int
    batch: int
    dtype: str
    platform: str
    interleaved: bool
    busy_elsewhere: float | None
    contenders: dict[str, Measurement]

    @property
    def label(self) -> str:
        """The case in words, without its level, direction and platform."""
        return f"{self.subject} {self.size}px b{self.batch} {_SHORT.get(self.dtype, self.dtype)}"

    def img_per_s(self, contender: str) -> float:
        return self.batch / self.contenders[contender].median

    def speed(self, ours: str, peer: str) -> float:
        """How many times the peer's speed ours has: the median over rounds where they took turns, else of medians."""
        mine, other = self.contenders[ours], self.contenders[peer]
        if self.interleaved:
            return statistics.median(b / a for a, b in zip(mine.samples, other.samples))
        if ours in other.ratios:
            return other.ratios[ours]
        return 1 / mine.ratios[peer] if peer in mine.ratios else other.median / mine.median

    def best_peer(self, ours: str = "fused") -> str | None:
        """The fastest contender that is not ours, within its error budget or not; None if ours or every peer is missing."""
        peers = [name for name, measurement in self.contenders.items() if not measurement.ours]
        return min(peers, key=lambda name: self.speed(ours, name), default=None) if ours in self.contenders else None


@dataclass(frozen=True)
class Absence:
    """What was not measured: a contender, why, and in which cases."""

    contender: str
    reason: str
    cases: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """A whole file. date: "2026-11-22". devices: platform -> its name. versions: package -> version. cases: by name."""

    path: Path
    date: str
    commit: str
    devices: dict[str, str]
    versions: dict[str, str]
    absent: tuple[Absence, ...]
    cases: dict[str, CaseResults]

    @property
    def contenders(self) -> list[str]:
        """The names of all contenders: eager, ours, the others."""
        found = {name: m.ours for case in self.cases.values() for name, m in case.contenders.items()}
        return sorted(found, key=lambda name: (name != "eager", not found[name]))
