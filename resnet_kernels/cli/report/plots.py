"""The report's figures: each function takes plain data and returns a matplotlib Figure; `save` writes one as bytes.

The colors are Okabe and Ito's, which color-blind readers can tell apart. In gray print, markers, line styles and hatches tell
the contenders apart. No number is shown by color alone: the page has each figure's numbers as a table, too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...perf.results import outcome
from ...perf.schema import Ceilings
from .plot_style import (
    BLACK,
    BLUE,
    GRAY,
    HATCHES,
    MARKERS,
    VERMILION,
    WIDTH,
    caption,
    fill_of,
    line_style,
    log_axis,
    new_figure,
    new_panels,
    number,
    ratio_ticks,
    unit_for,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """A contender's images per second at each batch size, in the order of the batches."""

    contender: str
    batches: Sequence[int]
    img_per_s: Sequence[float]


@dataclass(frozen=True)
class Bar:
    """Our speed in one case, as a multiple of the best peer's."""

    label: str
    speed: float
    peer: str

    @property
    def text(self) -> str:
        """What stands beside the bar."""
        return f"{self.speed:.2f}x {caption(self.peer)} ({outcome(self.speed)})"


@dataclass(frozen=True)
class Point:
    """A kernel on the roofline: FLOPs per byte, FLOP/s, and its share of the contender's time."""

    kind: str
    intensity: float
    flops_per_s: float
    share: float


@dataclass(frozen=True)
class Stack:
    """A bar of parts: bars of one group stand together, and `parts` maps kinds to milliseconds."""

    group: str
    label: str
    parts: Mapping[str, float]


def throughput(panels: Mapping[str, Sequence[Curve]], contenders: Sequence[str]) -> Figure:
    """Draws images per second against the batch size, with a panel per network; styles follow the order of `contenders`."""
    figure, grid = new_panels(len(panels), 3.2)
    ranges = [[value for curve in curves for value in curve.img_per_s] for curves in panels.values()]
    # The axis starts at 0 where the batch matters little. Elsewhere small batches would all lie on the ground.
    logarithmic = any(max(values) > 8 * min(values) for values in ranges)
    handles = {}
    for axes, (title, curves), values in zip(grid, panels.items(), ranges):
        for curve in curves:
            [handles[curve.contender]] = axes.plot(
                curve.batches, curve.img_per_s, ms=6, **line_style(contenders, curve.contender)
            )
        batches = sorted({batch for curve in curves for batch in curve.batches})
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set(xlabel="batch size (images)", ylabel="images / s" + (" (log scale)" if logarithmic else ""))
        if logarithmic:
            axes.set_yscale("log")
            log_axis(axes.yaxis, min(values), max(values))
        else:
            axes.set_ylim(0, 1.1 * max(values))
        axes.set_title(caption(title), fontsize=10)
        axes.grid(alpha=0.3)
    ordered = [name for name in contenders if name in handles]
    figure.legend(
        [handles[name] for name in ordered],
        [*map(caption, ordered)],
        loc="outside upper center",
        ncols=6,
        frameon=False,
    )
    return figure


def best_peer(bars: Sequence[Bar]) -> Figure:
    """Draws bars around 1, the greatest win on top; a loss has another color, a hatch and a word."""
    ordered = sorted(bars, key=lambda bar: -bar.speed)
    figure = new_figure(0.27 * len(ordered) + 1.3)
    axes = figure.subplots()
    # The axis is logarithmic: twice as fast is as far from 1 as half as fast.
    values, texts = [math.log2(bar.speed) for bar in ordered], []
    for y, (bar, value) in enumerate(zip(ordered, values)):
        verdict = outcome(bar.speed)
        color, hatch = {"faster": (BLUE, ""), "slower": (VERMILION, "////"), "level": (GRAY, "")}[verdict]
        axes.barh(y, value, height=0.7, color=color, hatch=hatch, edgecolor="white", linewidth=0)
        texts.append(bar.text)
        side = 1 if value >= 0 else -1
        axes.annotate(
            bar.text, (value, y), (4 * side, 0), textcoords="offset points", va="center", fontsize=8,
            ha="left" if side > 0 else "right",
        )  # fmt: skip
    axes.axvline(0, color=BLACK, linewidth=1)
    labels = [caption(bar.label) for bar in ordered]
    axes.set_yticks(range(len(ordered)), labels, fontsize=8)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    # The texts need room outside of the bars: 0.075 inches per letter, converted to units of the axis.
    # The axis reaches at least from 1/1.2 to 1.2; otherwise a loss of 1% would fill the page.
    left, right = (max(math.log2(1.2), *(side * value for value in values)) for side in (-1, 1))
    widths = [
        0.075 * max((len(t) for t, v in zip(texts, values) if (v < 0) == losses), default=0) + 0.2 for losses in (1, 0)
    ]
    inches = WIDTH - 0.075 * max(map(len, labels)) - 0.5
    unit = (left + right) / (inches - sum(widths))
    left, right = left + unit * widths[0], right + unit * widths[1]
    axes.set_xlim(-left, right)
    ticks = ratio_ticks(-left, right, 0.4 * unit)
    axes.set_xticks([math.log2(t) for t in ticks], [f"{t:g}" for t in ticks])
    axes.set_xlabel("times the best peer's speed (log scale): right of 1 fused is faster, left of 1 slower", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def roofline(
    panels: Mapping[str, Sequence[Point]], ceilings: Ceilings | None, winograd: Collection[str] = ()
) -> Figure:
    """Draws kernels under the machine's ceilings, a panel per contender; a marker's area is the kernel's share of time.

    Args:
        panels: kernels by contender.
        ceilings: of the machine.
        winograd: contenders with kernels that multiply 2.25 times less than is counted, and so have a ceiling of their own.
    """
    from matplotlib.collections import PathCollection

    figure, grid = new_panels(len(panels), 4.0)
    kinds = list(dict.fromkeys(point.kind for points in panels.values() for point in points))
    handles = {}
    for axes, (title, points) in zip(grid, panels.items()):
        for kind in kinds:
            mine = [point for point in points if point.kind == kind]
            index = kinds.index(kind)
            handles[kind] = axes.scatter(
                [point.intensity for point in mine], [point.flops_per_s for point in mine],
                s=[20 + 1200 * point.share for point in mine], marker=MARKERS[index % len(MARKERS)],
                facecolor=fill_of(index), edgecolor=BLACK, linewidth=0.5, alpha=0.65, label=kind,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log")
        axes.set_title(caption(title), fontsize=10)
        axes.set_xlabel("FLOP / byte (log scale)")
        axes.grid(alpha=0.3)
        # All panels have the same limits.
        everywhere = [p for points in panels.values() for p in points]
        _draw_ceilings(axes, everywhere, ceilings, _WINOGRAD if winograd else 1.0, title in winograd)
    legend = figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False)
    for handle in legend.legend_handles:
        assert isinstance(handle, PathCollection)
        handle.set_sizes([50])
    return figure


# Multiplications of a direct 3x3 convolution over those of Winograd's F(2x2, 3x3): 36 / 16.
_WINOGRAD = 2.25


def _draw_ceilings(
    axes: Axes, points: Sequence[Point], ceilings: Ceilings | None, highest: float, winograd: bool
) -> None:
    left = min(point.intensity for point in points) / 2
    right = max(point.intensity for point in points) * 2
    bottom = min(point.flops_per_s for point in points) / 2
    top = max(point.flops_per_s for point in points) * 2
    compute = ceilings.flops_per_s if ceilings and ceilings.flops_per_s else math.inf
    memory = ceilings.bytes_per_s if ceilings and ceilings.bytes_per_s else math.inf
    if compute < math.inf:
        top = max(top, 2.5 * highest * compute)
        start = left if memory == math.inf else compute / memory
        right = max(right, 4 * start)
        axes.plot([start, right], [compute, compute], color=BLACK, linewidth=1.5)
        axes.annotate(
            unit_for(compute, "FLOP/s"), (right, compute), (-4, 4), textcoords="offset points", ha="right", fontsize=8
        )
        if winograd:
            axes.plot([start, right], [_WINOGRAD * compute] * 2, color=BLACK, linewidth=1.0, linestyle=":")
            axes.annotate(
                f"{unit_for(_WINOGRAD * compute, 'FLOP/s')} by Winograd", (right, _WINOGRAD * compute), (-4, 4),
                textcoords="offset points", ha="right", fontsize=8,
            )  # fmt: skip
    if memory < math.inf:
        end = min(right, compute / memory)
        axes.plot([left, end], [memory * left, memory * end], color=BLACK, linewidth=1.5, linestyle="--")
        top = max(top, 2 * memory * end)
        bottom = min(bottom, memory * left)
        middle = math.sqrt(left * end)
        # The text stands at the line's upper left, where a line that rises to the right doesn't cross it.
        axes.annotate(
            unit_for(memory, "B/s"),
            (middle, memory * middle),
            (-5, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    axes.set(xlim=(left, right), ylim=(bottom, top))
    log_axis(axes.xaxis, left, right)
    log_axis(axes.yaxis, bottom, top, "FLOP/s")


def stacks(bars: Sequence[Stack], xlabel: str) -> Figure:
    """Draws horizontal stacked bars by group, each with its total; a kind has the same color and hatch everywhere."""
    kinds = list(dict.fromkeys(kind for bar in bars for kind in bar.parts))
    groups = list(dict.fromkeys(bar.group for bar in bars))
    figure = new_figure(0.3 * len(bars) + 0.22 * len(groups) + 1.4)
    axes = figure.subplots()
    totals = [sum(bar.parts.values()) for bar in bars]
    y, ticks, previous = 0.0, [], None
    for bar, total in zip(bars, totals):
        if bar.group != previous:
            y += 0.7 if previous is not None else 0
            axes.annotate(
                caption(bar.group), (0, y), (-70, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", va="center", fontsize=9, fontweight="bold",
            )  # fmt: skip
            previous = bar.group
        start = 0.0
        for kind, milliseconds in sorted(bar.parts.items(), key=lambda part: kinds.index(part[0])):
            index = kinds.index(kind)
            axes.barh(
                y, milliseconds, left=start, height=0.8, color=fill_of(index), hatch=HATCHES[index % len(HATCHES)],
                edgecolor="white", linewidth=0.5, label=kind,
            )  # fmt: skip
            start += milliseconds
        axes.annotate(number(total), (total, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
        ticks.append(y)
        y += 1
    axes.set_yticks(ticks, [caption(bar.label) for bar in bars], fontsize=8)
    axes.set_ylim(y - 0.3, -0.7)
    axes.set_xlim(0, 1.1 * max(totals))
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False)
    return figure
