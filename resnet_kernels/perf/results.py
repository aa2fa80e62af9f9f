"""Contents of a results file of `pytest benchmarks --benchmark-json=FILE`, for the report and the pages' tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..ops.dtypes import SHORT_NAMES
from .schema import Absence, CaseInfo, ContenderInfo, Ratios, Roofline

# Levels of cases, in the order of the report, with their headings.
LEVELS = {"model": "Networks", "stage": "Stages", "block": "Blocks", "op": "Operations"}

_SHORT_NAMES = {str(dtype).removeprefix("torch."): name for dtype, name in SHORT_NAMES.items()}


class ResultsError(ValueError):
    """Error for a results file that can't be used: its path and the reason, in one line."""


@dataclass(frozen=True, kw_only=True)
class Measurement(ContenderInfo, Ratios, Roofline):
    """Seconds of a contender on a case. samples: in the order of the rounds, empty if the file has none."""

    median: float
    samples: tuple[float, ...] = ()

    @property
    def ratios(self) -> dict[str, float]:
        """Ratios that the file holds, by the other contender's name."""
        known = {"eager": self.interleaved_ratio_to_eager, "fused": self.interleaved_ratio_to_fused}
        return {name: ratio for name, ratio in known.items() if ratio is not None}


@dataclass(frozen=True, kw_only=True)
class CaseResults(CaseInfo):
    """All measurements of a case, by contender."""

    name: str
    contenders: dict[str, Measurement]

    @property
    def size(self) -> int:
        """Height and width of the input, in pixels."""
        return self.image_size

    @property
    def platform(self) -> str:
        """Either "cpu" or "cuda"."""
        return self.device_type

    @property
    def interleaved(self) -> bool:
        """Whether all contenders have samples; those with the same index are of one round."""
        return all(measurement.samples for measurement in self.contenders.values())

    @property
    def label(self) -> str:
        """Name of the case without its level, direction and platform."""
        return f"{self.subject} {self.size}px b{self.batch} {_SHORT_NAMES.get(self.dtype, self.dtype)}"

    def img_per_s(self, contender: str) -> float:
        """Returns images per second, by the median."""
        return self.batch / self.contenders[contender].median

    def speed(self, ours: str, peer: str) -> float:
        """Returns our speed over the peer's: the median over shared rounds, else the ratio of medians."""
        mine, other = self.contenders[ours], self.contenders[peer]
        if self.interleaved:
            return statistics.median(b / a for a, b in zip(mine.samples, other.samples))
        if ours in other.ratios:
            return other.ratios[ours]
        return 1 / mine.ratios[peer] if peer in mine.ratios else other.median / mine.median

    def best_peer(self, ours: str = "fused") -> str | None:
        """Returns the fastest contender that isn't ours, even if over its budget; None if ours or every peer is missing."""
        peers = [name for name, measurement in self.contenders.items() if not measurement.ours]
        return min(peers, key=lambda name: self.speed(ours, name), default=None) if ours in self.contenders else None


@dataclass(frozen=True)
class Results:
    """Contents of a file. date: "2026-11-22". devices: platform -> its name. versions: package -> version. cases: by name."""

    path: Path
    date: str
    commit: str
    devices: dict[str, str]
    versions: dict[str, str]
    absent: tuple[Absence, ...]
    cases: dict[str, CaseResults]

    @property
    def contenders(self) -> list[str]:
        """Names of all contenders: eager, ours, the others."""
        found = {name: m.ours for case in self.cases.values() for name, m in case.contenders.items()}
        return sorted(found, key=lambda name: (name != "eager", not found[name]))


def outcome(speed: float) -> str:
    """Returns the word for a ratio of speeds: "faster", "slower", or "level" if it is written as 1.00."""
    text = f"{speed:.2f}"
    return "level" if text == "1.00" else "faster" if speed > 1 else "slower"


def outcomes(cases: Iterable[CaseResults]) -> dict[str, int]:
    """Counts the cases in which fused is faster than, level with and slower than the fastest peer."""
    counts = dict.fromkeys(("faster", "level", "slower"), 0)
    for case in cases:
        peer = case.best_peer()
        if peer:
            counts[outcome(case.speed("fused", peer))] += 1
    return counts
