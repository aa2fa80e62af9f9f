"""Convolutions in training by Winograd: values and all gradients against fp64, and what they leave to PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from helpers.convolutions import integers
from helpers.oracle import assert_within_budget
from helpers.own_kernels import assert_like_eager, skip_unless_compiled
from resnet_kernels.kernels.cpu import convolution
from resnet_kernels.kernels.geometry import normalize
from resnet_kernels.ops import conv_training, tuned_table
from resnet_kernels.ops.conv_problem import ConvProblem
from resnet_kernels.ops.conv_training import TrainedProblem

CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _compiled():
    skip_unless_compiled()


def by_pytorch(x, weight, bias, geometry):
    return F.conv2d(x, weight, bias, geometry.stride, geometry.conv2d_padding)


def gradients(convolve, x, weight, bias, grad_y, padding):
    """y and the gradients of x, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    y = convolve(*leaves[:2], leaves[2] if bias is not None else None, normalize(1, padding, 1, 1))
    return y.detach(), *torch.autograd.grad(y, leaves, grad_y)


@pytest.mark.parametrize("layout", (torch.contiguous_format, CHANNELS_LAST), ids=str)
@pytest.mark.parametrize("padding", (0, 1, 2, (1, 2)), ids=str)
@pytest.mark.parametrize("c_in, c_out", ((1, 1), (5, 33), (40, 17)))
def test_integers_are_exact(c_in, c_out, padding, layout):
    torch.manual_seed(0)
    draw = lambda *shape: integers(shape, -2, 2, torch.float32, "cpu")  # noqa: E731
    # Winograd's transform of the weight divides by four.
    x, weight, vector = draw(3, c_in, 7, 6).contiguous(memory_format=layout), draw(c_out, c_in, 3, 3) * 4, draw(c_out)
    grad_y = draw(*F.conv2d(x, weight, padding=padding).shape)
    for bias in (None, vector):
        expected = gradients(
            by_pytorch, *(None if t is None else t.double() for t in (x, weight, bias, grad_y)), padding
        )
        ours = gradients(conv_training.by_winograd, x, weight, bias, grad_y, padding)
        assert all(torch.equal(own.double(), truth) for own, truth in zip(ours, expected, strict=True))


@pytest.mark.parametrize("channels, size", ((64, 28), (128, 14), (256, 4), (512, 7), (512, 2)))
def test_gradients_are_as_accurate_as_eagers(channels, size):
    """Eager's on channels_last images; on contiguous ones it is more accurate."""
    torch.manual_seed(0)
    x, grad_y = torch.randn(2, channels, size, size).relu(), torch.randn(2, channels, size, size)
    x, grad_y = (tensor.contiguous(memory_format=CHANNELS_LAST) for tensor in (x, grad_y))
    weight, bias = torch.randn(channels, channels, 3, 3) / 50, torch.randn(channels)
    ours = gradients(conv_training.by_winograd, x, weight, bias, grad_y, 1)
    eager = gradients(by_pytorch, x, weight, bias, grad_y, 1)
    truth = gradients(by_pytorch, *(t.double() for t in (x, weight, bias, grad_y)), 1)
    for what, *each in zip(("y", "x", "weight", "bias"), ours, eager, truth):
        assert_within_budget(*each, what)


@pytest.mark.parametrize("value", (float("inf"), -float("inf"), float("nan")), ids=str)
def test_a_gradient_that_is_not_finite_spread_or_got_lost(value):
    x, weight, grad_y = torch.randn(20, 17, 4, 5), torch.randn(24, 17, 3, 3), torch.randn(20, 24, 4, 5)
    weight[torch.rand_like(weight) < 0.2] = 0
    for pixel in range(20):
        grad_y[pixel, pixel, pixel // 5, pixel % 5] = value
    ours = gradients(conv_training.by_winograd, x, weight, None, grad_y, 1)
    eager = gradients(by_pytorch, x, weight, None, grad_y, 1)
    truth = gradients(by_pytorch, x.double(), weight.double(), None, grad_y.double(), 1)
    assert not ours[1].isfinite().all()
    assert_like_eager(ours[1], eager[1], truth[1], "x's gradient")


@pytest.mark.parametrize("value", (float("nan"), 3e38), ids=str)
def test_a_weight_that_winograd_refuses_is_pytorchs(value):
    x, weight, grad_y = torch.randn(2, 17, 4, 5), torch.randn(24, 17, 3, 3), torch.randn(2, 24, 4, 5)
    weight[3, 4] = value
    ours = gradients(conv_training.by_winograd, x, weight, None, grad_y, 1)
    eager = gradients(by_pytorch, x, weight, None, grad_y, 1)
    for own, other in zip(ours, eager):
        torch.testing.assert_close(own, other, equal_nan=True)


def test_only_the_gradients_that_are_wanted(monkeypatch):
    packed = []
    original = convolution.pack
    monkeypatch.setattr(convolution, "pack", lambda *a, **k: packed.append(k) or original(*a, **k))
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3).requires_grad_()
    y = conv_training.by_winograd(x, weight, None, normalize(1, 1, 1, 1))
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert gradient.shape == weight.shape and packed == [{}]


def test_gradients_of_gradients():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, 5, 6), torch.randn(3, 4, 3, 3), torch.randn(3)
    results = []
    for convolve, dtype in (
        (conv_training.by_winograd, torch.float32), (by_pytorch, torch.float32), (by_pytorch, torch.float64)
    ):  # fmt: skip
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]
        y = convolve(*leaves, normalize(1, 1, 1, 1))
        (first,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), leaves))
    for what, *each in zip(("x", "weight", "bias"), *results):
        assert_within_budget(*each, what)


def test_a_table_decides(monkeypatch):
    x, weight, geometry = torch.randn(2, 16, 12, 12), torch.randn(16, 16, 3, 3), normalize(1, 1, 1, 1)
    answers, asked = [None, "eager", "winograd"], []
    monkeypatch.setattr(tuned_table, "choice", lambda problem, *_: asked.append(str(problem)) or answers.pop(0))
    for _ in range(2):
        assert conv_training.convolve(x, weight, None, geometry) is None
    assert asked == ["trained conv 16x12x12->16 3x3/1 p1,1,1,1 d1 g1"] * 2
    assert conv_training.convolve(x, weight, None, geometry) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_training.convolve(x, weight, None, geometry) is None
    assert conv_training.convolve(x.double(), weight.double(), None, geometry) is None
    assert conv_training.convolve(x, weight, None, normalize(2, 1, 1, 1)) is None


@pytest.mark.parametrize(
    "geometry, why",
    (
        (normalize(1, 3, 1, 1), "padding"),
        (normalize(1, ((0, 1), (1, 1)), 1, 1), "padding"),
        (normalize(1, 2, 2, 1), "dilation 1"),
    ),
)
def test_what_it_does_not_run(geometry, why):
    problem = TrainedProblem(ConvProblem(16, 12, 12, (16, 16, 3, 3), geometry, False, False, False, None))
    assert why in conv_training.why_not(problem, 4, torch.float32)
