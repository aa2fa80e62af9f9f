"""One benchmark per contender of a case: the parity gate first, then its samples from the case's shared rounds.

No time fails a test. Wrong numbers of a contender of ours do, and it gets no time then.
"""

from __future__ import annotations

import functools

import pytest
import torch

from . import harness
from .cases import Case, cases
from .harness import CONTENDERS, Absent, Measured, Row


class Replay:
    """Clock and callable that replay samples of `harness.measure` to pytest-benchmark.

    pytest-benchmark times one contender after the other, and a machine drifts; our contenders take turns. So pytest-benchmark
    gets our samples, one per round, for its tables, files, comparisons and histograms.
    """

    def __init__(self):
        self._samples = iter(())
        self._elapsed = 0.0

    def load(self, samples) -> None:
        self._samples, self._elapsed = iter(samples), 0.0

    def __call__(self) -> None:
        self._elapsed = next(self._samples)

    def interleaved_clock(self) -> float:
        elapsed, self._elapsed = self._elapsed, 0.0
        return elapsed


REPLAY = Replay()
OURS = {contender.name for contender in CONTENDERS if contender.ours}


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
    parameters = [
        pytest.param(
            case,
            contender.name,
            id=f"{case}-{contender.name}",
            marks=(pytest.mark.gpu, no_gpu) if case.device == "cuda" else (),
        )
        for case in cases(full)
        for contender in harness.contenders(case, full)
    ]
    metafunc.parametrize(("case", "contender"), parameters)


@functools.lru_cache(maxsize=1)
def rows_of(case: Case, chosen: tuple[str, ...], seconds: float, min_rounds: int, full: bool) -> dict[str, Row]:
    """The rows of a case, measured once: pytest runs the contenders of a case one after another."""
    # The previous case's compiled graphs would count against Dynamo's limit, and hold memory.
    torch.compiler.reset()
    return harness.measure(case, [c for c in CONTENDERS if c.name in chosen], seconds, min_rounds, profiled=full)


@pytest.fixture
def chosen(request, case) -> tuple[str, ...]:
    """The contenders of this case that the command line selects, plus eager, and fused if any but eager is selected."""
    names = {item.callspec.params["contender"] for item in request.session.items if _case(item) == case}
    return tuple(
        c.name for c in CONTENDERS if c.name in names | {"eager"} | ({"fused"} if names - {"eager"} else set())
    )


def _case(item) -> Case | None:
    return item.callspec.params.get("case") if hasattr(item, "callspec") else None


@pytest.mark.benchmark(timer=REPLAY.interleaved_clock)
def test_benchmark(benchmark, case, contender, chosen, results, pytestconfig):
    option = pytestconfig.getoption
    seconds = 0.0 if benchmark.disabled else float(option("benchmark_max_time"))
    try:
        row = rows_of(case, chosen, seconds, int(option("benchmark_min_rounds")), option("--full"))[contender]
    except torch.OutOfMemoryError as error:
        row = Absent(str(case), contender, f"does not fit into this GPU's memory: {error}")
    if isinstance(row, Absent):
        results.append(row)
        if contender in OURS and row.error and not isinstance(row.error, torch.OutOfMemoryError):
            raise row.error
        pytest.skip(f"{row.contender}: {row.reason}")
    assert contender not in OURS or not row.gate.failure, row.gate.failure
    benchmark.group = row.case
    if benchmark.disabled:
        benchmark(lambda: None)
        return
    assert isinstance(row, Measured)
    benchmark.extra_info.update(row.info.to_json())
    results.append(row)
    REPLAY.load(row.timing.samples)
    benchmark.pedantic(REPLAY, rounds=len(row.timing.samples))
