"""The loader of our CPU kernels: what it finds, what it says where it finds none, and that oneDNN serves then."""

from __future__ import annotations

import copy
import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import assert_within_budget
from helpers.own_kernels import skip_unless_compiled
from helpers.tiny import ENVIRONMENT
from resnet_kernels.cli.main import main
from resnet_kernels.kernels.cpu import convolution, library, plans
from resnet_kernels.kernels.cpu.library import ISA_VARIABLE, ISAS, Library, Missing
from resnet_kernels.kernels.cpu.program import Program
from resnet_kernels.kernels.geometry import normalize
from resnet_kernels.models.random_weights import randomise_batch_norms_

PACKAGE = Path(rk.__file__).parent
FILE = "_convolution" + importlib.machinery.EXTENSION_SUFFIXES[-1]


def _forget():
    library.find.cache_clear()
    plans.plan_for.cache_clear()
    convolution._sized.cache_clear()


@pytest.fixture
def fresh(monkeypatch, threads_as_before):
    """A process that has not looked for the library, and asks for nothing; monkeypatch, to change that."""
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    _forget()
    yield monkeypatch
    monkeypatch.undo()
    _forget()


@pytest.fixture
def folder(fresh, tmp_path):
    """The folder in which the library is looked for, empty."""
    fresh.setattr(library, "__file__", str(tmp_path / "library.py"))
    return tmp_path


def _runs_ours():
    """Whether a kernel of ours has a part in a fused network's call, whose result has to be right."""
    block = rk.models.resnet_v1.BasicBlock
    stem = (nn.Conv2d(3, 20, 7, 2, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    net = randomise_batch_norms_(nn.Sequential(*stem, block(20, 20), block(20, 20))).eval()
    x, seen = torch.randn(2, 3, 64, 64), []
    fused, original = rk.fuse(net), Program._run
    assert rk.explain(fused).fused
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Program, "_run", lambda *arguments: seen.append(0) or original(*arguments))
        y = fused(x)
    with torch.no_grad():
        assert_within_budget(y, net(x), copy.deepcopy(net).double()(x.double()))
    return bool(seen)


def assert_missing(reason):
    """There is no library, for a reason that is said in one line; and all runs without it."""
    found = library.find()
    assert isinstance(found, Missing) and reason in found.reason
    assert reason in library.describe() and "oneDNN" in library.describe() and "\n" not in library.describe()
    assert library.library_or_none() is None
    shapes = plans.Shapes((1, 16, 8, 8), (16, 16, 3, 3), normalize(1, 1, 1, 1))
    assert reason in plans.why_not("winograd", shapes, torch.float32, 1)
    assert not _runs_ours()


@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_that_was_asked_for(isa, fresh):
    able = bool(skip_unless_compiled().calls.rk_panel(ISAS.index(isa)))
    _forget()
    fresh.setenv(ISA_VARIABLE, isa)
    if not able:
        assert_missing(f"{ISA_VARIABLE} is {isa}, which this processor does not have")
        return
    found = library.find()
    assert isinstance(found, Library) and found.isa == isa and library.is_asked_for()
    assert f"ours, {isa}," in library.describe() and str(found.path) in library.describe()
    assert "\n" not in library.describe()
    assert _runs_ours()


def test_the_best_instruction_set_was_not_taken(fresh):
    found = skip_unless_compiled()
    assert found.isa == [isa for number, isa in enumerate(ISAS) if found.calls.rk_panel(number)][-1]
    assert not library.is_asked_for()


def test_none_of_our_kernels_was_asked_for(fresh):
    fresh.setenv(ISA_VARIABLE, "none")
    assert_missing(f"{ISA_VARIABLE} is none")


def test_an_unknown_instruction_set_is_named(fresh):
    fresh.setenv(ISA_VARIABLE, "nonsense")
    assert_missing(f"{ISA_VARIABLE} must be one of portable, avx2, avx512, none, got 'nonsense'")
    assert not library.is_asked_for()


def test_a_folder_without_a_library(folder):
    (folder / FILE).mkdir()
    assert_missing("they are not compiled (pip install -e .")


@pytest.mark.parametrize("content", (b"", b"garbage" * 1000, b"\x7fELF" + b"\0" * 200), ids=("empty", "garbage", "ELF"))
def test_a_damaged_library_is_named(content, folder):
    (folder / FILE).write_bytes(content)
    assert_missing(f"{folder / FILE} can't be loaded (")


@pytest.mark.parametrize(
    "code, reason",
    (
        (
            "long long rk_interface(void) { return 12; }",
            f"is of another version: its interface is 12, this version's is {library._INTERFACE}",
        ),
        ("long long rk_something(void) { return 1; }", "can't be loaded ("),
    ),
    ids=("another version", "another library"),
)
def test_a_strangers_library_was_called(code, reason, folder):
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (folder / "other.c").write_text(code)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / FILE), str(folder / "other.c")], check=True)
    assert_missing(f"{folder / FILE} {reason}")


@pytest.mark.parametrize("threads", (1, 2))
def test_threads_without_pytorchs_openmp(threads, fresh):
    skip_unless_compiled()
    _forget()
    fresh.setattr(library, "_parallel", lambda: None)
    torch.set_num_threads(threads)
    found = library.find()
    assert found.parallel is None and found.threads() == 1
    assert "on one thread, as PyTorch's OpenMP runtime has no GOMP_parallel" in library.describe()
    shapes = plans.Shapes((2, 64, 28, 28), (64, 64, 3, 3), normalize(1, 1, 1, 1))
    reason = plans.why_not("winograd", shapes, torch.float32, threads)
    assert reason == (None if threads == 1 else "found no OpenMP runtime of PyTorch's to run 2 threads on")
    fresh.setenv(ISA_VARIABLE, found.isa)  # then they run wherever they can
    assert _runs_ours() == (threads == 1)


COMMANDS = (["env"], ["explain", "--model", "d2l_resnet18"], ["demo", "--seconds", "0.1", "--model", "d2l_resnet18"])


@pytest.mark.parametrize("isa", ("none", ""), ids=("none", "default"))
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_command_kept_quiet_about_the_kernels(command, isa, fresh, capsys):
    fresh.setenv(ISA_VARIABLE, isa)
    main(command)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CPU kernels: ")]
    found = library.find()
    if isinstance(found, Missing):
        assert said == f"CPU kernels: oneDNN's, since ours can't be used: {found.reason}"
    else:
        assert f"ours, {found.isa}, on " in said and said.endswith(found.path.name)


def _python(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-B", *arguments],
        env={**ENVIRONMENT, **environment},
        cwd=Path(__file__).parent,  # from which nothing is imported
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_env_as_json_names_the_kernels():
    found = skip_unless_compiled()
    command = ("-m", "resnet_kernels", "env", "--json")
    ours, none = (json.loads(_python(*command, **{ISA_VARIABLE: isa})) for isa in (found.isa, "none"))
    assert ours["cpu_kernels"].endswith(found.path.name) and ours["cpu_isa"] == found.isa and ours["cpu_reason"] is None
    assert none["cpu_kernels"] is none["cpu_isa"] is None and none["cpu_reason"] == f"{ISA_VARIABLE} is none"


CALL = """
import torch
import resnet_kernels as rk
from resnet_kernels.kernels.cpu import library

with torch.no_grad():
    rk.fuse(rk.models.d2l_resnet18(3, 10, width=16).eval())(torch.randn(2, 3, 32, 32))
print(library.find().path)
"""


@pytest.mark.slow
def test_something_was_written_into_the_package(tmp_path):
    """A folder that may not be written to, as a system's; the administrator could, so its content is compared."""
    skip_unless_compiled()
    package = tmp_path / "site" / "resnet_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    folders = [package, *(path for path in package.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        before = {path: path.stat().st_mtime_ns for path in package.rglob("*")}
        said = _python("-c", CALL, PYTHONPATH=str(package.parent), HOME=str(tmp_path / "home"))
        assert Path(said.strip()).parent == package / "kernels" / "cpu"
        assert {path: path.stat().st_mtime_ns for path in package.rglob("*")} == before
    finally:
        for path in folders:
            path.chmod(0o755)
