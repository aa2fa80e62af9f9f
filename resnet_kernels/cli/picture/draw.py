"""The picture of a report: a frame for each stage, a line for each block, a box for each kernel.

All is placed by numbers, as SVG wraps no text. Widths of texts are upper bounds (words.py), as the viewer picks the font.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...fusion.report import FuseReport, Row
from ...kernels.activations import KINDS
from ...runtime.run_steps import CALLS
from . import words
from .alike import ARROW, PLUS, Group, stages

WIDTH, MARGIN, PAD, GAP = 960, 16, 12, 8
_LEFT = MARGIN + PAD
_LABEL_WIDTH = 180  # the column with the blocks' paths
_KERNELS = _LEFT + _LABEL_WIDTH + GAP
_RIGHT = WIDTH - MARGIN - PAD
_CELL_HEIGHT, _KERNEL_HEIGHT, _ARROW_WIDTH, _CELL_GAP = 20, 28, 18, 3
_MOST_CELLS = 5
_REASON_LINES = 3
_SIZE, _SMALL = 12, 12
_LINE = 17

_PAPER, _INK, _GRAY = "#ffffff", "#1f2328", "#59636e"
_FRAME, _FRAME_EDGE = "#f6f8fa", "#d1d9e0"
_FUSED, _FUSED_EDGE = "#d5e8f5", "#0072b2"
_OPERATION = "#eef6fb"
_LEFT_OUT, _LEFT_OUT_EDGE = "#fdeee2", "#b34700"
_OPERATIONS = {"add", *KINDS, *(f"add_{kind}" for kind in KINDS), *CALLS}
# A row that is fused, but runs eager as things stand, looks like one that is left out: eager is what runs.


def svg(report: FuseReport, title: str = "") -> str:
    """Returns the picture of a report, the text of an SVG file.

    Args:
        report: what `explain`, `fuse_` or `unfuse_` returned.
        title: the model's name.
    """
    picture = _Picture()
    picture.head(report, title)
    for name, groups in stages(report.rows):
        picture.stage(name, groups)
    picture.foot(report)
    return picture.text()


class _Picture:
    """Elements from top to bottom; `y` is where the next one goes."""

    def __init__(self) -> None:
        self._elements: list[str] = []
        self.y: float = MARGIN

    def text(self) -> str:
        height = self.y + MARGIN - GAP
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}" '
            'font-family="sans-serif">'
        )
        return "\n".join([head, _rect(0, 0, WIDTH, height, _PAPER), *self._elements, "</svg>"]) + "\n"

    def head(self, report: FuseReport, title: str) -> None:
        """Draws the title, the counts and the legend."""
        most = _RIGHT - MARGIN
        if title:
            self._write(MARGIN, words.fit(title, most, 20, bold=True), 20, bold=True, hover=title, line=30)
        left = sum(row.convolutions for row in report.unfused)
        counts = f"{report.convolutions - left} of {report.convolutions} convolutions are in fused kernels"
        self._write(MARGIN, counts, 14, line=22)
        for line in words.wrap(_about(report), most, _SMALL, 2):
            self._write(MARGIN, line, _SMALL, color=_GRAY)
        self.y += GAP
        if report.rows:
            self._legend(any_eager=any(row.reason for row in report.rows))

    def _legend(self, any_eager: bool) -> None:
        x = self._kernel(MARGIN, ["conv1", "bn1", "relu"], eager=False) + GAP
        first = "one kernel, and the layers that it computes"
        self._label(x, first)
        if any_eager:
            x += words.width(first, _SMALL) + 2 * GAP
            self._elements.append(_rect(x, self.y, 36, _KERNEL_HEIGHT, _LEFT_OUT, _LEFT_OUT_EDGE, dashed=True))
            self._label(x + 36 + GAP, "PyTorch's own code, and why")
        self.y += _KERNEL_HEIGHT + 2 * GAP

    def stage(self, name: str, groups: list[Group]) -> None:
        """Draws a frame with a stage's blocks in it."""
        start, top = len(self._elements), self.y
        self.y += GAP
        if [path for group in groups for path in group.paths] != [name]:
            shown = words.fit(name or "(model)", _RIGHT - _LEFT, 13, bold=True)
            self._write(_LEFT, shown, 13, bold=True, hover=name, line=22)
        for group in groups:
            self._group(group)
        self._elements.insert(start, _rect(MARGIN, top, WIDTH - 2 * MARGIN, self.y - top, _FRAME, _FRAME_EDGE))
        self.y += GAP

    def foot(self, report: FuseReport) -> None:
        """Draws the convolutions that are in no fused kernel, by reason."""
        if not report.rows:
            self._write(MARGIN, "Nothing to fuse: no block of Conv2d and BatchNorm2d was found.", 14, line=26)
        if report.unfused:
            self._write(MARGIN, "Convolutions in no fused kernel", 14, bold=True, line=24)
        counts = [words.width(str(row.convolutions), _SMALL) for row in report.unfused]
        x = MARGIN + max(32, *counts, 0) + GAP
        for row in report.unfused:
            self._write(MARGIN, str(row.convolutions), _SMALL, advance=False)
            for line in words.wrap(row.reason, _RIGHT - x, _SMALL, _REASON_LINES):
                self._write(x, line, _SMALL, hover=row.reason)
            more = f"such as {row.example}" + (f" → {row.hint}" if row.hint else "")
            for line in words.wrap(more, _RIGHT - x, _SMALL, _REASON_LINES):
                self._write(x, line, _SMALL, color=_GRAY, hover=more)
            self.y += 4
        self.y += GAP

    def _group(self, group: Group) -> None:
        rows, top = group.rows[0], self.y
        self._elements.append(f"<g><title>{words.quoted(_all_of(group))}</title>")
        for line, monospace in _names(group):
            keep_end = monospace and not line.startswith(words.ELLIPSIS)
            shown = words.fit(line, _LABEL_WIDTH, _SIZE, monospace=monospace, keep_end=keep_end)
            self._write(_LEFT, shown, _SIZE, color=_INK if monospace else _GRAY, monospace=monospace)
        below, self.y = self.y, top
        for row in rows:
            self._row(row)
        self.y = max(self.y, below) + GAP
        self._elements.append("</g>")

    def _row(self, row: Row) -> None:
        if row.steps:
            x: float = _KERNELS
            for number, step in enumerate(row.steps.split(ARROW)):
                cells = _cells(step)
                if number:
                    if x + _ARROW_WIDTH + _kernel_width(cells) > _RIGHT:
                        x, self.y = _KERNELS, self.y + _KERNEL_HEIGHT + 4
                    self._arrow(x)
                    x += _ARROW_WIDTH
                x = self._kernel(x, cells, eager=bool(row.reason) or not row.fused, hover=step)
            self.y += _KERNEL_HEIGHT + 4
        for note in _notes(row):
            for line in words.wrap(note, _RIGHT - _KERNELS, _SMALL, _REASON_LINES):
                self._write(_KERNELS, line, _SMALL, color=_GRAY, hover=note)
        if row.reason:
            self._reason(f"runs eager now: {row.reason}" if row.fused else row.reason)

    def _reason(self, reason: str) -> None:
        lines = words.wrap(reason, _RIGHT - _KERNELS - 2 * GAP, _SMALL, _REASON_LINES)
        longest = max(words.width(line, _SMALL) for line in lines)
        height = _KERNEL_HEIGHT + (len(lines) - 1) * _LINE
        box = _rect(_KERNELS, self.y, longest + 2 * GAP, height, _LEFT_OUT, _LEFT_OUT_EDGE, dashed=True)
        self._elements.append(box)
        for number, line in enumerate(lines):
            self._elements.append(_text(_KERNELS + GAP, self.y + 18 + number * _LINE, line, _SMALL, hover=reason))
        self.y += height + 4

    def _kernel(self, x: float, cells: list[str], *, eager: bool, hover: str = "") -> float:
        """Draws a kernel's box with its cells; returns where it ends."""
        fill, edge = (_LEFT_OUT, _LEFT_OUT_EDGE) if eager else (_FUSED, _FUSED_EDGE)
        self._elements.append(_rect(x, self.y, _kernel_width(cells), _KERNEL_HEIGHT, fill, edge, dashed=eager))
        x += 4
        for cell in cells:
            size = _cell_width(cell)
            inner = _OPERATION if cell.partition("(")[0] in _OPERATIONS else _PAPER
            self._elements.append(_rect(x, self.y + 4, size, _CELL_HEIGHT, inner, radius=3))
            self._elements.append(_text(x + 5, self.y + 18, cell, _SIZE, monospace=True, hover=hover))
            x += size + _CELL_GAP
        return x - _CELL_GAP + 4

    def _arrow(self, x: float) -> None:
        middle = self.y + _KERNEL_HEIGHT / 2
        self._elements.append(
            f'<path d="M{x + 3:g},{middle:g} h11 m-4,-4 l4,4 l-4,4" fill="none" stroke="{_GRAY}" stroke-width="1.5"/>'
        )

    def _label(self, x: float, text: str) -> None:
        self._elements.append(_text(x, self.y + 18, text, _SMALL))

    def _write(
        self,
        x: float,
        text: str,
        size: float,
        *,
        color: str = _INK,
        bold: bool = False,
        monospace: bool = False,
        hover: str = "",
        line: float = _LINE,
        advance: bool = True,
    ) -> None:
        self._elements.append(_text(x, self.y + size + 1, text, size, color, bold, monospace, hover))
        self.y += line if advance else 0


def _about(report: FuseReport) -> str:
    text = f'{len(report.fused)} fused, {len(report.skipped)} skipped, backend="{report.backend}"'
    text += "" if report.normalize is None else f", {report.normalize}"
    return text + (", frozen" if report.frozen else "")


def _names(group: Group) -> Iterable[tuple[str, bool]]:
    """The lines on the left of a block or of several, and whether each is code."""
    first, last, count = group.paths[0], group.paths[-1], len(group.paths)
    rows = group.rows[0]
    kind = rows[0].kind if len(rows) == 1 else rows[0].kind.removesuffix(" (part)")
    both = f"{first} {words.ELLIPSIS} {last}"
    if count == 1:
        yield first or "(model)", True
    elif words.width(both, _SIZE, monospace=True) <= _LABEL_WIDTH:
        yield both, True
    else:
        yield first, True
        yield f"{words.ELLIPSIS} {last.rpartition('.')[2]}", True
    yield kind if count == 1 else f"{count} {words.TIMES} {kind}", False


def _notes(row: Row) -> list[str]:
    notes = [f"apart from its neighbors: {row.apart}"] if row.apart else []
    return notes + ([f"by a measured table: {row.table}"] if row.table else [])


def _all_of(group: Group) -> str:
    """Every row of a group in words, for the pointer that rests on it."""
    return "\n".join(
        words.clean(
            f"{path or '(model)'}: {row.kind}: {', '.join(filter(None, (row.steps, *_notes(row), row.reason)))}"
        )
        for path, rows in zip(group.paths, group.rows)
        for row in rows
    )


def _cells(step: str) -> list[str]:
    """The names of a kernel's layers, cut so that the kernel fits a line."""
    names = step.split(PLUS)
    if len(names) > _MOST_CELLS:
        names = [*names[: _MOST_CELLS - 1], PLUS.join(names[_MOST_CELLS - 1 :])]
    most = (_RIGHT - _KERNELS - _ARROW_WIDTH - 8) / max(4, len(names)) - 10 - _CELL_GAP
    return [words.fit(name, most, _SIZE, monospace=True, keep_end=True) for name in names]


def _cell_width(cell: str) -> float:
    return round(words.width(cell, _SIZE, monospace=True) + 10, 1)


def _kernel_width(cells: list[str]) -> float:
    return sum(map(_cell_width, cells)) + _CELL_GAP * (len(cells) - 1) + 8


def _rect(
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str,
    edge: str = "",
    *,
    dashed: bool = False,
    radius: float = 6,
) -> str:
    line = f' stroke="{edge}"' if edge else ""
    line += ' stroke-dasharray="4 3"' if dashed else ""
    corner = f' rx="{radius:g}"' if edge or radius != 6 else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"{corner} fill="{fill}"{line}/>'


def _text(
    x: float,
    y: float,
    text: str,
    size: float,
    color: str = _INK,
    bold: bool = False,
    monospace: bool = False,
    hover: str = "",
) -> str:
    """A line of text, its baseline at y. Where it is shorter than `hover`, the pointer shows that."""
    style = "" if words.is_of_known_width(text) else _squeezed(text, size, bold=bold, monospace=monospace)
    style += (' font-weight="bold"' if bold else "") + (' font-family="monospace"' if monospace else "")
    tooltip = f"<title>{words.quoted(hover)}</title>" if words.ELLIPSIS in text and hover else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}"{style} xml:space="preserve">'
        f"{words.quoted(text)}{tooltip}</text>"
    )


def _squeezed(text: str, size: float, *, bold: bool, monospace: bool) -> str:
    most = words.width(text, size, bold=bold, monospace=monospace)
    return f' textLength="{most:.1f}" lengthAdjust="spacingAndGlyphs"'
