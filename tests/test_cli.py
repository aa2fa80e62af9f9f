"""python -m resnet_kernels: what it prints, and how it ends."""

import json
import os
import subprocess
import sys

import pytest

from resnet_kernels import __main__ as cli
from resnet_kernels import running

SMALL = ["--model", "d2l_resnet18", "--batch-size", "2"]


def test_demo(capsys):
    assert cli.main(["demo", *SMALL, "--seconds", "0.5"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "1. What was fused",
        "9 fused, 0 skipped",
        "parity holds",
        "3. How fast is it here?",
        "eager",
        "img/s",
    ):
        assert expected in text


def test_demo_json(capsys):
    assert cli.main(["demo", *SMALL, "--seconds", "0.5", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["verify"]["ok"] and values["speedup"] > 0 and len(values["report"]["rows"]) == 9
    assert set(values["timings"]) == {"eager channels_last", "fused"}


@pytest.mark.parametrize("as_json", (True, False))
def test_explain(capsys, as_json):
    assert cli.main(["explain", "--model", "resnet18", *(["--json"] if as_json else [])]) == 0
    text = capsys.readouterr().out
    assert len(json.loads(text)["rows"]) == 9 if as_json else "layer4.1" in text


def test_explain_timm(capsys):
    pytest.importorskip("timm", reason="needs timm")
    assert cli.main(["explain", "--model", "timm:seresnet18"]) == 0
    assert "se is a SEModule" in capsys.readouterr().out


def test_verify_and_its_exit_status(capsys, monkeypatch):
    assert cli.main(["verify", *SMALL]) == 0
    assert "parity holds" in capsys.readouterr().out
    original = running.PackedConv.__init__

    def faulty(self, *arguments):
        original(self, *arguments)
        self.bias = self.bias + 0.01

    monkeypatch.setattr(running.PackedConv, "__init__", faulty)
    for command in (["verify", *SMALL, "--json"], ["verify", *SMALL], ["demo", *SMALL]):
        assert cli.main(command) == 1
    assert "PARITY FAILS" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["explain", "--model", "resnet51"], "--model must be one of resnet18, "),
        (["explain", "--model", "keras:resnet50"], "--model must be one of resnet18, "),
        (["verify", "--backend", "fast"], "backend must be one of auto, triton, cudnn, cpu, eager, got 'fast'"),
        (["verify", *SMALL, "--device", "tpu"], "error: "),
        (["verify", *SMALL, "--image-size", "1", "--backend", "cudnn"], "error: "),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("arguments", ([], ["fly"], ["demo", "--batch-size", "0"], ["demo", "--dtype", "int8"]))
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(["explain", "--model", "timm:resnet18"]) == 2
    assert 'pip install "resnet_kernels[timm]"' in capsys.readouterr().err


def test_as_a_process():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "resnet_kernels", "verify", *SMALL, "--backend", "triton", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and "TRITON_INTERPRET=1" in done.stderr, done
