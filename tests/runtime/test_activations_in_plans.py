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
