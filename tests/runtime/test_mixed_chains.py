"""Chains of mixed forwards on the CPU: blocks and runs that follow one another are one program, until an edit ends that."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_kernels as rk
from helpers.cpu_chains import assert_next_call_like_eager, result
from helpers.mixed_blocks import LinearSEBlock
from helpers.own_kernels import skip_unless_compiled
from resnet_kernels.kernels.cpu import library
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.runtime import fused_container

pytestmark = pytest.mark.filterwarnings("ignore:resnet_kernels:RuntimeWarning")


@pytest.fixture(autouse=True)
def _wherever_they_can(threads_as_before, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, skip_unless_compiled().isa)


def _conv_bn(c_in, c_out, kernel=3, stride=1, groups=1, act=nn.ReLU6):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([] if act is None else [act()]))


class Inverted(nn.Module):
    """An inverted residual block, as MobileNetV2 has it: narrow, wide and depthwise, narrow."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.adds, wide = stride == 1 and c_in == c_out, 6 * c_in
        self.conv = nn.Sequential(
            _conv_bn(c_in, wide, 1),
            _conv_bn(wide, wide, 5 if stride == 1 else 3, stride, wide),
            _conv_bn(wide, c_out, 1, act=None),
        )

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class Mobile(nn.Module):
    """A network whose head is functions: its forward is instructions."""

    def __init__(self):
        super().__init__()
        blocks = Inverted(8, 8, 1), Inverted(8, 12, 2), Inverted(12, 12, 1)
        self.features = nn.Sequential(
            _conv_bn(3, 8, stride=2), *blocks, nn.Sequential(Inverted(12, 12, 1), Inverted(12, 12, 1))
        )
        self.last = _conv_bn(12, 70, 1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(70, 10))

    def forward(self, x):
        x = self.last(self.features(x))
        return self.classifier(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))


# A stem, five blocks of three, the last convolution.
WHOLE = [17]


@pytest.fixture
def nets():
    torch.manual_seed(0)
    net = randomise_batch_norms_(Mobile()).eval()
    return net, rk.fuse(net)


@pytest.fixture
def x():
    return torch.randn(2, 3, 40, 36)


def test_the_whole_of_it_is_one_program(nets, x, programs):
    net, ours = nets
    (chain,) = ours._rk_state.plan.chains
    assert ours._rk_state.plan.instructions and len(chain.parts) == 7
    first = assert_next_call_like_eager(net, ours, x)
    assert programs == WHOLE
    for layout in (torch.contiguous_format, torch.channels_last):
        again = result(ours, x.contiguous(memory_format=layout))
        assert torch.equal(again, first)
    assert programs == WHOLE * 3
    assert rk.verify(net, ours, x)


def test_a_value_in_the_middle_that_others_read(x, programs):
    """The chain ends there, and another one begins."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (
                nn.Sequential(_conv_bn(3, 8), Inverted(8, 8, 1)),
                nn.Sequential(_conv_bn(8, 8), _conv_bn(8, 8)),
            )

        def forward(self, x):
            y = self.a(x)
            return torch.cat((self.b(y), y), 1)

    net = randomise_batch_norms_(Two()).eval()
    ours = rk.fuse(net)
    for _ in range(2):
        programs.clear()
        assert_next_call_like_eager(net, ours, x)
        assert sum(programs) == 6 and len(programs) > 1


def _other_block(model):
    torch.manual_seed(5)
    model.features[2] = Inverted(8, 12, 2).eval()


def _forward_of_a_stage(model):
    model.features[4].forward = lambda x: 2 * x


def _one_more_block(model):
    model.features[4].append(nn.ReLU())


def _one_block_in_train_mode(model):
    model.features[1].train()


def _twice(module, inputs, output):
    return 2 * output


def _subclass_of_a_stage(model):
    class Twice(type(model.features[4])):
        def forward(self, x):
            return 2 * super().forward(x)

    model.features[4].__class__ = Twice


# By name: the edit, and whether the next call still is one program.
EDITS = {
    "weight in place": (lambda m: m.features[1].conv[1][0].weight.data.mul_(2), True),
    "another stride": (lambda m: setattr(m.features[2].conv[1][0], "stride", (1, 1)), True),
    "running_var": (lambda m: m.last[1].running_var.mul_(3), True),
    "another eps": (lambda m: setattr(m.features[3].conv[2][1], "eps", 0.5), True),
    "classifier": (lambda m: m.classifier[1].weight.data.mul_(2), True),
    "limits of a ReLU6": (lambda m: setattr(m.features[1].conv[0][2], "max_val", 1.0), False),
    "another block": (_other_block, False),
    "forward of a stage": (_forward_of_a_stage, False),
    "another class of a stage": (_subclass_of_a_stage, False),
    "one more module in a stage": (_one_more_block, False),
    "a block in train mode": (_one_block_in_train_mode, False),
    "hook on a block": (lambda m: m.features[1].register_forward_hook(_twice), False),
    "hook in a block": (lambda m: m.features[3].conv[1][1].register_forward_hook(_twice), False),
    "hook on a stage": (lambda m: m.features[4].register_forward_hook(_twice), False),
    "hook on what the forward runs into": (lambda m: m.features.register_forward_hook(_twice), False),
    "NaN in a weight": (lambda m: m.features[1].conv[1][0].weight.data[0].fill_(float("nan")), False),
    "a block's add": (lambda m: setattr(m.features[1], "adds", False), False),
}


@pytest.mark.slow(unless=lambda name: name in [*EDITS][::3])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_was_not_seen(name, nets, x, programs):
    net, ours = nets
    edit, is_whole = EDITS[name]
    before = result(ours, x)
    for model in nets:
        edit(model)
    for _ in range(2):
        programs.clear()
        y = assert_next_call_like_eager(net, ours, x, name) if "train" not in name else result(ours, x)
        if "train" in name:
            assert torch.allclose(y, result(net, x), rtol=1e-4, atol=1e-5)
        assert (programs == WHOLE) == is_whole, programs
        assert not torch.equal(y, before), "the edit changes the result"


def test_a_report_says_why_instructions_do_not_run(nets, x):
    _, ours = nets
    assert "runs eager now" not in str(rk.explain(ours))
    handle = ours.features.register_forward_hook(lambda module, inputs, y: None)
    assert "runs eager now: a hook on features has to fire" in str(rk.explain(ours))
    with pytest.warns(RuntimeWarning, match="in a Mobile, a hook on features has to fire"):
        result(ours, x)
    handle.remove()
    assert "runs eager now" not in str(rk.explain(ours))
    ours.classifier.forward = lambda x: x
    assert "classifier has another forward now" in str(rk.explain(ours))


def test_a_dropout_that_drops_in_a_network_in_eval_mode(nets, x):
    """Regression: for samples of a result ("Monte Carlo dropout") dropouts alone are in train() mode; ours did nothing."""
    net, ours = nets
    before = result(ours, x)
    for model in nets:
        model.classifier[0].train()
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        eager = result(net, x)
        torch.manual_seed(seed)
        results.append(result(ours, x))
        torch.testing.assert_close(results[-1], eager, rtol=1e-4, atol=1e-5)
        assert not torch.equal(results[-1], before)
    assert not torch.equal(results[0], results[1])
    for model in nets:
        model.eval()
    assert torch.equal(result(ours, x), before)
    seen = []
    ours.classifier[0].register_forward_hook(lambda module, inputs, y: seen.append(y.shape))
    result(ours, x)
    assert seen == [(2, 70)]


def test_an_identity_has_no_mode(x, programs):
    """Users put one in place of a layer after eval()."""
    net = randomise_batch_norms_(Mobile()).eval()
    net.classifier[0] = nn.Identity()
    ours = rk.fuse(net)
    assert net.classifier[0].training
    assert_next_call_like_eager(net, ours, x)
    assert programs == WHOLE


def test_gradients_and_other_dtypes_take_their_own_way(nets, x, programs):
    net, ours = nets
    ours(x).sum().backward()
    net(x).sum().backward()
    for own, eager in zip(ours.parameters(), net.parameters()):
        assert torch.allclose(own.grad, eager.grad, rtol=1e-3, atol=1e-4)
    assert programs == []
    with torch.no_grad():
        y = copy.deepcopy(ours).double()(x.double())
    assert torch.allclose(y, copy.deepcopy(net).double()(x.double())) and programs == []


SCALE = 1.0


class Scaled(LinearSEBlock):
    """Its forward reads a flag, and a global variable."""

    flag = False

    def forward(self, x):
        y = super().forward(x)
        return -y if self.flag else y * SCALE


class Others(nn.Module):
    """Mixed forwards inside of one whose Python code runs."""

    def __init__(self):
        super().__init__()
        self.stem = _conv_bn(3, 8, stride=2)
        self.stages = nn.ModuleList((Scaled(8, 16), Scaled(16, 16, 1)))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = stage(x) + i
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def nested():
    torch.manual_seed(0)
    net = randomise_batch_norms_(Others()).eval()
    return net, rk.fuse(net)


def _another_fc(model):
    torch.manual_seed(3)
    model.stages[1].se.fc1 = nn.Linear(16, 8)


NESTED_EDITS = {
    "flag": lambda m: setattr(m.stages[0], "flag", True),
    "weight": lambda m: m.stages[1].conv2.weight.data.mul_(2),
    "weight of a linear layer": lambda m: m.stages[0].se.fc1.weight.data.mul_(2),
    "another linear layer": _another_fc,
    "hook on a block": lambda m: m.stages[0].register_forward_hook(_twice),
    "hook between runs": lambda m: m.stages[0].se.fc2.register_forward_hook(_twice),
    "hook in a run": lambda m: m.stages[1].bn1.register_forward_hook(_twice),
    "forward of a block": lambda m: setattr(m.stages[1], "forward", lambda x: 2 * x),
    "forward of a module": lambda m: setattr(m.stages[1].se, "forward", lambda x: 2 * x),
    "another block": lambda m: m.stages.__setitem__(1, nn.Identity()),
}


def test_mixed_forwards_inside_a_network_run_at_once(nested, x, monkeypatch):
    net, ours = nested
    assert all(stage._rk_state.plan.instructions for stage in ours.stages)
    first = assert_next_call_like_eager(net, ours, x)
    result(ours, x)  # the first call has packed weights, so that the second one looks at all modules again
    asked, original = [], fused_container._plain_call
    monkeypatch.setattr(fused_container, "_plain_call", lambda *a: asked.append(a[0]) or original(*a))
    for _ in range(2):
        assert torch.equal(result(ours, x), first)
    assert asked == [ours] * 2, "only the network itself asks"


@pytest.mark.parametrize("name", NESTED_EDITS)
def test_an_edit_of_a_mixed_forward_inside_a_network_was_not_seen(name, nested, x):
    net, ours = nested
    before = assert_next_call_like_eager(net, ours, x)
    for model in nested:
        NESTED_EDITS[name](model)
    for _ in range(2):
        assert not torch.equal(assert_next_call_like_eager(net, ours, x, name), before)


def test_a_global_variable_that_a_mixed_forward_reads(nested, x, monkeypatch):
    net, ours = nested
    before = assert_next_call_like_eager(net, ours, x)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert not torch.equal(assert_next_call_like_eager(net, ours, x), before)
    monkeypatch.undo()
    assert torch.equal(assert_next_call_like_eager(net, ours, x), before)


def test_autocast_and_gradients_inside_a_network(nested, x):
    net, ours = nested
    for _ in range(2):
        assert_next_call_like_eager(net, ours, x)
        with torch.autocast("cpu", torch.bfloat16):
            y, eager = result(ours, x), result(net, x)
        assert y.dtype == eager.dtype
        torch.testing.assert_close(y.float(), eager.float(), rtol=0.1, atol=0.1)
        grads = []
        for model in nested:
            model.zero_grad()
            model(x).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for own, of_eager in zip(*grads):
            torch.testing.assert_close(own, of_eager, rtol=1e-3, atol=1e-3)
