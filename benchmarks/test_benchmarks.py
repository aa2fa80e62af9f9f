"""A benchmark a contender: first the gate of parity, then the time; eager's turn-taking ratio along with it.

No time fails a test. A contender whose numbers are wrong does, and has no time.
"""

from __future__ import annotations

import functools

import pytest
import torch

from resnet_kernels.timing import interleave, ratio

from .cases import Case, cases, contenders
from .conftest import Row
from .harness import Workload


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
    parameters = [
        pytest.param(
            case,
            contender,
            id=f"{case}-{contender}",
            marks=(pytest.mark.gpu, no_gpu) if case.platform.device == "cuda" else (),
        )
        for case in cases(full)
        for contender in contenders(case, full)
    ]
    metafunc.parametrize(("case", "contender"), parameters)


@functools.lru_cache(maxsize=1)
def workload_of(case: Case) -> Workload:
    """One for all contenders of a case, which run one after the other: the same data, and fp64's slow results once."""
    return Workload(case)


@functools.cache
def copy_gb_per_s(device: torch.device) -> float:
    """What a copy of 256 MiB moves a second on this device in this run, reads and writes: the roof of kernels that stream."""
    source = torch.empty(2**26, device=device).normal_()
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, seconds=0.5, device=device)["copy"]
    return 2 * source.numel() * source.element_size() / timing.median / 1e9


def test_benchmark(benchmark, case, contender, rows, pytestconfig):
    try:
        measure(benchmark, workload_of(case), contender, rows, float(pytestconfig.getoption("benchmark_max_time")))
    except torch.OutOfMemoryError as error:
        pytest.skip(f"does not fit into this GPU's memory: {error}")


def measure(benchmark, workload: Workload, contender: str, rows: list[Row], seconds: float) -> None:
    case = workload.case
    gate = workload.gate(contender)
    # A wrong result of ours is worth no time. A peer's costs it nothing but a line: its rounding is not ours to fix.
    assert not gate.failure or contender == "compile", gate.failure
    benchmark.group = str(case)
    benchmark.extra_info["parity_failure"] = gate.failure
    benchmark.extra_info.update(workload.info(), parity_error=gate.error, parity_budget=gate.budget)
    # One call ahead of pytest-benchmark's own: what is lazy is done, and the calibration sees the true time.
    call = workload.synchronised(contender)
    call()
    benchmark(call)
    if benchmark.disabled:
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info["img_per_s"] = case.batch / median
    benchmark.extra_info["gflop_per_s"] = benchmark.extra_info["gflop"] / median
    if workload.traffic():
        benchmark.extra_info["gb_per_s"] = workload.traffic() / median / 1e9
        benchmark.extra_info["copy_gb_per_s"] = copy_gb_per_s(workload.device)
    if case.backward and contender != "compile":
        benchmark.extra_info["saved_mib"] = workload.saved_bytes(contender) / 2**20
    if contender == "eager":
        return
    # A peer is timed with eager and fused in one run, round by round, so that both ratios are of pairs.
    names = dict.fromkeys(("eager", "fused", contender))
    timings = interleave({name: workload.call(name) for name in names}, seconds=seconds, device=workload.device)
    row = Row(str(case), contender, timings["eager"], timings[contender], gate)
    rows.append(row)
    benchmark.extra_info["interleaved_ratio_to_eager"] = row.ratio
    if contender != "fused":
        benchmark.extra_info["interleaved_ratio_to_fused"] = ratio(timings[contender], timings["fused"])
        rows.append(Row(f"{case} (fused for eager)", contender, timings["fused"], timings[contender], gate))
