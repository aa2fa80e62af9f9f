"""Reading activations: modules, functions, users' own and BatchNormAct2d, with their settings; why others are left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.activations import MODULES
from resnet_kernels.graph import reader
from resnet_kernels.graph.recipe import CannotRead
from resnet_kernels.kernels.activations import Activation


class Block(nn.Module):
    """conv, BN, `act`, conv, BN, add and `act` again, each of which subclasses may do in another way."""

    def __init__(self, act: nn.Module | None = None, channels: int = 8):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.act = act

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + x)


def calling(function):
    """A block whose activation is a call of a function."""
    return type("Calls", (Block,), {"act": None, "forward": lambda self, x: _forward(self, x, function)})()


def _forward(self, x, function):
    y = function(self.bn1(self.conv1(x)))
    return function(self.bn2(self.conv2(y)) + x)


def recipe(module):
    return reader.read(module).recipe()


def whole(name):
    return f"conv1+bn1+{name} -> conv2+bn2+add+{name}"


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    assert str(recipe(Block(MODULES[name]))) == whole(name)


@pytest.mark.parametrize(
    "module, name",
    [(nn.ReLU6(True), "relu6"), (nn.LeakyReLU(0.2, True), "leaky_relu(0.2)"), (nn.SiLU(True), "silu"),
     (nn.Hardswish(True), "hardswish"), (nn.LeakyReLU(), "leaky_relu(0.01)"), (nn.LeakyReLU(0), "leaky_relu(0.0)"),
     (nn.LeakyReLU(-0.5), "leaky_relu(-0.5)")],
    ids=str,
)  # fmt: skip
def test_in_place_and_other_settings(module, name):
    assert str(recipe(Block(module))) == whole(name)


@pytest.mark.parametrize(
    "function, name",
    [
        (F.relu6, "relu6"),
        (lambda x: F.relu6(x, True), "relu6"),
        (F.silu, "silu"),
        (lambda x: F.silu(x, inplace=True), "silu"),
        (F.leaky_relu, "leaky_relu(0.01)"),
        (lambda x: F.leaky_relu(x, 0.1), "leaky_relu(0.1)"),
        (lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True), "leaky_relu(0.3)"),
        (lambda x: F.leaky_relu_(x, 0.3), "leaky_relu(0.3)"),
        (F.gelu, "gelu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (F.hardswish, "hardswish"),
        (lambda x: x.relu(), "relu"),
    ],
)
def test_functions(function, name):
    assert str(recipe(calling(function))) == whole(name)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class SwishOfMethods(nn.Module):
    def __init__(self):
        super().__init__()
        self.inplace = False

    def forward(self, x):
        return x.mul_(x.sigmoid()) if self.inplace else x.mul(x.sigmoid())


class HardSwish(nn.Module):
    def forward(self, x):
        return x.mul(F.relu6(x + 3.0) / 6.0)


class NewGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


class Leaky(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return F.leaky_relu(x, self.slope)


class Clamp(nn.Module):
    def forward(self, x):
        return x.clamp(min=0)


@pytest.mark.parametrize(
    "module, name",
    [(Swish(), "silu"), (SwishOfMethods(), "silu"), (HardSwish(), "hardswish"), (NewGELU(), "gelu_tanh"),
     (Leaky(0.2), "leaky_relu(0.2)"), (Clamp(), "relu")],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_modules_of_users_that_compute_one(module, name):
    assert str(recipe(Block(module))) == whole(name)


class Scaled(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Shifted(nn.Module):
    def forward(self, x):
        return F.silu(x) + 1e-3


class Cut(nn.Module):
    def forward(self, x):
        return x.clamp(0, 500)


class InPlaceSwish(nn.Module):
    def forward(self, x):
        return x.mul_(x.sigmoid())


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


@pytest.mark.parametrize(
    "module", [Scaled(), Shifted(), Cut(), InPlaceSwish(), Learned()], ids=lambda m: type(m).__name__
)
def test_modules_of_users_that_compute_something_else(module):
    with pytest.raises(CannotRead, match=f"act is a {type(module).__name__}, a module that is not fused"):
        recipe(Block(module))


class OfAParameter(Block):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        return F.leaky_relu(self.conv1(x), self.slope)


def _with(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    "block, reason",
    [
        (Block(_with(nn.LeakyReLU(), negative_slope=torch.tensor(0.1))), "act has a tensor as its negative_slope"),
        (Block(nn.LeakyReLU(float("nan"))), "act has nan as its negative_slope"),
        (Block(_with(nn.GELU(), approximate="erf")), "act has approximate='erf', only 'none' and 'tanh'"),
        (Block(_with(nn.ReLU6(), max_val=5.0)), "act has the limits 0.0 and 5.0"),
        (Block(nn.Hardtanh(0, 6)), "act is a Hardtanh"),
        (Block(nn.ELU()), "act is a ELU"),
        (OfAParameter(), "its forward reads the attribute slope"),
        (calling(lambda x: F.leaky_relu(x, True)), "its leaky_relu has True as its negative_slope"),
        (calling(lambda x: F.gelu(x, approximate="fast")), "its gelu has approximate='fast'"),
        (calling(F.mish), "its forward calls mish"),
    ],
)
def test_reasons(block, reason):
    with pytest.raises(CannotRead, match=reason):
        recipe(block)


def test_an_activation_over_a_value_that_something_else_reads_is_not_read():
    class Twice(Block):
        def forward(self, x):
            y = self.conv1(x)
            return self.act(y) + self.conv2(y)

    with pytest.raises(CannotRead, match="act writes over a value that is used elsewhere"):
        recipe(Twice(nn.SiLU(True)))
    assert str(recipe(Twice(nn.SiLU()))) == "conv1 -> silu -> conv2+add"
    with pytest.raises(CannotRead, match="writes over a value"):
        recipe(type("Calls", (Block,), {"forward": lambda self, x: F.hardswish(x, True) + self.conv1(x)})())


def test_an_activation_before_the_add_is_a_step_of_its_own():
    class Darknet(Block):
        def forward(self, x):
            y = self.act(self.bn1(self.conv1(x)))
            return x + self.act(self.bn2(self.conv2(y)))

    assert str(recipe(Darknet(nn.LeakyReLU(0.1)))) == "conv1+bn1+leaky_relu(0.1) -> conv2+bn2+leaky_relu(0.1) -> add"


def test_an_activation_alone_and_behind_an_add_alone():
    class Alone(Block):
        def forward(self, x):
            return self.conv1(self.act(F.avg_pool2d(x, 1) if False else x) + self.act(self.conv2(x)))

    found = recipe(Alone(nn.SiLU()))
    assert str(found) == "silu -> conv2+silu -> add -> conv1"

    class Behind(Block):
        def forward(self, x):
            return self.conv1(self.act(self.act(self.conv2(x)) + self.act(x)))

    found = recipe(Behind(nn.SiLU()))
    assert str(found) == "conv2+silu -> silu -> add_silu -> conv1"
    assert [step.activation for step in found.steps] == [*[Activation("silu")] * 3, None]
    assert found.fuses


def test_batch_norm_act_of_timm():
    timm = pytest.importorskip("timm", reason="needs timm")
    from timm.layers import BatchNormAct2d

    del timm

    class Normed(Block):
        def __init__(self, act):
            super().__init__()
            self.bn1 = BatchNormAct2d(8, act_layer=act)

        def forward(self, x):
            return self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x

    for act, name in (
        (nn.SiLU, "silu"),
        (nn.LeakyReLU, "leaky_relu(0.01)"),
        (nn.Hardswish, "hardswish"),
        (nn.ReLU, "relu"),
    ):
        found = recipe(Normed(act))
        assert str(found) == f"conv1+bn1+{name} -> conv2+bn2+add"
    assert any(
        read.path == "bn1.act" and read.name == "negative_slope" for read in recipe(Normed(nn.LeakyReLU)).reads.inside
    )
    with pytest.raises(CannotRead, match="bn1 has a Mish behind it, which is not fused"):
        recipe(Normed(nn.Mish))
    odd = Normed(nn.LeakyReLU)
    odd.bn1.act.negative_slope = torch.tensor(0.5)
    with pytest.raises(CannotRead, match="bn1 has a LeakyReLU behind it that has a tensor as its negative_slope"):
        recipe(odd)


def test_runs_of_a_container():
    class Net(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.conv, self.bn, self.act, self.pool = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act, nn.MaxPool2d(2)
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            y = self.pool(self.act(self.bn(self.conv(x))))
            return self.fc(y.mean((2, 3)))

    for name, module in MODULES.items():
        plan = reader.read(Net(module)).container_plan()
        assert str(plan.runs["conv"]) == f"conv+bn+{name} -> pool" and plan.absorbed == ("bn", "act", "pool")
    plan = reader.read(Net(nn.LeakyReLU(float("inf")))).container_plan()
    assert str(plan.runs["conv"]) == "conv+bn"
