"""Plans of launches with every activation: on Triton, Hopper's links beside them, and as `auto` runs on an NVIDIA GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers import pretend
from helpers.activations import MODULES
from helpers.oracle import assert_within_budget, skip_unless_runnable
from helpers.stages import CHANNELS_LAST, FP16, bottlenecks, run
from resnet_kernels.kernels.activations import PReLU
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.runtime.gpu import multi_layer


def stage(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    """Bottlenecks, the first with a projection, whose ReLUs are another activation."""
    made, x = bottlenecks(device)
    for module in [*made.modules()]:
        if isinstance(module, rk.models.resnet_v1.Bottleneck):
            module.relu = copy.deepcopy(MODULES[name])
    made = randomise_batch_norms_(made).eval().to(device, dtype, memory_format=CHANNELS_LAST)
    return made, x.to(device, dtype, memory_format=CHANNELS_LAST)


def assert_like_eager(plain, fused, x, name):
    assert_within_budget(run(fused, x), run(plain, x), run(copy.deepcopy(plain).double(), x.double()), name)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", MODULES)
def test_on_triton(name, device, monkeypatch):
    """No link may take a layer with such an activation."""
    skip_unless_runnable("triton", device, FP16)
    chosen, original = [], multi_layer.choose

    def spy(*arguments):
        chosen.append(original(*arguments))
        return chosen[-1]

    monkeypatch.setattr(multi_layer, "choose", spy)
    plain, x = stage(name, device, FP16)
    assert_like_eager(plain, rk.fuse(plain, backend="triton"), x, name)
    assert chosen and not any(chosen)
    relu, x = bottlenecks(device)
    relu = relu.eval().to(device, FP16, memory_format=CHANNELS_LAST)
    run(rk.fuse(relu, backend="triton"), x.to(device, FP16, memory_format=CHANNELS_LAST))
    assert chosen[-1], "ReLU's layers are in links"


@pytest.mark.parametrize("name", MODULES)
def test_auto_on_nvidia(name, device, monkeypatch):
    """cuDNN's convolutions, each with one pass behind it: its fused operations end in ReLU alone."""
    skip_unless_runnable("triton", device, torch.float32)
    if device.type != "cpu":
        pytest.skip("the pretended GPU is the CPU")
    called = pretend.nvidia(monkeypatch)
    plain, x = stage(name, device)
    for options in ({}, {"freeze": True}):
        called.clear()
        assert_like_eager(plain, rk.fuse(plain, **options), x, name)
        assert set(called) == {"conv2d"}


class Learned(nn.Module):
    """Steps of every kind before a PReLU: BN + PReLU, with an add, after a bare convolution, and with one that broadcasts."""

    def __init__(self):
        super().__init__()
        self.bn0, self.bn1, self.bn2 = (nn.BatchNorm2d(16) for _ in range(3))
        self.conv1, self.conv2, self.conv3, self.side = (
            nn.Conv2d(16, 16, kernel, padding=kernel // 2) for kernel in (3, 3, 1, 1)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.acts = nn.ModuleList(nn.PReLU(number) for number in (16, 16, 1, 16))
        for act in self.acts:
            nn.init.uniform_(act.weight, -1, 2)

    def forward(self, x):
        y = self.acts[0](self.bn1(self.conv1(self.acts[3](self.bn0(x)))))
        y = self.acts[1](self.bn2(self.conv2(y)) + x)
        return self.acts[2](self.conv3(y) + self.side(self.pool(x)))


def learned(device):
    plain = randomise_batch_norms_(Learned()).eval().to(device)
    return plain, torch.randn(2, 16, 6, 5, device=device).contiguous(memory_format=CHANNELS_LAST)


def edit_slopes_(plain, fused):
    with torch.no_grad():
        for model in (plain, fused):
            for act in model.acts:
                act.weight.mul_(-1.5)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", (torch.float32, FP16), ids=str)
def test_prelus_on_triton(dtype, device):
    skip_unless_runnable("triton", device, dtype)
    plain, x = learned(device)
    plain, x = plain.to(dtype), x.to(dtype)
    fused = rk.fuse(plain, backend="triton")
    assert [row.steps for row in rk.explain(fused).fused] == [
        "bn0+acts.3 -> conv1+bn1+acts.0 -> conv2+bn2+add+acts.1 -> pool -> side -> conv3+add+acts.2"
    ]
    assert_like_eager(plain, fused, x, "prelu")
    edit_slopes_(plain, fused)
    assert_like_eager(plain, fused, x, "prelu, edited")


def test_prelus_on_nvidia(device, monkeypatch):
    """cuDNN's convolutions, each with one pass of ours behind it that ends in the PReLU; none of PyTorch's where ours can."""
    skip_unless_runnable("triton", device, torch.float32)
    if device.type != "cpu":
        pytest.skip("the pretended GPU is the CPU")
    from resnet_kernels.kernels import epilogue

    called, passes = pretend.nvidia(monkeypatch), []
    original = epilogue.launch
    monkeypatch.setattr(epilogue, "launch", lambda *a, **k: (passes.append(a[6]), original(*a, **k))[1])
    plain, x = learned(device)
    for options in ({}, {"freeze": True}):
        called.clear(), passes.clear()
        fused = rk.fuse(plain, **options)
        assert_like_eager(plain, fused, x, "prelu")
        assert set(called) == {"conv2d"}
        assert sum(isinstance(last, PReLU) for last in passes) == 2, "conv3's add broadcasts"
        edit_slopes_(plain, fused)
        assert_like_eager(plain, fused, x, "prelu, edited")


@pytest.mark.parametrize("name", ("silu", "leaky_relu(0.1)"))
def test_an_add_that_broadcasts(name, device):
    """The add and the activation follow by themselves."""

    class Broadcasts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.side = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)
            self.pool, self.act = nn.AdaptiveAvgPool2d(1), copy.deepcopy(MODULES[name])

        def forward(self, x):
            return self.act(self.bn(self.conv(x)) + self.side(self.pool(x)))

    plain = randomise_batch_norms_(Broadcasts()).eval().to(device)
    x = torch.randn(2, 16, 6, 5, device=device).contiguous(memory_format=CHANNELS_LAST)
    for backend in ("triton", "auto"):
        skip_unless_runnable("triton", device, torch.float32)
        fused = rk.fuse(plain, backend=backend)
        assert rk.explain(fused).fused
        assert_like_eager(plain, fused, x, backend)
