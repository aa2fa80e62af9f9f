"""Squeeze-and-excitation: in which forms it is read as steps of a recipe, and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_kernels as rk
from helpers.cpu_chains import assert_next_call_like_eager
from helpers.own_kernels import skip_unless_compiled
from helpers.small_resnet import convolutions_that_ran
from resnet_kernels.graph.recipe import CallStep, Recipe
from resnet_kernels.kernels.cpu import library
from resnet_kernels.models.random_weights import randomise_batch_norms_

pytestmark = pytest.mark.filterwarnings("ignore:resnet_kernels:RuntimeWarning")


class OwnSigmoid(nn.Module):
    """As timm has it."""

    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.sigmoid_() if self.inplace else x.sigmoid()


class OwnHardSigmoid(nn.Module):
    def forward(self, x):
        return F.relu6(x + 3.0) / 6.0


class Gate(nn.Module):
    """x * sigmoid(conv(relu(conv(mean(x))))), with all that may be written differently as a function."""

    def __init__(self, channels, mean, sigmoid, product, modules=()):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 6, 1), nn.Conv2d(6, channels, 1)
        self.mean, self.sigmoid, self.product = mean, sigmoid, product
        self.more = nn.Sequential(*modules)

    def forward(self, x):
        return self.product(x, self.sigmoid(self.expand(self.more(F.relu(self.reduce(self.mean(x)))))))


class Block(nn.Module):
    def __init__(self, *gate, channels=20, inner=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.se = Gate(channels, *gate) if inner is None else inner
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(self.se(F.silu(self.bn1(self.conv1(x)))))) + x)


def _mean(x):
    return x.mean((2, 3), keepdim=True)


def _product(x, gate):
    return x * gate


def _sigmoid(x):
    return torch.sigmoid(x)


# By name: average, sigmoid, product, more modules; the steps of it that are no convolutions.
FORMS = {
    "method": (_mean, _sigmoid, _product),
    "function": (lambda x: torch.mean(x, dim=[2, 3], keepdim=True), F.sigmoid, lambda x, s: torch.mul(x, s)),
    "negative axes": (lambda x: torch.mean(x, (-1, -2), True), lambda s: s.sigmoid(), lambda x, s: x.mul(s)),
    "pool": (nn.AdaptiveAvgPool2d(1), nn.Sigmoid(), lambda x, s: s * x),
    "pool of a pair": (nn.AdaptiveAvgPool2d((1, 1)), nn.Hardsigmoid(), _product),
    "pool as a function": (lambda x: F.adaptive_avg_pool2d(x, 1), F.hardsigmoid, lambda x, s: s.mul(x)),
    "in place": (_mean, lambda s: s.sigmoid_(), _product),
    "a sigmoid of somebody's own": (_mean, OwnSigmoid(), _product),
    "a hard sigmoid of somebody's own": (_mean, OwnHardSigmoid(), _product),
    "no sigmoid": (_mean, F.relu, _product),
    "bare": (_mean, nn.Identity(), _product),
    "BN and dropout": (_mean, _sigmoid, _product, (nn.Dropout(0.5), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.GELU())),
}


def _is_read(net):
    plan = rk.fuse(net)._rk_state.plan
    return isinstance(plan, Recipe) and any("mul" in step.what for step in plan.steps if isinstance(step, CallStep))


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_steps(form, programs, monkeypatch, threads_as_before):
    monkeypatch.setenv(library.ISA_VARIABLE, skip_unless_compiled().isa)
    torch.manual_seed(0)
    net = randomise_batch_norms_(Block(*FORMS[form])).eval()
    assert _is_read(net)
    ours = rk.fuse(net)
    for shape in ((1, 20, 9, 7), (3, 20, 14, 14), (2, 20, 1, 1)):
        programs.clear()
        x = torch.randn(shape)
        for layout in (torch.contiguous_format, torch.channels_last):
            assert_next_call_like_eager(net, ours, x.contiguous(memory_format=layout), form)
        assert len(programs) == 2, "one program a call"
    count = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    assert len(convolutions_that_ran(ours, x)) == count == rk.explain(net).convolutions
    assert rk.verify(net, ours, x)


class Excited(nn.Module):
    """SE-ResNet's block: the gate is followed by the add, and by what `last` is."""

    def __init__(self, form, last, c_in=20):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.se, self.last = Gate(20, *form), last
        self.down = None if c_in == 20 else nn.Sequential(nn.Conv2d(c_in, 20, 1, bias=False), nn.BatchNorm2d(20))

    def forward(self, x):
        y = self.se(self.bn1(self.conv1(x)))
        return self.last(y + (x if self.down is None else self.down(x)))


@pytest.mark.parametrize("last", ("relu", "silu", "identity"))
@pytest.mark.parametrize("form", ("method", "pool of a pair", "bare"))
def test_an_add_behind_a_gate_is_a_part_of_it(form, last, programs, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, skip_unless_compiled().isa)
    torch.manual_seed(0)
    act = {"relu": nn.ReLU(), "silu": nn.SiLU(), "identity": nn.Identity()}[last]
    net = nn.Sequential(*(Excited(FORMS[form], act, c_in) for c_in in (12, 20, 20)))
    net = randomise_batch_norms_(net).eval()
    ours = rk.fuse(net)
    for shape in ((1, 12, 9, 7), (4, 12, 30, 28)):
        x = torch.randn(shape)
        for layout in (torch.contiguous_format, torch.channels_last):
            given = x.contiguous(memory_format=layout)
            before = given.clone()
            assert_next_call_like_eager(net, ours, given, form)
            assert torch.equal(given, before)
    programs_made = [p for p in ours._rk_state.copies.compiled.values() if p.runs]
    labels = [layer.label for layer in programs_made[-1]._program.layers]
    structures, layers = programs_made[-1]._program._layers, programs_made[-1]._program.layers
    written = {layer.out.value: i for i, layer in enumerate(layers)}
    for structure, layer in zip(structures, layers):
        assert layer.gates is None or structure.needs > written[layer.gates.value], "threads have to wait for its gates"
    # The first block's shortcut is made after its gate, so that its convolution adds.
    ends = [label for label in labels if "mul" in label or "add" in label]
    assert [("mul" in label, "add" in label) for label in ends[-3:]] == [(False, True), (True, True), (True, True)], (
        labels
    )


class _TwoAverages(Gate):
    def forward(self, x):
        return x * torch.sigmoid(self.expand(_mean(x)[:, :6] + F.relu(self.reduce(_mean(x)))))


class _ReadTwice(Gate):
    def forward(self, x):
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(_mean(x)))))
        return x * gate + gate


class _AverageOfOthers(Gate):
    def forward(self, x):
        average = _mean(x)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(average)))) + average


class _InPlace(Gate):
    def forward(self, x):
        x *= torch.sigmoid(self.expand(F.relu(self.reduce(_mean(x)))))
        return x


class _Spatial(nn.Module):
    """Attention over pixels, as CBAM has it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        return x * torch.sigmoid(self.conv(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)))


class _Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 20), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3))).view(x.shape[0], -1, 1, 1)


class _Efficient(nn.Module):
    """A convolution over channels, as ECA has it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1))
        return x * y.sigmoid().view(x.shape[0], -1, 1, 1)


FORM = 20, _mean, _sigmoid, _product
OTHERS = {
    "two averages": lambda: _TwoAverages(*FORM),
    "a gate that others read": lambda: _ReadTwice(*FORM),
    "an average that others read": lambda: _AverageOfOthers(*FORM),
    "written over its input": lambda: _InPlace(*FORM),
    "over pixels": _Spatial,
    "linear layers": _Linear,
    "over channels": _Efficient,
    "a largest value": lambda: Gate(20, nn.AdaptiveMaxPool2d(1), *FORM[2:]),
    "four averages": lambda: Gate(20, nn.AdaptiveAvgPool2d(2), nn.Upsample(scale_factor=7), _product),
    "a mean over a row": lambda: Gate(20, lambda x: x.mean(3, keepdim=True), *FORM[2:]),
    "a softmax": lambda: Gate(20, _mean, lambda s: F.softmax(s, 1), _product),
    "a sum": lambda: Gate(20, _mean, _sigmoid, lambda x, s: torch.add(x, s)),
    "a sigmoid before the end": lambda: Gate(20, _mean, _sigmoid, _product, [nn.Sigmoid()]),
    "a constant": lambda: Gate(20, _mean, _sigmoid, lambda x, s: x * 2 * s * 3),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_left_to_pytorch(other):
    torch.manual_seed(0)
    net = randomise_batch_norms_(Block(inner=OTHERS[other]())).eval()
    ours, x = rk.fuse(net), torch.randn(2, 20, 14, 14)
    assert other == "a constant" or not _is_read(net)
    for _ in range(2):
        assert_next_call_like_eager(net, ours, x, other)


def test_a_gate_of_one_channel_broadcasts(programs):
    """It is read, but no kernel of ours has it: the steps run one by one."""
    skip_unless_compiled()
    net = randomise_batch_norms_(Block(*FORM[1:])).eval()
    net.se.expand = nn.Conv2d(6, 1, 1)
    ours = rk.fuse(net)
    for _ in range(2):
        assert_next_call_like_eager(net, ours, torch.randn(2, 20, 8, 8))
    assert _is_read(net) and programs == []


def _set_size(net):
    net.se.mean.output_size = 2
    net.se.sigmoid = nn.Upsample(scale_factor=4)


def _hook(net):
    net.se.register_forward_hook(lambda module, inputs, y: 2 * y)


EDITS = {
    "the pool's size": _set_size,
    "a hook on it": _hook,
    "a hook on its sigmoid": lambda net: net.se.sigmoid.register_forward_hook(lambda m, inputs, y: 2 * y),
    "a weight": lambda net: net.se.reduce.weight.data.mul_(2),
    "a bias": lambda net: net.se.expand.bias.data.add_(2),
    "another sigmoid": lambda net: setattr(net.se, "sigmoid", nn.Hardsigmoid()),
    "its forward": lambda net: setattr(net.se, "forward", lambda x: 2 * x),
    "another module": lambda net: setattr(net, "se", nn.Identity()),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_was_not_seen(edit):
    torch.manual_seed(0)
    net = randomise_batch_norms_(Block(nn.AdaptiveAvgPool2d(1), nn.Sigmoid(), _product)).eval()
    ours, x = rk.fuse(net), torch.randn(2, 20, 8, 8)
    before = assert_next_call_like_eager(net, ours, x)
    for model in (net, ours):
        EDITS[edit](model)
    for _ in range(2):
        assert not torch.equal(assert_next_call_like_eager(net, ours, x, edit), before)


@pytest.mark.parametrize("form", ("method", "pool of a pair", "bare"))
def test_gradients_are_eagers(form):
    """In train() mode, too."""
    torch.manual_seed(0)
    net = randomise_batch_norms_(Block(*FORMS[form])).eval()
    for training in (False, True):
        ours, eager, x = rk.fuse(net), copy.deepcopy(net), torch.randn(3, 20, 8, 8)
        grads = []
        for model in (ours, eager):
            given = x.clone().requires_grad_()
            model.train(training)(given).square().sum().backward()
            grads.append([given.grad, *(parameter.grad for parameter in model.parameters())])
        for own, of_eager in zip(*grads):
            torch.testing.assert_close(own, of_eager, rtol=1e-3, atol=1e-3)
        for own, of_eager in zip(ours.buffers(), eager.buffers()):
            torch.testing.assert_close(own, of_eager)


def test_a_squeeze_and_excitation_alone_is_no_block():
    """Its convolutions are too small to gain anything, but next to others."""
    net = nn.Sequential(nn.AvgPool2d(2), Gate(*FORM), nn.Upsample(scale_factor=2)).eval()
    report = rk.explain(net)
    assert not report.fused and "too small" in str(report)
