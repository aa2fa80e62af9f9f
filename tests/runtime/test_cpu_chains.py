"""Chains on the CPU: which there are, and that the next call sees every edit that would make eager do something else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import resnet_kernels as rk
from helpers.cpu_chains import assert_next_call_like_eager, net_and_ours, result, same
from helpers.own_kernels import skip_unless_compiled
from resnet_kernels.kernels.cpu import library
from resnet_kernels.kernels.cpu.program import Program
from resnet_kernels.models.random_weights import randomise_batch_norms_

# Edits that end a chain are said to; and CSR tensors are in beta.
pytestmark = pytest.mark.filterwarnings("ignore:resnet_kernels:RuntimeWarning", "ignore:Sparse CSR:UserWarning")

# Layers of the small torchvision network as one program, with the global average and the linear layer; and without.
WHOLE, HEADLESS = [16], [14]
# Of the others.
D2L, V2, V2_HEADLESS, RESNEXT = [10], [19], [16], [22]


@pytest.fixture(autouse=True)
def _wherever_they_can(threads_as_before, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, skip_unless_compiled().isa)


@pytest.fixture
def x():
    return torch.randn(2, 3, 40, 40)


def _members(model):
    return [chain.members for chain in model._rk_state.plan.chains]


# ---- which chains there are


def test_small_networks_run_as_one_program_from_the_first_call_on(programs, x):
    for name, layers in (("torchvision", WHOLE), ("d2l", D2L), ("v2", V2), ("resnext", RESNEXT)):
        net, ours = net_and_ours(name)
        assert len(_members(ours)) == 1
        programs.clear()
        first = assert_next_call_like_eager(net, ours, x, name)
        assert programs == layers, name
        for _ in range(2):
            assert torch.equal(result(ours, x), first)
        assert programs == layers * 3
        with torch.inference_mode():
            assert torch.equal(ours(x), first)


@pytest.mark.slow
def test_chains_of_models_of_others(programs):
    timm, models = pytest.importorskip("timm"), pytest.importorskip("torchvision.models")
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    stages = ("layer1", "layer2", "layer3", "layer4")
    cases = {
        "torchvision": (models.resnet18(), [("conv1", *stages, "avgpool", "fc")]),
        "v2": (rk.models.resnet_v2_50(), [("conv1", "block1", "block2", "block3", "block4", "postnorm", "logits")]),
        "resnext": (models.resnext50_32x4d(), [("conv1", *stages, "avgpool", "fc")]),
        "timm resnext": (timm.create_model("resnext50_32x4d"), [("conv1", *stages)]),
        "timm": (timm.create_model("resnet18"), [("conv1", *stages)]),
        "timm d": (timm.create_model("resnet50d"), [("conv1",), stages]),
        "detection": (
            resnet_fpn_backbone(backbone_name="resnet18", weights=None),
            [("conv1", "layer1"), ("layer2",), ("layer3",), ("layer4",)],
        ),
    }
    x = torch.randn(2, 3, 64, 64)
    for what, (net, members) in cases.items():
        net.eval()
        ours = rk.fuse(net)
        assert _members(ours.body if what == "detection" else ours) == members, what
        programs.clear()
        first = assert_next_call_like_eager(net, ours, x, what)
        again = result(ours, x)
        pairs = zip(first.values(), again.values()) if isinstance(first, dict) else [(first, again)]
        assert all(torch.equal(a, b) for a, b in pairs)
        assert len(programs) == 2 * len(members), what


# ---- edits


class _Seven(Tensor):
    """Its linear layers return sevens."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        y = super().__torch_function__(function, types, arguments, options or {})
        return torch.full_like(y.as_subclass(Tensor), 7) if function is F.linear else y


class _TwiceSequential(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def _twice(x):
    return 2 * x


def _set(path, value):
    """The edit that sets an attribute, to a value or to a function of the value before."""

    def edit(model):
        owner, _, name = path.rpartition(".")
        owner = model.get_submodule(owner)
        setattr(owner, name, value(getattr(owner, name)) if callable(value) else value)

    return edit


def _parameter(make):
    return lambda old: nn.Parameter(make(old.detach()))


class _Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def _become_another_block(model):
    model.layer1[0].__class__ = _Twice


def _buffer_instead(model):
    weight = model.fc.weight.detach()
    del model.fc.weight
    model.fc.register_buffer("weight", weight * 2)


def _double_all(model):
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def _assign_all(model):
    model.load_state_dict({name: value.clone() * 1.5 for name, value in model.state_dict().items()}, assign=True)


def _no_statistics(model):
    model.layer3[0].bn1.running_mean = model.layer3[0].bn1.running_var = None


def _fewer_channels(model):
    block = model.layer1[0]
    block.conv1.weight = nn.Parameter(block.conv1.weight.detach()[:48])
    block.conv2.weight = nn.Parameter(block.conv2.weight.detach()[:, :48])
    block.bn1 = nn.BatchNorm2d(48).eval()


class _Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


# By name: the edit, and the programs that the next call runs; None for any but WHOLE.
EDITS = {
    "weight in place": (lambda m: m.layer1[0].conv1.weight.mul_(2), WHOLE),
    "weight.data": (lambda m: m.layer4[0].conv2.weight.data.mul_(2), WHOLE),
    "weight by NumPy": (lambda m: m.conv1.weight.detach().numpy().__imul__(2), WHOLE),
    "running_mean": (lambda m: m.layer2[1].bn2.running_mean.add_(1), WHOLE),
    "running_var": (lambda m: m.bn1.running_var.data.mul_(3), WHOLE),
    "BN's weight": (lambda m: m.layer2[0].downsample[1].weight.mul_(2), WHOLE),
    "eps": (_set("layer3.0.bn2.eps", 0.5), WHOLE),
    "no statistics": (_no_statistics, None),
    "BN without weight": (_set("bn1.weight", None), WHOLE),
    "fc.weight in place": (lambda m: m.fc.weight.data.mul_(2), WHOLE),
    "fc.bias in place": (lambda m: m.fc.bias.data.add_(2), WHOLE),
    "fc.weight replaced": (_set("fc.weight", _parameter(lambda w: w * 2)), WHOLE),
    "fc.weight a buffer": (_buffer_instead, WHOLE),
    "fc.weight transposed": (_set("fc.weight", _parameter(lambda w: w.t().contiguous().t())), WHOLE),
    "fc.weight negated": (_set("fc.weight", _parameter(torch._neg_view)), WHOLE),
    "fc.bias negated": (_set("fc.bias", _parameter(torch._neg_view)), WHOLE),
    "fc.weight NaN": (lambda m: m.fc.weight[0, 0].fill_(float("nan")), HEADLESS),
    "fc.weight elsewhere": (lambda m: m.fc.to("meta"), HEADLESS),
    "fc.bias None": (_set("fc.bias", None), WHOLE),
    "fc.bias of one": (_set("fc.bias", _parameter(lambda b: b[:1] + 1)), HEADLESS),
    "fc.bias too long": (_set("fc.bias", _parameter(lambda b: torch.cat((b, b)))), HEADLESS),
    "fc double": (lambda m: m.fc.double(), HEADLESS),
    "fc another": (_set("fc", lambda old: _filled(nn.Linear(512, 37))), WHOLE),
    "fc for other channels": (_set("fc", lambda old: nn.Linear(100, 7)), HEADLESS),
    "fc Identity": (_set("fc", lambda old: nn.Identity()), HEADLESS),
    "fc None": (_set("fc", None), HEADLESS),
    "fc.forward": (_set("fc.forward", lambda old: _twice), HEADLESS),
    "fc a Sequential": (_set("fc", lambda old: nn.Sequential(nn.Flatten(), old)), HEADLESS),
    "avgpool.output_size": (_set("avgpool.output_size", 2), HEADLESS),
    "avgpool.forward": (_set("avgpool.forward", lambda old: lambda x: 2 * x.mean((2, 3), True)), HEADLESS),
    "maxpool.stride": (_set("maxpool.stride", 1), WHOLE),
    "maxpool.kernel_size, a list": (lambda m: m.maxpool.kernel_size.__setitem__(0, 2), None),
    "maxpool.ceil_mode": (_set("maxpool.ceil_mode", True), None),
    "maxpool another": (_set("maxpool", lambda old: nn.AvgPool2d(2)), None),
    "a block's stride": (lambda m: _strides(m.layer2[0], (1, 1)), WHOLE),
    "a stride that fits nothing": (_set("layer2.1.conv1.stride", (2, 2)), None),
    "padding": (_set("conv1.padding", (1, 1)), WHOLE),
    "padding_mode": (_set("conv1.padding_mode", "circular"), None),
    "a bias": (_set("layer1.0.conv1.bias", lambda old: nn.Parameter(torch.ones(64))), WHOLE),
    "a block Identity": (lambda m: m.layer2.__setitem__(1, nn.Identity()), None),
    "a block less": (lambda m: m.layer2.__delitem__(1), None),
    "a block appended": (lambda m: m.layer4.append(nn.Sigmoid()), None),
    "a stage around the same blocks": (lambda m: setattr(m, "layer1", nn.Sequential(*m.layer1, nn.Sigmoid())), None),
    "a module in the middle of a stage": (lambda m: m.layer2.add_module("x", nn.Sigmoid()), None),
    "a stage in a Sequential": (lambda m: setattr(m, "layer1", nn.Sequential(m.layer1, nn.Tanh())), None),
    "a block of another class": (_become_another_block, None),
    "a stage of another class": (lambda m: setattr(m.layer1, "__class__", _TwiceSequential), None),
    "a stage copied": (_set("layer3", copy.deepcopy), WHOLE),
    "a stage's forward": (_set("layer1.forward", lambda old: _twice), None),
    "a block's forward": (_set("layer1.0.forward", lambda old: _twice), None),
    "a compiled block": (_set("layer1.0._compiled_call_impl", lambda old: _twice), None),
    "a compiled stage": (_set("layer1._compiled_call_impl", lambda old: _twice), None),
    "conv's forward": (_set("layer2.1.conv1.forward", lambda old: _twice), None),
    "another ReLU": (_set("layer1.0.relu", lambda old: nn.SiLU()), None),
    "fewer channels": (_fewer_channels, WHOLE),
    "load_state_dict": (_double_all, WHOLE),
    "load_state_dict, assigned": (_assign_all, WHOLE),
    "train a BN": (lambda m: m.layer1[0].bn1.train(), None),
    "train a block": (lambda m: m.layer1[0].train(), None),
    "train the head": (lambda m: m.fc.train(), WHOLE),
    "train": (lambda m: m.train(), []),
    "a block in bf16": (lambda m: m.layer1[0].bfloat16(), None),
    "pruned": (lambda m: prune.l1_unstructured(m.layer1[0].conv1, "weight", 0.5), None),
    "the head pruned": (lambda m: prune.l1_unstructured(m.fc, "weight", 0.5), None),
    "parametrized": (lambda m: parametrize.register_parametrization(m.layer1[0].conv1, "weight", _Halved()), None),
    "the head parametrized": (lambda m: parametrize.register_parametrization(m.fc, "weight", _Halved()), HEADLESS),
}


# Edits after which the values are as before.
SAME = ("fc.weight transposed", "a stage copied", "train the head")


def _filled(linear):
    generator = torch.Generator().manual_seed(1)
    for parameter in linear.parameters():
        parameter.data.uniform_(-1, 1, generator=generator)
    return linear


def _strides(block, stride):
    block.conv1.stride = block.downsample[0].stride = stride


@pytest.mark.slow(unless=lambda edit: edit in [*EDITS][::3])
@pytest.mark.parametrize("edit", EDITS, ids=[name.replace(" ", "_") for name in EDITS])
def test_the_next_call_sees_an_edit(edit, programs, x):
    change, expected = EDITS[edit]
    net, ours = net_and_ours()
    if "list" in edit:
        net.maxpool.kernel_size = [3, 3]
        ours = rk.fuse(net)
    with torch.no_grad():
        before = ours(x)
        for model in (net, ours):
            change(model)
    programs.clear()
    y = assert_next_call_like_eager(net, ours, x, edit)
    assert programs == expected if expected is not None else programs != WHOLE, edit
    again = result(ours, x)
    assert type(again) is type(y) and (isinstance(y, Exception) or edit == "train" or same(again, y)), edit
    assert isinstance(y, Exception) or edit in SAME or not torch.equal(y, before)


@pytest.mark.parametrize("name", ("weight", "bias"))
def test_a_linear_layers_tensor_has_rules_of_its_own(name, programs, x):
    net, ours = net_and_ours()
    kinds = [lambda old: old.as_subclass(_Seven)] + [Tensor.to_sparse_csr] * (name == "weight")
    for kind in kinds:
        for model in (net, ours):
            setattr(model.fc, name, nn.Parameter(kind(getattr(model.fc, name).detach().as_subclass(Tensor).clone())))
        programs.clear()
        torch.testing.assert_close(result(ours, x), result(net, x), rtol=1e-4, atol=1e-4)
        assert programs == HEADLESS
        for model in (net, ours):
            setattr(model.fc, name, nn.Parameter(torch.ones(20, 512) if name == "weight" else torch.ones(20)))
    assert_next_call_like_eager(net, ours, x)


def test_the_next_call_sees_an_edit_of_a_preactivation(programs, x):
    net, ours = net_and_ours("v2")
    for change in (
        lambda m: m.block1[0].preact.bias.data.add_(1),
        lambda m: m.block2[1].preact.running_var.mul_(3),
        lambda m: m.block2[0].shortcut.bias.data.add_(1),
        lambda m: setattr(m.block1[1].preact, "eps", 0.5),
    ):
        before = result(ours, x)
        with torch.no_grad():
            change(net), change(ours)
        programs.clear()
        assert not torch.equal(assert_next_call_like_eager(net, ours, x), before)
        assert programs == V2


def _without_bias(model):
    model.logits.weight.data.mul_(2)
    model.logits.bias = None


def _another(path, make):
    def edit(model):
        torch.manual_seed(7)
        model.register_module(path, make().eval())

    return edit


# How each makes the next call run. The forward itself computes a ReLU and a mean between these modules.
HEAD_EDITS = {
    "weight": (lambda m: m.logits.weight.data.mul_(2), V2),
    "bias": (lambda m: m.logits.bias.data.add_(1), V2),
    "no bias": (_without_bias, V2),
    "gamma": (lambda m: m.postnorm.weight.data.mul_(-1), V2),
    "beta": (lambda m: m.postnorm.bias.data.sub_(1), V2),
    "mean": (lambda m: m.postnorm.running_mean.add_(1), V2),
    "var": (lambda m: m.postnorm.running_var.mul_(3), V2),
    "eps": (lambda m: setattr(m.postnorm, "eps", 0.5), V2),
    "all below zero": (lambda m: m.postnorm.bias.data.fill_(-1e4), V2),
    "nan": (lambda m: m.postnorm.bias.data.__setitem__(3, float("nan")), V2),
    "inf": (lambda m: m.logits.weight.data.__setitem__((3, 0), float("inf")), V2_HEADLESS),
    "another BN": (_another("postnorm", lambda: randomise_batch_norms_(nn.BatchNorm2d(64))), V2),
    "another convolution": (_another("logits", lambda: nn.Conv2d(64, 20, 1)), V2),
    "more classes": (_another("logits", lambda: nn.Conv2d(64, 33, 1)), V2),
    "3x3": (_another("logits", lambda: nn.Conv2d(64, 20, 3, padding=1)), V2_HEADLESS),
    "padding": (_another("logits", lambda: nn.Conv2d(64, 20, 1, padding=1)), V2_HEADLESS),
    "stride": (_another("logits", lambda: nn.Conv2d(64, 20, 1, stride=2)), V2_HEADLESS),
    "groups": (_another("logits", lambda: nn.Conv2d(64, 20, 1, groups=4)), V2_HEADLESS),
    "GroupNorm": (_another("postnorm", lambda: nn.GroupNorm(4, 64)), V2_HEADLESS),
    "fewer channels": (_another("postnorm", lambda: nn.BatchNorm2d(32)), V2_HEADLESS),
    "BN's forward": (lambda m: setattr(m.postnorm, "forward", torch.sigmoid), V2_HEADLESS),
    "convolution's forward": (lambda m: setattr(m.logits, "forward", lambda x: x * 2), V2_HEADLESS),
    "parametrized": (lambda m: parametrize.register_parametrization(m.logits, "weight", _Halved()), V2_HEADLESS),
    "bf16": (lambda m: m.logits.bfloat16(), V2_HEADLESS),
    "BN in bf16": (lambda m: m.postnorm.bfloat16(), V2_HEADLESS),
    "BN in fp64": (lambda m: m.postnorm.double(), V2_HEADLESS),
}


@pytest.mark.parametrize("edit", HEAD_EDITS, ids=[name.replace(" ", "_") for name in HEAD_EDITS])
def test_the_next_call_sees_an_edit_of_a_preactivation_nets_head(edit, programs, x):
    change, expected = HEAD_EDITS[edit]
    net, ours = net_and_ours("v2")
    before = result(ours, x)
    with torch.no_grad():
        change(net), change(ours)
    programs.clear()
    y = assert_next_call_like_eager(net, ours, x, edit)
    assert programs == expected
    assert isinstance(y, Exception) or not torch.equal(y, before)


def test_batch_statistics_of_a_preactivation_nets_head_are_pytorchs(programs, x):
    net, ours = net_and_ours("v2")
    for model in (net, ours):
        model.postnorm.train()
    torch.testing.assert_close(result(ours, x), result(net, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.postnorm.running_mean, net.postnorm.running_mean)
    assert programs == V2_HEADLESS


@pytest.mark.parametrize("path", ("postnorm", "logits"))
def test_a_hook_of_a_preactivation_nets_head_fires_on_what_eager_has_there(path, programs, x):
    net, ours = net_and_ours("v2")
    first = result(ours, x)
    seen = {}
    for model in (net, ours):
        values = seen[model] = []
        handle = model.get_submodule(path).register_forward_hook(
            lambda module, arguments, y, values=values: values.extend(v.clone() for v in (*arguments, y))
        )
        programs.clear()
        torch.testing.assert_close(result(model, x), first, rtol=1e-4, atol=1e-4)
        handle.remove()
    assert len(seen[net]) == len(seen[ours]) == 2 and programs != V2
    for one, of_eager in zip(seen[ours], seen[net]):
        assert one.stride() == of_eager.stride()
        torch.testing.assert_close(one, of_eager, rtol=1e-3, atol=1e-3)
    programs.clear()
    assert torch.equal(result(ours, x), first) and programs == V2


class _Head(nn.Module):
    """A block, and what heads are made of."""

    def __init__(self):
        super().__init__()
        self.block, self.bn = rk.models.resnet_v1.BasicBlock(8, 8), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 5, 1)


def _twice_read(m, x):
    y = F.relu(m.bn(m.block(x))).mean((2, 3), keepdim=True)
    return torch.flatten(m.conv(y), 1) + y.flatten(1)[:, :5]


ENDS = {
    "method": (True, lambda m, x: m.conv(F.relu(m.bn(m.block(x))).mean((2, 3), keepdim=True)).flatten(1)),
    "function": (
        True,
        lambda m, x: torch.flatten(m.conv(torch.mean(F.relu(m.bn(m.block(x))), [-1, -2], True)), start_dim=1),
    ),
    "named": (
        True,
        lambda m, x: m.conv(torch.relu(m.bn(m.block(x))).mean(dim=(3, 2), keepdim=True)).flatten(start_dim=1),
    ),
    "height alone": (False, lambda m, x: m.conv(F.relu(m.bn(m.block(x))).mean((2,), keepdim=True)).flatten(1)),
    "channels": (
        False,
        lambda m, x: m.conv(F.relu(m.bn(m.block(x))).mean((1, 3), keepdim=True).expand(-1, 8, -1, -1)).flatten(1),
    ),
    "no ReLU": (False, lambda m, x: m.conv(m.bn(m.block(x)).mean((2, 3), keepdim=True)).flatten(1)),
    "another activation": (False, lambda m, x: m.conv(F.elu(m.bn(m.block(x))).mean((2, 3), keepdim=True)).flatten(1)),
    "in place": (
        False,
        lambda m, x: m.conv(F.relu(m.bn(m.block(x)), inplace=True).mean((2, 3), keepdim=True)).flatten(1),
    ),
    "sum": (False, lambda m, x: m.conv(F.relu(m.bn(m.block(x))).sum((2, 3), keepdim=True)).flatten(1)),
    "maximum": (False, lambda m, x: m.conv(F.relu(m.bn(m.block(x))).amax((2, 3), keepdim=True)).flatten(1)),
    "a dtype": (
        False,
        lambda m, x: m.conv(F.relu(m.bn(m.block(x))).mean((2, 3), keepdim=True, dtype=x.dtype)).flatten(1),
    ),
    "flat from the batch on": (
        False,
        lambda m, x: m.conv(F.relu(m.bn(m.block(x))).mean((2, 3), keepdim=True)).flatten(0),
    ),
    "not flat": (False, lambda m, x: m.conv(F.relu(m.bn(m.block(x))).mean((2, 3), keepdim=True))),
    "read twice": (False, _twice_read),
}


@pytest.mark.parametrize("name", ENDS, ids=[name.replace(" ", "_") for name in ENDS])
def test_a_head_is_what_computes_as_slims_does(name):
    is_head, forward = ENDS[name]
    net = randomise_batch_norms_(type("Net", (_Head,), {"forward": forward})()).eval()
    ours, x = rk.fuse(net), torch.randn(2, 8, 9, 9)
    heads = [chain.head is not None for chain in ours._rk_state.plan.chains] if hasattr(ours, "_rk_state") else []
    assert any(heads) == is_head
    for _ in range(2):
        assert_next_call_like_eager(net, ours, x, name)


def _regroup(model):
    conv = model.layer2[0].conv2
    conv.groups, conv.weight = 4, nn.Parameter(torch.cat((conv.weight, conv.weight), 1))


def test_the_next_call_sees_an_edit_of_a_grouped_convolution(programs, x):
    net, ours = net_and_ours("resnext")
    for change in (
        lambda m: m.layer1[0].conv2.weight.data.mul_(2),
        lambda m: m.layer2[1].bn2.running_var.mul_(3),
        _set("layer4.0.conv2.weight", _parameter(lambda w: w * 2)),
        _regroup,
        _set("layer2.1.conv2.padding", (2, 2)),
    ):
        before = result(ours, x)
        with torch.no_grad():
            change(net), change(ours)
        programs.clear()
        y = assert_next_call_like_eager(net, ours, x)
        assert isinstance(y, Exception) or (programs == RESNEXT and not torch.equal(y, before))


def test_the_input_of_grouped_convolutions_is_activated_on_the_way(monkeypatch, x):
    """A BN and ReLU before a grouped convolution are no layers of their own."""
    net, ours = net_and_ours("grouped v2")
    layers = []
    original = Program.__init__
    monkeypatch.setattr(
        Program, "__init__", lambda self, made, *rest: layers.append(made) or original(self, made, *rest)
    )
    assert_next_call_like_eager(net, ours, x)
    kinds = [(layer.kernel.kind, bool(layer.kernel.arguments.pre_scale)) for made in layers for layer in made]
    assert kinds.count(("grouped", True)) == 3 and not any(kind == "elementwise" for kind, _ in kinds)


def test_the_next_call_sees_a_module_beside_nested_blocks(x):
    net, ours = net_and_ours("d2l")
    assert_next_call_like_eager(net, ours, x)
    for model in (net, ours):
        model[1].append(nn.Sigmoid())
    assert_next_call_like_eager(net, ours, x)


# ---- hooks

HOOKED = (
    "conv1", "maxpool", "layer1", "layer2.0", "layer2.1.conv2", "layer2.0.downsample", "layer4.0.relu", "avgpool", "fc", None
)  # fmt: skip


@pytest.mark.parametrize("kind", ("forward", "forward_pre"))
def test_a_hook_fires_on_what_eager_has_there(kind, programs, x):
    net, ours = net_and_ours()
    first = result(ours, x)
    for path in HOOKED:
        seen = {}
        for model in (net, ours):
            values = seen[model] = []

            def hook(module, arguments, *output, values=values):
                values.extend(value.clone() for value in (*arguments, *output))

            if path is None:
                handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(hook)
            else:
                handle = getattr(model.get_submodule(path), f"register_{kind}_hook")(hook)
            programs.clear()
            y = result(model, x)
            handle.remove()
        assert len(seen[net]) == len(seen[ours]) > 0 and programs != WHOLE, path
        for one, of_eager in zip(seen[ours], seen[net]):
            assert one.stride() == of_eager.stride(), path
            torch.testing.assert_close(one, of_eager, rtol=1e-3, atol=1e-3, equal_nan=True)
        torch.testing.assert_close(y, first, rtol=1e-4, atol=1e-4)
        programs.clear()
        assert torch.equal(result(ours, x), first) and programs == WHOLE, path


def test_a_hook_changes_the_result(x):
    for path in ("layer1", "avgpool", "fc", "layer3.0.bn1", "maxpool"):
        net, ours = net_and_ours()
        before = result(ours, x)
        for model in (net, ours):
            model.get_submodule(path).register_forward_hook(lambda module, arguments, y: 2 * y)
        assert not torch.equal(assert_next_call_like_eager(net, ours, x, path), before)


# ---- modes, dtypes, copies


def test_modes_and_dtypes_and_back(programs, x):
    net, ours = net_and_ours()
    first = assert_next_call_like_eager(net, ours, x)
    double = net.double()(x.double())
    torch.testing.assert_close(ours.double()(x.double()), double)
    net.float(), ours.float()
    programs.clear()
    assert torch.equal(result(ours, x), first) and programs == WHOLE
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        programs.clear()
        y, eager = ours(x), net(x)
        assert not programs and y.dtype == eager.dtype == torch.bfloat16
        torch.testing.assert_close(y, eager, rtol=0.05, atol=0.05)
    with torch.no_grad():
        copied = copy.deepcopy(ours).bfloat16()
        assert copied(x.bfloat16()).dtype == torch.bfloat16 and not programs
        ours.train(), ours.eval()
        assert torch.equal(ours(x), first) and programs == WHOLE


def test_gradients_are_eagers(programs, x):
    net, ours = net_and_ours()
    before = result(ours, x)
    programs.clear()
    gradients = []
    for model in (net, ours):
        images = x.clone().requires_grad_()
        (model(images) * torch.linspace(-1, 1, 40).view(2, 20)).sum().backward()
        gradients.append([images.grad, model.fc.weight.grad, model.layer1[0].conv1.weight.grad])
    assert not programs
    for ours_, eagers in zip(gradients[1], gradients[0]):
        torch.testing.assert_close(ours_, eagers, rtol=1e-3, atol=1e-3)
    assert torch.equal(result(ours, x.requires_grad_()), before) and programs == WHOLE
    assert not result(ours, x).requires_grad


def test_copies_run_on_their_own_weights(programs, x):
    net, ours = net_and_ours()
    first = result(ours, x)
    for what, make in (
        ("deepcopy", copy.deepcopy),
        ("pickle", lambda model: pickle.loads(pickle.dumps(model))),
        ("fused again", lambda model: rk.fuse(_unfused(copy.deepcopy(model)))),
    ):
        copied = make(ours)
        programs.clear()
        assert torch.equal(result(copied, x), first) and programs == WHOLE, what
        for model in (copied, edited := copy.deepcopy(net)):
            model.fc.bias.data.add_(1), model.conv1.weight.data.mul_(2)
        assert_next_call_like_eager(edited, copied, x, what)
        assert torch.equal(result(ours, x), first), what
    shallow = copy.copy(ours)
    for model in (net, shallow):
        model.layer1[0].conv1.weight.data.mul_(2)
    assert_next_call_like_eager(net, shallow, x)
    assert_next_call_like_eager(net, ours, x)
    replica = ours._replicate_for_data_parallel()
    for name, child in ours.named_children():
        replica._modules[name] = child
    replica.fc = nn.Linear(512, 20)
    other = copy.deepcopy(net)
    other.fc = replica.fc
    for _ in range(2):
        assert_next_call_like_eager(net, ours, x)
        assert_next_call_like_eager(other, replica, x)


def _unfused(model):
    rk.unfuse_(model)
    return model


def test_other_parameters_by_functional_call(programs, x):
    net, ours = net_and_ours()
    before = result(ours, x)
    for names in (["fc.weight"], ["layer1.0.conv1.weight", "bn1.running_mean"], None):
        others = {k: v.detach() * 1.5 for k, v in ours.state_dict().items() if names is None or k in names}
        with torch.no_grad():
            y = torch.func.functional_call(ours, others, x)
            eager = torch.func.functional_call(net, others, x)
        torch.testing.assert_close(y, eager, rtol=1e-4, atol=1e-4)
        assert torch.equal(result(ours, x), before)


# ---- freeze=True


def test_a_frozen_chain_renews_its_copies_and_sees_the_rest(programs, x):
    net, ours = net_and_ours(freeze=True)
    first = assert_next_call_like_eager(net, ours, x)
    assert programs == WHOLE
    for model in (net, ours):
        model.fc.weight.data.mul_(2), model.layer1[0].conv1.weight.data.mul_(2)
    assert torch.equal(result(ours, x), first)
    rk.refresh(ours)
    assert not torch.equal(assert_next_call_like_eager(net, ours, x, "refresh"), first)
    for what, renew in (
        ("train", lambda m: m.train().eval()),
        ("load", lambda m: m.load_state_dict(m.state_dict())),
        ("to", lambda m: m.double().float()),
    ):
        for model in (net, ours):
            model.fc.bias.data.add_(1), model.layer3[0].bn1.bias.data.add_(1)
            renew(model)
        programs.clear()
        assert_next_call_like_eager(net, ours, x, what)
        assert programs == WHOLE, what
    fired = []
    handle = ours.layer2[1].conv1.register_forward_hook(lambda *_: fired.append(1))
    assert_next_call_like_eager(net, ours, x, "hook")
    handle.remove()
    assert fired
    for change in (
        _set("maxpool.stride", 1),
        _set("fc", lambda old: _filled(nn.Linear(512, 7))),
        _set("fc.bias", lambda old: nn.Parameter(old.detach() + 1)),
        lambda m: m.layer2[1].conv1.train(),
        lambda m: m.layer4.append(nn.Sigmoid()),
    ):
        for model in (net, ours):
            change(model)
        assert_next_call_like_eager(net, ours, x)
