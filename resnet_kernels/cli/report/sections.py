"""The report's sections: each has a plot with its table, or the reason why there is nothing to draw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from ...perf.results import LEVELS, CaseResults, Results, outcome
from . import plots
from .kernel_sections import layers, roofline, training_step
from .parts import DIRECTIONS, Part, Section


def sections(results: Results) -> list[Section]:
    """Returns the page's sections below its summary, in order."""
    return [
        best_peer(results),
        throughput(results),
        roofline(results),
        layers(results),
        training_step(results),
        times(results),
    ]


def best_peer(results: Results) -> Section:
    """Returns the section of fused against the best peer: a plot per level, direction and platform."""
    parts, lonely = [], []
    for (level, direction, platform), cases in _grouped(
        results.cases.values(), lambda case: (case.level, case.direction, case.platform)
    ).items():
        bars, ranked = [], []
        for case in cases:
            peer = case.best_peer()
            if peer is None:
                lonely.append(case.name)
                continue
            speed = case.speed("fused", peer)
            flag = " (over its error budget)" if case.contenders[peer].parity_failure else ""
            bars.append(plots.Bar(case.label, speed, peer))
            row = (case.label, _ms(case, "fused"), peer + flag, _ms(case, peer), f"{speed:.2f}", outcome(speed))
            ranked.append((speed, row))
        if not bars:
            continue
        title = f"{LEVELS[level]}, {DIRECTIONS[direction]}, {platform}"
        rows = [row for _, row in sorted(ranked, key=lambda pair: -pair[0])]
        alt = f"Horizontal bars around 1: fused against the best peer in {len(bars)} cases, sorted, losses hatched."
        head = ("case", "fused ms", "best peer", "its ms", "times its speed", "fused is")
        parts.append(Part(title, alt, plots.best_peer(bars), head, rows))
    return Section(
        "best-peer",
        "Fused against the best peer",
        "The peer is whichever of the other contenders is fastest in that very case, whatever its numerical error. "
        "Ratios are medians over rounds in which contenders took turns, not ratios of the two medians beside them.",
        parts,
        f"No peer, or no fused contender, was measured in: {', '.join(lonely)}." if lonely else "",
    )


def throughput(results: Results) -> Section:
    """Returns the section of images per second: a plot per direction, with a panel per network."""
    key = lambda case: (case.direction, case.platform, case.system, case.subject, case.size, case.dtype)  # noqa: E731
    groups = _grouped((case for case in results.cases.values() if case.level == "model"), key)
    single = [f"{own[0].label} ({DIRECTIONS[own[0].direction]})" for own in groups.values() if len(own) == 1]
    figures: dict[str, dict[str, list[plots.Curve]]] = defaultdict(dict)
    rows = defaultdict(list)
    for (direction, platform, system, subject, size, dtype), cases in groups.items():
        if len(cases) == 1:
            continue
        cases.sort(key=lambda case: case.batch)
        curves = []
        for name in results.contenders:
            measured = [case for case in cases if name in case.contenders]
            if measured:
                speeds = [case.img_per_s(name) for case in measured]
                curves.append(plots.Curve(name, [case.batch for case in measured], speeds))
                numbers = ", ".join(f"{case.batch}: {speed:.4g}" for case, speed in zip(measured, speeds))
                rows[direction].append((f"{subject} {size}px {dtype} {platform}", name, numbers))
        figures[direction][f"{subject} ({system}), {size}px, {dtype}, {platform}"] = curves
    parts = [
        Part(
            DIRECTIONS[direction].capitalize(),
            f"Lines of images per second against batch size, a panel a network: {', '.join(panels)}.",
            plots.throughput(panels, results.contenders),
            ("network", "contender", "batch size: images / s"),
            rows[direction],
        )
        for direction, panels in figures.items()
    ]
    missing = f"Measured at one batch size only, so no curve: {', '.join(dict.fromkeys(single))}." if single else ""
    return Section(
        "throughput",
        "Images per second against batch size",
        "From each contender's median. Axes begin at 0 unless they say that they are logarithmic.",
        parts,
        missing or ("" if parts else "The file has no network."),
    )


def times(results: Results) -> Section:
    """Returns the section with the time and the error of every case and contender, as a table."""
    rows = []
    for case in results.cases.values():
        for name, measurement in case.contenders.items():
            error = ""
            if measurement.parity_error is not None and measurement.parity_budget is not None:
                error = f"{measurement.parity_error:.1e} / {measurement.parity_budget:.1e}"
            rows.append(
                (f"{case.level}, {case.direction}: {case.label}", name, _ms(case, name), f"{case.img_per_s(name):.4g}",
                 f"{case.speed(name, 'eager'):.2f}" if "eager" in case.contenders else "",
                 f"{measurement.roofline_share:.0%}" if measurement.roofline_share else "",
                 error + (" over" if measurement.parity_failure else ""))
            )  # fmt: skip
    head = ("case", "contender", "median ms", "images / s", "times eager's speed", "of roofline", "error / budget")
    return Section(
        "times",
        "All times",
        "Errors are relative norms against fp64; the budget is twice eager's error plus one rounding. A peer over it "
        "is timed all the same, and says so. Of roofline: the least time by the machine's ceilings over the median; it "
        "may pass 100% where a CPU's caches hold what is counted as read from memory.",
        [Part("Every case and contender", "", None, head, rows)],
    )


def _grouped(
    cases: Iterable[CaseResults], key: Callable[[CaseResults], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[CaseResults]]:
    """Groups cases by a key, in the order of the levels, then of the file."""
    groups = defaultdict(list)
    for case in sorted(cases, key=lambda case: list(LEVELS).index(case.level)):
        groups[key(case)].append(case)
    return groups


def _ms(case: CaseResults, contender: str) -> str:
    return f"{1e3 * case.contenders[contender].median:.4g}"
