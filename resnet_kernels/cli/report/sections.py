"""What the report says of a results file: a section a plot, with the table behind it, or why there is nothing to draw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...perf.results import CaseResults, Kernel, Results
from . import plots

LEVELS = {"model": "Networks", "stage": "Stages", "block": "Blocks", "op": "Operations"}
_DIRECTIONS = {"forward": "inference", "forward-backward": "training step (forward and backward)"}
_PARTS = {"conv": "convolution", "bn": "batch norm", "rest": "rest", "": "not told apart"}
# Whose kernels are drawn beside one another, of those that the file has.
_PROFILED = ("eager", "compile", "fused")


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


def sections(results: Results) -> list[Section]:
    """All of the page's sections below its summary, in its order."""
    return [
        best_peer(results),
        throughput(results),
        roofline(results),
        layers(results),
        training_step(results),
        times(results),
    ]


def outcomes(cases: Iterable[CaseResults]) -> dict[str, int]:
    """In how many cases fused is faster than, level with and slower than the fastest peer."""
    counts = dict.fromkeys(("faster", "level", "slower"), 0)
    for case in cases:
        peer = case.best_peer()
        if peer:
            counts[plots.outcome(case.speed("fused", peer))] += 1
    return counts


def best_peer(results: Results) -> Section:
    parts, lonely = [], []
    for (level, direction, platform), cases in _grouped(
        results.cases.values(), lambda case: (case.level, case.direction, case.platform)
    ).items():
        bars, rows = [], []
        for case in cases:
            peer = case.best_peer()
            if peer is None:
                lonely.append(case.name)
                continue
            speed = case.speed("fused", peer)
            flag = " (over its error budget)" if case.contenders[peer].parity_failure else ""
            bars.append(plots.Bar(case.label, speed, peer))
            row = (case.label, _ms(case, "fused"), peer + flag, _ms(case, peer), f"{speed:.2f}", plots.outcome(speed))
            rows.append((speed, row))
        if not bars:
            continue
        title = f"{LEVELS[level]}, {_DIRECTIONS[direction]}, {platform}"
        rows = [row for _, row in sorted(rows, key=lambda pair: -pair[0])]
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
    key = lambda case: (case.direction, case.platform, case.system, case.subject, case.size, case.dtype)  # noqa: E731
    groups = _grouped((case for case in results.cases.values() if case.level == "model"), key)
    single = [f"{own[0].label} ({_DIRECTIONS[own[0].direction]})" for own in groups.values() if len(own) == 1]
    figures = defaultdict(dict)
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
            _DIRECTIONS[direction].capitalize(),
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


def roofline(results: Results) -> Section:
    parts = []
    for case in _profiled(results, "forward"):
        panels, rows, left_out = {}, [], []
        for name in _PROFILED:
            kernels = case.contenders[name].kernels if name in case.contenders else ()
            total = sum(kernel.seconds for kernel in kernels)
            drawn = [kernel for kernel in kernels if kernel.flops and kernel.hbm_bytes and kernel.seconds]
            if len(drawn) < len(kernels):
                share = 1 - sum(kernel.seconds for kernel in drawn) / total
                left_out.append(
                    f"{name}: {len(kernels) - len(drawn)} of {len(kernels)} kernels, {share:.0%} of the time"
                )
            if not drawn:
                continue
            stages = _stages(drawn)
            panels[name] = [
                plots.Point(
                    stage, kernel.flops / kernel.hbm_bytes, kernel.flops / kernel.seconds, kernel.seconds / total
                )
                for stage, kernel in zip(stages, drawn)
            ]
            slowest = sorted(drawn, key=lambda kernel: -kernel.seconds)[:10]
            rows += [
                (name, kernel.path or "-", kernel.name, f"{1e3 * kernel.seconds:.3g}", f"{kernel.seconds / total:.1%}",
                 f"{kernel.flops / kernel.hbm_bytes:.3g}", f"{kernel.flops / kernel.seconds / 1e9:.4g}")
                for kernel in slowest
            ]  # fmt: skip
        if not panels:
            continue
        ceilings = next((m.ceilings for m in case.contenders.values() if m.ceilings), None)
        note = f"Ceilings: {ceilings.source}." if ceilings else "The file has no ceilings of the machine."
        if left_out:
            note += f" Not drawn, as they have no FLOPs or it is not known what they move: {'; '.join(left_out)}."
        alt = (
            f"Log-log scatter plots of FLOP/s against FLOP per byte under the machine's ceilings: {', '.join(panels)}."
        )
        head = ("contender", "module", "kernel (the ten slowest)", "ms", "share of time", "FLOP / byte", "GFLOP / s")
        parts.append(Part(case.label, alt, plots.roofline(panels, ceilings), head, rows, note))
    return Section(
        "roofline",
        "Roofline of the kernels",
        "A marker is a kernel (on a CPU an operation), its area the share of the contender's time. "
        "Bytes are the least that it has to move: where caches hold the data a kernel may lie above the memory's ceiling.",
        parts,
        "" if parts else _unprofiled(results, "forward"),
    )


def layers(results: Results) -> Section:
    parts = []
    for case in _profiled(results, "forward"):
        by_stage: dict[str, dict[str, dict[str, float]]] = {"whole network": {}}
        pathless = []
        for name in (name for name in _PROFILED if name in case.contenders):
            kernels = case.contenders[name].kernels
            if not kernels:
                continue
            by_stage["whole network"][name] = _milliseconds(kernels)
            if not any(kernel.path for kernel in kernels):
                pathless.append(name)
                continue
            for stage, kernel in zip(_stages(kernels), kernels):
                parts_of = by_stage.setdefault(stage, {}).setdefault(name, dict.fromkeys(_PARTS.values(), 0.0))
                parts_of[_part(kernel)] += 1e3 * kernel.seconds
        note = f"{', '.join(pathless)}: whole network alone, its kernels bear no module's path." if pathless else ""
        parts.append(_stacked(case, by_stage, "time per layer", note))
    return Section(
        "layers",
        "Time per layer",
        "Layers are put together by stage (the part of their path before the first dot) and kind of operation. A fused "
        "convolution, with its BN, add and ReLU, counts as a convolution.",
        parts,
        "" if parts else _unprofiled(results, "forward"),
    )


def training_step(results: Results) -> Section:
    parts = []
    for case in _profiled(results, "forward-backward"):
        split = {n: _milliseconds(m.kernels) for n, m in case.contenders.items() if n in _PROFILED and m.kernels}
        parts.append(_stacked(case, {"": split}, "training step", ""))
    return Section(
        "training",
        "A training step, split",
        "Forward and backward together.",
        parts,
        "" if parts else _unprofiled(results, "forward-backward"),
    )


def times(results: Results) -> Section:
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


def _stacked(case: CaseResults, groups: dict[str, dict[str, dict[str, float]]], what: str, note: str) -> Part:
    splits = [split for bars in groups.values() for split in bars.values()]
    used = [part for part in _PARTS.values() if any(split[part] for split in splits)]
    stacks = [
        plots.Stack(group, name, {part: split[part] for part in used})
        for group, bars in groups.items()
        for name, split in bars.items()
    ]
    rows = [
        (stack.group, stack.label, *map(plots.number, stack.parts.values()), plots.number(sum(stack.parts.values())))
        for stack in stacks
    ]
    names = ", ".join(dict.fromkeys(stack.label for stack in stacks))
    alt = f"Stacked bars of milliseconds in {', '.join(used)}, {what}, of {names}."
    head = ("layers", "contender", *(f"{part} ms" for part in used), "sum ms")
    return Part(case.label, alt, plots.stacks(stacks, "ms of one call, summed over its kernels"), head, rows, note)


def _milliseconds(kernels: Sequence[Kernel]) -> dict[str, float]:
    split = dict.fromkeys(_PARTS.values(), 0.0)
    # A compiled network on a CPU is one region to the profiler.
    one = {kernel.kind for kernel in kernels} == {"rest"} and not any(kernel.path for kernel in kernels)
    for kernel in kernels:
        split[_PARTS[""] if one else _part(kernel)] += 1e3 * kernel.seconds
    return split


def _part(kernel: Kernel) -> str:
    return _PARTS.get(kernel.kind, _PARTS["rest"])


def _stages(kernels: Sequence[Kernel]) -> list[str]:
    """Each kernel's stage: the first name of its path; what lies at the top is the stem, and behind all stages the head."""
    names = {kernel.path.split(".")[0] for kernel in kernels if "." in kernel.path}
    firsts = [kernel.path.split(".")[0] for kernel in kernels]
    last = max((index for index, name in enumerate(firsts) if name in names), default=len(kernels))
    return [
        name if name in names else "outside of modules" if not name else "head" if index > last else "stem"
        for index, name in enumerate(firsts)
    ]


def _profiled(results: Results, direction: str) -> list[CaseResults]:
    return [
        case
        for case in results.cases.values()
        if case.direction == direction and any(m.kernels for n, m in case.contenders.items() if n in _PROFILED)
    ]


def _unprofiled(results: Results, direction: str) -> str:
    if not any(case.level == "model" and case.direction == direction for case in results.cases.values()):
        return f"Nothing to draw: the file has no network's {_DIRECTIONS[direction]}."
    return "Nothing to draw: the file has no times of single kernels."


def _grouped(cases: Iterable[CaseResults], key) -> dict[tuple, list[CaseResults]]:
    """By the level, then as in the file."""
    groups = defaultdict(list)
    for case in sorted(cases, key=lambda case: list(LEVELS).index(case.level)):
        groups[key(case)].append(case)
    return groups


def _ms(case: CaseResults, contender: str) -> str:
    return f"{1e3 * case.contenders[contender].median:.4g}"
