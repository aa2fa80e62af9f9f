"""Two results files of one machine compared: which contenders became slower or faster by more than noise.

What is compared is each contender's time over eager's, so that a machine that is slower as a whole changes nothing. Eager is
the control: nothing of this package runs in it. A change counts if it lies beyond both kinds of noise:

    within a run    the change's 99% interval does not reach the margin. A median's interval is that of order statistics,
                    which assumes no distribution; those of several medians are joined by MOVER (Zou and Donner 2008,
                    "Construction of confidence limits about effect measures"). Rounds in which contenders took turns are
                    compared pair by pair, where both files have them.
    between runs    the margin: 3%, or two standard deviations of the peers' changes, if that is more. Like eager, peers of
                    one version are not this package's, so what changed in them between the runs is noise. Robustly
                    estimated (1.48 times the median magnitude), and from three changes at least: fewer tell nothing.
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


@dataclass(frozen=True)
class Change:
    """A contender's time in the new file over that in the old one, each in units of `unit`'s time.

    factor: 1.05 is 5% slower; low and high: its 99% interval, noise within the runs alone. unit: "eager"; or "" where a file
    lacks eager in this case: the machine's drift is in it. verdict: "slower", "faster" or "within noise".
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
    """changes: ours first. margin: of this pair of files, a share. controls: how many changes of peers it rests on.

    drift: eager's time over its time in the old file, the median over cases; None if none has it. missing: what can't be
    compared in the cases that both files have, "case, contender".
    """

    new: Results
    old: Results
    changes: tuple[Change, ...]
    margin: float
    controls: int
    drift: float | None
    missing: tuple[str, ...]

    @property
    def alike(self) -> bool:
        """Whether both files took their samples in the same way, in turns or contender by contender."""
        common = [name for name in self.new.cases if name in self.old.cases]
        return all(self.new.cases[name].interleaved == self.old.cases[name].interleaved for name in common)

    def of_ours(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.ours and change.verdict == verdict]


def compare(new: Results, old: Results, margin: float = MARGIN) -> Comparison:
    """Compares all contenders but eager in the cases that both files have.

    Raises:
        ResultsError: if the files are of different machines, or have no case in common.
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
    estimates, magnitudes, missing, drifts = [], [], [], []
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
            unit, *interval = _change(*cases, contender)
            if unit and not mine.ours and mine.version == before.version:
                magnitudes.append(abs(interval[0]))
            estimates.append((name, contender, mine.ours, unit, *interval))
    if len(magnitudes) >= _MIN_CONTROLS:
        margin = max(margin, math.expm1(2 * 1.4826 * statistics.median(magnitudes)))
    changes = [
        Change(name, contender, ours, unit, *map(math.exp, interval), _verdict(interval, math.log1p(margin)))
        for name, contender, ours, unit, *interval in estimates
    ]
    changes.sort(key=lambda change: (not change.ours, -change.factor))
    drift = statistics.median(drifts) if drifts else None
    return Comparison(new, old, tuple(changes), margin, len(magnitudes), drift, tuple(missing))


def _verdict(interval: Sequence[float], margin: float) -> str:
    _, low, high = interval
    return "slower" if low > margin else "faster" if high < -margin else "within noise"


def _change(new: CaseResults, old: CaseResults, contender: str) -> tuple[str, float, float, float]:
    """(unit, change, low, high) in logarithms."""
    cases = (new, old)
    has_eager = all("eager" in case.contenders and case.contenders["eager"].samples for case in cases)
    if has_eager and new.interleaved and old.interleaved:
        terms = [_median(_log_ratios(case, contender)) for case in cases]
        return "eager", *_joined(terms[:1], terms[1:])
    logs = {
        name: [_median([math.log(s) for s in case.contenders[name].samples]) for case in cases]
        for name in ((contender, "eager") if has_eager else (contender,))
    }
    if not has_eager:
        return "", *_joined(logs[contender][:1], logs[contender][1:])
    (mine, mine_before), (eager, eager_before) = logs[contender], logs["eager"]
    return "eager", *_joined([mine, eager_before], [mine_before, eager])


def _log_ratios(case: CaseResults, contender: str) -> list[float]:
    pairs = zip(case.contenders[contender].samples, case.contenders["eager"].samples)
    return [math.log(mine / eager) for mine, eager in pairs]


def _median(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high): the tightest order statistics that hold the median 99% of the time, else the whole range."""
    ordered = sorted(values)
    n = len(ordered)
    # Of n samples a binomial number lies below the true median. The normal approximation of it, with the correction for
    # whole numbers, is off by less than one from n = 8 on; fewer samples need their whole range, and get it.
    z = statistics.NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    k = max(0, math.floor(n / 2 - z * math.sqrt(n) / 2 - 0.5))
    return statistics.median(ordered), ordered[k], ordered[n - 1 - k]


def _joined(added: Sequence[tuple], subtracted: Sequence[tuple]) -> tuple[float, float, float]:
    """The sum of some medians less that of others, with its interval by MOVER."""
    middle = sum(m for m, _, _ in added) - sum(m for m, _, _ in subtracted)
    below = math.hypot(*(m - low for m, low, _ in added), *(high - m for m, _, high in subtracted))
    above = math.hypot(*(high - m for m, _, high in added), *(m - low for m, low, _ in subtracted))
    return middle, middle - below, middle + above
