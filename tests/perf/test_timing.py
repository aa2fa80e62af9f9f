"""timing.py: the order of the rounds, what is counted, and the errors. No test depends on how fast a machine is."""

import dataclasses
import io
import json
import math
import re
import time

import pytest
import torch

import resnet_kernels as rk
from resnet_kernels.perf import timing
from resnet_kernels.perf.timing import Timing, interleave, ratio, ratios, summary_line, time_run, time_runs

WHEN = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{6})?: "
NOTHING = {"a": lambda: None}


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_rounds_are_really_interleaved():
    calls = []
    interleave({name: lambda name=name: calls.append(name) for name in "abc"}, seconds=0, min_rounds=4)
    assert "".join(calls) == "abc" * (len(calls) // 3)
    assert len(calls) > 3 * 4  # the warm-up is of such rounds, too


@pytest.mark.parametrize("min_rounds", [1, 7])
def test_min_rounds_are_done_and_the_warm_up_is_not_counted(min_rounds):
    calls = []
    timings = interleave({"a": lambda: calls.append(0), "b": lambda: None}, seconds=0, min_rounds=min_rounds)
    assert list(timings) == ["a", "b"]
    assert [len(timing.samples) for timing in timings.values()] == [min_rounds] * 2
    assert len(calls) > min_rounds


def test_rounds_go_on_until_the_time_has_gone():
    seen = []
    timings = interleave(NOTHING, seconds=0.02, min_rounds=1, progress=lambda *now: seen.append(now))
    rounds, elapsed = zip(*seen)
    assert rounds == tuple(range(1, len(timings["a"].samples) + 1))
    assert list(elapsed) == sorted(elapsed)
    assert elapsed[-1] >= 0.02 and all(seconds < 0.02 for seconds in elapsed[:-1])


def test_a_slow_contender_has_a_ratio_above_one():
    timings = interleave({"slow": lambda: time.sleep(0.01), "fast": lambda: spin(0.001)}, seconds=0)
    # Neither can end before its time, whatever else the machine does.
    assert min(timings["slow"].samples) >= 0.01 and min(timings["fast"].samples) >= 0.001
    assert ratio(timings["slow"], timings["fast"]) > 1 > ratio(timings["fast"], timings["slow"])


def test_progress_is_not_timed():
    timings = interleave(NOTHING, seconds=0, progress=lambda *_: time.sleep(0.01))
    assert timings["a"].median < 0.01


def test_ratio_pairs_the_rounds():
    # b takes twice as long, and was disturbed in the second round. The medians are of different rounds: 1 / 20.
    a, b = Timing((1.0, 1.0, 10.0)), Timing((2.0, 20.0, 20.0))
    assert ratio(a, b) == 0.5
    assert a.median / b.median == 0.05
    assert ratios(a, b) == (0.5, 0.05, 0.5)


def test_lead_in_calls_are_the_contenders_own_and_not_counted():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = interleave(contenders, seconds=0, min_rounds=3, lead_in=1e-9)
    rounds = len(calls) // 4
    assert rounds > 3 and "".join(calls) == "aabb" * rounds
    assert len(timings["a"].samples) == 3


def test_lead_in_lasts_as_long_as_it_is_to():
    begin = time.perf_counter()
    timings = interleave({"a": lambda: spin(0.001)}, seconds=0, min_rounds=1, lead_in=0.01)
    # Of the warm-up's two rounds and the counted one.
    assert time.perf_counter() - begin > 3 * 0.01 and len(timings["a"].samples) == 1


def test_summary_of_the_samples():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0, 6.0))
    assert (timing.p20, timing.median, timing.p80) == (2.0, 3.5, 5.0)
    summary = json.loads(json.dumps(timing.to_dict()))
    assert summary == {"median": 3.5, "p20": 2.0, "p80": 5.0, "rounds": 6, "samples": [5.0, 1.0, 3.0, 2.0, 4.0, 6.0]}
    assert Timing((2.0,)).p20 == Timing((2.0,)).p80 == 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        timing.samples = ()


@pytest.mark.parametrize("samples", [(), (1.0, float("nan")), (float("inf"),), (-1.0,)])
def test_timing_refuses_what_is_no_time(samples):
    with pytest.raises(ValueError, match="samples must"):
        Timing(samples)


def test_ratio_refuses_what_is_no_pair():
    with pytest.raises(TypeError, match="b must be a Timing, got float"):
        ratio(Timing((1.0,)), 1.0)
    with pytest.raises(ValueError, match="same rounds, got 1 and 2"):
        ratio(Timing((1.0,)), Timing((1.0, 2.0)))
    with pytest.raises(ValueError, match="b must have no sample of 0"):
        ratio(Timing((1.0,)), Timing((0.0,)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"contenders": [print]}, TypeError, "contenders must map names to callables, got list"),
        ({"contenders": {}}, ValueError, "contenders must hold at least one"),
        ({"contenders": {1: print}}, TypeError, "contenders must have str names, got 1"),
        ({"contenders": {"a": 1}}, TypeError, r"contenders\['a'\] must be callable, got int"),
        ({"seconds": "1"}, TypeError, "seconds must be a number, got '1'"),
        ({"seconds": True}, TypeError, "seconds must be a number, got True"),
        ({"seconds": -1}, ValueError, "seconds must be finite and at least 0, got -1"),
        ({"seconds": float("nan")}, ValueError, "seconds must be finite"),
        ({"seconds": float("inf")}, ValueError, "seconds must be finite"),
        ({"lead_in": "1"}, TypeError, "lead_in must be a number, got '1'"),
        ({"lead_in": -1}, ValueError, "lead_in must be finite and at least 0, got -1"),
        ({"min_rounds": 1.5}, TypeError, "min_rounds must be an int, got 1.5"),
        ({"min_rounds": True}, TypeError, "min_rounds must be an int, got True"),
        ({"min_rounds": 0}, ValueError, "min_rounds must be at least 1, got 0"),
        ({"progress": 1}, TypeError, "progress must be callable or None, got int"),
        ({"device": 0}, TypeError, "device must be a torch.device, a str or None, got int"),
        ({"device": "toaster"}, ValueError, "device must name a device, got 'toaster'"),
        ({"device": "meta"}, ValueError, "device must be a CPU or CUDA device, got meta"),
        ({"device": "cuda:99"}, ValueError, "device must be one that is here, got cuda:99"),
    ],
)
def test_argument_errors(arguments, error, message):
    called = []
    with pytest.raises(error, match=message):
        interleave(**{"contenders": {"a": lambda: called.append(0)}, **arguments})
    assert not called


def test_errors_of_a_contender_are_passed_on():
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0})


def lines_of(call, **arguments) -> list[str]:
    stream = io.StringIO()
    call(stream=stream, **arguments)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("num_batches, steps", [(1, [0]), (10, [0]), (11, [0, 10]), (25, [0, 10, 20])])
def test_time_run_prints_every_tenth_step_and_a_summary(num_batches, steps):
    *each, last = lines_of(time_run, target=lambda: None, info="Forward", num_batches=num_batches)
    found = [re.fullmatch(WHEN + r"step:(\d+)\. duration = \d+\.\d{3}", line) for line in each]
    assert [int(match.group(2)) for match in found] == steps
    summary = WHEN + rf"Forward across {num_batches} steps, \d+\.\d{{3}} \+/- \d+\.\d{{3}} sec / batch"
    assert re.fullmatch(summary, last)


def test_summary_line_is_that_of_time_run():
    line = summary_line("Forward-backward", Timing((0.1, 0.3)))
    assert re.fullmatch(WHEN + r"Forward-backward across 2 steps, 0\.200 \+/- 0\.100 sec / batch", line)


def test_time_run_prints_to_stdout(capsys):
    rk.timing.time_run(lambda: None, "Forward", 1, 0)
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("burn_in", [0, 3])
def test_burn_in_is_done(burn_in):
    calls = []
    time_run(lambda: calls.append(0), "Forward", 12, burn_in, stream=io.StringIO())
    assert len(calls) == burn_in + 12


def faked_clock(monkeypatch, seconds):
    def clock(device):
        return lambda call: (call(), next(seconds))[1]

    monkeypatch.setattr(timing, "clock_of", clock)


def test_mean_and_deviation_without_the_burn_in(monkeypatch):
    faked_clock(monkeypatch, iter([9.0, 1.0, 2.0, 3.0, 6.0]))
    stream = io.StringIO()
    run = time_run(lambda: None, "Forward", 4, 1, stream=stream)
    assert run == (3.0, math.sqrt(3.5)) and (run.mean, run.std) == run
    assert stream.getvalue().endswith("Forward across 4 steps, 3.000 +/- 1.871 sec / batch\n")


@pytest.mark.parametrize("seconds", [0.1, 1 / 3, 1e-9, 1e9 / 7, 0.0])
@pytest.mark.parametrize("num_batches", [1, 3, 49, 100])
def test_equal_durations_deviate_by_nothing(monkeypatch, seconds, num_batches):
    """E[x^2] - E[x]^2 of such durations can round to below zero."""
    faked_clock(monkeypatch, iter([seconds] * num_batches))
    assert time_run(lambda: None, "Forward", num_batches, 0, stream=io.StringIO()).std == 0


def test_runs_take_turns_step_by_step():
    calls = []
    contenders = {"Forward, eager": lambda: calls.append("e"), "Forward, fused": lambda: calls.append("f")}
    lines = lines_of(time_runs, contenders=contenders, num_batches=11, num_steps_burn_in=2)
    assert "".join(calls) == "ef" * 13
    steps = [re.fullmatch(WHEN + r"step:(\d+)\. duration = \d+\.\d{3} \((.+)\)", line) for line in lines[:-2]]
    expected = [(step, info) for step in ("0", "10") for info in contenders]
    assert [match.group(2, 3) for match in steps] == expected
    for line, info in zip(lines[-2:], contenders):
        assert re.match(WHEN + f"{info} across 11 steps, ", line)


def test_runs_can_be_paired():
    both = {"a": lambda: spin(0.002), "b": lambda: spin(0.001)}
    timings = time_runs(both, 3, 1, stream=io.StringIO())
    assert [len(timing.samples) for timing in timings.values()] == [3, 3]
    assert min(timings["a"].samples) >= 0.002 and ratio(timings["a"], timings["b"]) > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": 1}, TypeError, "target must be callable, got int"),
        ({"info": 1}, TypeError, "info must be a str, got 1"),
        ({"num_batches": 0}, ValueError, "num_batches must be at least 1, got 0"),
        ({"num_batches": 10.0}, TypeError, "num_batches must be an int, got 10.0"),
        ({"num_steps_burn_in": -1}, ValueError, "num_steps_burn_in must be at least 0, got -1"),
        ({"num_steps_burn_in": True}, TypeError, "num_steps_burn_in must be an int, got True"),
        ({"device": "toaster"}, ValueError, "device must name a device, got 'toaster'"),
        ({"stream": 1}, TypeError, "stream must be a text stream or None, got int"),
    ],
)
def test_argument_errors_of_time_run(arguments, error, message):
    called = []
    with pytest.raises(error, match=message):
        time_run(**{"target": lambda: called.append(0), "info": "Forward", **arguments})
    assert not called


@pytest.mark.gpu
def test_cuda_events_wait_for_the_work():
    x = torch.randn(4096, 4096, device="cuda")
    some = {"long": lambda: [x @ x for _ in range(20)], "short": lambda: x[:32] @ x}
    timings = interleave(some, seconds=0, device="cuda")
    assert ratio(timings["long"], timings["short"]) > 1
