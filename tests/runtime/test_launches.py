"""Blocks that run as one plan on a GPU's backends: what shares a launch, and what makes a plan anew."""

import copy

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import assert_within_budget, runnable
from helpers.stages import CHANNELS_LAST, Net, basic_blocks, bottlenecks, image, preacts, prepared, run
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.runtime.gpu import plan as gpu_plan

pytestmark = pytest.mark.skipif(
    runnable("triton", "cuda" if torch.cuda.is_available() else "cpu", torch.float32) is not None,
    reason="needs Triton",
)


@pytest.fixture
def stage(device):
    """Three bottlenecks, the first with a projection at stride 2."""
    downsample = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    blocks = [rk.models.resnet_v1.Bottleneck(16, 8, 2, downsample)]
    blocks += [rk.models.resnet_v1.Bottleneck(32, 8) for _ in range(2)]
    return randomise_batch_norms_(nn.Sequential(*blocks)).eval().to(device)


@pytest.fixture
def x(device):
    return torch.randn(2, 16, 6, 6, device=device).to(memory_format=CHANNELS_LAST)


@pytest.fixture
def plans(monkeypatch):
    """How many blocks each plan that is made holds."""
    made = []

    class Spy(gpu_plan.Plan):
        def __init__(self, modules, *rest):
            made.append(len(modules))
            super().__init__(modules, *rest)

    monkeypatch.setattr("resnet_kernels.runtime.inference.Plan", Spy)
    return made


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_stage_is_one_plan(stage, x, plans):
    fused = rk.fuse(stage, backend="triton")
    y = run(fused, x)
    assert plans == [3]
    close(y, run(stage, x))
    one_by_one = x
    for block in fused:
        one_by_one = run(block, one_by_one)
    assert torch.equal(y, one_by_one) and plans == [3, 1, 1, 1]
    run(fused, x)
    assert len(plans) == 4  # kept


def test_a_hook_keeps_its_block_out(stage, x, plans):
    fused, seen = rk.fuse(stage, backend="triton"), []
    expected = run(stage, x)
    handle = fused[1].register_forward_hook(lambda *call: seen.append(call[2]))
    close(run(fused, x), expected)
    assert plans == [1, 1, 1] and len(seen) == 1 and seen[0].shape == expected.shape
    assert [row.apart for row in rk.explain(fused)] == ["", "a hook on it has to fire", ""]
    assert "[apart from its neighbors: a hook on it has to fire]" in str(rk.explain(fused))
    handle.remove()
    handle = fused[2].bn1.register_forward_hook(lambda *call: seen.append(call[2]))
    with pytest.warns(RuntimeWarning, match="a hook on bn1 has to fire"):
        close(run(fused, x), expected)
    assert plans == [1, 1, 1, 2] and len(seen) == 2
    handle.remove()
    close(run(fused, x), expected)
    assert plans == [1, 1, 1, 2, 3]


def _set_stride(stage):
    stage[1].conv2.stride, stage[1].conv2.padding = (1, 1), (2, 2)
    stage[1].conv2.dilation = (2, 2)


def _set_eps(stage):
    stage[2].bn3.eps = 0.5


def _replace(stage):
    stage[1].conv1 = copy.deepcopy(stage[1].conv1)
    stage[1].conv1.weight.data.mul_(-1)


def _write_behind(stage):
    stage[0].bn1.running_var.data.mul_(4)


def _assign(stage):
    stage[0].bn2.weight = nn.Parameter(stage[0].bn2.weight.detach() * -1)


@pytest.mark.parametrize("change", (_set_stride, _set_eps, _replace, _write_behind, _assign), ids=lambda f: f.__name__)
def test_a_kept_plan_sees_changes(stage, x, change):
    fused = rk.fuse(stage, backend="triton")
    before = run(fused, x)
    change(fused)
    change(stage)
    y = run(fused, x)
    close(y, run(stage, x))
    assert not torch.allclose(y, before, rtol=1e-2)


def test_plans_are_of_a_shape_and_few(stage, device, plans, monkeypatch):
    monkeypatch.setattr("resnet_kernels.runtime.inference._MOST_PLANS", 3)
    fused = rk.fuse(stage, backend="triton")
    for size in (4, 5, 6, 7, 8):
        x = torch.randn(1, 16, size, size, device=device).to(memory_format=CHANNELS_LAST)
        close(run(fused, x), run(stage, x))
    assert plans == [3] * 5 and len(fused[0].__dict__["_rk_state"].plans) <= 3


def test_all_norms_of_a_plan_are_one_launch(stage, x, monkeypatch):
    from resnet_kernels.kernels import bn_scale_shift

    counts, original = [], bn_scale_shift.Layers.launch
    monkeypatch.setattr(
        bn_scale_shift.Layers, "launch", lambda layers: counts.append(len(layers.sizes)) or original(layers)
    )
    run(rk.fuse(stage, backend="triton"), x)
    assert counts == [10]


def test_norms_that_are_no_table_go_one_by_one(stage, x):
    stage[0].bn1.weight = nn.Parameter(torch.stack([stage[0].bn1.weight.detach()] * 2, 1)[:, 0])
    assert not stage[0].bn1.weight.is_contiguous()
    close(run(rk.fuse(stage, backend="triton"), x), run(stage, x))


def test_a_copy_and_a_pickle_make_plans_of_their_own(stage, x):
    fused = rk.fuse(stage, backend="triton")
    expected = run(fused, x)
    twin = copy.deepcopy(fused)
    assert not twin[0].__dict__["_rk_state"].plans
    twin[0].conv1.weight.data.zero_()
    run(twin, x)
    assert torch.equal(run(fused, x), expected)


# Chains and merged shortcuts: Hopper's kernels, in the interpreter.

EXPECTED = {
    bottlenecks: [
        "0.conv1+bn1+relu",
        "0.conv2+bn2+relu -> 0.downsample.0+downsample.1 -> 0.conv3+bn3+add+relu -> 1.conv1+bn1+relu",
        "1.conv2+bn2+relu -> 1.conv3+bn3+add+relu -> 2.conv1+bn1+relu",
        "2.conv2+bn2+relu -> 2.conv3+bn3+add+relu",
    ],
    preacts: [
        "0.preact+relu",
        "0.conv1+bn1+relu",
        "0.conv2+bn2+relu -> 0.shortcut -> 0.conv3+add -> 1.preact+relu -> 1.conv1+bn1+relu",
        "1.conv2+bn2+relu -> 1.conv3+add -> 2.preact+relu -> 2.conv1+bn1+relu",
        "2.subsample",
        "2.conv2+bn2+relu -> 2.conv3+add",
    ],
    basic_blocks: [
        "0.conv1+bn1+relu",
        "0.downsample.0+downsample.1 -> 0.conv2+bn2+add+relu",
        "1.conv1+bn1+relu",
        "1.conv2+bn2+add+relu",
    ],
}


@pytest.mark.parametrize("make", EXPECTED, ids=lambda f: f.__name__)
def test_chained_stages_are_as_accurate_as_eager(make, device, hopper, ran):
    stage, x = prepared(make, device)
    fused = rk.fuse(stage, backend="triton")
    y = run(fused, x)
    assert ran == EXPECTED[make]
    assert_within_budget(y, run(stage, x), run(copy.deepcopy(stage).double(), x.double()))
    assert y.is_contiguous(memory_format=CHANNELS_LAST)
    # Its weights are read in each call.
    for chained in (stage, fused):
        chained[1].conv2.weight.data.mul_(-1)
    assert_within_budget(run(fused, x), run(stage, x), run(copy.deepcopy(stage).double(), x.double()))


def test_a_hook_turns_the_chain_off_around_its_block(device, hopper, ran):
    stage, x = prepared(bottlenecks, device)
    fused, seen = rk.fuse(stage, backend="triton"), []
    fused[1].register_forward_hook(lambda *call: seen.append(call[2]))
    run(fused, x)
    assert ran == [
        "0.conv1+bn1+relu",
        "0.conv2+bn2+relu",
        "0.downsample.0+downsample.1 -> 0.conv3+bn3+add+relu",
        "1.conv1+bn1+relu",
        "1.conv2+bn2+relu -> 1.conv3+bn3+add+relu",
        "2.conv1+bn1+relu",
        "2.conv2+bn2+relu -> 2.conv3+bn3+add+relu",
    ]
    assert_within_budget(seen[0], run(stage[:2], x), run(copy.deepcopy(stage[:2]).double(), x.double()))


def test_a_width_that_no_chain_takes_is_merged_at_least(device, hopper, ran):
    downsample = nn.Sequential(nn.Conv2d(32, 96, 1, 2, bias=False), nn.BatchNorm2d(96))
    blocks = rk.models.resnet_v1.Bottleneck(32, 24, 2, downsample), rk.models.resnet_v1.Bottleneck(96, 24)
    stage, x = prepared(lambda device: (nn.Sequential(*blocks), torch.randn(2, 32, 6, 6, device=device)), device)
    y = run(rk.fuse(stage, backend="triton"), x)
    assert ran[2:4] == ["0.downsample.0+downsample.1 -> 0.conv3+bn3+add+relu", "1.conv1+bn1+relu"]
    assert_within_budget(y, run(stage, x), run(copy.deepcopy(stage).double(), x.double()))


@pytest.mark.parametrize("pool", (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2)), ids=("taken", "another window"))
def test_the_stem_and_its_pool_are_one_launch(pool, device, hopper, ran):
    net, x = prepared(lambda device: (Net(pool), image(device)), device)
    fused = rk.fuse(net, backend="triton")
    y = run(fused, x)
    assert ran[0] == ("conv1+bn1+relu -> maxpool" if pool.kernel_size == 3 else "conv1+bn1+relu")
    assert_within_budget(y, run(net, x), run(copy.deepcopy(net).double(), x.double()))
    if pool.kernel_size == 3:
        for each in (net, fused):
            each.maxpool.kernel_size, each.maxpool.padding = 2, 0
        ran.clear()
        assert_within_budget(run(fused, x), run(net, x), run(copy.deepcopy(net).double(), x.double()))
        assert ran[:2] == ["conv1+bn1+relu", "maxpool"]


def test_a_sequential_stem_too(device, hopper, ran):
    net = Net(nn.MaxPool2d(3, 2, 1))
    net, x = prepared(
        lambda device: (nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1), image(device)), device
    )
    y = run(rk.fuse(net, backend="triton"), x)
    assert ran[0] == "0+1+relu -> 3"
    assert_within_budget(y, run(net, x), run(copy.deepcopy(net).double(), x.double()))
