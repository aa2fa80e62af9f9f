"""`--full`, and the table at the end: each contender's time over eager's, measured in turns."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from resnet_kernels.report import table
from resnet_kernels.timing import Timing, ratio

from .harness import Gate


@dataclass(frozen=True)
class Row:
    """A contender against eager, from interleaved rounds."""

    case: str
    contender: str
    eager: Timing
    timing: Timing
    gate: Gate

    @property
    def ratio(self) -> float:
        return ratio(self.timing, self.eager)


ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="benchmarks: ResNet-50 at 224x224 (batch 1, 8; 256 on a GPU), torch.compile"
    )


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install 'resnet_kernels[bench]'")
    config.stash[ROWS] = []


@pytest.fixture
def rows(pytestconfig) -> list[Row]:
    """The rows of the table at the end, to be appended to."""
    return pytestconfig.stash[ROWS]


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("time / eager's time, measured in turns: below 1 is faster")
    head = ("case", "contender", "ratio", "eager [p20, p80] ms", "contender [p20, p80] ms", "rounds", "error", "budget")
    cells = [
        (
            row.case,
            row.contender,
            f"{row.ratio:.3f}",
            _milliseconds(row.eager),
            _milliseconds(row.timing),
            str(len(row.timing.samples)),
            f"{row.gate.error:.1e}",
            f"{row.gate.budget:.1e}",
        )
        for row in rows
    ]
    terminalreporter.write_line(table(head, cells))


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3f} [{timing.p20 * 1e3:.3f}, {timing.p80 * 1e3:.3f}]"
