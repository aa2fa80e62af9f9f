"""The report's sections on kernels: rooflines, layers, a training step."""

from __future__ import annotations

from collections.abc import Sequence

from ...perf.results import CaseResults, Results
from ...perf.schema import Kernel
from . import plot_style, plots
from .parts import DIRECTIONS, PARTS, PROFILED, Part, Section


def roofline(results: Results) -> Section:
    """Returns the section of rooflines: a plot per profiled inference case, with the ten slowest kernels of each contender."""
    parts = []
    for case in _profiled(results, "forward"):
        panels, rows, left_out = {}, [], []
        winograd = set()
        for name in PROFILED:
            kernels = case.contenders[name].kernels if name in case.contenders else ()
            total = sum(kernel.seconds for kernel in kernels)
            drawn = [
                (kernel, kernel.flops / kernel.hbm_bytes, kernel.flops / kernel.seconds)
                for kernel in kernels
                if kernel.flops and kernel.hbm_bytes and kernel.seconds
            ]
            if len(drawn) < len(kernels):
                share = 1 - sum(kernel.seconds for kernel, _, _ in drawn) / total
                left_out.append(
                    f"{name}: {len(kernels) - len(drawn)} of {len(kernels)} kernels, {share:.0%} of the time"
                )
            if not drawn:
                continue
            if any("winograd" in kernel.name for kernel, _, _ in drawn):
                winograd.add(name)
            stages = _stages([kernel for kernel, _, _ in drawn])
            panels[name] = [
                plots.Point(stage, intensity, flops_per_s, kernel.seconds / total)
                for stage, (kernel, intensity, flops_per_s) in zip(stages, drawn)
            ]
            slowest = sorted(drawn, key=lambda entry: -entry[0].seconds)[:10]
            rows += [
                (name, kernel.path or "-", kernel.name, f"{1e3 * kernel.seconds:.3g}", f"{kernel.seconds / total:.1%}",
                 f"{intensity:.3g}", f"{flops_per_s / 1e9:.4g}")
                for kernel, intensity, flops_per_s in slowest
            ]  # fmt: skip
        if not panels:
            continue
        ceilings = next((m.ceilings for m in case.contenders.values() if m.ceilings), None)
        note = f"Ceilings: {ceilings.source}." if ceilings else "The file has no ceilings of the machine."
        if winograd:
            note += (
                " FLOPs are a direct convolution's everywhere; Winograd's kernel multiplies 2.25 times less, so its ceiling "
                "is so much higher (dotted)."
            )
        if left_out:
            note += f" Not drawn, as they have no FLOPs or it is not known what they move: {'; '.join(left_out)}."
        alt = (
            f"Log-log scatter plots of FLOP/s against FLOP per byte under the machine's ceilings: {', '.join(panels)}."
        )
        head = ("contender", "module", "kernel (the ten slowest)", "ms", "share of time", "FLOP / byte", "GFLOP / s")
        parts.append(Part(case.label, alt, plots.roofline(panels, ceilings, winograd), head, rows, note))
    return Section(
        "roofline",
        "Roofline of the kernels",
        "A marker is a kernel (on a CPU an operation), its area the share of the contender's time. "
        "Bytes are the least that it has to move: where caches hold the data a kernel may lie above the memory's ceiling.",
        parts,
        "" if parts else _unprofiled(results, "forward"),
    )


def layers(results: Results) -> Section:
    """Returns the section of times per layer: a plot per profiled inference case, its bars grouped by stage."""
    parts = []
    for case in _profiled(results, "forward"):
        by_stage: dict[str, dict[str, dict[str, float]]] = {"whole network": {}}
        pathless = []
        for name in (name for name in PROFILED if name in case.contenders):
            kernels = case.contenders[name].kernels
            if not kernels:
                continue
            by_stage["whole network"][name] = _milliseconds(kernels)
            if not any(kernel.path for kernel in kernels):
                pathless.append(name)
                continue
            for stage, kernel in zip(_stages(kernels), kernels):
                parts_of = by_stage.setdefault(stage, {}).setdefault(name, dict.fromkeys(PARTS.values(), 0.0))
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
    """Returns the section of training steps: a plot per profiled case, its bars split by kind of operation."""
    parts = []
    for case in _profiled(results, "forward-backward"):
        split = {n: _milliseconds(m.kernels) for n, m in case.contenders.items() if n in PROFILED and m.kernels}
        parts.append(_stacked(case, {"": split}, "training step", ""))
    return Section(
        "training",
        "A training step, split",
        "Forward and backward together.",
        parts,
        "" if parts else _unprofiled(results, "forward-backward"),
    )


def _stacked(case: CaseResults, groups: dict[str, dict[str, dict[str, float]]], what: str, note: str) -> Part:
    splits = [split for bars in groups.values() for split in bars.values()]
    used = [part for part in PARTS.values() if any(split[part] for split in splits)]
    stacks = [
        plots.Stack(group, name, {part: split[part] for part in used})
        for group, bars in groups.items()
        for name, split in bars.items()
    ]
    rows = [
        (
            stack.group,
            stack.label,
            *map(plot_style.number, stack.parts.values()),
            plot_style.number(sum(stack.parts.values())),
        )
        for stack in stacks
    ]
    names = ", ".join(dict.fromkeys(stack.label for stack in stacks))
    alt = f"Stacked bars of milliseconds in {', '.join(used)}, {what}, of {names}."
    head = ("layers", "contender", *(f"{part} ms" for part in used), "sum ms")
    return Part(case.label, alt, plots.stacks(stacks, "ms of one call, summed over its kernels"), head, rows, note)


def _milliseconds(kernels: Sequence[Kernel]) -> dict[str, float]:
    split = dict.fromkeys(PARTS.values(), 0.0)
    # A compiled network on a CPU is one region to the profiler.
    one = {kernel.kind for kernel in kernels} == {"rest"} and not any(kernel.path for kernel in kernels)
    for kernel in kernels:
        split[PARTS[""] if one else _part(kernel)] += 1e3 * kernel.seconds
    return split


def _part(kernel: Kernel) -> str:
    return PARTS.get(kernel.kind, PARTS["rest"])


def _stages(kernels: Sequence[Kernel]) -> list[str]:
    """Returns each kernel's stage: the first name of its path. At the top lie the stem and, after all stages, the head."""
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
        if case.direction == direction and any(m.kernels for n, m in case.contenders.items() if n in PROFILED)
    ]


def _unprofiled(results: Results, direction: str) -> str:
    if not any(case.level == "model" and case.direction == direction for case in results.cases.values()):
        return f"Nothing to draw: the file has no network's {DIRECTIONS[direction]}."
    return "Nothing to draw: the file has no times of single kernels."
