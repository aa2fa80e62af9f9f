"""verify finds what is wrong, and where; and says nothing where nothing is."""

import copy
import json

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import skip_unless_runnable
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import onednn
from resnet_kernels.runtime.cpu import packed_conv


@pytest.fixture
def model():
    block = rk.models.resnet_v1.BasicBlock
    return randomise_batch_norms_(rk.models.ResNet(block, (1, 2, 1, 1), num_classes=5)).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 48, 48)


def test_parity_holds(model, x):
    seen = []
    result = rk.verify(model, rk.fuse(model), x, progress=seen.append)
    assert result.ok and bool(result) and result.first_over_budget is None and result.top1_agreement == 1.0
    paths = ["conv1", "layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"]
    assert [p.path for p in result.blocks] == seen == paths
    assert "parity holds" in str(result) and "TF32 off" in str(result)
    values = json.loads(result.to_json())
    assert values["ok"] and len(values["rows"]) == 7 and values["rows"][-1]["path"] == ""
    assert all(p.error > 0 and p.eager_error > 0 for p in result.blocks), "two equal results would prove nothing"


@pytest.mark.parametrize("path", ("layer2.1", "conv1"))
def test_names_the_first_block_over_budget(model, x, path, monkeypatch):
    """A fault of one part in ten thousand, in one layer."""
    fused = rk.fuse(model)
    target = fused.conv1 if path == "conv1" else fused.layer2[1].conv2
    original = packed_conv.PackedConv.__init__

    def faulty(self, conv, bn, x):
        original(self, conv, bn, x)
        if conv is target:
            self.bias.mul_(1 + 1e-4)  # in place: a kernel may know its address

    monkeypatch.setattr(packed_conv.PackedConv, "__init__", faulty)
    result = rk.verify(model, fused, x)
    assert not result and result.first_over_budget.path == path
    assert f"PARITY FAILS, first at {path}" in str(result)
    assert sum(not p.ok for p in result.blocks) == 1, "each block is fed eager's own input"


def test_sees_lost_and_new_nan(model, x, onednn_alone, monkeypatch):
    x[0, 0, 5, 5] = float("nan")
    fused = rk.fuse(model)
    assert rk.verify(model, fused, x), "NaN stays NaN"
    monkeypatch.setattr(onednn, "_SAFE", float("inf"))
    monkeypatch.setattr(onednn, "bound", lambda x, known: 0.0)
    result = rk.verify(model, rk.fuse(model), x)
    assert not result and result.first_over_budget.lost > 0, "oneDNN's own ReLU would turn NaN into 0"


def test_inf_and_values_near_overflow(model):
    """Interval arithmetic refuses to promise anything about such inputs, and torch.relu keeps what is there."""
    for value in (float("inf"), -float("inf"), 3e38, 1e37):
        x = torch.randn(2, 3, 48, 48)
        x[1, 2, 7, 7] = value
        with torch.no_grad():
            ours, eager = rk.fuse(model)(x), model(x)
        assert torch.equal(ours.isnan(), eager.isnan()) and torch.equal(ours.isfinite(), eager.isfinite())


def test_uses_eval_mode_and_restores_the_flags(model, x):
    fused = rk.fuse(model)
    model.train()
    fused.layer1.train()
    flags = [m.training for m in (*model.modules(), *fused.modules())]
    assert rk.verify(model, fused, x)
    assert [m.training for m in (*model.modules(), *fused.modules())] == flags
    assert not any(m._forward_hooks for m in model.modules())


def test_half_precision_budget(model, x):
    skip_unless_runnable("cpu", torch.device("cpu"), torch.bfloat16)
    wide = copy.deepcopy(model).to(torch.bfloat16)
    result = rk.verify(wide, rk.fuse(wide), x.bfloat16())
    assert result and result.dtype == "bfloat16" and result.output.budget > 1e-3


@pytest.mark.parametrize("seed", range(6))
def test_an_output_of_few_values_is_no_game_of_chance(seed):
    """Regression: of 4 numbers eager's error is 10 times as large for one image as for the next, by luck."""
    torch.manual_seed(seed)
    block = rk.models.resnet_v1.BasicBlock
    model = nn.Sequential(
        block(32, 32), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2048), nn.ReLU(), nn.Linear(2048, 2)
    )  # fmt: skip
    model = randomise_batch_norms_(model).eval()
    assert rk.verify(model, rk.fuse(model), torch.randn(1, 32, 9, 9))


@pytest.mark.parametrize("classes, calls", ((1, 64), (5, 13), (64, 1), (100, 1)))
def test_how_often_a_small_output_is_computed(classes, calls):
    block = rk.models.resnet_v1.BasicBlock
    model = nn.Sequential(
        block(16, 16), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)
    ).eval()
    fused, seen = rk.fuse(model), []
    fused[4].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert rk.verify(model, fused, torch.randn(1, 16, 5, 5))
    assert len(seen) == calls and sum(output.numel() for output in seen) >= 64


def test_a_fault_behind_the_blocks_is_seen_in_few_values(model, x):
    fused = rk.fuse(model)
    fused.fc.bias.data += 1e-4
    result = rk.verify(model, fused, x)
    assert not result and result.first_over_budget is result.output


def test_feature_maps_have_no_top1(model, x):
    stage = nn.Sequential(model.layer1, model.layer2)
    assert rk.verify(stage, rk.fuse(stage), torch.randn(1, 64, 8, 8)).top1_agreement is None


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (lambda m, f, x: (None, f, x), TypeError, "model must be a torch.nn.Module, got NoneType"),
        (lambda m, f, x: (m, "f", x), TypeError, "fused must be a torch.nn.Module, got str"),
        (lambda m, f, x: (m, f, [x]), TypeError, "x must be a floating-point tensor, got list"),
        (lambda m, f, x: (m, f, x.int()), TypeError, "x must be a floating-point tensor, got torch.int32"),
        (lambda m, f, x: (f, f, x), ValueError, "model must be the unfused reference"),
        (lambda m, f, x: (nn.Sequential(m), f, x), ValueError, "model has no module 'conv1'"),
    ],
)
def test_bad_input(model, x, change, kind, message):
    with pytest.raises(kind, match=message):
        rk.verify(*change(model, rk.fuse(model), x))
