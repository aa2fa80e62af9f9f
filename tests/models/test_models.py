"""The zoo: torchvision's keys, shapes, options and errors; d2l's shapes and Sequential indices."""

import inspect

import pytest
import torch
from torch import nn

import resnet_kernels as rk

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes_are_torchvisions(name):
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    with torch.device("meta"):
        ours, theirs = getattr(rk.models, name)(), models.get_model(name, weights=None)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]


@pytest.mark.parametrize("options", [
    {}, {"replace_stride_with_dilation": [False, True, True]}, {"groups": 2, "width_per_group": 32},
    {"norm_layer": lambda c: nn.BatchNorm2d(c, eps=0.1)}, {"num_classes": 7},
])  # fmt: skip
def test_same_numbers_as_torchvision(options):
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    ours, theirs = rk.models.resnet50(**options).eval(), models.resnet50(weights=None, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_zero_init_residual():
    for maker, last in ((rk.models.resnet18, "bn2"), (rk.models.resnet50, "bn3")):
        model = maker(zero_init_residual=True)
        assert getattr(model.layer1[0], last).weight.abs().sum() == 0
        assert getattr(maker().layer1[0], last).weight.abs().sum() > 0
        assert model.layer1[0].bn1.weight.abs().sum() > 0


def test_errors():
    with pytest.raises(ValueError, match="replace_stride_with_dilation must be None or have three elements"):
        rk.models.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match="BasicBlock only supports groups=1"):
        rk.models.ResNet(rk.BasicBlock, [1, 1, 1, 1], groups=2)
    with pytest.raises(NotImplementedError, match="dilation=1"):
        rk.models.resnet18(replace_stride_with_dilation=[True, False, False])
    with pytest.raises(ValueError, match="num_blocks must name"):
        rk.models.d2l_resnet18(num_blocks=())


def test_d2l_shapes_at_224_and_keys():
    """The shape walk that the text prints."""
    net, x, shapes = rk.models.d2l_resnet18(), torch.randn(1, 1, 224, 224), []
    for layer in net:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    stages = [(64, 56, 56), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
    assert shapes == [*stages, (512, 1, 1), (512,), (10,)]
    keys = net.state_dict()
    for key in ("0.0.weight", "0.1.running_mean", "1.0.conv1.bias", "2.0.conv3.weight", "4.1.bn2.bias", "7.weight"):
        assert key in keys
    assert "1.0.conv3.weight" not in keys


def test_helpers():
    assert rk.models.conv3x3(4, 8, 2, dilation=2).padding == (2, 2) and rk.models.conv1x1(4, 8).bias is None


def test_in_channels_is_the_last_option_and_changes_the_stem_alone():
    *_, last = inspect.signature(rk.models.ResNet).parameters
    assert last == "in_channels"
    one, three = (rk.models.resnet18(num_classes=10, **options).state_dict() for options in ({"in_channels": 1}, {}))
    assert one["conv1.weight"].shape == (64, 1, 7, 7)
    assert [k for k in one if one[k].shape != three[k].shape] == ["conv1.weight"] and one.keys() == three.keys()
    assert rk.models.resnet18(in_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 1000)
