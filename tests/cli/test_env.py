"""python -m resnet_kernels env: all that a bug report needs, and nothing private."""

import getpass
import json
import os
from pathlib import Path

import pytest
import torch

from resnet_kernels.cli import env
from resnet_kernels.cli import main as cli

ROOT = Path(__file__).parents[2]


def values(capsys):
    assert cli.main(["env", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_a_bug_report_needs(capsys, monkeypatch):
    monkeypatch.setenv("RESNET_KERNELS_BACKEND", "cpu")
    monkeypatch.setenv("RESNET_KERNELS_TOKEN_OF_TOMORROW", "1")
    monkeypatch.setenv("AN_API_KEY", "secret")
    found = values(capsys)
    for name in ("resnet_kernels", "torch", "python", "os", "cpu", "cores", "threads", "torch_build", "tables"):
        assert isinstance(found[name], str) and found[name], name
    assert found["torch"] == torch.__version__ and str(torch.get_num_threads()) in found["threads"]
    assert found["torch_build"].startswith("CUDA " if torch.version.cuda else "CPU")
    assert "MKL-DNN" in found["torch_build"] or "oneDNN" in found["torch_build"]
    assert found["variables"]["RESNET_KERNELS_BACKEND"] == "cpu"
    assert found["variables"]["RESNET_KERNELS_TOKEN_OF_TOMORROW"] == "1"
    assert set(found["packages"]) == set(env.PACKAGES)
    assert "secret" not in json.dumps(found) and "AN_API_KEY" not in json.dumps(found)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's list of the processor's features")
def test_instruction_sets(capsys):
    flags = values(capsys)["cpu_flags"].split()
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):
        assert {"AVX2": "avx2", "AVX512": "avx512f"}[capability] in flags and "sse2" not in flags


def test_text_has_the_same_as_json(capsys):
    found = values(capsys)
    assert cli.main(["env"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines)
    assert shown.keys() == {name for name, value in found.items() if value not in (None, {})}
    assert shown["os"] == found["os"] and shown["torch_build"] == found["torch_build"]
    assert last.startswith("CPU kernels: ")


def test_packages_that_are_absent_are_named(capsys, monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("numpy", "no-such-package"))
    assert values(capsys)["packages"]["no-such-package"] is None
    cli.main(["env"])
    assert "no-such-package not installed" in capsys.readouterr().out


def test_neither_home_nor_user_is_named(capsys, monkeypatch, tmp_path):
    home = tmp_path / "home" / "alice"
    for name, value in (("HOME", home), ("USER", "alice"), ("LOGNAME", "alice"), ("USERPROFILE", home)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("RESNET_KERNELS_CACHE", str(home / "tables"))
    monkeypatch.setenv("RESNET_KERNELS_OTHER", "/scratch/alice/data and /scratch/alicence and alice")
    assert getpass.getuser() == "alice"
    found = values(capsys)
    assert found["tables"] == os.path.join("~", "tables")
    assert found["variables"]["RESNET_KERNELS_CACHE"] == os.path.join("~", "tables")
    assert found["variables"]["RESNET_KERNELS_OTHER"] == "/scratch/USER/data and /scratch/alicence and alice"
    cli.main(["env"])
    assert str(home) not in capsys.readouterr().out


def test_a_home_that_begins_like_another_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/al")
    assert env._without_names("/home/alice/x:/home/al/y:/home/al") == "/home/alice/x:~/y:~"


def test_the_packages_are_those_of_the_extras():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {text.split(">")[0] for extra in ("vision", "timm", "report", "train") for text in extras[extra]}
    assert {name for name in names if "[" not in name} == set(env.PACKAGES) - {"numpy"}
