"""Pruned convolutions: the weight was cut, as torch-pruning's users do, and `in_channels` and `out_channels` were not."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.profiler import profile

import resnet_kernels as rk
from helpers.oracle import skip_unless_runnable
from helpers.own_kernels import is_fused_convolution
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.models.resnet_v1 import BasicBlock, Bottleneck


def halve(tensor, dim=0):
    kept = tensor.detach()[::2] if dim == 0 else tensor.detach()[:, ::2]
    return nn.Parameter(kept.clone()) if isinstance(tensor, nn.Parameter) else kept.clone()


def prune_(net):
    """Halves all channels except the image's and the last layer's; no attribute but the tensors is changed."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            if module is not net[-1]:
                module.weight = halve(module.weight)
                module.bias = None if module.bias is None else halve(module.bias)
            if module is not net[0]:
                module.weight = halve(module.weight, 1)
        elif isinstance(module, nn.BatchNorm2d):
            for name in ("weight", "bias", "running_mean", "running_var"):
                setattr(module, name, halve(getattr(module, name)))


def network(block):
    stem = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    return randomise_batch_norms_(nn.Sequential(*stem, block(), block(), nn.Conv2d(16, 4, 1))).eval()


# Each with the number of its convolutions.
BLOCKS = {"basic": (lambda: BasicBlock(16, 16), 2), "bottleneck": (lambda: Bottleneck(16, 4), 3)}


@pytest.mark.slow(unless=lambda backend, when, block: block == "basic" or backend == "auto")
@pytest.mark.parametrize("backend", ("auto", "triton"))
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("when", ("before fusing", "after fusing", "after a call"))
def test_a_pruned_block_ran_eager_without_a_word(backend, when, block, device):
    if backend == "triton":
        skip_unless_runnable("triton", device, torch.float32)
    make, convolutions = BLOCKS[block]
    net, x = network(make).to(device), torch.randn(2, 3, 48, 48, device=device)
    if backend == "triton" and device.type == "cpu":
        x = x[:, :, :9, :9]
    pruned = copy.deepcopy(net)
    prune_(pruned)
    fused = rk.fuse(pruned if when == "before fusing" else net, backend=backend)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        if when == "after a call":
            torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)
        if when != "before fusing":
            prune_(fused)
        for _ in range(2):
            with profile() as profiled:
                y = fused(x)
            torch.testing.assert_close(y, pruned(x), rtol=1e-4, atol=1e-4)
    if backend == "auto" and device.type == "cpu":
        calls = sum(e.count for e in profiled.key_averages() if is_fused_convolution(e.key))
        assert calls == 1 + 2 * convolutions
