"""Hooks on and around fused blocks fire, and see what they would see in eager."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.fx
from torch import nn

import resnet_kernels as rk
from helpers.small_resnet import close, small_resnet


@pytest.mark.parametrize("add_before", (True, False))
def test_hooks_fire_whether_added_before_or_after(model, x, add_before):
    mine, seen = copy.deepcopy(model), []

    def add():
        for path in ("layer1.0", "layer1.0.conv2", "layer1.1.bn3", "layer2.0.downsample", "bn1", "layer1"):
            mine.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: seen.append((path, o.clone())))

    if add_before:
        add()
    rk.fuse_(mine)
    if not add_before:
        add()
    assert not seen, "reading a model must not fire its hooks"
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="a hook on"):
        y = mine(x)
        fired = list(seen)
        seen.clear()
        close(y, rk.unfuse_(mine)(x))
    assert [path for path, _ in fired] == [path for path, _ in seen] and len(fired) == 6
    for (_, a), (_, b) in zip(fired, seen):
        close(a, b)


def test_hooks_registered_after_the_dict_of_hooks_was_replaced_fire(model, x):
    """`module._forward_hooks = OrderedDict()` is a common way of removing hooks."""
    fused, seen = rk.fuse(model), []
    with torch.no_grad():
        fused(x), fused(x)
        for path in ("layer1.0", "layer1.0.conv2", "layer1", "bn1"):
            module = fused.get_submodule(path)
            module._forward_hooks = OrderedDict()
            module.register_forward_hook(lambda m, i, o, path=path: seen.append(path))
        with pytest.warns(RuntimeWarning, match="a hook on"):
            fused(x)
    assert seen == ["bn1", "layer1.0.conv2", "layer1.0", "layer1"]


def test_a_forward_set_on_a_fused_block_runs(model):
    """Regression: a block that was verified once ran its recipe past a forward set on the instance later."""
    fused, x = rk.fuse(nn.Sequential(model.layer1, model.layer2)), torch.randn(1, 64, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            fused(x)
        fused[0][1].forward = torch.zeros_like
        close(fused(x), model.layer2(torch.zeros(1, 256, 8, 8)))


def test_a_hook_on_a_block_may_keep_its_output(model, x):
    """Regression guard: the next block writes its residual add over its input only when nobody else holds it."""
    mine = rk.fuse(model)
    kept = []
    mine.layer1[0].register_forward_hook(lambda m, i, o: kept.append(o))
    with torch.no_grad():
        mine(x)
        copies = [k.clone() for k in kept]
        mine.layer1[1](kept[0])
        assert torch.equal(kept[0], copies[0])
        close(kept[0], model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x))))) * 0 + copies[0])


def test_stage_never_writes_over_its_callers_input(model):
    fused = rk.fuse(model)
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    identity = rk.fuse(nn.Sequential(*(small_resnet(rk.models.resnet_v1.BasicBlock).layer1[:2])))
    with torch.no_grad():
        identity(x), fused.layer1(x)
    assert torch.equal(x, before)


def test_global_hooks_fire(model, x):
    fused, seen = rk.fuse(model), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        with torch.no_grad(), pytest.warns(RuntimeWarning, match="global module hook"):
            fused(x)
    finally:
        handle.remove()
    assert seen.count("Conv2d") == sum(isinstance(m, nn.Conv2d) for m in model.modules())
