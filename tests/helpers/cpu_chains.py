"""Small networks whose blocks run as one program on the CPU, and what ran of them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_kernels as rk
from helpers.own_kernels import assert_like_eager
from resnet_kernels.kernels.cpu.program import Program
from resnet_kernels.models.random_weights import randomise_batch_norms_


@pytest.fixture
def programs(monkeypatch) -> list[int]:
    """The programs that ran: the number of layers of each."""
    seen, original = [], Program.__call__

    def spy(program, *arguments):
        seen.append(len(program.layers))
        return original(program, *arguments)

    monkeypatch.setattr(Program, "__call__", spy)
    return seen


class PreActivation(nn.Module):
    """A pre-activation unit whose first convolution has groups."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.bn1(x)))
        return self.conv2(torch.relu(self.bn2(y))) + x


@functools.cache
def _net(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "v2":
        block = rk.models.resnet_v2_block
        net: nn.Module = rk.models.ResNetV2([block("block1", 8, 2, 2), block("block2", 16, 2, 1)], num_classes=20)
    elif name == "d2l":
        net = rk.models.d2l_resnet18(3, 20, width=8, num_blocks=(1, 2))
        net(torch.randn(1, 3, 32, 32))  # it is lazy
    elif name == "grouped v2":
        net = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), PreActivation(24, 6), PreActivation(24, 3), PreActivation(24, 12)
        )
    elif name == "resnext":
        from torchvision.models import resnet

        net = resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], num_classes=20, groups=8, width_per_group=4)
    else:
        from torchvision.models import resnet

        net = resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=20)
    return randomise_batch_norms_(net).eval()


def net_and_ours(name: str = "torchvision", **options: Any) -> tuple[nn.Module, nn.Module]:
    """A network, and the same one fused."""
    net = copy.deepcopy(_net(name))
    return net, rk.fuse(net, **options)


def result(net: nn.Module, x: Tensor) -> Any:
    """What a call without gradients returns or raises."""
    try:
        with torch.no_grad():
            return net(x)
    except Exception as error:
        return error


def assert_next_call_like_eager(net: nn.Module, ours: nn.Module, x: Tensor, what: str = "") -> Any:
    """Compares values within the budget, strides, and the types of errors; returns our result."""
    eager, y = result(net, x), result(ours, x)
    if isinstance(eager, Exception) or isinstance(y, Exception):
        assert type(y) is type(eager), f"{what}: {y!r} instead of {eager!r}"
        return y
    oracle = result(copy.deepcopy(net).double(), x.double())
    leaves = lambda value: [*value.values()] if isinstance(value, dict) else [value]  # noqa: E731
    for one, of_eager, truth in zip(leaves(y), leaves(eager), leaves(oracle), strict=True):
        assert type(one) is type(of_eager) and one.stride() == of_eager.stride(), what
        assert_like_eager(one, of_eager, truth, what)
    return y


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal, NaN included."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
