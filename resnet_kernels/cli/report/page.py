"""The report's two pages, in Markdown and in HTML, with the same summary and sections."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Iterator, Sequence

import resnet_kernels as rk

from ...perf.regressions import Comparison
from ...perf.results import Results, outcomes
from .parts import Part, Section

GENERATOR = "resnet_kernels report"

_BUSY = 0.25  # the page mentions other processes that kept more cores than this busy

_MOST_LISTED = 5

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 3rem; border-bottom: 1px solid #999 }
figure { margin: 1rem 0 }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .6rem; border: 1px solid #bbb; text-align: left }
.table { overflow-x: auto }
.missing { border-left: .3rem solid #D55E00; padding-left: .8rem }
"""


def file_name(section: Section, index: int) -> str:
    """Returns the name of the PNG of a section's part; index counts from 0."""
    return f"plot-{section.name}-{index + 1}.png"


def summary(results: Results) -> list[str]:
    """Returns sentences about the whole file: its origin, wins and losses, missing contenders, errors over the budget."""
    counts = outcomes(results.cases.values())
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    commit = f", commit {results.commit}" if results.commit else ""
    lines = [
        f"{results.path.name}: measured {results.date or 'at an unknown date'} on {'; '.join(results.devices.values())} "
        f"({versions}{commit}).",
        f"Against the fastest peer of each case, fused is faster in {counts['faster']}, level in {counts['level']} and slower "
        f"in {counts['slower']} of {_cases(sum(counts.values()))}. Level is what two decimals write as 1.00.",
    ]
    over = [
        f"{name} in {case.name}"
        for case in results.cases.values()
        for name, measurement in case.contenders.items()
        if measurement.parity_failure
    ]
    if over:
        lines.append(f"Over the error budget, and timed all the same: {'; '.join(over)}.")
    busy = [cores for case in results.cases.values() if (cores := case.busy_elsewhere or 0.0) > _BUSY]
    if busy:
        lines.append(
            f"Other processes kept more than {_BUSY} cores busy in {_cases(len(busy))}, up to {max(busy):.1f}. "
            "Taking turns makes that fair on average, not harmless."
        )
    for absence in results.absent:
        where = f" in {_cases(len(absence.cases))}" if absence.cases else ""
        lines.append(f"Not measured{where}: {absence.contender} ({absence.reason}).")
    return lines


def settings(results: Results) -> list[tuple[str, str, str]]:
    """Returns (contender, what it is, its settings) for each contender that names its settings."""
    found: dict[tuple[str, str, str], None] = {}
    for case in results.cases.values():
        for name, m in case.contenders.items():
            if m.settings:
                found[name, m.label, m.settings] = None
    return list(found)


def against(comparison: Comparison) -> Section:
    """Returns the section of --against: each change, with its interval."""
    rows = [
        (change.verdict, change.case, change.contender, _percent(change.factor),
         f"{_percent(change.low)} to {_percent(change.high)}", f"over {change.unit}" if change.unit else "times alone")
        for change in comparison.changes
    ]  # fmt: skip
    head = ("verdict", "case", "contender", "time", "99% interval", "of what")
    part = Part("Changes, ours first", "", None, head, rows)
    return Section("against", f"Against {comparison.old.path.name}", " ".join(describe(comparison)), [part])


def describe(comparison: Comparison) -> list[str]:
    """Returns sentences about the noise of a comparison and about the cases that it could not compare."""
    old, new = comparison.old, comparison.new
    lines = [f"{new.path.name} ({new.date}, {new.commit}) against {old.path.name} ({old.date}, {old.commit})."]
    if old.versions != new.versions:
        names = [n for n in {**old.versions, **new.versions} if old.versions.get(n) != new.versions.get(n)]
        lines.append(
            "Other versions: "
            + ", ".join(f"{n} {old.versions.get(n)} then, {new.versions.get(n)} now" for n in names)
            + "."
        )
    if comparison.drift is not None:
        lines.append(
            f"Eager, the control, takes {comparison.drift:.2f} times its old time; times are compared in units of its time."
        )
    basis = (
        f"{comparison.controls} changes of peers"
        if comparison.controls >= 3
        else "no estimate: fewer than three peers' changes"
    )
    lines.append(f"A change below {comparison.margin:.1%} is noise between runs ({basis}).")
    for ones, others in ((new, old), (old, new)):
        lonely = ones.cases.keys() - others.cases.keys()
        if lonely:
            lines.append(f"In {ones.path.name} alone: {_cases(len(lonely))}.")
    if comparison.missing:
        more = len(comparison.missing) - _MOST_LISTED
        tail = f"; and {more} more" if more > 0 else ""
        lines.append(f"Not in both files: {'; '.join(comparison.missing[:_MOST_LISTED])}{tail}.")
    return lines


def _cases(count: int) -> str:
    return f"{count} case" if count == 1 else f"{count} cases"


def _percent(factor: float) -> str:
    return f"{100 * (factor - 1):+.1f}%"


def to_markdown(results: Results, sections: Sequence[Section]) -> str:
    """Returns the page as Markdown; its plots are files beside it, by `file_name`."""
    lines = ["# Benchmark report", "", *_paragraphs(map(_text, summary(results)))]
    if settings(results):
        lines += [*_markdown_table(("contender", "what", "settings"), settings(results)), ""]
    for section in sections:
        lines += [
            f"## {_text(section.title)}",
            "",
            *_paragraphs(map(_text, filter(None, (section.intro, section.missing)))),
        ]
        for index, part in enumerate(section.parts):
            lines += [f"### {_text(part.title)}", ""]
            if part.figure is not None:
                lines += [f"![{_text(part.alt)}]({file_name(section, index)})", ""]
            lines += [*_paragraphs(map(_text, filter(None, (part.note,)))), *_markdown_table(part.head, part.rows), ""]
    return "\n".join([*lines, f"Written by {GENERATOR}, {rk.__version__}.", ""])


def to_html(results: Results, sections: Sequence[Section], images: Sequence[Sequence[bytes | None]]) -> str:
    """Returns the page as HTML with its plots inside.

    Args:
        results: the file.
        sections: the page's sections.
        images: one SVG per part of each section; None where a part has no figure.
    """
    body = ["<h1>Benchmark report</h1>", *(f"<p>{html.escape(line)}</p>" for line in summary(results))]
    if settings(results):
        body += _html_table(("contender", "what", "settings"), settings(results), "Contenders and their settings")
    for section, pictures in zip(sections, images):
        body.append(f'<section id="{section.name}">\n<h2>{html.escape(section.title)}</h2>')
        body.append(f"<p>{html.escape(section.intro)}</p>")
        if section.missing:
            body.append(f'<p class="missing">{html.escape(section.missing)}</p>')
        for part, picture in zip(section.parts, pictures):
            body.append(f"<h3>{html.escape(part.title)}</h3>")
            if picture is not None:
                source = "data:image/svg+xml;base64," + base64.b64encode(picture).decode()
                body.append(f'<figure><img src="{source}" alt="{html.escape(part.alt)}"></figure>')
            if part.note:
                body.append(f"<p>{html.escape(part.note)}</p>")
            body += _html_table(part.head, part.rows, "The numbers" if picture is not None else "", picture is None)
        body.append("</section>")
    title = html.escape(f"Benchmark report: {results.path.name}")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta name="generator" content="{GENERATOR} {rk.__version__}">',
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str, is_open: bool = False) -> Iterator[str]:
    if title:
        yield f"<details{' open' if is_open else ''}><summary>{html.escape(title)}</summary>"
    yield '<div class="table"><table>\n<thead><tr>'
    yield "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head) + "</tr></thead>\n<tbody>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    yield "</tbody></table></div>" + ("</details>" if title else "")


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(_text(cell).replace('|', chr(92) + '|') for cell in row)} |"


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (text, "")


# What Markdown reads as code, emphasis, a link, a picture or a footnote, and at a line's start as a heading, a list or a rule.
_MARKDOWN = re.compile(r"[\\`*~]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|^[#+-](?=[#\s]|$)|^[-=](?=[-=]*$)|(?<=^\d)[.)](?=\s)")


def _text(text: str) -> str:
    """Returns text that Markdown shows as it is: on one line, without tags, links, headings or emphasis."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(html.escape(text, quote=False).split()))
