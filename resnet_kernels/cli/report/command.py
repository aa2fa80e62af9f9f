"""python -m resnet_kernels report RESULTS.json [--against OLD.json] --out DIR: a results file as a page with plots.

It writes report.html, which holds everything in itself, and report.md with plot-*.png beside it. It writes nothing before
all is made, and touches no file that an earlier report didn't write.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
import time
from pathlib import Path

from ...fusion.report import table
from ...perf import read_results, regressions, results
from .. import terminal
from . import page, plot_style, sections
from .parts import Section

_TEMPORARY = ".report-"
_SECONDS_OF_WRITING = 600.0  # an older temporary folder is of a report that was killed

HELP = "plot a file of pytest benchmarks --benchmark-json on a page, and compare it with an older file"
EXAMPLES = (
    "results.json --out report",
    "new.json --against old.json --out report",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.set_defaults(run=run)
    parser.add_argument(
        "results", type=Path, metavar="RESULTS.json", help="the file that pytest benchmarks --benchmark-json wrote"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for report.html, report.md and its plots"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OLD.json",
        help="an older file of the same machine: prints what became slower or faster, exits with 1 if something of ours "
        "became slower",
    )
    parser.add_argument(
        "--margin",
        type=_share,
        default=regressions.MARGIN,
        help=f"the smallest change, as a share, that is more than noise between two runs (default: {regressions.MARGIN})",
    )


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def run(options: argparse.Namespace) -> int:
    """Writes the pages; returns the exit status, 1 if something of ours became slower."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('matplotlib is needed for the plots: pip install "resnet_kernels[report]"')
    new = read_results.read(options.results)
    comparison = None
    if options.against:
        comparison = regressions.compare(new, read_results.read(options.against), options.margin)
    _check_out(options.out)
    parts = sections.sections(new)
    if comparison:
        parts.insert(0, page.against(comparison))
    _write(options.out, _files(new, parts))
    print(f"wrote {options.out / 'report.html'} and {options.out / 'report.md'}")
    if comparison is None:
        return 0
    terminal.show(f"\n{_changes(comparison)}")
    return 1 if comparison.of_ours("slower") else 0


def _files(new: results.Results, parts: list[Section]) -> dict[str, bytes]:
    """Returns the contents of all files to write, by name."""
    figures = [[part.figure for part in section.parts] for section in parts]
    images = [[figure and plot_style.save(figure, "svg") for figure in row] for row in figures]
    files = {
        page.file_name(section, index): plot_style.save(figure, "png")
        for section, row in zip(parts, figures)
        for index, figure in enumerate(row)
        if figure
    }
    files["report.md"] = page.to_markdown(new, parts).encode()
    files["report.html"] = page.to_html(new, parts, images).encode()
    return files


def _check_out(out: Path) -> None:
    """Raises ValueError unless the folder is new, empty, or an earlier report's."""
    try:
        # A report that was killed leaves its temporary folder.
        if not out.exists() or all(path.name.startswith(_TEMPORARY) for path in out.iterdir()):
            return
        earlier = out / "report.html"
        if earlier.is_file() and f'content="{page.GENERATOR}' in earlier.read_text(errors="replace"):
            return
    except OSError as error:
        raise ValueError(f"--out {out} can't be used: {error.strerror}") from error
    raise ValueError(f"--out {out} is not empty and holds no earlier report: name another folder")


def _write(out: Path, files: dict[str, bytes]) -> None:
    """Writes all files to a temporary folder, renames them into place, and removes plots that only an earlier report had."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(f"{_TEMPORARY}*"):
            if time.time() - left.stat().st_mtime > _SECONDS_OF_WRITING:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=_TEMPORARY) as folder:
            for name, contents in files.items():
                (Path(folder) / name).write_bytes(contents)
            for name in files:
                os.replace(Path(folder) / name, out / name)
        for stale in out.glob("plot-*.png"):
            if stale.name not in files:
                stale.unlink()
    except OSError as error:
        raise ValueError(f"--out {out} can't be written: {error.strerror}") from error


def _changes(comparison: regressions.Comparison) -> str:
    section = page.against(comparison)
    [part] = section.parts
    rows = [row for row in part.rows if row[0] != "within noise"]
    ours = [len(comparison.of_ours(verdict)) for verdict in ("slower", "faster", "within noise")]
    lines = [*page.describe(comparison), "", *([table(part.head, rows), ""] if rows else [])]
    lines.append("ours: {} slower, {} faster, {} within noise".format(*ours))
    return "\n".join(lines)
