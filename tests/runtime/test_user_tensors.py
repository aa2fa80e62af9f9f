"""Tensors and settings that the user edits: seen by the next call, and never touched by ours."""

import numpy as np
import pytest
import torch
from torch import nn

import resnet_kernels as rk


def small_net(c_in=64, c_out=64, kernel=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, 1, kernel // 2), nn.BatchNorm2d(c_out), nn.ReLU()).eval()


def warm(net, x):
    fused = rk.fuse(net, backend="cpu")
    with torch.no_grad():
        fused(x)
        fused(x)
    return fused


@torch.no_grad()
def assert_same(net, fused, x):
    torch.testing.assert_close(fused(x), net(x), atol=1e-4, rtol=1e-4)


# Weights as they come: contiguous, channels_last, and with the filters innermost, as in TensorFlow's kernels.
LAYOUTS = [
    lambda w: w,
    lambda w: w.contiguous(memory_format=torch.channels_last),
    lambda w: w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 64, 3), (40, 96, 1), (96, 24, 1)])
def test_a_filter_zeroed_through_data(shape, layout):
    c_out, c_in, kernel = shape
    net = small_net(c_in, c_out, kernel)
    net[0].weight = nn.Parameter(layout(net[0].weight.detach()))
    x = torch.randn(1, c_in, 8, 8)
    fused = warm(net, x)
    for i in range(c_out):
        kept = net[0].weight[i].clone()
        for model in (net, fused):
            model[0].weight.data[i] = 0
        assert_same(net, fused, x)
        for model in (net, fused):
            model[0].weight.data[i] = kept
    assert_same(net, fused, x)


def test_one_tap_zeroed_through_data():
    net, x = small_net(), torch.randn(1, 64, 8, 8)
    fused = warm(net, x)
    for i in range(9):
        for model in (net, fused):
            model[0].weight.data[:, :, i // 3, i % 3] = 0
        assert_same(net, fused, x)


def test_a_single_element_of_a_small_weight():
    net, x = small_net(3, 8), torch.randn(1, 3, 8, 8)
    fused = warm(net, x)
    for model in (net, fused):
        model[0].weight.data.view(-1)[101] = 9
    assert_same(net, fused, x)


def test_a_plain_tensor_in_the_place_of_the_weight():
    net, x = small_net(), torch.randn(1, 64, 8, 8)
    weight = net[0].weight.detach()
    del net[0].weight
    net[0].weight = weight
    fused = warm(net, x)
    for model in (net, fused):
        model[0].weight = model[0].weight * 2  # another object
    assert_same(net, fused, x)
    for model in (net, fused):
        model[0].weight.data[5] = 0
    assert_same(net, fused, x)
    for model in (net, fused):
        model[0].weight = nn.Parameter(model[0].weight.detach() * 3)
    assert_same(net, fused, x)


def test_a_plain_tensor_that_hides_the_parameter():
    net, x = small_net(), torch.randn(1, 64, 8, 8)
    fused = warm(net, x)
    for model in (net, fused):
        model[0].__dict__["weight"] = model[0].weight.detach() * 2
    assert_same(net, fused, x)


def test_an_expanded_weight():
    net, x = small_net(), torch.randn(1, 64, 8, 8)
    fused = warm(net, x)
    # A copy of the model would have a weight that is not expanded.
    fused[0].weight = net[0].weight = nn.Parameter(torch.randn(1, 64, 3, 3).expand(64, -1, -1, -1))
    assert_same(net, fused, x)
    net[0].weight.data[0, 7] = 1
    assert_same(net, fused, x)


def test_data_at_the_same_address_in_another_order():
    net, x = small_net(), torch.randn(1, 64, 8, 8)
    fused = warm(net, x)
    for model in (net, fused):
        model[0].weight.data = model[0].weight.data.transpose(2, 3)
    assert_same(net, fused, x)


def test_storages_stay_resizable():
    net, x = small_net(), torch.randn(1, 64, 8, 8)
    fused = warm(net, x)
    for name in ("weight", "bias"):
        for layer in fused[:2]:
            storage = getattr(layer, name).untyped_storage()
            values, size = getattr(layer, name).detach().clone(), storage.nbytes()
            storage.resize_(0)
            storage.resize_(size)
            with torch.no_grad():
                getattr(layer, name).copy_(values)
    assert fused[0].weight.untyped_storage().resizable()
    assert_same(net, fused, x)


def test_a_freed_storage_is_not_read():
    net, x = small_net(256, 256), torch.randn(1, 256, 8, 8)
    fused = warm(net, x)
    (pack,) = fused._rk_state.copies.packs.values()
    storage = fused[0].weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    assert not pack.is_unchanged(fused[0], fused[1])
    storage.resize_(16)
    assert not pack.is_unchanged(fused[0], fused[1])
    storage.resize_(size)


NUMBERS = [1, [1], (1,), [1, 1], np.int64(1), (np.int64(1), 1), torch.tensor(1), 2, [2, 1]]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", NUMBERS, ids=str)
def test_settings_that_are_no_pair(name, value, when):
    net, x = small_net(3, 8), torch.randn(1, 3, 12, 12)
    if when == "before":
        setattr(net[0], name, value)
    fused = warm(net, x)
    for model in (net, fused):
        setattr(model[0], name, value)
    assert_same(net, fused, x)


def test_a_list_of_settings_edited_in_place():
    net, x = small_net(3, 8), torch.randn(1, 3, 12, 12)
    net[0].stride = [1, 1]
    fused = warm(net, x)
    for model in (net, fused):
        model[0].stride[0] = 2
    assert_same(net, fused, x)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [3, 4])
def test_a_padding_by_name_set_after_construction(padding, kernel):
    net, x = small_net(3, 8, kernel), torch.randn(1, 3, 12, 12)
    fused = warm(net, x)
    for model in (net, fused):
        model[0].padding, model[0].dilation = padding, 2
    assert_same(net, fused, x)


@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", 0), ("stride", 1.5), ("stride", (1, 1, 1)), ("padding", -1), ("padding", "foo"), ("dilation", 0)],
)
def test_settings_that_eager_rejects(name, value):
    net, x = small_net(3, 8), torch.randn(1, 3, 12, 12)
    fused = warm(net, x)
    for model in (net, fused):
        setattr(model[0], name, value)
    with torch.no_grad(), pytest.raises((RuntimeError, TypeError, ValueError)) as eager:
        net(x)
    with torch.no_grad(), pytest.raises(eager.type):
        fused(x)


def test_a_statistic_that_is_expanded_in_place_is_seen():
    """`.data` takes another view of the same memory: address and size stay, and only the strides tell."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    net[1].running_mean.uniform_(-1, 1)
    fused, x = rk.fuse(net), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        fused(x)
        for model in (net, fused):
            model[1].running_mean.data = model[1].running_mean.data[:1].expand(8)
        torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-5)
