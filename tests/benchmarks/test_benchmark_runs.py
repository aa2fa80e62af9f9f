"""Runs of `pytest benchmarks` in a process of their own: the file that they write, and what ends them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

from benchmarks import conftest
from benchmarks.harness import Absent
from benchmarks.test_benchmarks import Replay
from resnet_kernels.perf.schema import Absence
from resnet_kernels.perf.timing import Timing

ROOT = Path(__file__).parents[2]


def test_replay_gives_the_very_samples():
    replay = Replay()
    replay.load((0.1, 1e-7, 3.3))
    seen = []
    for _ in range(3):
        start = replay.interleaved_clock()
        replay()
        seen.append(replay.interleaved_clock() - start)
    assert seen == [0.1, 1e-7, 3.3]


PLUGIN = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from benchmarks import cases, extra_info, harness
from benchmarks.cases import Block, Case, Platform
from benchmarks.contenders.ours import Contender
from resnet_kernels.perf.roofline.bounds import Machine

class Missing(Contender):
    name = label = "missing"
    settings = "none"
    def covers(self, case, full): return True
    def why_absent(self, case): return "not installed: missing"

cpu = Platform("cpu", torch.float32)
tiny = [Case(Block(name, "BasicBlock", 8, 8, 6), "forward", cpu) for name in ("first", "second")]
cases.cases = lambda full: tiny
harness.CONTENDERS = (*harness.CONTENDERS[:2], Missing())
extra_info.ceilings = lambda device, dtype: Machine(1e12, 1e11)
fused = harness.Fused.prepare

def broken(self, workload):
    if workload.case is tiny[1]:
        raise RuntimeError("boom")
    runner = fused(self, workload)
    runner.module.bn2.weight.data.mul_(1.01)
    return runner

if {broken}:
    harness.Fused.prepare = broken

measure = harness.measure
contenders = harness.contenders
harness.contenders = lambda case, full: contenders(case, full, harness.CONTENDERS)

def interrupted(case, *args, **kwargs):
    if case is tiny[1] and {interrupt}:
        # A shell's background job, and what it starts, ignores the signal.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
    return measure(case, *args, **kwargs)

harness.measure = interrupted
"""


def run_benchmarks(tmp_path, *options, interrupt=False, broken=False) -> subprocess.CompletedProcess:
    (tmp_path / "planted.py").write_text(PLUGIN.format(root=str(ROOT), interrupt=interrupt, broken=broken))
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "planted", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip


def run_and_save(tmp_path, **planted) -> tuple[subprocess.CompletedProcess, dict]:
    out = tmp_path / "out.json"
    run = run_benchmarks(tmp_path, "--benchmark-max-time=0.01", f"--benchmark-json={out}", **planted)
    assert out.exists(), run.stdout + run.stderr
    return run, json.loads(out.read_text())


@pytest.mark.slow
def test_a_run_writes_what_its_rounds_were(tmp_path):
    run, results = run_and_save(tmp_path)
    assert run.returncode == 0, run.stdout
    assert [(b["extra_info"]["subject"], b["params"]["contender"]) for b in results["benchmarks"]] == [
        (subject, contender) for subject in ("first", "second") for contender in ("eager", "fused")
    ]
    eager, fused, *_ = results["benchmarks"]
    assert eager["group"] == fused["group"] == eager["extra_info"]["case"]
    ratios = [a / b for a, b in zip(fused["stats"]["data"], eager["stats"]["data"], strict=True)]
    assert fused["extra_info"]["interleaved_ratio_to_eager"] == pytest.approx(Timing(ratios).median)
    groups = [b["group"] for b in results["benchmarks"][::2]]
    assert results["absent"] == [{"contender": "missing", "reason": "not installed: missing", "cases": groups}]
    assert re.search(r"absent peers =+\n.*\n.*\nmissing +2 +not installed: missing", run.stdout)
    steps = len(eager["stats"]["data"])
    line = (
        rf"{groups[0]}\n  \d{{4}}-.*: Forward, eager across {steps} steps, \d\.\d{{3}} \+/- \d\.\d{{3}} sec / batch\n"
    )
    assert re.search(line, run.stdout)


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    run, results = run_and_save(tmp_path, interrupt=True)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert [(b["extra_info"]["subject"], b["params"]["contender"]) for b in results["benchmarks"]] == [
        ("first", "eager"), ("first", "fused")
    ]  # fmt: skip
    assert [entry["contender"] for entry in results["absent"]] == ["missing"]
    assert "Forward, fused across" in run.stdout


@pytest.mark.slow
def test_our_wrong_numbers_and_crashes_fail_a_run_without_times_too(tmp_path):
    run = run_benchmarks(tmp_path, "--benchmark-disable", broken=True)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert "RuntimeError: boom" in run.stdout
    assert "2 failed, 2 passed, 2 skipped" in run.stdout and "OVER BUDGET" in run.stdout


def test_absentees_are_put_together():
    some = [Absent("a", "x", "no"), Absent("b", "y", "no"), Absent("b", "x", "no"), Absent("b", "x", "other")]
    assert conftest.absentees(some) == [
        Absence("x", "no", ("a", "b")),
        Absence("y", "no", ("b",)),
        Absence("x", "other", ("b",)),
    ]
