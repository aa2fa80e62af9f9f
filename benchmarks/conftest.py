"""The option --full, and the summary at the end: a line per contender as the slim text has it, ratios, absent contenders."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict

import pytest

from resnet_kernels.fusion.report import table
from resnet_kernels.perf.schema import Absence, Spread
from resnet_kernels.perf.timing import Timing

from .harness import Absent, Measured, Row

# The summary warns if other processes kept more cores busy.
BUSY_CORES = 0.2

RESULTS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="benchmarks: whole networks at real sizes by batch, bfloat16 on the CPU, and all peers",
    )


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install 'resnet_kernels[bench]'")
    config.stash[RESULTS] = []


@pytest.fixture
def results(pytestconfig) -> list[Row]:
    """The list of rows for the tables at the end; tests append to it."""
    return pytestconfig.stash[RESULTS]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Adds the absent contenders to the JSON file, which pytest-benchmark writes after Ctrl-C, too."""
    output_json["absent"] = [asdict(absence) for absence in absentees(config.stash[RESULTS])]


def absentees(results: list[Row]) -> list[Absence]:
    """Returns the absent contenders, one entry per contender and reason, with its cases."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in results:
        if isinstance(row, Absent):
            found[row.contender, row.reason].append(row.case)
    return [Absence(name, reason, tuple(names)) for (name, reason), names in found.items()]


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash[RESULTS]
    measured = [row for row in results if isinstance(row, Measured)]
    if measured:
        terminalreporter.section(
            "mean +/- standard deviation, from rounds in which all of a case's contenders take turns"
        )
        group = None
        for row in measured:
            if row.case != group:
                terminalreporter.write_line(group := row.case)
            terminalreporter.write_line(f"  {row.line}")
        terminalreporter.section("time / eager's time and / fused's time of the same round: below 1 is faster")
        terminalreporter.write_line(_table(measured))
        busy = max(row.info.case.busy_elsewhere or 0.0 for row in measured)
        if busy > BUSY_CORES:
            terminalreporter.write_line(
                f"other processes kept up to {busy:.1f} cores busy: contenders with different thread pools suffer "
                "differently from that, so measure again on a quiet machine"
            )
    absent = absentees(results)
    if absent:
        terminalreporter.section("absent peers")
        cells = [(absence.contender, str(len(absence.cases)), absence.reason) for absence in absent]
        terminalreporter.write_line(table(("contender", "cases", "reason"), cells))


def _table(rows: list[Measured]) -> str:
    head = (
        "case",
        "contender",
        "/ eager [p20, p80]",
        "/ fused",
        "ms [p20, p80]",
        "rounds",
        "roofline",
        "error",
        "budget",
    )
    cells = [
        (
            row.case,
            row.contender,
            _ratio(row.info.spread),
            _number(row.info.spread.interleaved_ratio_to_fused),
            _milliseconds(row.timing),
            str(len(row.timing.samples)),
            f"{row.info.rates.roofline_share:.0%}",
            f"{row.gate.error:.1e}",
            f"{row.gate.budget:.1e}{' OVER BUDGET' if row.gate.failure else ''}",
        )
        for row in rows
    ]
    return table(head, cells)


def _ratio(spread: Spread) -> str:
    if spread.interleaved_ratio_to_eager is None:
        return ""
    low, high = map(_number, (spread.interleaved_ratio_to_eager_p20, spread.interleaved_ratio_to_eager_p80))
    return f"{_number(spread.interleaved_ratio_to_eager)} [{low}, {high}]"


def _number(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3f} [{timing.p20 * 1e3:.3f}, {timing.p80 * 1e3:.3f}]"
