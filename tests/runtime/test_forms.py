"""`auto` without a table: which form each convolution takes, that all of them are right, and that nothing goes stale."""

import copy

import pytest
import torch
from helpers import pretend
from helpers.oracle import assert_within_budget, skip_unless_runnable
from test_launches import CHANNELS_LAST, basic_blocks, bottlenecks, preacts, run
from torch import nn

import resnet_kernels as rk
from resnet_kernels import models
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import conv_candidates
from resnet_kernels.runtime.gpu import forms
from resnet_kernels.runtime.gpu import plan as gpu_plan

FP16 = torch.float16


@pytest.fixture
def called(monkeypatch, device):
    skip_unless_runnable("triton", device, torch.float32)
    if device.type != "cpu":
        pytest.skip("the pretended GPU is the CPU")
    return pretend.nvidia(monkeypatch)


def d2l(device):
    blocks = models.d2l.Residual(16, 16), models.d2l.Residual(16, 32, use_1x1conv=True, strides=2)
    return nn.Sequential(*blocks), torch.randn(2, 16, 9, 8, device=device)


STAGES = (bottlenecks, preacts, basic_blocks, d2l)


def prepared(make, dtype=torch.float32, layout=CHANNELS_LAST):
    stage, x = make("cpu")
    for module in stage.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)  # a new one may be zero
    return randomise_batch_norms_(stage).eval().to(dtype, memory_format=layout), x.to(dtype, memory_format=layout)


def cheaper(monkeypatch, what):
    """Makes folding, or a pass over the output, the cheaper one everywhere."""
    if what is not None:
        monkeypatch.setattr(forms, "_pass_bytes", lambda *_: float("inf") if what == "folding" else 0)


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


def plan_of(fused):
    states = [m.__dict__["_rk_state"] for m in fused.modules() if "_rk_state" in m.__dict__]
    (plan,) = [plan for state in states for plan in state.plans.values()]
    return plan


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


def forms_of(net, batch, dtype, size=224, layout=CHANNELS_LAST, channels=3, freeze=False):
    """By the name of each step, the forms of a network's plans; nothing is computed."""
    found, original = {}, gpu_plan.Plan.__init__

    def init(plan, *arguments):
        original(plan, *arguments)
        found.update((name, launch.run.args[0]) for name, launch in plan.launches if hasattr(launch.run, "args"))

    with torch.device("meta"):
        fused = rk.fuse(net().eval().to(dtype, memory_format=layout), backend="auto", freeze=freeze)
        x = torch.empty(batch, channels, size, size, dtype=dtype).to(memory_format=layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_plan.Plan, "__init__", init)
        for kind in ("constants.LiveConstants", "frozen_constants.FrozenConstants"):
            patch.setattr(f"resnet_kernels.runtime.gpu.{kind}.read", lambda constants: _Anything())
        patch.setattr(gpu_plan, "convolve_as", _shape_only)
        run(fused, x)
    return found


class _Anything(dict):
    def __missing__(self, key):
        return None


def _shape_only(form, part, values, constants, backend):
    x = values[part.step.x]
    shape = gpu_plan._geometry(part, x).out_shape(x.shape, part.child.weight.shape)
    values[part.step.out] = torch.empty(shape, dtype=x.dtype, device="meta").contiguous(memory_format=CHANNELS_LAST)


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
