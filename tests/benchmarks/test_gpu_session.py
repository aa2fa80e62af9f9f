"""benchmarks/gpu/session.py, dry: files that are whole, within the budget's order, whatever a section does."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

ROOT = Path(__file__).parents[2]

gpu_session = importlib.import_module("benchmarks.gpu.session")
Session = gpu_session.Session

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is no dry run")


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path, 60.0, True)


def read(path):
    values = json.loads(path.read_text())
    assert values["dry_run"] and values["environment"]["torch"] == torch.__version__ and values["device"]["name"]
    return values


@pytest.mark.slow
def test_the_whole_session_dry(tmp_path):
    """The command itself, as CI runs it."""
    out = tmp_path / "a directory" / "out"
    command = ["bash", str(ROOT / "benchmarks" / "gpu" / "run.sh"), str(out), "60"]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHON": sys.executable}
    )
    assert run.returncode == 0, run.stderr[-3000:]
    files = {path.name: path for path in out.iterdir()}
    assert len(files) <= 8 and "log.txt" in files
    sections = read(files["session.json"])["sections"]
    assert list(sections) == list(gpu_session.SHARES)
    # A busy machine may leave a section without its time; none may fail.
    assert not [s for s in sections.values() if "failed" in str(s["ended"]) or "Error" in str(s["ended"])], sections
    for name in files:
        if name.endswith(".json") and not name.startswith("dry-run"):
            read(files[name])
    if sections["ceilings"]["ended"] == "done":
        assert all(view["right"] for view in read(files["ceilings.json"])["descriptors"].values())
    if sections["tune"]["ended"] == "done":
        table = next(path for name, path in files.items() if name.startswith("dry-run"))
        records = json.loads(table.read_text())["records"]
        assert records and all("samples" in row["call"] for r in records for row in r["candidates"].values())
    if sections["models"]["ended"] == "done":
        groups = {b["group"] for b in read(files["models.json"])["benchmarks"]}
        assert len(groups) == 2 and any("backward" in group for group in groups)


def test_usage(tmp_path):
    run = subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu" / "run.sh")], capture_output=True, text=True)
    assert run.returncode == 2 and "usage: " in run.stderr


def test_what_act_1_denied_is_not_tuned(tmp_path, monkeypatch):
    noted = []

    def command(session, arguments, seconds, output=None, **environment):
        noted.append(arguments)
        return "done"

    monkeypatch.setattr(gpu_session.Session, "command", command)
    sections(monkeypatch, tune=gpu_session.tune)
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text("[]")
    for arguments, expected in (([], None), (["--denied", str(elsewhere)], elsewhere)):
        assert gpu_session.main([str(tmp_path / "out"), "--dry-run", *arguments]) == 0
        *_, last = noted
        assert ("--without" in last) == (expected is not None) and (expected is None or str(expected) in last)
    beside = tmp_path / "out" / "denied.json"
    beside.write_text("[]")
    assert gpu_session.main([str(tmp_path / "out"), "--dry-run"]) == 0 and str(beside) in noted[-1]
    with pytest.raises(SystemExit):
        gpu_session.main([str(tmp_path / "out"), "--dry-run", "--denied", str(tmp_path / "nothing.json")])


def hangs(session, seconds):
    return {"ended": session.command(["-c", "import time; time.sleep(600)"], 1.0)}


def crashes(session, seconds):
    return {"ended": session.command(["-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"], 30.0)}


def raises(session, seconds):
    raise ValueError("no such thing")


def writes(session, seconds):
    session.write("written.json", {"values": [1]})
    return {"ended": "done"}


def sections(monkeypatch, **functions):
    monkeypatch.setattr(gpu_session, "SECTIONS", functions)
    monkeypatch.setattr(gpu_session, "SHARES", dict.fromkeys(functions, 1))


def test_what_fails_costs_its_section_alone(tmp_path, monkeypatch):
    sections(monkeypatch, hangs=hangs, crashes=crashes, raises=raises, writes=writes)
    assert gpu_session.main([str(tmp_path), "--dry-run", "--seconds", "60"]) == 0
    ended = {name: s["ended"] for name, s in read(tmp_path / "session.json")["sections"].items()}
    assert ended == {
        "hangs": "out of time",
        "crashes": f"failed ({-signal.SIGSEGV})",
        "raises": "ValueError: no such thing",
        "writes": "done",
    }
    assert read(tmp_path / "written.json")["values"] == [1]


def test_no_time_is_no_failure(tmp_path, monkeypatch):
    sections(monkeypatch, raises=raises)
    assert gpu_session.main([str(tmp_path), "--dry-run", "--seconds", "0"]) == 0
    assert read(tmp_path / "session.json")["sections"]["raises"]["ended"] == "no time left"


def test_stopped_in_the_middle(tmp_path, monkeypatch):
    def stop(session, seconds):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    sections(monkeypatch, writes=writes, stop=stop, raises=raises)
    try:
        assert gpu_session.main([str(tmp_path), "--dry-run"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    ended = {name: s["ended"] for name, s in read(tmp_path / "session.json")["sections"].items()}
    assert ended == {"writes": "done", "stop": "stopped"}
    assert read(tmp_path / "written.json")


@pytest.mark.slow
def test_a_commands_children_end_with_it(session, tmp_path):
    starts_one = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
    )
    assert session.command(["-c", f"{starts_one}time.sleep(600)"], 5.0) == "out of time"
    assert session.command(["-c", starts_one], 60.0) == "done"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("a child goes on")


def test_tests_that_were_cut_off_count_as_far_as_they_went():
    lines = ("one[x y] PASSED [ 1%]", "two FAILED [ 2%]", "three SKIPPED (why) [ 3%]", "fo")
    text = "\n".join(f"tests/a.py::{line}" for line in lines)
    found = gpu_session._read_tests(text)
    assert found["counts"] == {"PASSED": 1, "FAILED": 1, "SKIPPED": 1} and found["failures"] == ["tests/a.py::two"]
    assert found["end_of_output"] == text


def test_the_gpus_tests_are_found():
    names = {
        path.name for path in (ROOT / "tests").rglob("test_*.py") if gpu_session._FOR_GPUS.search(path.read_text())
    }
    assert {"test_conv_bias_act.py", "test_conv_bias_act_tma.py", "test_parity.py", "test_batch_norm_act.py"} <= names
    assert "test_cli.py" not in names


@pytest.mark.slow
def test_cases_that_are_not_there_are_said(session, monkeypatch):
    monkeypatch.setattr(gpu_session, "DRY_CASES", ("no-such-case",))
    (result,) = gpu_session.models(session, 60.0)["cases"].values()
    assert result == "no such case" and read(session.out / "models.json")["benchmarks"] == []


def test_a_section_that_breaks_the_gpu_is_tried_again_behind_it(session, monkeypatch):
    said = []
    monkeypatch.setattr(
        session, "command", lambda *a, **k: (said.append(a), "failed (2)" if len(said) < 3 else "done")[1]
    )
    result = gpu_session.tune(session, 60.0)
    assert len(said) == 3 and result["ended"] == "done"


def test_only_the_sections_asked_for(tmp_path, monkeypatch):
    sections(monkeypatch, raises=raises, writes=writes)
    assert gpu_session.main([str(tmp_path), "--dry-run", "--only", "writes"]) == 0
    assert list(read(tmp_path / "session.json")["sections"]) == ["writes"]
