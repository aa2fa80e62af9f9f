"""The scripts of docs/examples: each runs in small, and what it prints is what its page says it shows."""

import ast
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.tiny import ENVIRONMENT
from resnet_kernels.cli import main as cli

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
PAGE = (ROOT / "docs" / "examples.md").read_text()
DISTRIBUTED = ("ddp", "fsdp2")


def run(name, capsys, *arguments):
    """Runs a script's main() and returns what it printed."""
    # Loss and parity are compared with a plain network that has as many threads.
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="example")["main"]([*arguments])
    return capsys.readouterr().out


@pytest.fixture
def torchvision():
    return pytest.importorskip("torchvision", reason="needs torchvision")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_is_a_script_with_its_command_on_the_page(script):
    tree = ast.parse(script.read_text())
    text = ast.get_docstring(tree)
    [(shown, command)] = re.findall(
        rf"^\| \[{script.name}\]\(examples/{script.name}\) \| (.+?) \| `(.+?)` \|$", PAGE, re.M
    )
    assert command in text and shown.endswith(".")
    assert isinstance(tree.body[-1], ast.If) and ast.unparse(tree.body[-1].test) == "__name__ == '__main__'"


def test_the_page_lists_them_all():
    assert sorted(re.findall(r"^\| \[(\w+\.py)\]", PAGE, re.M)) == [script.name for script in SCRIPTS]


def test_new_kernel(capsys):
    pytest.importorskip("triton", reason="needs Triton")
    runpy.run_path(str(FOLDER / "new_kernel.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 4 and all(line.endswith((": True", ": caught")) for line in lines)


def test_fine_tuning_learns_on_fused_kernels_as_the_plain_network(capsys):
    text = run("fine_tuning_frozen_bn", capsys, "--steps", "3", "--batch-size", "2")
    assert text.startswith("9 of 9 blocks train on fused kernels\n")
    losses = re.findall(r"^step \d: loss (\S+) fused, (\S+) plain$", text, re.M)
    assert len(losses) == 3
    for ours, theirs in losses:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-3)
    assert float(re.search(r"difference of a parameter: (\S+)", text)[1]) < 1e-3


def test_features_stay_within_the_budget(capsys, torchvision):
    text = run("feature_extractor", capsys)
    assert text.count("within budget: True") == 4 and "False" not in text
    assert "9 blocks fused" in text and "9 blocks of the getter fused" in text


def test_a_pyramid_has_parity(capsys, torchvision):
    text = run("detection_backbone", capsys)
    assert "9 blocks fused, 0 skipped" in text and "parity: True" in text and "3 (256, 3, 3)" in text


def greedy_nms(boxes, scores, iou_threshold):
    """torchvision.ops.nms, where torchvision has no operations of its own for this PyTorch."""
    from torchvision.ops import box_iou

    kept, left = [], scores.argsort(descending=True)
    while len(left):
        kept.append(left[0])
        left = left[1:][box_iou(boxes[left[:1]], boxes[left[1:]])[0] <= iou_threshold]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.long)


@pytest.mark.slow
def test_a_detector_finds_the_same_boxes(capsys, torchvision, monkeypatch):
    if not torchvision.extension._has_ops():
        from torchvision.ops import boxes, poolers
        from torchvision.ops.roi_align import _roi_align

        monkeypatch.setattr(boxes, "nms", greedy_nms)
        monkeypatch.setattr(
            poolers,
            "roi_align",
            lambda x, rois, output_size, spatial_scale, sampling_ratio: _roi_align(
                x, rois, spatial_scale, *output_size, sampling_ratio, False
            ),
        )
    text = run("detection_backbone", capsys, "--image-size", "64", "--detector")
    counts = re.findall(r"^image \d: (\d+) boxes before, (\d+) after, moved by (\S+) pixels at most$", text, re.M)
    assert "Faster R-CNN: 10 blocks fused" in text and len(counts) == 2, (
        text
    )  # the ResNet, and the RPN's own convolution
    assert all(before == after and int(after) > 0 and float(moved) < 0.1 for before, after, moved in counts)


def test_a_server_answers_every_caller_in_batches(capsys):
    text = run("serving", capsys)
    counts = re.search(r"^(\d+) images in (\d+) batches of (\d+) to (\d+)$", text, re.M)
    images, batches, least, most = map(int, counts.groups())
    assert images == 24 and 6 <= batches < 24 and 1 <= least <= most <= 4
    assert "parity: True" in text and float(re.search(r"plain model's answer: (\S+)", text)[1]) < 1e-3


def test_a_server_hands_its_errors_to_the_callers():
    """And goes on with the next batch; what was submitted before close() is answered."""
    server_class = runpy.run_path(str(FOLDER / "serving.py"), run_name="example")["Server"]

    def model(x):
        if x.isnan().any():
            raise ValueError("no image")
        return x.flatten(1)

    server = server_class(model, torch.device("cpu"), max_batch=2, max_wait=0.0)
    with pytest.raises(ValueError, match="no image"):
        server.submit(torch.full((1, 2, 2), torch.nan)).result(timeout=20)
    answers = [server.submit(torch.full((1, 2, 2), float(value))) for value in range(5)]
    server.close()
    assert [answer.result(timeout=20).tolist() for answer in answers] == [[float(value)] * 4 for value in range(5)]
    assert max(server.batches) <= 2 and sum(server.batches) == 6
    patient = server_class(model, torch.device("cpu"), max_batch=8, max_wait=60.0)
    answers = [patient.submit(torch.zeros(1, 2, 2)) for _ in range(3)]
    patient.close()  # which ends the wait for more images
    assert patient.batches == [3] and all(answer.done() for answer in answers)


@pytest.mark.parametrize("average", ("ema", "swa"))
def test_an_average_is_fused_and_has_parity(average, capsys):
    text = run("ema_swa", capsys, "--average", average, "--steps", "4")
    assert "9 blocks fused, 9 in the average" in text and "parity of the average: True" in text
    assert "All keys matched" in text


@pytest.fixture
def alone(monkeypatch):
    """torchrun's environment for a single process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_one_process(name, capsys, alone):
    check_distributed(name, run(name, capsys, "--steps", "2"), 1, 2)
    assert not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_processes(name):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    check_distributed(name, done.stdout, 2, 3 if name == "fsdp2" else 4)


def check_distributed(name, text, processes, steps):
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"{processes} processes on {kind}, 9 blocks fused" in text
    assert text.count("mean loss") == steps
    if name == "ddp":
        assert "same parameters in all processes: True" in text and "parity: True" in text
        return
    for ours, theirs in re.findall(r"mean loss (\S+) fused, (\S+) plain", text):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-2, abs=1e-4)
    assert float(re.search(r"in eval mode: (\S+)", text)[1]) < 1e-3


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_without_torchrun_it_says_how_to_start(name, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=f"torchrun --nproc-per-node 2 docs/examples/{name}.py"):
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="example")["main"]([])


def test_timing_prints_the_texts_lines(capsys):
    text = run("timing_your_network", capsys, "--num-batches", "2", "--burn-in", "1")
    assert "4 fused, 0 skipped" in text and "parity: True" in text
    for line in ("Forward, plain", "Forward-backward, plain", "Forward, fused", "Forward-backward, fused"):
        assert (
            len(re.findall(rf": {line} across 2 steps, \d+\.\d{{3}} \+/- \d+\.\d{{3}} sec / batch$", text, re.M)) == 1
        )


def test_the_commands_of_the_page_run(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for command in re.findall(r"^python -m resnet_kernels (.+)$", PAGE, re.M):
        arguments = [*command.split(), *(["--num-batches", "1"] if command.startswith("time") else [])]
        assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "4 fused, 0 skipped" in text and "parity holds" in text and "batch 2, 32x32, 1 batches" in text
    assert os.getcwd() == str(ROOT)
