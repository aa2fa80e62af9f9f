"""benchmarks/stress.py: each section is right, and finds a planted fault."""

import copy
import random

import pytest
import torch

import resnet_kernels as rk
from benchmarks import stress
from resnet_kernels.runtime.cpu.watched_tensors import WatchedTensors

SECONDS = 2.0


def run(name, seed=0):
    torch.manual_seed(seed)
    return stress.SECTIONS[name](SECONDS, random.Random(seed))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", stress.SECTIONS)
def test_nothing_goes_wrong(name):
    outcome = run(name)
    assert outcome.done and not outcome.failures and outcome.figures, outcome


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_planted_faults_are_found(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(WatchedTensors, "are_unchanged", lambda self: True)
        assert "errs by" in run("edits").failures[0]
    with monkeypatch.context() as patch:
        fuse, kept = rk.fuse, []
        patch.setattr(rk, "fuse", lambda model: kept.append(fuse(model)) or kept[-1])
        assert run("memory").failures == ["a fused model outlives its last reference"]
    with monkeypatch.context() as patch:
        patch.setattr(rk, "explain", lambda model: torch.rand(1))  # which moves the random generator
        patch.setattr(rk, "fuse_", rk.explain)
        assert "the random generator" in run("interrupts").failures[0]


def test_a_result_is_judged_by_eager_in_fp64():
    plain, x = stress.network(), torch.randn(1, 3, 32, 32)
    judge = stress.Judge(plain, x)
    with torch.no_grad():
        y = copy.deepcopy(plain)(x)
    assert judge.why_wrong(y) is None
    assert "errs by" in judge.why_wrong(y * 1.001) and "shape" in judge.why_wrong(y[:, :5])


def test_a_section_that_dies_costs_itself_alone(monkeypatch, capsys):
    outcomes = {
        "threads": stress.Outcome(failures=["the process ended with -11: "]),
        "sizes": stress.Outcome(3, "fine"),
    }
    monkeypatch.setattr(stress, "in_a_process", lambda name, seconds, seed: outcomes[name])
    assert stress.main(["--only", "threads", "sizes"]) == 1
    shown = capsys.readouterr()
    assert "ended with -11" in shown.err and "right" in shown.out and "wrong" in shown.out
    assert stress.main(["--only", "sizes"]) == 0


def test_a_child_that_fails_is_said(monkeypatch):
    monkeypatch.setitem(stress.SECTIONS, "nothing of the kind", stress.sizes)  # which the child doesn't know
    (failure,) = stress.in_a_process("nothing of the kind", 1.0, 0).failures
    assert failure.startswith("the process ended with 2: ") and "invalid choice" in failure
