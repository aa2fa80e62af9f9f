"""Output on a terminal: tables as wide as it is, and progress lines. What is piped stays as it is, a row a line."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_GAP = 2  # spaces between columns, as fusion.report.table has them
_RULE = re.compile(r"-+(?: {2}-+)+")
_LEAST_WIDTH = 8  # no column is cut to less


def show(text: Any) -> None:
    """Prints a text. Where stdout is a terminal, tables that are too wide for it have their widest columns wrapped."""
    print(fit(str(text), shutil.get_terminal_size().columns) if sys.stdout.isatty() else text, flush=True)


def fit(text: str, width: int) -> str:
    """Returns a text whose tables are at most `width` wide; its other lines are as they were.

    Args:
        text: lines, among them tables of `fusion.report.table`, known by the rule under their heads.
        width: columns of the terminal.
    """
    lines, out = text.split("\n"), []
    index = 0
    while index < len(lines):
        rule = lines[index + 1] if index + 1 < len(lines) else ""
        if not _RULE.fullmatch(rule):
            out.append(lines[index])
            index += 1
            continue
        starts = [match.start() for match in re.finditer("-+", rule)]
        end = index + 2
        while end < len(lines) and _is_row(lines[end], starts):
            end += 1
        rows = [_cells(line, starts) for line in (lines[index], *lines[index + 2 : end])]
        out += lines[index:end] if max(map(len, lines[index:end])) <= width else _lay_out(rows, width)
        index = end
    return "\n".join(out)


def announce(quiet: bool) -> Callable[[str], None]:
    """Returns a function that shows its text as a progress line on a terminal's stderr, written over the line before it."""
    if quiet or not sys.stderr.isatty():
        return lambda what: None
    return lambda what: print(f"\r\033[K{what}", end="" if what else "\r", file=sys.stderr, flush=True)


def _is_row(line: str, starts: Sequence[int]) -> bool:
    # Prose behind a table has no two spaces in each of these places.
    return bool(line) and not any(line[start - _GAP : start].strip() for start in starts[1:])


def _cells(line: str, starts: Sequence[int]) -> list[str]:
    return [line[start:end].strip() for start, end in zip(starts, (*starts[1:], None))]


def _lay_out(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    words = [max((len(word) for cell in column for word in cell.split()), default=0) for column in zip(*rows)]
    # Between words first; where that does not do, anywhere.
    for least in (words, [min(word, _LEAST_WIDTH) for word in words]):
        while sum(widths) + _GAP * (len(widths) - 1) > width:
            wide = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
            if widths[wide] <= least[wide]:
                break
            widths[wide] -= 1
    for number, row in enumerate(rows):
        wrapped = [_wrap(cell, max(w, 1)) for cell, w in zip(row, widths)]
        for line in range(max(map(len, wrapped))):
            cells = (part[line] if line < len(part) else "" for part in wrapped)
            yield (" " * _GAP).join(cell.ljust(w) for cell, w in zip(cells, widths)).rstrip()
        if number == 0:
            yield (" " * _GAP).join("-" * w for w in widths)


def _wrap(text: str, width: int) -> list[str]:
    """Returns a cell's lines. A word that is too long is cut behind a mark that joins its parts, if it has one in time."""
    lines = []
    while len(text) > width:
        cut = text.rfind(" ", 1, width + 1)
        if cut < 0:
            cut = max((mark.end() for mark in re.finditer(r"[+./:_]", text[:width])), default=width)
        lines.append(text[:cut].rstrip())
        text = text[cut:].lstrip()
    return [*lines, text]
