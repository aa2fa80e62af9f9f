"""Whole models that we did not write: torchvision's and timm's, on every backend, against fp64."""

import copy

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import assert_within_budget, skip_unless_runnable
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.runtime import fused_module

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def torchvision_model(name, **options):
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    return randomise_batch_norms_(models.get_model(name, weights=None, **options)).eval()


def timm_model(name, **options):
    timm = pytest.importorskip("timm", reason="needs timm")
    return randomise_batch_norms_(timm.create_model(name, pretrained=False, **options)).eval()


def check(model, x, blocks_fused, backend="auto"):
    fused = rk.fuse(model, backend=backend)
    report = rk.explain(fused)
    assert len(report.fused) == blocks_fused, str(report)
    assert not any(row.reason for row in report), str(report)
    result = rk.verify(model, fused, x)
    assert result, str(result)
    assert result.top1_agreement in (1.0, None) or x.dtype != torch.float32
    return fused


@pytest.mark.slow(unless=lambda name, **_: name in ("resnet18", "resnet50"))
@pytest.mark.parametrize(
    "name, count, dtype",
    [
        ("resnet18", 9, torch.float32),
        ("resnet18", 9, torch.bfloat16),
        ("resnet34", 17, torch.float32),
        ("resnet50", 17, torch.float32),
        ("resnet50", 17, torch.bfloat16),
        ("resnet152", 51, torch.float32),
        ("resnext50_32x4d", 17, torch.float32),
        ("wide_resnet50_2", 17, torch.float32),
    ],
)
def test_torchvision(name, count, dtype, device):
    if device.type == "cpu":
        skip_unless_runnable("cpu", device, dtype)  # `auto` leaves a dtype that oneDNN lacks here to eager, and says so
    model = torchvision_model(name).to(device, dtype)
    size = 64 if name in ("resnet18", "resnet50") else 32
    check(model, torch.randn(2, 3, size, size, device=device, dtype=dtype), count)


@pytest.mark.parametrize("batch, size", [(1, 32), (1, 96), (3, 33)])
def test_image_sizes(batch, size, device):
    """One small image goes through other convolutions of PyTorch's than a batch does."""
    check(torchvision_model("resnet18").to(device), torch.randn(batch, 3, size, size, device=device), 9)


def test_torchvision_dilated_and_frozen(device):
    from torchvision.ops.misc import FrozenBatchNorm2d

    model = torchvision_model(
        "resnet50", replace_stride_with_dilation=[False, True, True], norm_layer=FrozenBatchNorm2d
    ).to(device)  # fmt: skip
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.2, 0.8)
    check(model, torch.randn(1, 3, 64, 64, device=device), 17)


@pytest.mark.slow
def test_torchvision_through_the_triton_kernels(device):
    skip_unless_runnable("triton", device, torch.float32)
    resnet = pytest.importorskip("torchvision.models.resnet", reason="needs torchvision")
    model = randomise_batch_norms_(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=64)).eval().to(device)
    check(model, torch.randn(1, 3, 32, 32, device=device), 5, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("triton", "cudnn"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("resnet18", "resnet50", "resnext50_32x4d"))
def test_gpu_backends(name, dtype, backend, device):
    model = torchvision_model(name).to(device, dtype, memory_format=torch.channels_last)
    check(model, torch.randn(4, 3, 224, 224, device=device, dtype=dtype), 9 if name == "resnet18" else 17, backend)


def test_detection_backbone(device):
    pytest.importorskip("torchvision", reason="needs torchvision")
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    model = randomise_batch_norms_(
        fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, trainable_backbone_layers=5)
    ).eval()  # fmt: skip
    fused = rk.fuse(model)
    report = rk.explain(fused)
    paths = [row.path for row in report.fused]
    assert paths[:2] == ["backbone.body", "backbone.body.layer1.0"] and len(paths) >= 17
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        features, expected = fused.backbone(x), model.backbone(x)
        assert list(features) == list(expected)
        for name in expected:
            torch.testing.assert_close(features[name], expected[name], rtol=1e-3, atol=1e-3)
            assert features[name].stride() == expected[name].stride()


def test_segmentation(device):
    pytest.importorskip("torchvision", reason="needs torchvision")
    from torchvision.models.segmentation import fcn_resnet50

    model = randomise_batch_norms_(fcn_resnet50(weights=None, weights_backbone=None)).eval().to(device)
    fused, x = rk.fuse(model), torch.randn(1, 3, 64, 64, device=device).to(memory_format=torch.channels_last)
    assert sum(row.kind == "Bottleneck" for row in rk.explain(fused).fused) == 16
    with torch.no_grad():
        ours, eager, oracle = fused(x)["out"], model(x)["out"], copy.deepcopy(model).double()(x.double())["out"]
    assert_within_budget(ours, eager, oracle)
    assert ours.stride() == eager.stride()


def test_feature_extractor():
    pytest.importorskip("torchvision", reason="needs torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    model = torchvision_model("resnet18")
    x, nodes = torch.randn(1, 3, 64, 64), {"layer1.0.relu": "a", "layer3": "b", "layer4.1.add": "c"}
    with torch.no_grad():
        expected = create_feature_extractor(model, nodes)(x)
        for name, value in create_feature_extractor(rk.fuse(model), nodes)(x).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_batch_norm_classes_of_other_blocks_are_torchvisions(device):
    """vgg16_bn and mobilenet: no residual block at all, but runs of convolution, BN and ReLU."""
    x = torch.randn(1, 3, 32, 32, device=device)
    check(torchvision_model("vgg11_bn", num_classes=4).to(device), x, 1)


@pytest.mark.slow(unless=lambda name, **_: name in ("resnet18", "resnet26d", "resnetv2_18"))
@pytest.mark.parametrize(
    "name, options, count",
    [
        ("resnet18", {}, 9),
        ("resnet50", {}, 17),
        ("resnet26d", {}, 9),  # deep stem, averaged shortcut
        ("resnext50_32x4d", {}, 17),
        ("resnet50", {"drop_path_rate": 0.1, "drop_block_rate": 0.1}, 17),  # inactive in eval mode
        ("tv_resnet50", {"features_only": True}, 17),
        ("resnetv2_50", {}, 16),  # pre-activation, BatchNormAct2d, shortcuts in a module of their own
        ("resnetv2_50d", {}, 17),
        ("resnetv2_18", {}, 8),
        ("seresnet18", {}, 9),
    ],
)
def test_timm(name, options, count, device):
    model = timm_model(name, **options).to(device)
    check(model, torch.randn(2, 3, 32, 32, device=device), count)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("resnetblur18", "aa is a BlurPool2d"),
        ("ecaresnet26t", "EcaModule"),
        ("resnet18", None),
    ],
)
def test_timm_blocks_with_something_unknown_are_fused_around_it(name, reason):
    timm = pytest.importorskip("timm", reason="needs timm")
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    options = {} if reason else {"act_layer": nn.Mish}
    model = timm_model(name, **options)
    report = rk.explain(model)
    kinds = {row.kind for row in report.skipped}
    assert report.skipped and kinds <= {"BasicBlock (rest)", "Bottleneck (rest)"}, str(report)
    assert all((reason or "is a Mish") in row.reason for row in report.skipped), str(report)
    # All but those of the attention modules.
    small = sum(row.convolutions for row in report.unfused if "averages" in row.reason or "Conv1d" in row.reason)
    assert sum(row.convolutions for row in report.unfused) == small, str(report)
    fused, x = rk.fuse(model), torch.randn(1, 3, 64, 64)
    result = rk.verify(model, fused, x)
    assert result, str(result)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-3)


def test_timm_drop_path_in_train_mode_is_eagers():
    model = timm_model("resnet18", drop_path_rate=0.5)
    pair = model, rk.fuse(model)
    x, outputs = torch.randn(4, 3, 32, 32), []
    for m in pair:
        m.train()
        torch.manual_seed(1)
        outputs.append(m(x))
    assert torch.equal(*outputs)


class OddBlock(nn.Module):
    """What nobody would call standard: stride on the 1x1, biases, a ceil-mode pooled shortcut, its own eps, F.relu."""

    def __init__(self):
        super().__init__()
        self.reduce = nn.Conv2d(16, 8, 1, stride=2)
        self.n1 = nn.BatchNorm2d(8, eps=0.3)
        self.spatial = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.n2 = nn.BatchNorm2d(8, affine=False)
        self.expand = nn.Conv2d(8, 24, 1)
        self.n3 = nn.BatchNorm2d(24, eps=1e-12)
        self.short = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), nn.Conv2d(16, 24, 1))

    def forward(self, x):
        y = torch.relu(self.n1(self.reduce(x)))
        y = nn.functional.relu(self.n2(self.spatial(y)), inplace=True)
        return torch.relu(self.short(x) + self.n3(self.expand(y)))


@pytest.mark.parametrize("backend", ("auto", "triton"))
def test_a_block_is_read_never_assumed(backend, device):
    skip_unless_runnable("triton", device, torch.float32)
    model = randomise_batch_norms_(nn.Sequential(OddBlock(), nn.Identity())).eval().to(device)
    fused = check(model, torch.randn(2, 16, 7, 9, device=device), 1, backend)
    assert "reduce+n1+relu -> spatial+n2+relu -> short.0 -> short.1 -> expand+n3+add+relu" in str(rk.explain(fused))


@pytest.mark.parametrize("backend", ("auto", "triton"))
@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: rk.BasicBlock(16, 16), (2, 16, 7, 7)),
        (lambda: rk.BasicBlock(16, 32, 2, nn.Sequential(nn.Conv2d(16, 32, 1, 2), nn.BatchNorm2d(32))), (2, 16, 7, 7)),
        (lambda: rk.Bottleneck(64, 16), (2, 64, 5, 5)),
        (lambda: rk.Bottleneck(64, 16, groups=4, base_width=32, dilation=2), (2, 64, 5, 5)),
        (lambda: rk.Residual(3, 3), (4, 3, 6, 6)),
        (lambda: rk.Residual(3, 6, use_1x1conv=True, strides=2), (4, 3, 6, 6)),
    ],
)
def test_our_blocks(make, shape, backend, device):
    skip_unless_runnable("triton", device, torch.float32)
    block = randomise_batch_norms_(make()).eval().to(device)
    assert fused_module.is_fused(block) and rk.explain(block).fused
    plain, x = rk.unfuse_(copy.deepcopy(block)), torch.randn(shape, device=device)
    block.__dict__["_rk_state"].backend = backend
    assert rk.verify(plain, block, x)


def test_residual_shapes_of_the_text():
    with torch.no_grad():
        x = torch.randn(4, 3, 6, 6)
        assert rk.Residual(3, 3).eval()(x).shape == (4, 3, 6, 6)
        assert rk.Residual(3, 6, use_1x1conv=True, strides=2).eval()(x).shape == (4, 6, 3, 3)


def test_our_blocks_are_drop_ins_for_torchvisions():
    resnet = pytest.importorskip("torchvision.models.resnet", reason="needs torchvision")
    for ours, theirs, layers in (
        (rk.BasicBlock, resnet.BasicBlock, [1, 2, 1, 1]),
        (rk.Bottleneck, resnet.Bottleneck, [1] * 4),
    ):
        built, reference = resnet.ResNet(ours, layers), randomise_batch_norms_(resnet.ResNet(theirs, layers)).eval()
        assert {k: v.shape for k, v in built.state_dict().items()} == {
            k: v.shape for k, v in reference.state_dict().items()
        }
        built.load_state_dict(reference.state_dict())
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(built.eval()(x), reference(x), rtol=1e-4, atol=1e-4)
        for bad in ({"groups": 2}, {"base_width": 32}, {"dilation": 2}) if theirs is resnet.BasicBlock else ():
            with pytest.raises(Exception) as right:
                theirs(64, 64, **bad)
            with pytest.raises(type(right.value)):
                ours(64, 64, **bad)


def test_a_block_built_around_something_unknown_says_so_and_runs():
    with pytest.warns(RuntimeWarning, match="BasicBlock was built unfused: bn1 is a GroupNorm"):
        block = rk.BasicBlock(8, 8, norm_layer=lambda channels: nn.GroupNorm(2, channels))
    assert block(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)
