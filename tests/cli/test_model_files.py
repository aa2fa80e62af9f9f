"""--model FILE.py:FUNCTION in every command that takes a model, and the one line where the file or the function is wrong."""

import json
import sys

import pytest
import torch

import resnet_kernels as rk
from resnet_kernels.cli import arguments
from resnet_kernels.cli import main as cli
from resnet_kernels.models import by_name

MODEL = """
from torch import nn

import resnet_kernels as rk
import helper_beside_it

def build():
    return rk.models.d2l_resnet18(3, 10, width=8, num_blocks=(1, 1))

def wide():
    return rk.models.d2l_resnet18(3, 10, width=16, num_blocks=(1, 1))

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))

def with_depth(depth): ...
def no_module(): return 3
def a_class(): return nn.ReLU
def raises(): return {}["depth"]
def leaves(): raise SystemExit("no checkpoint\\nhere")
def headless(): return nn.Linear(3, 3)
number = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a file, and forgets the folders that were added to Python's path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "helper_beside_it.py").write_text("")

    def write(text=MODEL, name="my_model.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    yield write
    for name in [name for name in sys.modules if "_resnet_kernels_model_" in name or name == "helper_beside_it"]:
        del sys.modules[name]


def one_line_and_status_2(capsys, *arguments):
    assert cli.main([*arguments]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and not out, (out, error)
    return error


SMALL = ["--device", "cpu", "--image-size", "32"]


@pytest.mark.parametrize(
    ("command", "expected"),
    (
        (["explain", "--device", "cpu"], "3 fused"),
        (["verify", *SMALL], "parity holds"),
        (["demo", *SMALL, "--seconds", "0.2"], "batch 1, 32x32, interleaved"),
        (["time", *SMALL, "--num-batches", "1"], "batch 2, 32x32, 1 batches"),
        (["profile", *SMALL, "--steps", "1"], "inference, batch 2, 32x32, 1 steps"),
        (["roofline", "--image-size", "32"], "batch 256, 32x32, bf16"),
    ),
)
def test_every_command_takes_a_file(command, expected, file, capsys):
    assert cli.main([*command, "--model", file()]) == 0
    assert expected in capsys.readouterr().out


def test_tune_takes_a_file(file, tmp_path, capsys):
    output = tmp_path / "table.json"
    arguments = ["tune", "--dry-run", "--image-size", "8", "--seconds", "0", "--output", str(output)]
    assert cli.main([*arguments, "--model", f"{file()}:wide", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["left"] > 0 and values["layers"] == [] and values["path"] == str(output)


def test_a_function_and_a_class_by_name(file):
    path = file()
    assert by_name.build(path)[0][0].out_channels == 8 and by_name.build(f"{path}:wide")[0][0].out_channels == 16
    assert type(by_name.build(f"{path}:Net")).__name__ == "Net"


def test_weights_of_a_file_stay(file):
    """A function may load a checkpoint: only the models of the zoo and of packages get random statistics."""
    text = MODEL + "\ndef loaded():\n    net = build()\n    net[0][1].running_mean.fill_(7)\n    return net\n"
    options = cli._parser().parse_args(["verify", "--device", "cpu", "--model", f"{file(text)}:loaded"])
    assert torch.equal(arguments.model_for(options)[0][1].running_mean, torch.full((8,), 7.0))


@pytest.mark.parametrize(
    ("function", "message"),
    (
        (
            "made",
            "has no function 'made'; it has Net, a_class, build, headless, leaves, no_module, raises, wide, with_",
        ),
        ("number", "has no function 'number'; it has Net"),
        ("with_depth", "is called without arguments, but needs some: with_depth(depth)"),
        ("no_module", "no_module() in {path} must return an nn.Module, got int"),
        ("a_class", "a_class() in {path} must return an nn.Module, got the class ReLU"),
        ("raises", "raises() in {path} raises KeyError: 'depth' (line 20)"),
        ("leaves", "leaves() in {path} raises SystemExit: no checkpoint (line 21)"),
        ("headless", "--model must have a Conv2d, and a Linear has none"),
    ),
)
def test_a_function_that_is_wrong(function, message, file, capsys):
    path = file()
    error = one_line_and_status_2(capsys, "verify", "--device", "cpu", "--model", f"{path}:{function}")
    assert message.format(path=path) in error


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("import torch\n\ntorch.nothing_like_it\n", "can't be run: AttributeError: module 'torch' has no"),
        ("import no_such_package\n", "can't be run: ModuleNotFoundError: No module named 'no_such_package' (line 1)"),
        ("def build(:\n", "can't be run: SyntaxError: invalid syntax"),
        ("raise SystemExit\n", "can't be run: SystemExit (line 1)"),
        ("", "has no function 'build'; it has no functions"),
    ),
)
def test_a_file_that_is_wrong(text, message, file, capsys):
    assert message in one_line_and_status_2(capsys, "explain", "--model", file(text))


@pytest.mark.parametrize("command", ("demo", "explain", "verify", "time", "profile", "roofline"))
@pytest.mark.parametrize("name", ("none.py", "none.py:build", "folder.py"))
def test_a_file_that_is_not_there(command, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    error = one_line_and_status_2(capsys, command, "--model", name)
    assert f"--model: there is no file {name.partition(':')[0]}" in error


EXAMPLE = MODEL + "import torch\ndef example_input(): return torch.full((3, 3, 24, 40), 2.0).double()\n"


@pytest.mark.parametrize(
    ("options", "shape"),
    (
        ([], (3, 3, 24, 40)),
        (["--batch-size", "1"], (1, 3, 24, 40)),
        (["--image-size", "32"], (3, 3, 32, 32)),
        (["--image-size", "32", "--batch-size", "2"], (2, 3, 32, 32)),
    ),
)
def test_an_example_input(options, shape, file, capsys, monkeypatch):
    """It is the input where no size is asked for; otherwise the sizes that weren't given are its own."""
    seen, verify = [], rk.verify
    monkeypatch.setattr(rk, "verify", lambda model, fused, x, **rest: seen.append(x) or verify(model, fused, x, **rest))
    assert cli.main(["verify", "--device", "cpu", "--model", file(EXAMPLE), *options]) == 0
    [x] = seen
    assert x.shape == shape and x.dtype == torch.float32
    assert (x == 2).all() == (not options)


def test_an_example_input_gives_every_command_its_sizes(file, capsys):
    path = file(EXAMPLE)
    assert cli.main(["time", "--device", "cpu", "--num-batches", "1", "--json", "--model", path]) == 0
    values, error = json.loads((shown := capsys.readouterr()).out), shown.err
    assert (values["batch_size"], values["image_size"]) == (3, [24, 40]) and "3, 24x40" in error
    assert "smaller than the text's" not in error
    assert cli.main(["roofline", "--json", "--model", path]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["batch_size"], values["image_size"]) == (3, [24, 40])
    assert cli.main(["profile", "--device", "cpu", "--steps", "1", "--json", "--model", path]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["batch_size"], values["image_size"]) == (3, [24, 40])


@pytest.mark.parametrize(
    ("body", "message"),
    (
        ("[1]", "must return a tensor, (N, C, H, W), got list"),
        ("torch.zeros(3, 8, 8)", "must return images, (N, C, H, W), in floating point, got (3, 8, 8) of float32"),
        ("torch.zeros(1, 3, 8, 8, dtype=int)", "in floating point, got (1, 3, 8, 8) of int64"),
        ("torch.zeros(0, 3, 8, 8)", "got (0, 3, 8, 8) of float32"),
        ("1 / 0", "raises ZeroDivisionError: division by zero"),
    ),
)
def test_an_example_input_that_is_wrong(body, message, file, capsys):
    path = file(f"{MODEL}import torch\ndef example_input(): return {body}\n")
    assert message in one_line_and_status_2(capsys, "verify", "--device", "cpu", "--model", path)


def test_a_torchvision_of_another_pytorch_is_one_clear_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    assert cli.main(["explain", "--model", "timm:resnet18"]) == 2
    error = capsys.readouterr().err
    assert "timm is installed, but its import fails (operator torchvision::nms does not exist)" in error
    assert error.count("\n") == 1 and torch.__version__ in error
