"""Fused models on our CPU kernels: as eager is, whatever the values, sizes, threads and processes, and after edits."""

from __future__ import annotations

import concurrent.futures
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_kernels as rk
from helpers.own_kernels import assert_like_eager, skip_unless_compiled
from helpers.small_resnet import small_resnet
from helpers.tiny import ENVIRONMENT
from resnet_kernels.kernels.cpu import convolution
from resnet_kernels.kernels.cpu.convolution import KERNELS
from resnet_kernels.models.d2l import Residual
from resnet_kernels.models.random_weights import randomise_batch_norms_

BasicBlock = rk.models.resnet_v1.BasicBlock


@pytest.fixture(autouse=True)
def _compiled(threads_as_before):
    skip_unless_compiled()


def fused(net):
    """A network with random BNs, and fused; all of its blocks have to be."""
    net = randomise_batch_norms_(net).eval()
    ours = rk.fuse(net)
    assert rk.explain(ours).fused and not rk.explain(ours).skipped
    return net, ours


def assert_runs_like_eager(net, ours, x, what=""):
    with torch.no_grad():
        assert_like_eager(ours(x), net(x), copy.deepcopy(net).double()(x.double()), what)


@pytest.mark.parametrize("spoiled", (None, "nan", "inf", "-inf", "pruned"))
def test_a_fused_block_changed_what_is_not_finite(spoiled):
    """In x, at every pixel, and in a weight, which our kernels don't take."""
    net, ours = fused(nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16)))
    x = torch.randn(120, 16, 5, 6)
    for image in range(120):
        value = (float("inf"), -float("inf"), float("nan"), 2e38)[image // 30]
        x[image, image % 16, image % 30 // 6, image % 6] = value
    with torch.no_grad():
        for weight in (net[1].conv1.weight, ours[1].conv1.weight):
            if spoiled == "pruned":
                weight[:, :, 1, 1] = 0
                weight[:8][weight[:8].abs() < 0.05] = 0
            elif spoiled is not None:
                weight[3, 5, 1, 2] = float(spoiled)
    assert spoiled in (None, "pruned") or all(convolution.pack(name, weight.detach()) is None for name in KERNELS)
    assert_runs_like_eager(net, ours, x)
    assert_runs_like_eager(net, ours, torch.randn(2, 16, 5, 6))
    if spoiled not in (None, "pruned"):
        run = lambda backend: rk.ops.conv_bias_act(x[:4], weight.detach(), padding=1, backend=backend)  # noqa: E731
        assert_like_eager(run("cpu"), run("eager"), F.conv2d(x[:4].double(), weight.double(), padding=1).relu())
