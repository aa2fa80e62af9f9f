"""benchmarks/gpu/checks.py: a crash or a hang costs one check, and what crashed is said; the jobs travel as JSON."""

import importlib
import json
import os
import signal
import time

import pytest
import torch

pytest.importorskip("triton", reason="its checks are of Triton kernels")

gpu_checks = importlib.import_module("benchmarks.gpu.checks")
gpu_jobs = importlib.import_module("benchmarks.gpu.jobs")
Check, Job = gpu_checks.Check, gpu_checks.Job

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is no dry run")


@pytest.fixture
def dry(monkeypatch):
    monkeypatch.setenv("RESNET_KERNELS_DRY_RUN", "1")


def crash():
    os.kill(os.getpid(), signal.SIGKILL)


def raises():
    raise ValueError("no such thing")


def test_a_crash_and_a_hang_cost_one_check_each(tmp_path, dry):
    jobs = [
        Job("crashes", [Check("a", dict), Check("b", crash, "tma 1"), Check("c", raises), Check("d", dict)], 20.0),
        Job("hangs", [Check("e", lambda: time.sleep(600), "tma 2", "conv x"), Check("f", dict)], 1.0),
    ]
    gpu_checks.Runner(tmp_path, time.monotonic() + 60).run(iter(jobs), children=2)
    lines = [json.loads(line) for line in (tmp_path / "checks.jsonl").read_text().splitlines()]
    assert {line["starting"] for line in lines if "starting" in line} == set("abcdef")
    found = {line["check"]: line for line in lines if "check" in line}
    assert found.keys() == set("abcdef")
    assert not any("refused" in found[name] or "failed" in found[name] for name in "adf")
    assert found["b"]["failed"] == f"died (signal {signal.SIGKILL.value})"
    assert found["c"]["refused"] == "ValueError: no such thing"
    assert found["e"]["failed"].startswith("silent for 1 s")
    denied = json.loads((tmp_path / "denied.json").read_text())
    assert {(row["candidate"], row["problem"]) for row in denied} == {("tma 1", None), ("tma 2", "conv x")}


def test_what_had_no_time_is_said(tmp_path, dry):
    jobs = [Job("long", [Check("a", lambda: time.sleep(600)), Check("b", dict)]), Job("never", [Check("c", dict)])]
    gpu_checks.Runner(tmp_path, time.monotonic() + 0.5).run(iter(jobs), children=1)
    lines = [json.loads(line) for line in (tmp_path / "checks.jsonl").read_text().splitlines()]
    assert {"check": "a", "failed": "no time left"} in lines and {"job": "never", "not_run": 1} in lines


def test_a_wrong_candidate_is_refused(dry, monkeypatch):
    """As a kernel that leaves memory unwritten, and one that differs from call to call."""
    asked, batch = next(iter(gpu_checks.DRY.values()))
    problem = gpu_checks.problems.conv_problem(asked, batch, torch.float32, torch.device("cpu"))
    assert "refused" not in gpu_checks.check_problem(problem, problem.default)
    right = problem.candidates[problem.default]
    calls = []

    def drifts(*operands):
        calls.append(None)
        return right(*operands) * (1 + 2e-8 * len(calls)) if len(calls) > 1 else right(*operands)

    for name, run in {
        "unwritten": lambda *operands: right(*operands).index_fill_(0, torch.tensor(0), float("nan")),
        "drifts": lambda *operands: drifts(*operands) + 1e-7 * len(calls),
    }.items():
        own = gpu_checks.replace(problem, candidates={name: run})
        assert gpu_checks.check_problem(own, name)["refused"], name


@pytest.mark.slow
def test_jobs_are_noted_without_a_gpu_and_travel(tmp_path):
    noted = gpu_jobs.note("resnet18", 75, False)
    (tmp_path / "jobs.json").write_text(json.dumps([[*noted[:3], gpu_jobs.to_json(noted.problems)]]))
    (read,) = gpu_jobs.read(tmp_path / "jobs.json")
    assert read == noted._replace(problems=read.problems) and read.problems == [tuple(p) for p in noted.problems]
    kinds = {type(asked).__name__ for asked, _ in read.problems}
    assert kinds == {"ConvProblem", "LinkProblem", "StemProblem"}
    names = [job.name for job in gpu_checks.jobs([read])]
    assert {"stem", "link", "cudnn", "small"} <= set(names) and any(name.startswith("tma ") for name in names)


@pytest.mark.slow
def test_activations_are_checked(dry):
    portable = next(name for name in gpu_checks.conv_candidates.tiles() if name.startswith("pointer "))
    for candidate in (portable, "norm"):
        rows = [check.run() for check in gpu_checks._activation_checks(candidate)]
        assert rows and not any("refused" in row or "skipped" in row for row in rows), rows
    names = [check.name for check in gpu_checks._activation_checks(portable)]
    assert names == [f"{portable} | prelu"], "a GPU checks all"


def test_networks_of_other_libraries_are_checked(monkeypatch):
    pytest.importorskip("timm")
    networks = importlib.import_module("benchmarks.gpu.networks")
    monkeypatch.setattr(networks, "DEVICE", "cpu")
    row = networks.inference("timm:seresnet18", 1, 64, "auto", torch.float32)
    assert "refused" not in row and row["error"] > 0
    monkeypatch.setattr(networks, "OTHERS", ("timm:seresnet18",))
    names = [name for name, _ in networks.jobs()]
    assert "timm:seresnet18 triton 4x128" in names
