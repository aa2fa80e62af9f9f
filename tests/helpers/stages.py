"""Small stages and nets for the GPU backends, and the launches of their plans."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.runtime.gpu import plan as gpu_plan

CHANNELS_LAST = torch.channels_last


def run(module, x):
    with torch.inference_mode():
        return module(x)


FP16 = torch.float16


@pytest.fixture
def ran(monkeypatch):
    """The launches of each call, by the text that profilers show."""
    seen, original = [], gpu_plan.Plan.run

    def run(plan, *rest):
        seen.extend(name for name, _ in plan.launches)
        return original(plan, *rest)

    images = gpu_plan.Plan.run_images

    def run_images(plan, *rest):
        y = images(plan, *rest)
        seen.extend(name for name, _ in plan.launches if y is not None)
        return y

    monkeypatch.setattr(gpu_plan.Plan, "run", run)
    monkeypatch.setattr(gpu_plan.Plan, "run_images", run_images)
    return seen


def bottlenecks(device):
    downsample = nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
    blocks = [rk.models.resnet_v1.Bottleneck(64, 32, 2, downsample)]
    blocks += [rk.models.resnet_v1.Bottleneck(128, 32) for _ in range(2)]
    return nn.Sequential(*blocks), torch.randn(2, 64, 8, 8, device=device)


def preacts(device):
    units = [rk.models.resnet_v2.PreactBottleneck(64, 128, 32), rk.models.resnet_v2.PreactBottleneck(128, 128, 32)]
    units.append(rk.models.resnet_v2.PreactBottleneck(128, 128, 32, stride=2))
    return nn.Sequential(*units), torch.randn(2, 64, 4, 4, device=device)


def basic_blocks(device):
    downsample = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    blocks = rk.models.resnet_v1.BasicBlock(16, 32, 2, downsample), rk.models.resnet_v1.BasicBlock(32, 32)
    return nn.Sequential(*blocks), torch.randn(2, 16, 8, 8, device=device)


def prepared(make, device):
    stage, x = make(device)
    stage = randomise_batch_norms_(stage).eval().to(device, FP16, memory_format=CHANNELS_LAST)
    return stage, x.to(FP16, memory_format=CHANNELS_LAST)


class Net(nn.Module):
    """A network's stem, and a block so that there is something to fuse behind it."""

    def __init__(self, pool):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        self.relu, self.maxpool = nn.ReLU(inplace=True), pool
        self.layer1 = rk.models.resnet_v1.BasicBlock(16, 16)

    def forward(self, x):
        return self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))


def image(device):
    return torch.randn(1, 3, 18, 20, device=device)


def d2l(device):
    blocks = rk.models.d2l.Residual(16, 16), rk.models.d2l.Residual(16, 32, use_1x1conv=True, strides=2)
    return nn.Sequential(*blocks), torch.randn(2, 16, 9, 8, device=device)
