"""benchmarks/tools/serving.py: its figures, its gate, its processes, on a network that computes in a millisecond."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import resnet_kernels as rk
from benchmarks.serving import models, plot, workers
from benchmarks.serving.loops import Figures, Load, Loop, Station
from benchmarks.serving.models import Demand
from benchmarks.tools import serving
from helpers.tiny import ENVIRONMENT, tiny
from resnet_kernels.models.random_weights import randomise_batch_norms_

SIZE = 16
OURS = ["eager", "fused", "frozen"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def network():
    return randomise_batch_norms_(tiny(10, 3)).eval()


@pytest.fixture
def folder(tmp_path, network, monkeypatch):
    monkeypatch.setattr(models.foreign.OnnxRuntime, "modules", ("no_such_module",))  # exporting takes seconds
    monkeypatch.setattr(models.foreign.OpenVino, "modules", ("no_such_module",))
    assert models.export(network, SIZE, tmp_path).keys() == {"onnxruntime", "openvino"}
    return tmp_path


def test_figures_of_a_round():
    # Two callers: 2 images in 1 s, and 4 in 4 s because it ended later.
    loops_ = [Loop((0.4, 0.6), 2, 1.0), Loop((1.0, 1.0, 1.0, 1.0), 4, 4.0)]
    figures = Figures.of(loops_)
    assert figures.images_per_s == 3.0 and figures.p50_ms == 1000.0 and figures.p99_ms == pytest.approx(1000.0)
    rounds = [Figures(1.0, 30.0, 40.0), Figures(2.0, 10.0, 90.0), Figures(9.0, 20.0, 50.0)]
    assert Figures.median(rounds) == Figures(2.0, 20.0, 50.0)


@pytest.mark.parametrize("callers", [1, 3])
def test_threads_call_one_model_until_the_time_is_up(folder, callers):
    station = Station(folder, OURS, Demand(1))
    for name in OURS:
        found = station.round(name, callers, Load(0.05))
        assert len(found) == callers
        assert all(loop.latencies and loop.images == len(loop.latencies) for loop in found)
        assert all(sum(loop.latencies) <= loop.seconds for loop in found)


def test_batches_change_and_calls_are_counted(folder):
    station = Station(folder, ["frozen"], Demand(1, any_batch=True))
    (first,), (again,), (other,) = (
        station.round("frozen", 1, Load(60.0, serving.BATCHES, calls=40, seed=seed)) for seed in (0, 0, 1)
    )
    assert len(first.latencies) == 40 and 40 < first.images < 320
    assert first.images == again.images != other.images


def test_wrong_numbers_get_no_time(folder, monkeypatch):
    def off(folder, demand):
        right = models._eager(folder, demand)
        return models.Shared(right.caller, right.convert, lambda y: 1.001 * y)

    monkeypatch.setitem(models.MAKERS, "fused", off)
    with pytest.raises(models.WrongNumbers, match=r"fused: y errs by 1\.0.e-03"):
        Station(folder, OURS, Demand(1))


def test_a_caller_that_fails_ends_the_round(folder):
    station = Station(folder, ["eager"], Demand(1))
    right, seen = station._shared["eager"], []

    def caller():
        call = right.caller()

        def fails_once(x):
            seen.append(x)
            if len(seen) == 2:
                raise RuntimeError("out of luck")
            return call(x)

        return fails_once

    station._shared["eager"] = models.Shared(caller, right.convert, right.restore)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of luck"):
        station.round("eager", 3, Load(0.05))
    assert threading.active_count() == before


def test_the_command_names_who_is_absent_and_writes_all_figures(tmp_path, network, monkeypatch, capsys):
    monkeypatch.setitem(rk.models.BY_NAME, "tiny", lambda: network)
    monkeypatch.setattr(models.foreign.OnnxRuntime, "modules", ("no_such_module",))
    monkeypatch.setattr(models.foreign.OpenVino, "modules", ("torch",))  # as if it were installed
    monkeypatch.setattr(models, "_write_openvino", lambda *_: 1 / 0)
    monkeypatch.setattr(serving.time, "sleep", lambda seconds: None)
    file = tmp_path / "new" / "serving.json"
    arguments = ["--network", "tiny", "--size", str(SIZE), "--seconds", "0.04", "--threads", "1", "--only", "threads"]
    serving.main([*arguments, "--write", str(file)])
    shown = capsys.readouterr().out
    assert "absent: onnxruntime: not installed: no_such_module" in shown
    assert "absent: openvino: division by zero" in shown
    written = json.loads(file.read_text())
    assert written["absent"].keys() == {"onnxruntime", "openvino"} and written["measured"]["torch"]
    assert [(row["callers"], row["contender"]) for row in written["rows"]] == [
        (callers, name) for callers in workers.COUNTS for name in OURS
    ]
    for row in written["rows"]:
        assert len(row["rounds"]) == serving.ROUNDS
        assert 0 < row["figures"]["p50_ms"] <= row["figures"]["p99_ms"] and row["figures"]["images_per_s"] > 0
        assert f"{row['figures']['images_per_s']:.1f}" in shown


@pytest.mark.parametrize(
    "heights", [[0.5], [0.1, 0.9], [0.5, 0.5, 0.5], [0.99, 1.2, 0.98], [0.0, 0.01], [0.3, 0.38, 0.45, 0.2, 0.9]]
)
def test_labels_stand_apart_in_their_order(heights):
    places = plot.spread(heights, 0.1)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    gaps = [places[above] - places[below] for below, above in itertools.pairwise(order)]
    assert all(gap > 0.1 - 1e-9 for gap in gaps) and all(0 <= place <= 1 for place in places)
    alone = len(heights) == 1 or min(abs(a - b) for a, b in itertools.pairwise(sorted(heights))) > 0.1
    assert not alone or places == heights


def test_the_plot_has_a_row_of_panels_for_each_way(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    rows = [
        serving.Row(section, name, callers, threads, Figures(9.0 * callers, 10.0, 20.0 * callers), ())
        for section in ("threads", "processes", "neighbor")
        for threads in (2, 1)
        for callers in (1, 2)
        for name in OURS
    ]
    file = tmp_path / "new" / "serving.png"
    serving.write_plot(file, rows, "tiny $_$")
    assert file.read_bytes().startswith(b"\x89PNG")
    curves = [plot.Curve(name, {1: Figures(9.0, 10.0, 20.0), 2: Figures(18.0, 10.0, 40.0)}) for name in OURS]
    figure = plot.draw({"threads": curves, "processes": curves}, OURS, "tiny")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["threads", "threads", "processes", "processes"]
    assert {text.get_text() for text in figure.axes[0].texts} == {f"{name} 18" for name in OURS}


@pytest.mark.parametrize("arguments", [["--only", "batches"], ["--only", "threads"]])
def test_a_plot_that_can_not_be_is_refused_before_anything_runs(arguments, monkeypatch, capsys):
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        serving.main([*arguments, "--plot", "serving.png"])
    assert "--plot needs" in capsys.readouterr().err


def test_an_unknown_network_is_an_error_of_the_command_line(capsys):
    with pytest.raises(SystemExit):
        serving.main(["--network", "resnet19"])
    assert "--model must be one of" in capsys.readouterr().err


def test_a_neighbor_burns_and_ends():
    with workers.busy_neighbor() as process:
        time.sleep(0.3)
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.slow
def test_two_processes_and_a_neighbor(folder):
    rows = []
    for section, names in (("processes", OURS), ("neighbor", ["frozen"]), ("batches", ["frozen"])):
        rows += serving.SECTIONS[section](serving.Job(folder, names, seconds=0.2, cores=1, counts=(1, 2), calls=8))
    assert [(row.callers, row.contender) for row in rows if row.section == "processes"] == [
        (callers, name) for callers in (1, 2) for name in OURS
    ]
    assert [(row.neighbor, row.waiting) for row in rows if row.section == "neighbor"] == [
        (neighbor, waiting) for neighbor in (False, True) for waiting in ("spin", "sleep")
    ]
    assert rows[-1].section == "batches" and rows[-1].peak_MB > rows[-1].growth_MB >= 0
    assert "eager" in serving.as_table(rows[:6]) and "sleep" in serving.as_table(rows[6:-1])


@pytest.mark.slow
def test_no_process_is_left_behind(folder):
    with pytest.raises(KeyboardInterrupt), workers.Workers(folder, ["eager"], Demand(1), 2) as started:
        children = [process for process, _ in started._processes]
        # The first would wait for the dead one at their barrier.
        children[1].kill()
        with pytest.raises(workers.WorkerError, match="a process died"):
            started.round("eager", 2, Load(0.01))
        raise KeyboardInterrupt
    assert not any(child.is_alive() for child in children)
    # A contender that can't be made is an error for the parent.
    (folder / models.IMAGES).unlink()
    with pytest.raises(workers.WorkerError, match="FileNotFoundError"):
        workers.Workers(folder, ["eager"], Demand(1), 1).__enter__()


PARENT = """
import sys
from pathlib import Path
from benchmarks.serving.models import Demand
from benchmarks.serving.workers import Workers, busy_neighbor

if __name__ == "__main__":
    with Workers(Path(sys.argv[1]), ["eager"], Demand(1), 1) as started, busy_neighbor() as neighbor:
        print(started._processes[0][0].pid, neighbor.pid, flush=True)
        input()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_processes_end_with_a_parent_that_is_killed(folder, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join((str(ROOT), ENVIRONMENT["PYTHONPATH"]))}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert parent.stdout is not None
    pids = parent.stdout.readline().split()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(pids) == 2
    end = time.monotonic() + 20
    while any(_runs(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # nobody may be there to wait for an orphan
