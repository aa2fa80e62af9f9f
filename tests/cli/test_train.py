"""python -m resnet_kernels train: what it prints and writes, and that it can be stopped anywhere and go on."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_kernels as rk
from helpers.tiny import ENVIRONMENT, TRAIN, tiny
from resnet_kernels.cli import main as cli
from resnet_kernels.cli.train import checkpoint, command, data, loop
from resnet_kernels.models.loss import loss_function

pytest.importorskip("sklearn", reason="needs scikit-learn")
pytestmark = pytest.mark.usefixtures("tiny_in_zoo")


def train(output, *options):
    return cli.main([*TRAIN, "--output", str(output), *options])


def read(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)


def test_what_is_printed_and_written(tmp_path, capsys):
    assert train(tmp_path, "--epochs", "3") == 0
    shown, error = capsys.readouterr()
    lines = shown.splitlines()
    assert not error and re.match(
        r"tiny \([\d,]+ parameters, 3 blocks fused\) on digits \(1x16x16; 1150 to train", lines[0]
    )
    state = read(tmp_path)
    for number, (line, row) in enumerate(zip(lines[1:-1], state["history"]), 1):
        assert (
            line == f"[{number}] loss: {row['loss']:.3f}, validation accuracy: {100 * row['validation_accuracy']:.1f} %"
        )
    percent, right, count = map(
        int, re.fullmatch(r"Accuracy on the test set: (\d+) % \[(\d+)/(\d+)\]", lines[-1]).groups()
    )
    assert len(lines) == 5 and count == 360 and percent == 100 * right // 360 and right > 180  # by chance: 36
    # The weights are the plain model's, and do what was printed.
    model = tiny(10, 1)
    model.load_state_dict(state["model"])
    digits = data.load("digits", "", 0.2)
    images, labels = digits.test.tensors
    with torch.no_grad():
        predicted = model.eval()(data.prepare(images, digits.levels, 16, False)).argmax(1)
    # Fused, a near tie may fall to the other side.
    assert abs((predicted == labels).sum().item() - right) <= 1
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 2


# Where oneDNN has no bfloat16, evaluation under autocast runs the model's own code, and says so.
@pytest.mark.filterwarnings("ignore:resnet_kernels. the .cpu. backend needs a CPU with bfloat16:RuntimeWarning")
@pytest.mark.slow(unless=lambda options: not options)
@pytest.mark.parametrize("options", [[], ["--optimizer", "sgd", "--no-fused"], ["--amp"]], ids=" ".join)
def test_resumed_is_bit_for_bit_the_uninterrupted_run(options, tmp_path, capsys):
    assert train(tmp_path / "straight", "--epochs", "4", *options) == 0
    straight = capsys.readouterr().out.splitlines()
    assert train(tmp_path / "resumed", "--epochs", "2", *options) == 0
    capsys.readouterr()
    torch.manual_seed(99)
    assert train(tmp_path / "resumed", "--epochs", "4", "--resume", *options) == 0
    assert capsys.readouterr().out.splitlines()[1:] == straight[3:]
    one, other = read(tmp_path / "straight"), read(tmp_path / "resumed")
    assert one["history"] == other["history"] and len(one["history"]) == 4
    for part in ("model", "optimizer", "scheduler", "rng"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def test_fused_and_plain_checkpoints_are_each_others(tmp_path, capsys):
    assert train(tmp_path, "--epochs", "1") == 0
    assert train(tmp_path, "--epochs", "2", "--resume", "--no-fused") == 0
    assert "not fused" in capsys.readouterr().out


def test_fused_training_stays_with_plain(tmp_path):
    """The budget is eager's own spread: plain training through oneDNN's convolutions and through ATen's own."""

    def history(*options):
        assert train(tmp_path, "--epochs", "1", *options) == 0
        return read(tmp_path)["history"][0]

    fused, plain = history("--fused"), history("--no-fused")
    with torch.backends.mkldnn.flags(enabled=False):
        native = history("--no-fused")
    for name in ("loss", "validation_loss"):
        spread = abs(native[name] - plain[name])
        assert abs(fused[name] - plain[name]) <= 2 * spread + 2**-23 * plain[name], name


def test_seed_and_order():
    images = data.load("digits", "", 0.2)
    sampler = torch.utils.data.DistributedSampler(images.train, 1, 0, seed=3)
    for size in (32, 383, 1149, 1150, 5000):  # 1150 = 3 * 383 + 1 = 1149 + 1
        batches = loop.Batches(sampler, size)
        assert sorted(torch.cat(list(batches)).tolist()) == list(range(1150))
        assert len(list(batches)) == len(batches) and min(map(len, batches)) > 1


def test_loss_of_probabilities_is_keras():
    logits, labels = torch.randn(16, 10, dtype=torch.float64, requires_grad=True), torch.randint(10, (16,))
    plain, keras = nn.Sequential(nn.Identity()), nn.Sequential(nn.Identity(), nn.Softmax(1))
    losses = [loss_function(m)(m(logits), labels) for m in (plain, keras)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))
    sure = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = loss_function(keras)(sure, torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor(1e-7).log().neg())
    # A fused model ends in the same Softmax.
    block = rk.fuse(nn.Sequential(*tiny(10, 1), nn.Softmax(1)))
    assert loss_function(block) is not F.cross_entropy and loss_function(block[:-1]) is F.cross_entropy


@pytest.mark.slow
def test_stopped_in_an_epoch_keeps_the_last_one(tmp_path, monkeypatch, capsys):
    evaluate, calls = loop.Training.evaluate, []

    def stop_in_the_third(self, part):
        calls.append(part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "evaluate", stop_in_the_third)
        assert train(tmp_path / "stopped", "--epochs", "4") == 130
    assert f"{tmp_path / 'stopped' / 'checkpoint.pt'} holds epoch 2: add --resume" in capsys.readouterr().err
    assert train(tmp_path / "stopped", "--epochs", "4", "--resume") == 0
    assert train(tmp_path / "straight", "--epochs", "4") == 0
    one, other = read(tmp_path / "straight"), read(tmp_path / "stopped")
    assert one["history"] == other["history"]
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("sent", (signal.SIGINT, signal.SIGTERM))
def test_signals_stop_a_process_cleanly(sent, tmp_path, capsys):
    arguments = [*TRAIN, "--epochs", "100000", "--output", str(tmp_path)]
    script = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "tiny.py"), *arguments]
    process = subprocess.Popen(script, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not process.stdout.readline().startswith("[1] loss: "):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(sent)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "add --resume to go on" in error and "Traceback" not in error, error
    done = read(tmp_path)["epoch"]
    assert train(tmp_path, "--epochs", str(done + 1), "--resume") == 0
    assert f"[{done + 1}] loss: " in capsys.readouterr().out and not list(tmp_path.glob("*.tmp"))


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"epoch": 1})
    for error in (KeyboardInterrupt, OSError):

        def half(state, file, error=error):
            file.write(b"half")
            raise error

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(error):
            checkpoint.save(path, {"epoch": 2})
        assert torch.load(path)["epoch"] == 1 and list(tmp_path.iterdir()) == [path]


def test_an_earlier_run_is_kept(tmp_path, capsys):
    assert train(tmp_path, "--epochs", "1") == 0
    first = read(tmp_path)["model"]
    assert train(tmp_path, "--epochs", "1", "--seed", "1") == 0
    assert "checkpoint.earlier.pt" in capsys.readouterr().out
    kept = torch.load(tmp_path / "checkpoint.earlier.pt", weights_only=True)["model"]
    assert all(torch.equal(kept[k], v) for k, v in first.items()) and not torch.equal(
        read(tmp_path)["model"]["0.0.weight"], kept["0.0.weight"]
    )


def test_no_earlier_run_is_written_over(tmp_path):
    """The second run's checkpoint took the place of the first one's."""
    for i in range(3):
        (tmp_path / "checkpoint.pt").write_text(f"run {i}")
        checkpoint.set_aside(tmp_path / "checkpoint.pt")
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {f"checkpoint.earlier{end}.pt": f"run {i}" for i, end in enumerate(("", "-2", "-3"))}


def test_output_that_cannot_be_written_shows_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop.Training, "train_epoch", lambda self: pytest.fail("it trained"))
    (tmp_path / "a file").touch()
    (tmp_path / "folder" / "checkpoint.pt").mkdir(parents=True)
    for output, message in (("a file", "can't be written to"), ("folder", "is there and is no file")):
        assert train(tmp_path / output, "--epochs", "1") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --output: ") and message in error and error.count("\n") == 1


def test_a_changed_bit_is_found(tmp_path):
    """PyTorch reads it without a word."""
    weight = torch.zeros(1000)
    state = {name: {} for name in checkpoint.KEYS} | {"settings": {}, "epoch": 0, "history": [], "model": {"w": weight}}
    state |= {"rng": {"cpu": torch.get_rng_state()}}
    del state["version"]
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state)
    assert torch.equal(checkpoint.load(path, {})["model"]["w"], weight)
    raw = bytearray(path.read_bytes())
    at = raw.find(bytes(weight.numpy().tobytes())) + 2000
    raw[at] ^= 1
    path.write_bytes(raw)
    assert not torch.equal(torch.load(path)["model"]["w"], weight)
    with pytest.raises(ValueError, match="is damaged: its values are not those that were saved"):
        checkpoint.load(path, {})


def test_what_a_killed_save_left_goes_with_the_next_save(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, alive = (tmp_path / f"checkpoint.pt.{pid}.tmp" for pid in (process.pid, 1))
    other = tmp_path / "checkpoint.pt.notes.tmp"
    for path in (dead, alive, other):
        path.touch()
    checkpoint.save(tmp_path / "checkpoint.pt", {"epoch": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", alive.name, other.name}


def test_stopped_before_its_first_epoch_it_says_what_is_there(tmp_path, capsys, monkeypatch):
    """With --resume it said that nothing was saved."""

    def stop(self):
        raise KeyboardInterrupt

    def stop_early(*_):
        raise KeyboardInterrupt

    assert train(tmp_path, "--epochs", "1") == 0
    path = tmp_path / "checkpoint.pt"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load", stop_early)
        assert train(tmp_path, "--epochs", "2", "--resume") == 130
        assert f"no epoch was done, and {path} is as it was" in capsys.readouterr().err
    monkeypatch.setattr(loop.Training, "train_epoch", stop)
    assert train(tmp_path, "--epochs", "2", "--resume") == 130
    assert f"{path} holds epoch 1: add --resume" in capsys.readouterr().err
    assert train(tmp_path / "new", "--epochs", "2") == 130
    assert "no epoch was done, nothing is saved" in capsys.readouterr().err


def test_a_broken_connection_says_what_is_kept(tmp_path, capsys, monkeypatch):
    """Another process was stopped; its message said so, and not how to go on."""

    def breaks(self):
        raise RuntimeError("Connection closed by peer\nmore")

    assert train(tmp_path, "--epochs", "1") == 0
    capsys.readouterr()
    monkeypatch.setattr(loop.Training, "train_epoch", breaks)
    monkeypatch.setenv("WORLD_SIZE", "2")  # without a RANK there is one process all the same
    assert train(tmp_path, "--epochs", "2", "--resume") == 2
    expected = f"error: Connection closed by peer; {tmp_path / 'checkpoint.pt'} holds epoch 1: add --resume to go on\n"
    assert capsys.readouterr().err == expected


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    assert train(tmp_path, "--epochs", "1") == 0
    original = command.Training.__init__

    def poisoned(self, *arguments):
        original(self, *arguments)
        loss, steps = self.loss, iter(range(1000))
        self.loss = lambda *pair: loss(*pair) * (float("nan") if next(steps) == 6 else 1)

    monkeypatch.setattr(command.Training, "__init__", poisoned)
    capsys.readouterr()
    assert train(tmp_path, "--epochs", "2", "--resume") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the loss is nan in epoch 2, step 7 of 36") and error.count("\n") == 1
    assert read(tmp_path)["epoch"] == 1
