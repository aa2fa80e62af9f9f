"""The stem as a run of its container: its max-pool joins where nobody else looks; on Hopper one kernel takes both."""

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import assert_within_budget
from helpers.stem_nets import Net, prepared
from resnet_kernels import models


class SeenBeforeThePool(Net):
    def forward(self, x):
        seen = self.relu(self.bn1(self.conv1(x)))
        return self.layer1(self.maxpool(seen)), seen


class PooledTwice(Net):
    def forward(self, x):
        return self.layer1(self.maxpool(self.maxpool(self.relu(self.bn1(self.conv1(x))))))


def stem_row(model):
    return rk.explain(model).rows[0].steps


@pytest.fixture
def x():
    return torch.randn(2, 3, 24, 20)


@torch.no_grad()
def same(fused, model, x):
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    assert fused(x).stride() == model(x).stride()


def test_the_pool_is_in_the_report_and_the_numbers_are_the_same(x):
    model = prepared(Net())
    fused = rk.fuse(model)
    assert stem_row(model) == stem_row(fused) == "conv1+bn1+relu -> maxpool"
    same(fused, model, x)
    assert rk.verify(model, fused, x)
    same(rk.unfuse_(fused), model, x)


@pytest.mark.parametrize(
    "net, row",
    [
        (SeenBeforeThePool(), "conv1+bn1+relu"),
        (PooledTwice(), "conv1+bn1+relu"),
        (Net(return_indices=True), "conv1+bn1+relu"),
        (Net(kernel_size=2, padding=0, ceil_mode=True), "conv1+bn1+relu -> maxpool"),
    ],
    ids=("seen", "called twice", "indices", "another pool"),
)
def test_only_a_pool_of_its_own_and_seen_by_nobody_is_taken(net, row, x):
    model = prepared(net)
    fused = rk.fuse(model)
    assert stem_row(fused) == row
    if not net.maxpool.return_indices:
        with torch.no_grad():
            for ours, theirs in zip(fused(x), model(x)):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_pool_that_two_names_share_is_left(x):
    net = Net()
    net.other = net.maxpool
    assert stem_row(prepared(net)) == "conv1+bn1+relu"


def test_a_sequential_stem(x):
    model = prepared(Net())
    model = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, *model.layer1)
    fused = rk.fuse(model)
    assert stem_row(fused) == "0+1+relu -> 3"
    same(fused, model, x)


@pytest.mark.parametrize("name", ("conv1", "relu", "maxpool"))
def test_hooks_see_what_eager_shows_them(name, x):
    model = prepared(Net())
    fused = rk.fuse(model)
    with torch.no_grad():
        fused(x)
    seen = []
    for module in (model, fused):
        getattr(module, name).register_forward_hook(lambda m, inputs, y: seen.append((inputs[0].clone(), y.clone())))
    with pytest.warns(RuntimeWarning, match=f"a hook on {name}"):
        same(fused, model, x)
    ours, theirs = seen[0], seen[1]
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert f"a hook on {name}" in rk.explain(fused).rows[0].reason


def test_a_pool_that_is_changed_or_replaced_is_the_one_that_runs(x):
    model = prepared(Net())
    fused = rk.fuse(model)
    same(fused, model, x)
    for net in (model, fused):
        net.maxpool.kernel_size, net.maxpool.padding = 2, 0
    same(fused, model, x)
    for net in (model, fused):
        net.maxpool = nn.AvgPool2d(2)
    with pytest.warns(RuntimeWarning, match="changed after it was fused"):
        same(fused, model, x)


def test_feature_extraction_before_the_pool(x):
    utils = pytest.importorskip("torchvision.models._utils")
    model = prepared(models.resnet18())
    layers = {"relu": "a", "maxpool": "b", "layer1": "c"}
    getter = utils.IntermediateLayerGetter(model, layers)
    fused = rk.fuse(getter)
    assert stem_row(fused) == "conv1+bn1+relu"
    with torch.no_grad():
        expected = getter(x)
        for name, value in fused(x).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_training_is_eager_s_on_both_backends(x):
    pytest.importorskip("triton")
    for backend in ("auto", "triton"):
        model = prepared(Net()).train()
        fused = rk.fuse(model, backend=backend)
        for net in (model, fused):
            net(x).square().mean().backward()
        assert torch.allclose(fused.bn1.running_mean, model.bn1.running_mean, atol=1e-6)
        torch.testing.assert_close(fused.conv1.weight.grad, model.conv1.weight.grad, rtol=1e-3, atol=1e-5)


# On Hopper, as the interpreter runs it.


@torch.no_grad()
def test_the_stem_kernel_runs_both_steps(launches):
    model = prepared(Net())
    model.layer1 = nn.Sequential(model.layer1[0])
    half, x = model.half(), torch.randn(1, 3, 20, 20).half()
    fused = rk.fuse(half, backend="triton")
    assert_within_budget(fused(x), half(x), half.double()(x.double()))
    assert len(launches) == 1


@torch.no_grad()
def test_the_stem_kernel_leaves_other_stems_alone(launches):
    model = prepared(Net(kernel_size=2, padding=0))
    model.layer1 = nn.Sequential(model.layer1[0])
    half, x = model.half(), torch.randn(1, 3, 16, 16).half()
    assert_within_budget(rk.fuse(half, backend="triton")(x), half(x), half.double()(x.double()))
    assert not launches


@torch.no_grad()
def test_a_whole_recipe_begins_with_a_stem_too(launches):
    stem = prepared(Net())
    block = nn.Sequential(stem.conv1, stem.bn1, stem.relu, stem.maxpool).half()
    x = torch.randn(1, 3, 18, 14).half()
    fused = rk.fuse(block, backend="triton")
    assert_within_budget(fused(x), block(x), block.double()(x.double()))
    assert len(launches) == 1
