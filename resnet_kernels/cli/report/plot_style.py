"""Colors, markers, axes and panels of the report's figures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, YELLOW = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#F0E442",
)  # fmt: skip


GRAY = "#999999"
# Yellow last: it is pale on white.
_COLORS = (BLACK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW)
MARKERS = "osD^vPX<>ph"
_LINES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "ooo", "+++")
WIDTH = 9.5  # inches, of every figure
_LONGEST_CAPTION = 64


def save(figure: Figure, kind: str) -> bytes:
    """Returns the figure as "png" or "svg": the same bytes for the same figure."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "resnet_kernels"}):
        figure.savefig(buffer, format=kind, dpi=130, metadata=metadata)
    return buffer.getvalue()


def new_figure(height: float) -> Figure:
    """Returns an empty figure of the page's width; height in inches."""
    # A figure of its own, not pyplot's, opens no window and switches no backend for the program that imported us.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its `count` axes, two per row, each `height` inches high."""
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    figure = new_figure(height * rows + 0.6)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def line_style(contenders: Sequence[str], name: str) -> dict[str, Any]:
    """Returns the arguments of `plot` for a contender, by its place among all of them."""
    index = contenders.index(name)
    # Contenders beyond the last color have hollow markers, and other ones.
    again = index // len(_COLORS)
    return {
        "color": _COLORS[index % len(_COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": _LINES[(index + again) % len(_LINES)],
        "markerfacecolor": "white" if again else None,
        "linewidth": 2.5 if name == "fused" else 1.3,
    }


def fill_of(index: int) -> str:
    """Returns the color of an area: any but black."""
    return _COLORS[1:][index % (len(_COLORS) - 1)]


def caption(text: str) -> str:
    """Returns a name from a results file as a figure can show it: on one line, not too long, and without formulas."""
    line = " ".join(text.split())
    if len(line) > _LONGEST_CAPTION:
        line = f"{line[: _LONGEST_CAPTION - 20]}…{line[-19:]}"
    return line.replace("$", r"\$")


def number(value: float) -> str:
    """Returns a number with three significant digits and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def unit_for(value: float, unit: str) -> str:
    """Returns a number with the unit's prefix: 1.5e12 and "FLOP/s" give "1.5 TFLOP/s"."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{number(value / factor)} {prefix}{unit}"
    return f"{number(value)} {unit}"


def log_axis(axis: Axis, low: float, high: float, unit: str = "") -> None:
    """Puts ticks at 1, 2 and 5, or at powers of ten where those would be too many, and writes their numbers out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: unit_for(value, unit) if unit else number(value)))
    axis.set_minor_formatter(NullFormatter())


def ratio_ticks(low: float, high: float, apart: float) -> list[float]:
    """Returns the ratios to write at an axis of their logarithms to base 2.

    The roundest come first; a ratio that is less than `apart` from an earlier one is left out.
    """
    ticks = [1.0]
    for tick in (
        0.5, 2, 0.2, 5, 0.1, 10, 0.05, 20, 0.02, 50, 0.01, 100,
        1.5, 0.75, 1.25, 0.8, 1.1, 0.9, 0.7, 0.6, 0.4, 0.3, 3, 4, 1.75,
    ):  # fmt: skip
        if low < math.log2(tick) < high and all(abs(math.log2(tick / other)) >= apart for other in ticks):
            ticks.append(tick)
    return ticks
