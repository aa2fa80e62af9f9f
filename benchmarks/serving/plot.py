"""Figure of the server's view: a row of panels for each way to serve, throughput on the left and p99 latency on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resnet_kernels.cli.report.plot_style import caption, line_style, log_axis, new_figure, number

from .loops import Figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW_INCHES = 2.9
_LABEL_APART = 0.085  # of the axes' height: a line of small text


@dataclass(frozen=True)
class Curve:
    """A contender's figures by the number of callers."""

    contender: str
    figures: Mapping[int, Figures]


def draw(ways: Mapping[str, Sequence[Curve]], contenders: Sequence[str], title: str) -> Figure:
    """Draws the curves of each way to serve; all panels of a column have the same limits.

    Args:
        ways: the rows, by their titles.
        contenders: all names, in the order of their styles.
        title: of the figure.
    """
    figure = new_figure(_ROW_INCHES * len(ways) + 0.4)
    figure.suptitle(caption(title), fontsize=11)
    grid = figure.subplots(len(ways), 2, squeeze=False)
    every = [figures for curves in ways.values() for curve in curves for figures in curve.figures.values()]
    most = max(figures.images_per_s for figures in every)
    low, high = min(figures.p99_ms for figures in every), max(figures.p99_ms for figures in every)
    for (left, right), (way, curves) in zip(grid, ways.items()):
        left.set(ylabel="images / s, all callers", ylim=(0, 1.1 * most))
        right.set(ylabel="p99 latency, ms (log scale)", yscale="log", ylim=(low / 1.15, high * 1.15))
        log_axis(right.yaxis, low, high)
        for axes, value in ((left, lambda f: f.images_per_s), (right, lambda f: f.p99_ms)):
            lines = {curve.contender: [value(f) for f in curve.figures.values()] for curve in curves}
            for curve in curves:
                axes.plot([*curve.figures], lines[curve.contender], ms=4, **line_style(contenders, curve.contender))
            counts = sorted({count for curve in curves for count in curve.figures})
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.minorticks_off()
            axes.set_title(caption(way), fontsize=10, loc="left")
            axes.grid(alpha=0.3)
            _label_ends(axes, counts[-1], {name: values[-1] for name, values in lines.items()}, contenders)
    for axes in grid[-1]:
        axes.set_xlabel("callers")
    return figure


def _label_ends(axes: Axes, x: float, ends: Mapping[str, float], contenders: Sequence[str]) -> None:
    """Writes each line's name and last value beside its end, in its color, moved apart where ends are close."""
    to_axes = axes.transScale + axes.transLimits
    heights = {name: to_axes.transform((x, y))[1] for name, y in ends.items()}
    places = spread(list(heights.values()), _LABEL_APART)
    for (name, y), place in zip(ends.items(), places):
        axes.annotate(
            f"{name} {number(y)}",
            (x, y),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=line_style(contenders, name)["color"],
            annotation_clip=False,
        )


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """Returns heights in the same order that are at least `apart`, near the given ones and from 0 to 1."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    # Groups of labels that touch each other, each as its members and the sum of the heights that its lowest would like.
    groups: list[tuple[list[int], float]] = []
    for i in order:
        members, wish = [i], heights[i]
        while groups and groups[-1][1] / len(groups[-1][0]) + len(groups[-1][0]) * apart > wish / len(members):
            below, wish_below = groups.pop()
            wish += wish_below - len(below) * len(members) * apart
            members = below + members
        groups.append((members, wish))
    places = {i: wish / len(members) + rank * apart for members, wish in groups for rank, i in enumerate(members)}
    for limits, indices, sign in ((1.0, order[::-1], 1), (0.0, order, -1)):
        limit = limits
        for i in indices:
            places[i] = sign * min(sign * places[i], sign * limit)
            limit = places[i] - sign * apart
    return [places[i] for i in range(len(heights))]
