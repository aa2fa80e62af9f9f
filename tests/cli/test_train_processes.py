"""train under torchrun: two processes on the CPU over gloo."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.tiny import ENVIRONMENT, TRAIN

pytest.importorskip("sklearn", reason="needs scikit-learn")
if not torch.distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

TINY = str(Path(__file__).parents[1] / "helpers" / "tiny.py")
ROOT = Path(__file__).parents[2]


def torchrun(*arguments):
    # --standalone looks for a free port.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False, timeout=300)


@pytest.mark.slow
def test_the_command_of_the_readme(tmp_path):
    options = ["--epochs", "1", "--image-size", "8", "--batch-size", "384", "--optimizer", "sgd", "--device", "cpu"]
    done = torchrun("-m", "resnet_kernels", "train", *options, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1:3] == [
        "2 processes, each with 192 of a batch's images",
        "BN statistics are of each process' images: SyncBatchNorm needs GPUs",
    ]
    assert lines[3].startswith("BN's running statistics take up 0.1 of a batch's, a step: after 3 steps")
    assert lines[4].startswith("[1] loss: ") and len(lines) == 6
    assert re.fullmatch(r"Accuracy on the test set: \d+ % \[\d+/360\]", lines[5])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "curve.png"}
    # No wrapper's prefix in the keys.
    assert "0.0.weight" in torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]


@pytest.mark.slow
def test_two_processes_learn_resume_and_agree(tmp_path):
    right = []
    for output, options in (("straight", ["2"]), ("resumed", ["1"]), ("resumed", ["2", "--resume"])):
        done = torchrun(TINY, *TRAIN, "--batch-size", "16", "--output", str(tmp_path / output), "--epochs", *options)
        assert done.returncode == 0, done.stderr
        right.append(int(re.search(r"Accuracy on the test set: \d+ % \[(\d+)/360\]", done.stdout).group(1)))
    assert right[0] == right[2] > 180  # by chance: 36
    one, other = (torch.load(tmp_path / d / "checkpoint.pt", weights_only=True) for d in ("straight", "resumed"))
    assert one["history"] == other["history"]
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=0)


@pytest.mark.slow
def test_an_error_is_said_once():
    done = torchrun(TINY, *TRAIN, "--batch-size", "33")
    assert done.returncode != 0
    assert done.stderr.count("error: --batch-size must be a multiple of the 2 processes, got 33") == 1
