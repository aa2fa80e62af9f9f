"""Comparison of two results files of one machine: contenders that became slower or faster by more than noise.

Each contender's time over eager's time of the same round is compared, so a machine that is slower as a whole changes nothing.
Eager is the control: nothing of this package runs in it. A change counts if it lies beyond both kinds of noise:

    within a run    The change's 99% interval does not reach the margin. A median's interval is that of order statistics,
                    which assumes no distribution. Intervals of several medians are joined by MOVER (Zou and Donner 2008,
                    "Construction of confidence limits about effect measures").
    between runs    The margin is 3%, or two standard deviations of the peers' changes, if that is more. Peers of one version
                    don't contain this package, so their changes between the runs are noise. The standard deviation is 1.48
                    times the median magnitude, which is robust. Fewer than three changes give no estimate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .results import CaseResults, Results, ResultsError

MARGIN = 0.03
_CONFIDENCE = 0.99
_MIN_CONTROLS = 3

_Interval = tuple[float, float, float]  # (middle, low, high)


@dataclass(frozen=True)
class Change:
    """A contender's time in the new file over its time in the old one, each in units of `unit`'s time.

    factor: 1.05 is 5% slower. low, high: its 99% interval by the noise within the runs. unit: "eager", or "" where a file
    lacks eager in this case, so that the factor includes the machine's drift. verdict: "slower", "faster" or "within noise".
    """

    case: str
    contender: str
    ours: bool
    unit: str
    factor: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All changes between two files, ours first.

    margin: smallest change that isn't noise between these runs, a share. controls: number of peers' changes behind it. drift:
    eager's time over its time in the old file, the median over cases, None if no case has eager in both. missing: "case,
    contender" for each contender that only one file has, in the cases that both have.
    """

    new: Results
    old: Results
    changes: tuple[Change, ...]
    margin: float
    controls: int
    drift: float | None
    missing: tuple[str, ...]

    def of_ours(self, verdict: str) -> list[Change]:
        """Returns the changes of this package's contenders with a verdict."""
        return [change for change in self.changes if change.ours and change.verdict == verdict]


def compare(new: Results, old: Results, margin: float = MARGIN) -> Comparison:
    """Compares all contenders but eager in the cases that both files have.

    Args:
        new: The newer file.
        old: The older file, of the same machine.
        margin: The least change that counts, a share.

    Raises:
        ResultsError: The files are of different machines, or have no case in common.
    """
    platforms = [platform for platform in new.devices if platform in old.devices]
    for platform in platforms or new.devices:
        here, there = new.devices[platform], old.devices.get(platform, ", ".join(old.devices.values()))
        if here != there:
            raise ResultsError(
                f"{new.path} is from {here}, {old.path} from {there}: times of two machines don't compare"
            )
    common = [name for name in new.cases if name in old.cases]
    if not common:
        raise ResultsError(f"{new.path} and {old.path} have no case in common")
    estimates: list[tuple[str, str, bool, str, _Interval]] = []
    magnitudes: list[float] = []
    missing: list[str] = []
    drifts: list[float] = []
    for name in common:
        cases = new.cases[name], old.cases[name]
        both = [contender for contender in cases[0].contenders if contender in cases[1].contenders]
        lost = {*cases[0].contenders, *cases[1].contenders} - {*both}
        missing += [f"{name}, {contender}" for contender in sorted(lost)]
        if "eager" in both:
            drifts.append(cases[0].contenders["eager"].median / cases[1].contenders["eager"].median)
        for contender in both:
            if contender == "eager":
                continue
            if any(not case.contenders[contender].samples for case in cases):
                missing.append(f"{name}, {contender} (no samples: --benchmark-json writes them)")
                continue
            mine, before = (case.contenders[contender] for case in cases)
            unit, interval = _change(*cases, contender)
            if unit and not mine.ours and mine.version == before.version:
                magnitudes.append(abs(interval[0]))
            estimates.append((name, contender, mine.ours, unit, interval))
    if len(magnitudes) >= _MIN_CONTROLS:
        margin = max(margin, math.expm1(2 * 1.4826 * statistics.median(magnitudes)))
    changes = [
        Change(
            *(name, contender, ours, unit),
            *(math.exp(interval[0]), math.exp(interval[1]), math.exp(interval[2])),
            _verdict(interval, math.log1p(margin)),
        )
        for name, contender, ours, unit, interval in estimates
    ]
    changes.sort(key=lambda change: (not change.ours, -change.factor))
    drift = statistics.median(drifts) if drifts else None
    return Comparison(new, old, tuple(changes), margin, len(magnitudes), drift, tuple(missing))


def _verdict(interval: _Interval, margin: float) -> str:
    _, low, high = interval
    return "slower" if low > margin else "faster" if high < -margin else "within noise"


def _change(new: CaseResults, old: CaseResults, contender: str) -> tuple[str, _Interval]:
    """Returns (unit, change in logarithms). Eager's samples in a file are of the same rounds as the contender's."""
    if all("eager" in case.contenders and case.contenders["eager"].samples for case in (new, old)):
        return "eager", _joined(*([_median(_log_ratios(case, contender))] for case in (new, old)))
    logs = ([math.log(sample) for sample in case.contenders[contender].samples] for case in (new, old))
    return "", _joined(*([_median(values)] for values in logs))


def _log_ratios(case: CaseResults, contender: str) -> list[float]:
    pairs = zip(case.contenders[contender].samples, case.contenders["eager"].samples)
    return [math.log(mine / eager) for mine, eager in pairs]


def _median(values: Sequence[float]) -> _Interval:
    """Returns (median, low, high): the tightest order statistics that hold the median 99% of the time, else the range."""
    ordered = sorted(values)
    n = len(ordered)
    # The number of samples below the true median is binomial. Its normal approximation, with the correction for whole
    # numbers, is off by less than one from n = 8 on; fewer samples need their whole range, and get it.
    z = statistics.NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    k = max(0, math.floor(n / 2 - z * math.sqrt(n) / 2 - 0.5))
    return statistics.median(ordered), ordered[k], ordered[n - 1 - k]


def _joined(added: Sequence[_Interval], subtracted: Sequence[_Interval]) -> _Interval:
    """Sum of some medians less the sum of others, with its interval by MOVER."""
    middle = sum(m for m, _, _ in added) - sum(m for m, _, _ in subtracted)
    below = math.hypot(*(m - low for m, low, _ in added), *(high - m for m, _, high in subtracted))
    above = math.hypot(*(high - m for m, _, high in added), *(m - low for m, low, _ in subtracted))
    return middle, middle - below, middle + above
