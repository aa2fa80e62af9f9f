"""d2l.py against both texts: the layers written out with functions, TensorFlow's SAME by its formula, in fp64."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_kernels as rk
from resnet_kernels.models import Residual, d2l_resnet18, d2l_resnet18_keras, print_shapes, resnet_block
from resnet_kernels.models.random_weights import randomise_batch_norms_

SIZES = [(32, 32), (33, 33), (28, 28), (31, 38)]


def pad_same(x, size, stride, value=0.0):
    """out = ceil(n / stride): what is missing for that many windows, the larger half at the end."""
    pads = []
    for n in reversed(x.shape[2:]):
        out = -(-n // stride)
        missing = max((out - 1) * stride + size - n, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.pad(x, pads, value=value)


def pad_by_half(x, size, stride, value=0.0):
    return F.pad(x, [size // 2] * 4, value=value)


TEXTS = {"pytorch": (pad_by_half, 1e-5), "keras": (pad_same, 1e-3)}


def text_conv(x, params, name, stride, pad):
    weight = params[f"{name}.weight"]
    return F.conv2d(pad(x, weight.shape[2], stride), weight, params[f"{name}.bias"], stride)


def text_batch_norm(x, params, name, eps):
    mean, var, weight, bias = (
        params[f"{name}.{what}"][:, None, None] for what in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + eps).sqrt() * weight + bias


def text_residual(x, params, name, strides, text):
    pad, eps = TEXTS[text]
    y = text_batch_norm(text_conv(x, params, f"{name}conv1", strides, pad), params, f"{name}bn1", eps).clamp_min(0)
    y = text_batch_norm(text_conv(y, params, f"{name}conv2", 1, pad), params, f"{name}bn2", eps)
    if f"{name}conv3.weight" in params:
        x = text_conv(x, params, f"{name}conv3", strides, pad)
    return (x + y).clamp_min(0)


def text_net(x, params, num_blocks, text):
    pad, eps = TEXTS[text]
    x = text_batch_norm(text_conv(x, params, "0.0", 2, pad), params, "0.1", eps).clamp_min(0)
    x = F.max_pool2d(pad(x, 3, 2, -math.inf), 3, 2)
    for stage, count in enumerate(num_blocks, 1):
        for block in range(count):
            x = text_residual(x, params, f"{stage}.{block}.", 2 if stage > 1 and block == 0 else 1, text)
    last = len(num_blocks) + 3
    x = x.mean((2, 3)) @ params[f"{last}.weight"].T + params[f"{last}.bias"]
    return x.exp() / x.exp().sum(1, keepdim=True) if text == "keras" else x


def assert_rounding_apart(y, expected):
    """Two orders of summation in fp64: nothing but rounding may differ."""
    assert y.shape == expected.shape
    assert (y - expected).norm() <= 1e3 * torch.finfo(torch.float64).eps * expected.norm()


def randomised(module: nn.Module) -> nn.Module:
    """In fp64, with every bias and BN at work."""
    module = randomise_batch_norms_(module.double().eval(), 0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return module


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("num_blocks", [(2, 2, 1), (1, 3)])
def test_net_has_the_texts_numbers(text, size, num_blocks):
    net = randomised(d2l_resnet18(2, 5, 4, num_blocks, tf_padding=text == "keras"))
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    with torch.no_grad():
        assert_rounding_apart(net(x), text_net(x, net.state_dict(), num_blocks, text))


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (6, 9)])
@pytest.mark.parametrize("use_1x1conv, strides", [(False, 1), (True, 1), (True, 2), (True, 3)])
@pytest.mark.parametrize("text", TEXTS)
def test_residual_has_the_texts_numbers(text, use_1x1conv, strides, size):
    block = randomised(Residual(3, 6 if use_1x1conv else 3, use_1x1conv, strides, tf_padding=text == "keras"))
    x = torch.randn(4, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        assert_rounding_apart(block(x), text_residual(x, block.state_dict(), "", strides, text))
    assert block(x).shape[2:] == tuple(-(-n // strides) for n in size)


@pytest.mark.parametrize("tf_padding", [False, True])
def test_the_texts_example(tf_padding):
    block = Residual(3, 6, use_1x1conv=True, strides=2, tf_padding=tf_padding)
    assert block(torch.randn(4, 3, 6, 6)).shape == (4, 6, 3, 3)
    assert Residual(3, 3, tf_padding=tf_padding)(torch.randn(4, 3, 6, 6)).shape == (4, 3, 6, 6)


def test_both_texts_have_the_same_keys():
    with torch.device("meta"):
        ours, keras = d2l_resnet18(), d2l_resnet18_keras()
    shapes = [(key, value.shape) for key, value in ours.state_dict().items()]
    assert shapes == [(key, value.shape) for key, value in keras.state_dict().items()]
    assert [type(layer).__name__ for layer in keras[len(ours) :]] == ["Softmax"]
    assert rk.models.BY_NAME["d2l_resnet18_keras"] is d2l_resnet18_keras


def test_resnet_block_is_the_texts():
    blocks = resnet_block(4, 8, 3)
    assert [type(block) for block in blocks] == [Residual] * 3
    assert [block.conv1.stride[0] for block in blocks] == [2, 1, 1]
    assert [block.conv3 is not None for block in blocks] == [True, False, False]
    first = resnet_block(4, 4, 2, first_block=True)
    assert [block.conv1.stride[0] for block in first] == [1, 1] and not any(block.conv3 for block in first)
    x = torch.randn(1, 4, 8, 8)
    assert nn.Sequential(*first, *blocks)(x).shape == (1, 8, 4, 4)


@pytest.mark.parametrize("tf_padding, expected", [(False, (1e-5, 0.1)), (True, (1e-3, 0.01))])
def test_batch_norms_are_their_librarys(tf_padding, expected):
    net = d2l_resnet18(width=4, num_blocks=(1, 1), tf_padding=tf_padding)
    assert {(m.eps, m.momentum) for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {expected}


@pytest.mark.parametrize("make", [lambda: d2l_resnet18_keras(width=32, num_blocks=(1, 1)),
                                  lambda: Residual(32, 64, True, 2, tf_padding=True)])  # fmt: skip
def test_kerass_initial_weights_are_glorot_uniform(make):
    weighted = [m for m in make().modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) >= 3
    for layer in weighted:
        assert not layer.bias.any()
        weight = layer.weight.detach().double()
        outputs, inputs = weight.shape[:2]
        limit = math.sqrt(6 / ((inputs + outputs) * weight[0, 0].numel()))
        assert weight.abs().max() <= limit
        squares = weight.square().flatten()
        # A uniform's variance is a third of its limit's square; five standard errors of what a sample of it shows.
        assert abs(squares.mean() - limit**2 / 3) < 5 * squares.std() / math.sqrt(len(squares))


def test_keras_gives_probabilities():
    net = d2l_resnet18_keras(width=4, num_blocks=(1, 1)).double().eval()
    y = net(torch.randn(3, 1, 28, 28, dtype=torch.float64))
    assert (y > 0).all()
    assert ((y.sum(1) - 1).abs() <= 10 * torch.finfo(y.dtype).eps).all()


@pytest.mark.parametrize("make", [d2l_resnet18, d2l_resnet18_keras])
def test_print_shapes_at_224(make, capsys):
    net = make()
    shapes = print_shapes(net)
    lines = capsys.readouterr().out.splitlines()
    stages = [(1, 64, 56, 56), (1, 64, 56, 56), (1, 128, 28, 28), (1, 256, 14, 14), (1, 512, 7, 7)]
    expected = [*stages, (1, 512, 1, 1), (1, 512), (1, 10)]
    names = ["Sequential"] * 5 + ["AdaptiveAvgPool2d", "Flatten", "Linear"]
    if make is d2l_resnet18_keras:
        expected, names = [*expected, (1, 10)], [*names, "Softmax"]
    assert shapes == expected
    assert lines == [f"{name} output shape:\t torch.Size({list(shape)})" for name, shape in zip(names, expected)]


def test_print_shapes_changes_nothing(capsys):
    net = d2l_resnet18(3, 4, 4, (1, 1)).double()
    net[1].eval()  # a frozen stage in a net that trains
    modes = [m.training for m in net.modules()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    assert print_shapes(net, (2, 3, 16, 17))[-1] == (2, 4)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    with pytest.raises(RuntimeError):
        print_shapes(net, (2, 1, 16, 16))
    assert [m.training for m in net.modules()] == modes


@pytest.mark.parametrize("tf_padding", [False, True])
def test_every_parameter_gets_a_gradient(tf_padding):
    net = d2l_resnet18(1, 4, 4, (1, 1), tf_padding=tf_padding).double()
    y = net(torch.randn(4, 1, 16, 16, dtype=torch.float64))
    y.backward(torch.randn_like(y))
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Residual(3, 3, strides=0), ValueError, "strides must be at least 1, got 0"),
        (lambda: Residual(3, 3.5), TypeError, "num_channels must be an int, got 3.5"),
        (lambda: resnet_block(3, 3, 0), ValueError, "num_residuals must be at least 1, got 0"),
        (lambda: resnet_block(3, 4, 1, True), ValueError, "input_channels must be num_channels, 4, in a first_block"),
        (lambda: d2l_resnet18(num_blocks=(2, 0)), ValueError, r"num_blocks must name .* got \(2, 0\)"),
        (lambda: d2l_resnet18(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (lambda: d2l_resnet18(width="64"), TypeError, "width must be an int, got '64'"),
        (lambda: print_shapes(nn.Linear(1, 1)), TypeError, "net must be an nn.Sequential, got Linear"),
    ],
)
def test_argument_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
