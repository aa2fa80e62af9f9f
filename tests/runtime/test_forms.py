"""`auto` without a table: which form each convolution takes, that all of them are right, and that nothing goes stale."""

import copy

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers import pretend
from helpers.forms import cheaper, forms_of, prepared
from helpers.oracle import assert_within_budget, skip_unless_runnable
from helpers.stages import CHANNELS_LAST, FP16, basic_blocks, bottlenecks, d2l, preacts, run
from resnet_kernels import models
from resnet_kernels.ops import conv_candidates
from resnet_kernels.runtime.gpu import forms


@pytest.fixture
def called(monkeypatch, device):
    skip_unless_runnable("triton", device, torch.float32)
    if device.type != "cpu":
        pytest.skip("the pretended GPU is the CPU")
    return pretend.nvidia(monkeypatch)


STAGES = (bottlenecks, preacts, basic_blocks, d2l)


@pytest.mark.slow(unless=lambda make, what, layout: layout is CHANNELS_LAST and make in [*STAGES][:2])
@pytest.mark.parametrize("layout", (CHANNELS_LAST, torch.contiguous_format), ids=("channels_last", "contiguous"))
@pytest.mark.parametrize("what", ("folding", "a pass"))
@pytest.mark.parametrize("make", STAGES, ids=lambda f: f.__name__)
def test_as_accurate_as_eager_and_never_stale(make, what, layout, called, monkeypatch):
    stage, x = prepared(make, layout=layout)
    if layout == torch.contiguous_format:
        # These are copied anyway, so folding would cost nothing.
        monkeypatch.setattr(forms, "_folding_bytes", lambda *_: 1)
    cheaper(monkeypatch, what)
    fused = rk.fuse(stage)
    for _ in range(2):
        called.clear()
        y = run(fused, x)
        assert_within_budget(y, run(stage, x), run(copy.deepcopy(stage).double(), x.double()))
        assert y.is_contiguous(memory_format=layout)
        for each in (stage, fused):
            # What leaves no trace, and what moves.
            next(m for m in each.modules() if isinstance(m, nn.Conv2d)).weight.data.mul_(-1)
            norm = next(m for m in each.modules() if isinstance(m, nn.BatchNorm2d))
            norm.running_mean.data.add_(0.5)
            norm.weight = nn.Parameter(norm.weight.detach() * -1)
    assert ("fused" in called) == (what == "folding")
    assert_within_budget(run(fused, x), run(stage, x), run(copy.deepcopy(stage).double(), x.double()))


@pytest.mark.parametrize("make", STAGES, ids=lambda f: f.__name__)
def test_half_precision_is_never_folded(make, called, monkeypatch):
    stage, x = prepared(make, FP16)
    cheaper(monkeypatch, "folding")
    for norm in (m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_var[0] = 6e4  # a scale of 4e-3: folded weights would be subnormal
    y = run(rk.fuse(stage), x)
    assert_within_budget(y, run(stage, x), run(copy.deepcopy(stage).double(), x.double()))
    assert set(called) == {"conv2d"}


def test_autocast_casts_in_one_launch(called, monkeypatch):
    from resnet_kernels.kernels import fold_weights

    launched, original = [], fold_weights.Table.launch
    monkeypatch.setattr(fold_weights.Table, "launch", lambda table, *a: launched.append(table) or original(table, *a))
    stage, x = prepared(bottlenecks)
    fused = rk.fuse(stage)
    with torch.autocast("cpu", FP16):
        y, eager = run(fused, x), run(stage, x)
    oracle = run(copy.deepcopy(stage).double(), x.double())
    assert y.dtype == FP16 and len(launched) == 1 and len(launched[0].addresses) == 10
    assert_within_budget(y, eager.to(FP16), oracle)


@pytest.mark.parametrize("what", ("folding", "a pass"))
def test_two_launches_for_all_constants(what, called, monkeypatch):
    from resnet_kernels.kernels import bn_scale_shift, epilogue, fold_weights

    counts = dict.fromkeys(("norms", "weights", "passes"), 0)

    def counted(name, function):
        def call(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return call

    for name, owner, method in (
        ("norms", bn_scale_shift.Layers, "launch"), ("weights", fold_weights.Table, "launch"), ("passes", epilogue, "launch")
    ):  # fmt: skip
        monkeypatch.setattr(owner, method, counted(name, getattr(owner, method)))
    stage, x = prepared(bottlenecks)
    cheaper(monkeypatch, what)
    fused = rk.fuse(stage)
    run(fused, x)
    # Ten convolutions; the projection is finished by the convolution that adds it.
    folded = what == "folding"
    assert counts == dict(norms=1, weights=int(folded), passes=0 if folded else 9)
    expected = ["fused", "fused", "conv2d", "fused add", *["fused", "fused", "fused add"] * 2]
    assert called == (expected if folded else ["conv2d"] * 10)


def test_weights_of_two_dtypes_and_of_odd_layouts_are_folded_by_pytorch(called, monkeypatch):
    stage, x = prepared(bottlenecks)
    cheaper(monkeypatch, "folding")
    conv = stage[1].conv2
    conv.weight = nn.Parameter(torch.stack([conv.weight.detach()] * 2, -1)[..., 0])
    shortcut = stage[0].downsample[0]
    shortcut.weight = nn.Parameter(torch.stack([shortcut.weight.detach()] * 2, -1)[..., 0])
    assert not conv.weight.is_contiguous(memory_format=CHANNELS_LAST)
    y = run(rk.fuse(stage), x)
    assert_within_budget(y, run(stage, x), run(copy.deepcopy(stage).double(), x.double()))


class Broadcasting(nn.Module):
    """A block whose shortcut has one pixel."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


@pytest.mark.parametrize("what", ("folding", "a pass"))
def test_an_add_that_broadcasts(what, called, monkeypatch):
    stage, x = prepared(lambda device: (Broadcasting(), torch.randn(2, 8, 3, 3)))
    cheaper(monkeypatch, what)
    fused = rk.fuse(nn.Sequential(stage))
    assert rk.explain(fused).rows[0].fused
    y = run(fused, x)
    assert_within_budget(y, run(stage, x), run(copy.deepcopy(stage).double(), x.double()))


@pytest.mark.slow
def test_bytes_decide(called):
    """ResNet-50 in bf16: outputs are the larger at batch 256, the weights of the last stages at batch 1."""
    large = forms_of(models.resnet50, 256, torch.bfloat16)
    stem = large["conv1+bn1+relu"]
    assert len(large) == 53 and stem == forms.Form("cudnn+epilogue", stem.geometry, stem.run)
    assert all(form.folds for name, form in large.items() if name != "conv1+bn1+relu")
    small = forms_of(models.resnet50, 1, torch.bfloat16)
    folded = {name for name, form in small.items() if form.folds}
    assert {"layer1.0.conv1+bn1+relu", "layer1.2.conv3+bn3+add+relu"} <= folded
    assert not {name for name in folded if name.startswith("layer4")}
    projection, adding = small["layer4.0.downsample.0+downsample.1"], small["layer4.0.conv3+bn3+add+relu"]
    assert projection.bare and adding.adds is not None and adding.name == projection.name == "cudnn+epilogue"
    half = forms_of(models.resnet50, 256, FP16)
    assert not any(form.folds for form in half.values()) and {f.name for f in half.values()} == {"cudnn+epilogue"}
    # Weights that are contiguous have to be copied anyway.
    contiguous = forms_of(models.resnet50, 1, torch.bfloat16, layout=torch.contiguous_format)
    assert contiguous["layer4.1.conv2+bn2+relu"].folds and not small["layer4.1.conv2+bn2+relu"].folds


def test_one_line_turns_the_fused_operations_off(called, monkeypatch):
    monkeypatch.setattr(conv_candidates, "FUSED", "cudnn+epilogue")
    assert not any(form.folds for form in forms_of(models.resnet18, 256, torch.bfloat16).values())
    stage, x = prepared(basic_blocks)
    assert_within_budget(run(rk.fuse(stage), x), run(stage, x), run(copy.deepcopy(stage).double(), x.double()))
    assert set(called) == {"conv2d"}


def test_preact_units_end_in_one_pass(called):
    found = forms_of(models.resnet_v2_50, 256, torch.bfloat16)
    adding = {name: form for name, form in found.items() if name.endswith("conv3+add")}
    assert len(adding) == 16 and all(form.name == "cudnn+epilogue" for form in adding.values())
    assert sum(form.adds is not None for form in adding.values()) == 4
