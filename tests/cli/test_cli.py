"""python -m resnet_kernels: what it prints, and how it ends."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resnet_kernels import models
from resnet_kernels.cli import main as cli
from resnet_kernels.perf.steps import forward_backward
from resnet_kernels.runtime.cpu import packed_conv

SMALL = ["--model", "d2l_resnet18", "--batch-size", "2", "--image-size", "32"]


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
    assert cli.main(["explain", "--model", "timm:ecaresnet26t"]) == 0
    assert "se is a EcaModule" in capsys.readouterr().out


def test_verify_and_its_exit_status(capsys, monkeypatch):
    assert cli.main(["verify", *SMALL]) == 0
    assert "parity holds" in capsys.readouterr().out
    original = packed_conv.PackedConv.__init__

    def faulty(self, *arguments):
        original(self, *arguments)
        self.bias.add_(0.01)

    monkeypatch.setattr(packed_conv.PackedConv, "__init__", faulty)
    for command in (["verify", *SMALL, "--json"], ["verify", *SMALL], ["demo", *SMALL], ["time", *SMALL]):
        assert cli.main(command) == 1
    assert "PARITY FAILS" in capsys.readouterr().out


@pytest.mark.slow
def test_time(capsys):
    assert cli.main(["time", *SMALL, "--image-size", "16", "--num-batches", "11"]) == 0
    text = capsys.readouterr().out
    assert "d2l_resnet18: batch 2, 16x16, 11 batches after 10 to warm up" in text and "smaller" not in text
    for run in ("Forward", "Forward-backward"):
        steps = re.findall(rf": step:(\d+)\. duration = \d+\.\d{{3}} \({run}, (\w+)\)$", text, re.M)
        assert steps == [(step, who) for step in ("0", "10") for who in ("eager", "fused")]
        for who in ("eager", "fused"):
            summary = rf"^.+: {run}, {who} across 11 steps, \d+\.\d{{3}} \+/- \d+\.\d{{3}} sec / batch$"
            assert len(re.findall(summary, text, re.M)) == 1
            row = rf"^{run}, {who} +\d+\.\d\d \+/- \d+\.\d\d +\d+\.\d +\d+\.\d\dx$"
            assert len(re.findall(row, text, re.M)) == 1


@pytest.mark.slow
def test_time_json_and_its_defaults_on_a_cpu(capsys):
    assert cli.main(["time", "--model", "d2l_resnet18_keras", "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "smaller than the text's 32, 28x28 and 100 after 10" in err and "across 10 steps" in err
    values = json.loads(out)
    sizes = {key: values[key] for key in ("batch_size", "image_size", "num_batches", "num_steps_burn_in")}
    assert sizes == {"batch_size": 2, "image_size": 28, "num_batches": 10, "num_steps_burn_in": 2}
    assert list(values["runs"]) == ["Forward", "Forward-backward"]
    for run in values["runs"].values():
        assert set(run) == {"eager", "fused", "speedup"} and run["speedup"] > 0
        assert all(len(run[who]["samples"]) == 10 and run[who]["mean"] > 0 for who in ("eager", "fused"))


def test_time_takes_the_gradients_of_cross_entropy():
    """Of all parameters, and of the network that gives probabilities the same as from its logits."""
    net = models.d2l_resnet18_keras(width=4, num_blocks=(1, 1)).double()
    x = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    torch.manual_seed(1)
    step = forward_backward(net.eval(), x)(net, x)
    torch.manual_seed(1)
    labels = torch.randint(10, (4,))
    assert net.training
    expected = torch.autograd.grad(F.cross_entropy(net[:-1](x), labels), list(net.parameters()))
    for mine, theirs in zip(step(), expected, strict=True):
        # A bias before a BN has a gradient of nothing but rounding.
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


def test_time_needs_classes(monkeypatch, capsys):
    maps = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())  # noqa: E731
    monkeypatch.setitem(models.BY_NAME, "maps", maps)
    assert cli.main(["time", "--model", "maps", "--device", "cpu", "--image-size", "8", "--num-batches", "1"]) == 2
    assert "--model must give (N, classes) to be trained on labels, got (1, 4, 6, 6)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["explain", "--model", "resnet51"], "--model must be one of resnet18, "),
        (["explain", "--model", "keras:resnet50"], "--model must be one of resnet18, "),
        (["time", "--model", "resnet_v2_51"], "--model must be one of resnet18, "),
        (["verify", "--backend", "fast"], "backend must be one of auto, triton, cudnn, cpu, eager, got 'fast'"),
        (["verify", *SMALL, "--device", "tpu"], "--device must be cpu, cuda, cuda:1 ..., got 'tpu'"),
        (["verify", *SMALL, "--image-size", "1", "--backend", "cudnn"], "error: "),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ("demo", "explain", "verify", "time", "profile", "tune"))
def test_a_gpu_that_is_not_there(command, capsys):
    assert cli.main([command, "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device cuda: PyTorch sees no GPU here") and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    ([], ["fly"], ["demo", "--batch-size", "0"], ["time", "--num-batches", "0"], ["demo", "--dtype", "int8"]),
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(["explain", "--model", "timm:resnet18"]) == 2
    assert 'pip install "resnet_kernels[timm]"' in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_process():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "resnet_kernels", "verify", *SMALL, "--backend", "triton", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and "TRITON_INTERPRET=1" in done.stderr, done
