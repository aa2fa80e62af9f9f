"""Fused models on our CPU kernels: as eager is, whatever the values and sizes, and after edits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_kernels as rk
from helpers.own_kernels import assert_like_eager, of_groups, skip_unless_compiled
from resnet_kernels.kernels.cpu import convolution, library
from resnet_kernels.kernels.cpu.program import Program
from resnet_kernels.models.d2l import Residual
from resnet_kernels.models.random_weights import randomise_batch_norms_

BasicBlock = rk.models.resnet_v1.BasicBlock


@pytest.fixture(autouse=True)
def _wherever_they_can(threads_as_before, monkeypatch):
    """Without an instruction set that is asked for, our kernels leave some convolutions to oneDNN on some processors."""
    monkeypatch.setenv(library.ISA_VARIABLE, skip_unless_compiled().isa)


@pytest.fixture
def calls_of_ours(monkeypatch):
    """The kernels of ours that ran, by name."""
    seen, original, run = [], convolution.Bound._run, Program._run

    def spy(bound, *arguments):
        seen.append(bound.name)
        return original(bound, *arguments)

    def spy_on_program(program, first, end, *arguments):
        seen.extend(layer.kernel.kind for layer in program.layers[first:end])
        run(program, first, end, *arguments)

    monkeypatch.setattr(convolution.Bound, "_run", spy)
    monkeypatch.setattr(Program, "_run", spy_on_program)
    return seen


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
    assert spoiled in (None, "pruned") or all(
        convolution.pack(name, weight.detach()) is None for name in of_groups(1, 16)
    )
    assert_runs_like_eager(net, ours, x)
    assert_runs_like_eager(net, ours, torch.randn(2, 16, 5, 6))
    if spoiled not in (None, "pruned"):
        run = lambda backend: rk.ops.conv_bias_act(x[:4], weight.detach(), padding=1, backend=backend)  # noqa: E731
        assert_like_eager(run("cpu"), run("eager"), F.conv2d(x[:4].double(), weight.double(), padding=1).relu())


def _conv_bn(c_in, c_out, kernel=3, **options):
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, **options), nn.BatchNorm2d(c_out), nn.ReLU())


@pytest.mark.slow(unless=lambda channels: channels == (1, 1))
@pytest.mark.parametrize("channels", ((1, 1), (1, 20), (16, 1), (17, 33)), ids=str)
def test_a_small_size_was_not_as_eager(channels, calls_of_ours):
    """No images, single pixels, one channel, one output channel."""
    layers = (
        _conv_bn(*channels, padding=1),
        _conv_bn(*channels, 1),
        _conv_bn(*channels, padding=1, stride=2),
        nn.Sequential(_conv_bn(*channels, padding=1), BasicBlock(channels[1], channels[1])),
    )
    for net, ours in map(fused, layers):
        for module in (*net.modules(), *ours.modules()):
            if isinstance(module, nn.BatchNorm2d):
                module.bias.data += 2  # few outputs are what a cancellation leaves of larger sums
        oracle = copy.deepcopy(net).double()
        for n in (0, 1, 3):
            for size in ((1, 1), (1, 9), (5, 6)):
                # Judged together: in a single number eager may be lucky.
                images = [torch.randn(n, channels[0], *size) for _ in range(12)]
                images[::2] = [x.contiguous(memory_format=torch.channels_last) for x in images[::2]]
                with torch.no_grad():
                    results = [(ours(x), net(x), oracle(x.double())) for x in images]
                assert_like_eager(*map(torch.cat, zip(*results)), f"{net} on {n} images of {size}")
    assert len(calls_of_ours) > 100


@pytest.mark.parametrize("block", ("Sequential", "Residual"))
def test_a_bias_without_bn_was_kept(block, calls_of_ours):
    net, bias_of = _with_plain_bias(block)
    ours, x = rk.fuse(net), torch.randn(2, 16, 12, 12)
    with torch.no_grad():
        before = net(x)
        assert_runs_like_eager(net, ours, x)
        for bias in (bias_of(net).bias, bias_of(ours).bias):
            bias += 1
            bias[3] = -5
        assert not torch.equal(net(x), before)
        assert_runs_like_eager(net, ours, x, "edited in place")
        old = bias_of(ours).bias
        for conv in (bias_of(net), bias_of(ours)):
            conv.bias = nn.Parameter(conv.bias * 2)
        old.fill_(float("nan"))
        old.untyped_storage().resize_(0)
        assert_runs_like_eager(net, ours, x, "another bias")
    assert calls_of_ours


@pytest.mark.parametrize("block", ("Sequential", "Residual"))
def test_a_frozen_model_read_the_users_bias(block, calls_of_ours):
    net, bias_of = _with_plain_bias(block)
    ours, x = rk.fuse(net, freeze=True), torch.randn(2, 16, 12, 12)
    with torch.no_grad():
        assert_runs_like_eager(net, ours, x)
        before, bias = ours(x), bias_of(ours).bias
        bias.data.fill_(float("nan"))
        assert torch.equal(ours(x), before)
        bias.untyped_storage().resize_(0)
        assert torch.equal(ours(x), before)
    assert calls_of_ours


def _with_plain_bias(block):
    """A block, and the function that finds its convolution without a BN."""
    if block == "Residual":
        return randomise_batch_norms_(Residual(16, 24, True)).eval(), lambda net: net.conv3
    return nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()).eval(), lambda net: net[0]


@pytest.mark.parametrize("last", (nn.Conv2d(12, 6, 3, groups=2), nn.Tanh()))
def test_another_run_of_a_container_ran_in_the_place_of_one(last):
    """Two runs on images of one shape, in a container that is no chain as a whole."""
    net = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Tanh(), nn.Conv2d(4, 12, 3, padding=1), nn.ReLU(), last
    ).eval()
    ours, x = rk.fuse(net), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        assert_runs_like_eager(net, ours, x)


def test_a_run_behind_code_that_sees_layouts_had_its_own_layout():
    net = nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU()
    ).eval()  # fmt: skip
    ours, x = rk.fuse(net), torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        assert ours(x.clone()).stride() == net(x.clone()).stride()


def test_a_pool_that_was_replaced_ran_on():
    net = rk.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5).eval()
    ours, x = rk.fuse(net), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for pool in (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 2), nn.MaxPool2d(3, 1, 1)):
            net.maxpool, ours.maxpool = pool, copy.deepcopy(pool)
            torch.testing.assert_close(ours(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", (1, 2, 8))
def test_few_classes_were_no_part_of_a_chain(threads, calls_of_ours, threads_as_before):
    net = rk.models.d2l_resnet18(1, 10, width=16, num_blocks=(1, 1)).eval()
    ours, x = rk.fuse(net), torch.randn(1, 1, 64, 64)
    torch.set_num_threads(threads)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), net(x), rtol=1e-4, atol=1e-5)
        assert "average_pool" in calls_of_ours
