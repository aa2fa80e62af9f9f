"""Nets that begin with a stem, and the launches of Hopper's stem kernel."""

from __future__ import annotations

import pytest
from torch import nn

from resnet_kernels import models
from resnet_kernels.models.random_weights import randomise_batch_norms_


class Net(nn.Module):
    """A stem and a block; subclasses change forward."""

    def __init__(self, **pool):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(**dict(kernel_size=3, stride=2, padding=1) | pool)
        self.layer1 = nn.Sequential(*(models.resnet_v1.BasicBlock(16, 16) for _ in range(2)))

    def forward(self, x):
        return self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))


def prepared(net):
    return randomise_batch_norms_(net).eval()


@pytest.fixture
def launches(monkeypatch):
    """The calls of the stem kernel, on a CPU that passes for Hopper."""
    pytest.importorskip("triton")
    from resnet_kernels.kernels import target
    from resnet_kernels.kernels.sm90 import stem

    calls, launch = [], stem.launch
    monkeypatch.setattr(target, "is_hopper", lambda device: True)
    monkeypatch.setattr(stem, "launch", lambda *args, **kwargs: calls.append(args) or launch(*args, **kwargs))
    return calls
