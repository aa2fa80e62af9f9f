"""resnet_v2.py against slim's text, written out with functions and explicit pads in fp64."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_kernels as rk
from resnet_kernels.models import Block, PreactBottleneck, ResNetV2, resnet_v2_block
from resnet_kernels.models.random_weights import randomise_batch_norms_

UNITS = {
    "resnet_v2_50": (3, 4, 6, 3),
    "resnet_v2_101": (3, 4, 23, 3),
    "resnet_v2_152": (3, 8, 36, 3),
    "resnet_v2_200": (3, 24, 36, 3),
}


def slim_batch_norm_relu(x, params, name):
    """slim.batch_norm(activation_fn=relu) with is_training=False."""
    mean, var = params[f"{name}.running_mean"], params[f"{name}.running_var"]
    gamma, beta = params[f"{name}.weight"], params[f"{name}.bias"]
    per_channel = (1, -1, 1, 1)
    y = (x - mean.view(per_channel)) / (var.view(per_channel) + 1e-5).sqrt()
    return (y * gamma.view(per_channel) + beta.view(per_channel)).clamp_min(0)


def slim_conv2d_same(x, weight, bias, stride):
    """VALID after (k - 1) // 2 before and the rest after, as conv2d_same does; SAME at stride 1 is the same."""
    total = weight.shape[2] - 1
    before, after = total // 2, total - total // 2
    return F.conv2d(F.pad(x, (before, after, before, after)), weight, bias, stride)


def slim_max_pool_same(x, size, stride):
    pads = []
    for n in x.shape[2:]:
        total = max((math.ceil(n / stride) - 1) * stride + size - n, 0)
        pads.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = pads
    return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-math.inf), size, stride)


def slim_bottleneck(x, params, name, depth, stride):
    preact = slim_batch_norm_relu(x, params, f"{name}.preact")
    if depth == x.shape[1]:
        shortcut = x[:, :, ::stride, ::stride]
    else:
        weight, bias = params[f"{name}.shortcut.weight"], params[f"{name}.shortcut.bias"]
        shortcut = F.conv2d(preact, weight, bias, stride)
    y = slim_batch_norm_relu(F.conv2d(preact, params[f"{name}.conv1.weight"]), params, f"{name}.bn1")
    y = slim_conv2d_same(y, params[f"{name}.conv2.weight"], None, stride)
    y = slim_batch_norm_relu(y, params, f"{name}.bn2")
    return shortcut + F.conv2d(y, params[f"{name}.conv3.weight"], params[f"{name}.conv3.bias"])


def slim_resnet_v2(x, params, blocks, *, root=True, global_pool=True, classes=True):
    """The network, and its end points under the scope `net`."""
    points = {}
    if root:
        x = slim_conv2d_same(x, params["conv1.weight"], params["conv1.bias"], 2)
        x = slim_max_pool_same(x, 3, 2)
    for scope, depth, strides in blocks:
        for number, stride in enumerate(strides, 1):
            x = slim_bottleneck(x, params, f"{scope}.unit_{number}", depth, stride)
            points[f"net/{scope}/unit_{number}/bottleneck_v2"] = x
        points[f"net/{scope}"] = x
    x = slim_batch_norm_relu(x, params, "postnorm")
    if global_pool:
        x = x.mean((2, 3), keepdim=True)
    if classes:
        x = F.conv2d(x, params["logits.weight"], params["logits.bias"])
        points["logits"] = x[:, :, 0, 0] if global_pool else x
        scores = points["logits"].exp()
        points["predictions"] = scores / scores.sum(1, keepdim=True)
    return (x[:, :, 0, 0] if global_pool else x), points


BLOCKS = [resnet_v2_block("block1", 4, 3, 2), resnet_v2_block("block2", 6, 2, 1)]
SLIM_BLOCKS = [("block1", 16, (1, 1, 2)), ("block2", 24, (1, 1))]


def small(**options) -> ResNetV2:
    net = ResNetV2(BLOCKS, **{"num_classes": 5, "scope": "net", **options}).double().eval()
    randomise_batch_norms_(net, 0)
    with torch.no_grad():  # so that a bias that is left out shows
        for name, p in net.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return net


def assert_rounding_apart(y, expected):
    """Two orders of summation in fp64: nothing but rounding may differ."""
    assert y.shape == expected.shape
    assert (y - expected).norm() <= 1e3 * torch.finfo(torch.float64).eps * expected.norm()


@pytest.mark.parametrize("size", [(32, 32), (33, 33), (31, 38), (29, 30)])
@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("global_pool", [True, False])
def test_same_numbers_as_slims_text(size, classes, global_pool):
    net = small(num_classes=5 if classes else None, global_pool=global_pool)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        y, points = net(x), net.end_points(x)
        expected, expected_points = slim_resnet_v2(
            x, net.state_dict(), SLIM_BLOCKS, global_pool=global_pool, classes=classes
        )
    assert_rounding_apart(y, expected)
    assert list(points) == list(expected_points)
    for name, value in points.items():
        assert_rounding_apart(value, expected_points[name])
    channels = 5 if classes else 24
    map_size = tuple(math.ceil(n / 8) for n in size)
    assert y.shape == ((2, channels) if global_pool else (2, channels, *map_size))


def test_without_the_root_block():
    net = small(include_root_block=False, in_channels=16)
    x = torch.randn(2, 16, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_rounding_apart(net(x), slim_resnet_v2(x, net.state_dict(), SLIM_BLOCKS, root=False)[0])
    # 16 channels go in and 16 come out: the first unit needs no projection.
    assert net.block1.unit_1.shortcut is None
    assert not [key for key in net.state_dict() if key.startswith(("conv1", "pool1"))]


@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
@pytest.mark.parametrize("in_channels, depth, stride", [(8, 8, 1), (8, 8, 2), (8, 12, 1), (8, 12, 2), (8, 8, 3)])
def test_bottleneck(in_channels, depth, stride, size):
    unit = randomise_batch_norms_(PreactBottleneck(in_channels, depth, 4, stride).double().eval(), 0)
    params = {f"unit.{key}": value for key, value in unit.state_dict().items()}
    x = torch.randn(2, in_channels, *size, dtype=torch.float64)
    with torch.no_grad():
        assert_rounding_apart(unit(x), slim_bottleneck(x, params, "unit", depth, stride))
    assert (unit(x) < 0).any()  # nothing after the add


def test_keys():
    unit = PreactBottleneck(8, 12, 4, 2)
    modules = {key.rpartition(".")[0] for key in unit.state_dict()}
    assert modules == {"preact", "conv1", "bn1", "conv2", "bn2", "conv3", "shortcut"}
    biased = {name for name, m in unit.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None}
    assert biased == {"conv3", "shortcut"}
    subsampled = PreactBottleneck(8, 8, 4, 2)
    assert subsampled.shortcut is None and not [key for key in subsampled.state_dict() if "s" == key[0]]
    net = small()
    assert net.conv1.bias is not None and net.logits.bias is not None
    assert {key.split(".")[0] for key in net.state_dict()} == {"conv1", "block1", "block2", "postnorm", "logits"}


def parameter_count(units, classes=1000):
    """By hand: a convolution has in * out * k * k weights, a BN two numbers a channel."""
    total, channels = 7 * 7 * 3 * 64 + 64, 64
    for base, count in zip((64, 128, 256, 512), units):
        for _ in range(count):
            total += 2 * channels + channels * base + 2 * base + 9 * base * base + 2 * base + base * 4 * base + 4 * base
            if channels != 4 * base:
                total += channels * 4 * base + 4 * base
            channels = 4 * base
    return total + 2 * channels + channels * classes + classes


@pytest.mark.parametrize("name", UNITS)
def test_the_four_nets(name):
    with torch.device("meta"):
        net = getattr(rk.models, name)().eval()
        points = net.end_points(torch.empty(2, 3, 224, 224))
    assert sum(p.numel() for p in net.parameters()) == parameter_count(UNITS[name])
    expected = []
    for number, (count, depth, size) in enumerate(zip(UNITS[name], (256, 512, 1024, 2048), (28, 14, 7, 7)), 1):
        path, before = f"{name}/block{number}", 56 if number == 1 else expected[-1][1][2]
        # The stride is in the last unit.
        sizes = [before] * (count - 1) + [size]
        expected += [(f"{path}/unit_{j}/bottleneck_v2", (2, depth, s, s)) for j, s in enumerate(sizes, 1)]
        expected.append((path, (2, depth, size, size)))
    expected += [("logits", (2, 1000)), ("predictions", (2, 1000))]
    assert [(key, tuple(value.shape)) for key, value in points.items()] == expected
    assert rk.models.BY_NAME[name] is getattr(rk.models, name)


def test_resnet_v2_50_has_the_published_count():
    """Keras' ResNet50V2, the same network, lists 25,568,360 trainable parameters."""
    assert parameter_count(UNITS["resnet_v2_50"]) == 25_568_360


def test_options_reach_the_net():
    with torch.device("meta"):
        net = rk.models.resnet_v2_50(num_classes=21, in_channels=1, global_pool=False, scope="segmenter").eval()
        points = net.end_points(torch.empty(1, 1, 65, 97))
    assert points["logits"].shape == (1, 21, 3, 4) and "segmenter/block4" in points


def test_batch_norms_are_slims():
    norms = [m for m in small().modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 * 5 + 1
    assert {(m.momentum, m.eps) for m in norms} == {(0.003, 1e-5)}


def test_initial_weights_are_a_truncated_normal_over_the_fan_in():
    unit = PreactBottleneck(128, 192, 96)
    # The variance that truncation at two deviations leaves of a normal's.
    density, mass = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(2 / math.sqrt(2))
    kept = 1 - 4 * density / mass
    for conv in (unit.conv1, unit.conv2, unit.conv3, unit.shortcut):
        weight = conv.weight.detach().double()
        variance = 1.3 * 2.0 / (conv.in_channels * conv.kernel_size[0] ** 2)
        assert weight.abs().max() <= 2 * math.sqrt(variance) * (1 + 1e-6)
        squares = weight.square().flatten()
        standard_error = squares.std() / math.sqrt(len(squares))
        assert abs(squares.mean() - kept * variance) < 5 * standard_error
        assert abs(weight.mean()) < 5 * weight.std() / math.sqrt(len(squares))
        assert conv.bias is None or not conv.bias.any()


def test_every_parameter_gets_a_gradient():
    net = small().train()
    y = net(torch.randn(2, 3, 33, 32, dtype=torch.float64))
    y.backward(torch.randn_like(y))
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_copies_are_the_same_net():
    net, x = small(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    again = small()
    again.load_state_dict(net.state_dict())
    with torch.no_grad():
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), again):
            assert torch.equal(other(x), net(x))
            assert list(other.end_points(x)) == list(net.end_points(x))


def test_units_of_ones_own():
    class Scaled(PreactBottleneck):
        def forward(self, x):
            return 2 * super().forward(x)

    net = ResNetV2([Block("stage", Scaled, [(8, 4, 1), (8, 4, 2)])], 3, 1)
    assert [type(unit) for unit in net.stage] == [Scaled, Scaled]
    assert next(iter(net.end_points(torch.randn(1, 1, 16, 16)))) == "resnet_v2/stage/unit_1/bottleneck_v2"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PreactBottleneck(8, 8, 4, 0), ValueError, "stride must be at least 1, got 0"),
        (lambda: PreactBottleneck(8, 8, 4.0), TypeError, "depth_bottleneck must be an int, got 4.0"),
        (lambda: PreactBottleneck(True, 8, 4), TypeError, "in_channels must be an int, got True"),
        (lambda: resnet_v2_block("block1", 4, 0, 1), ValueError, "num_units must be at least 1, got 0"),
        (lambda: ResNetV2([]), ValueError, "blocks must hold at least one Block, got none"),
        (lambda: ResNetV2([(64, 1)]), TypeError, "blocks must be of Block, got tuple"),
        (lambda: ResNetV2([Block("a", PreactBottleneck, [])]), ValueError, "at least one unit each, got none in 'a'"),
        (lambda: ResNetV2([BLOCKS[0], BLOCKS[0]]), ValueError, "free as attribute names, got 'block1'"),
        (lambda: ResNetV2([BLOCKS[0]._replace(scope="logits")]), ValueError, "free as attribute names, got 'logits'"),
        (lambda: ResNetV2([BLOCKS[0]._replace(scope="a.b")]), ValueError, "free as attribute names, got 'a.b'"),
        (lambda: ResNetV2([BLOCKS[0]._replace(scope=1)]), TypeError, "scopes of type str, got 1"),
        (lambda: ResNetV2(BLOCKS, 0), ValueError, "num_classes must be at least 1, got 0"),
        (lambda: ResNetV2(BLOCKS, "ten"), TypeError, "num_classes must be an int, got 'ten'"),
        (lambda: ResNetV2(BLOCKS, in_channels=0), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: ResNetV2(BLOCKS, scope=50), TypeError, "scope must be a str, got 50"),
        (lambda: rk.models.resnet_v2_50(blocks=[]), TypeError, "blocks"),
    ],
)
def test_argument_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
