"""What reading finds in blocks: as their authors wrote them, whatever their names; and why it gives up."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_kernels import models
from resnet_kernels.fusion.blocks import fuse_block_
from resnet_kernels.graph import fusible, reader
from resnet_kernels.graph.recipe import CannotRead


def recipe(module):
    return str(reader.read(module).recipe())


class Block(nn.Module):
    """A block with everything in it; subclasses change forward."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def variant(function, **attributes):
    """Block with another forward."""
    block = type("Variant", (Block,), {"forward": function})()
    for name, value in attributes.items():
        setattr(block, name, value)
    return block


def _adds_in_place_what_is_read_later(self, x):
    kept = out = self.conv1(x)
    out += x
    return self.conv2(out) + kept


def _adds_to_its_input_in_place(self, x):
    x += x
    return self.conv1(x)


def test_recipes_of_the_zoo():
    net = models.resnet50()
    assert recipe(net.layer1[0]) == (
        "conv1+bn1+relu -> conv2+bn2+relu -> downsample.0+downsample.1 -> conv3+bn3+add+relu"
    )
    assert recipe(net.layer1[1]) == "conv1+bn1+relu -> conv2+bn2+relu -> conv3+bn3+add+relu"
    assert recipe(models.resnet18().layer2[0]) == "conv1+bn1+relu -> downsample.0+downsample.1 -> conv2+bn2+add+relu"
    d2l = models.d2l_resnet18()
    assert recipe(d2l[0]) == "0+1+relu -> 3"
    assert recipe(d2l[2][0]) == "conv1+bn1+relu -> conv3 -> conv2+bn2+add+relu"


@pytest.mark.parametrize(
    "forward, expected",
    [
        (Block.forward, "conv1+bn1+relu -> conv2+bn2+add+relu"),
        (lambda self, x: torch.relu(x + self.bn1(self.conv1(x))), "conv1+bn1+add+relu"),
        (lambda self, x: self.bn1(self.conv1(x)).add_(x).relu_(), "conv1+bn1+add+relu"),
        (lambda self, x: torch.add(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))), x),
         "conv1+bn1+relu -> conv2+bn2+add"),
        (lambda self, x: self.relu(self.conv1(x)), "conv1+relu"),
        (lambda self, x: self.conv2(F.relu(self.bn1(x))) + x, "bn1+relu -> conv2+add"),
        (lambda self, x: self.conv1(F.relu(self.bn1(x) + self.relu(x))), "relu -> bn1+add+relu -> conv1"),
        (lambda self, x: self.conv1(x) + self.conv1(x), "conv1 -> conv1+add"),
        # A value with two readers is never swallowed.
        (lambda self, x: (lambda y: F.relu(self.bn1(y)) + y)(self.conv1(x)), "conv1 -> bn1+relu -> add"),
        (lambda self, x: (lambda y: y + y)(self.bn1(self.conv1(x))), "conv1+bn1 -> add"),
    ],
)  # fmt: skip
def test_forms_of_forward(forward, expected):
    module = variant(forward)
    assert recipe(module) == expected
    module.eval()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-1, 1), m.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 8, 6, 6)
    fused = fuse_block_(copy.deepcopy(module))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "module, reason",
    [
        (variant(lambda self, x: F.relu(self.bn1(self.conv1(x))) * 2), "calls mul"),
        (variant(lambda self, x: self.conv1(x) if x.sum() > 0 else x), "can't be traced"),
        (variant(lambda self, x: self.relu(self.conv1(x)), relu=nn.Sigmoid()), "relu is a Sigmoid"),
        (variant(Block.forward, bn1=nn.GroupNorm(2, 8)), "bn1 is a GroupNorm, a norm that is not fused"),
        (variant(Block.forward, bn1=nn.BatchNorm2d(8, track_running_stats=False)), "track_running_stats=False"),
        (variant(Block.forward, conv1=nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), "padding_mode='reflect'"),
        (variant(Block.forward, conv1=nn.Conv3d(8, 8, 3)), "conv1 is a Conv3d, only Conv2d is fused"),
        (variant(Block.forward, conv1=nn.LazyConv2d(8, 3)), "conv1 is lazy and not materialized"),
        (variant(lambda self, x: F.dropout(self.conv1(x), 0.5)), "calls dropout"),
        (variant(lambda self, x, y: self.conv1(x) + y), "more than one argument"),
        (variant(lambda self, *xs: self.conv1(xs[0])), "no positional argument"),
        (variant(lambda self, x: (self.conv1(x), x)), "more than one tensor"),
        (variant(lambda self, x: self.conv1(x) + 1), "calls add"),
        (variant(lambda self, x: F.relu(self.bn1(x) + x)), "no convolution of its own"),
        (variant(lambda self, x: torch.add(self.conv1(x), x, alpha=2)), "other arguments than two tensors"),
        (variant(lambda self, x: self.conv1(x).add_(x, alpha=2)), "other arguments than two tensors"),
        (variant(lambda self, x: setattr(self, "kept", x) or self.conv1(x)), "calls setattr"),
        (variant(lambda self, x: self.conv1(F.relu_(x)) + x), "writes over a value that is used elsewhere"),
        (variant(_adds_in_place_what_is_read_later), "writes over a value that is used elsewhere"),
        (variant(_adds_to_its_input_in_place), "writes over a value that is used elsewhere"),
        (variant(lambda self, x: self.conv1(F.relu(x, True)) + x), "writes over a value that is used elsewhere"),
    ],
)
def test_reasons(module, reason):
    with pytest.raises(CannotRead, match=reason):
        recipe(module)


def test_an_inplace_relu_on_the_blocks_input_is_not_read():
    block = variant(lambda self, x: self.conv1(self.relu(x)) + x, relu=nn.ReLU(inplace=True))
    with pytest.raises(CannotRead, match="writes over a value"):
        recipe(block)


def test_parametrized_and_patched_children_are_not_read():
    block = Block()
    nn.utils.parametrizations.weight_norm(block.conv1)
    with pytest.raises(CannotRead, match="conv1"):
        recipe(block)
    block = Block()
    block.bn1.forward = lambda x: x
    with pytest.raises(CannotRead, match="bn1 has a forward of its own"):
        recipe(block)


def test_reading_leaves_no_trace_on_the_module():
    class Counts(Block):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    block = Counts()
    before = dict(block.__dict__)
    with pytest.raises(CannotRead, match="sets attributes"):
        recipe(block)
    assert block.__dict__ == before and block.calls == 0


def test_training_only_branches_are_not_what_is_read():
    class Branch(Block):
        def forward(self, x):
            return self.relu(self.conv1(x)) if not self.training else self.conv2(x)

    assert recipe(Branch().train()) == "conv1+relu"


def test_dead_values_are_freed_where_they_are_used_last():
    steps = reader.read(models.resnet50().layer1[0]).recipe().steps
    assert [step.frees for step in steps] == [(), (1,), (0,), (2, 3)]
    assert [step.overwrites_residual for step in steps] == [False, False, False, True]


def test_container_plan_takes_only_runs_that_nobody_else_sees():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
            self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            x = self.relu(self.bn1(self.conv1(x)))
            y = self.conv2(x)
            z = self.bn2(y)
            z = z + y.mean()  # a second reader of conv2's output
            z = self.bn3(self.conv3(z))
            return self.head(F.relu(z).mean((2, 3)))

    plan = reader.read(Net()).container_plan()
    assert {name: str(run) for name, run in plan.runs.items()} == {"conv1": "conv1+bn1+relu", "conv3": "conv3+bn3"}
    assert plan.absorbed == ("bn1", "relu", "bn3")


def test_container_plan_leaves_a_relu_alone_that_is_called_twice():
    class Net(Block):
        def forward(self, x):
            return torch.sigmoid(self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))))

    plan = reader.read(Net()).container_plan()
    assert [str(run) for run in plan.runs.values()] == ["conv1+bn1", "conv2+bn2"]


def test_a_pool_named_add_is_no_addition():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.add, self.relu = nn.Conv2d(2, 2, 1), nn.AvgPool2d(2), nn.ReLU()

        def forward(self, x):
            return self.relu(self.add(self.conv(x)))

    assert recipe(Net()) == "conv -> add -> relu"


def test_a_residual_that_is_added_twice_is_written_over_the_second_time_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3, self.conv4 = (nn.Conv2d(4, 4, 1) for _ in range(4))

        def forward(self, x):
            y = F.relu(self.conv1(x))
            z = F.relu(self.conv3(F.relu(self.conv2(y))) + y)
            return F.relu(self.conv4(z) + y)

    steps = reader.read(Net()).recipe().steps
    assert [step.overwrites_residual for step in steps] == [False, False, False, True]
    net, x = Net().eval(), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(fuse_block_(copy.deepcopy(net))(x), net(x))


def test_a_class_of_pytorchs_name_is_told_by_its_module():
    """Regression: "is a Conv2d, only Conv2d is fused" was said of torch.ao's reference of a quantized convolution."""
    conv = type("Conv2d", (nn.Conv2d,), {"__module__": "a.library"})(3, 3, 1)
    assert fusible.why_not_conv(conv) == "is a a.library.Conv2d, only Conv2d is fused"
    assert fusible.why_not_conv(nn.Conv2d(3, 3, 1)) is None
