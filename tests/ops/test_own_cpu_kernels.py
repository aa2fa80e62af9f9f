"""Our fp32 CPU kernels from Python: exact on integers, as accurate as eager, NaN and inf where eager has them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import resnet_kernels as rk
from helpers.convolutions import Case, integers, operands, truth
from helpers.oracle import assert_within_budget
from helpers.own_kernels import assert_like_eager, bind, skip_unless_compiled
from resnet_kernels.kernels.cpu import convolution, library, plans
from resnet_kernels.kernels.cpu.plans import KERNELS, Pool, Shapes
from resnet_kernels.kernels.geometry import Geometry, normalize

CHANNELS_LAST = torch.channels_last
SAME_3X3 = normalize(1, 1, 1, 1)


@pytest.fixture(autouse=True)
def _wherever_they_can(threads_as_before, monkeypatch):
    """Without an instruction set that is asked for, our kernels leave some convolutions to oneDNN on some processors."""
    monkeypatch.setenv(library.ISA_VARIABLE, skip_unless_compiled().isa)


SIDE = st.integers(0, 2)
PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))
CHANNELS = st.sampled_from((1, 3, 4, 8, 15, 16, 17, 33, 70))


@given(
    name=st.sampled_from(KERNELS), n=st.integers(1, 3), c_in=CHANNELS, c_out=CHANNELS,
    size=st.tuples(*[st.integers(1, 9)] * 2), kernel=st.tuples(*[st.integers(1, 4)] * 2), stride=PAIR, dilation=PAIR,
    padding=st.tuples(SIDE, SIDE, SIDE, SIDE),
    uses=st.tuples(*[st.booleans()] * 8), pool=st.sampled_from(((2, 1, 0), (2, 2, 1), (3, 2, 1))), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_geometry_is_exact_on_integers(
    name, n, c_in, c_out, size, kernel, stride, dilation, padding, uses, pool, seed
):
    """Also with an activation on the way, a max-pool behind, x as NCHW and a residual that is overwritten."""
    torch.manual_seed(seed)
    has_scale, has_bias, has_residual, overwrites, relu, activates, pools, planar = uses
    if name == "winograd":
        kernel, stride, dilation, pools, planar = (3, 3), (1, 1), (1, 1), False, False
    geometry = Geometry(stride, padding, dilation, 1)
    shape = (n, c_out, *geometry.out_size(size, kernel))
    if min(shape) < 1:
        assert plans.why_not(name, Shapes((n, c_in, *size), (c_out, c_in, *kernel), geometry), torch.float32, 1)
        return
    copies = name == "direct" and (activates or pools or planar or seed % 2 == 1)
    pools = pools and min(shape[2:]) > 2
    draw = lambda *shape: integers(shape, -2, 2, torch.float32, "cpu")  # noqa: E731
    # Winograd's transform of the weight divides by four.
    x, weight = draw(n, c_in, *size), draw(c_out, c_in, *kernel) * (4 if name == "winograd" else 1)
    scale, bias = draw(c_out) if has_scale else None, draw(c_out) if has_bias else None
    residual = draw(*shape) if has_residual and not pools else None
    activation = (draw(c_in), draw(c_in), relu) if activates else None
    top, bottom, left, right = padding
    y = x.double()
    if activation is not None:
        y = y * activation[0].double()[:, None, None] + activation[1].double()[:, None, None]
        y = y.relu() if relu else y
    y = F.conv2d(F.pad(y, (left, right, top, bottom)), weight.double(), None, stride, 0, dilation)
    y = y if scale is None else y * scale.double()[:, None, None]
    y = y if bias is None else y + bias.double()[:, None, None]
    y = y if residual is None else y + residual.double()
    y = y.relu() if relu else y
    if pools:
        y = F.max_pool2d(y, *pool)
    pool = Pool(*pool[:2], (pool[2],) * 4) if pools else None
    run = bind(name, x, weight, geometry, scale, bias, activation, pool, copies)
    x = x.contiguous(memory_format=torch.contiguous_format if planar else CHANNELS_LAST)
    residual = None if residual is None else residual.contiguous(memory_format=CHANNELS_LAST)
    before, kept = x.clone(), None if residual is None else residual.clone()
    overwrites = overwrites and residual is not None
    ours = run(x, residual, relu, overwrite_residual=overwrites)
    assert torch.equal(ours.double(), y) and torch.equal(x, before) and ours.is_contiguous(memory_format=CHANNELS_LAST)
    if residual is not None:
        assert (ours is residual) if overwrites else torch.equal(residual, kept)


LAYERS = (
    Case("stem", 1, 3, 112, 112, 64, (7, 7), 2, 3),
    Case("stage 1 3x3", 1, 64, 56, 56, 64),
    Case("stage 2 3x3/2", 1, 128, 28, 28, 128, stride=2),
    Case("stage 3 1x1", 1, 1024, 14, 14, 256, (1, 1), padding=0),
    Case("stage 4 1x1", 1, 2048, 7, 7, 512, (1, 1), padding=0),
    Case("stage 4 1x1, batch 8", 8, 2048, 7, 7, 64, (1, 1), padding=0),
    Case("stage 4 3x3", 1, 512, 7, 7, 256),
    Case("stage 4 3x3, batch 4", 4, 512, 7, 7, 64),
    Case("shortcut", 1, 256, 28, 28, 512, (1, 1), 2, 0),
)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_sums_are_as_accurate_as_eagers(case, threads):
    """Eager's error depends on the threads: on one it takes a GEMM for some 1x1 convolutions."""
    torch.set_num_threads(threads)
    x, weight, *_ = operands(case, torch.float32, "cpu", real=True)
    x, geometry = x.contiguous(memory_format=CHANNELS_LAST), normalize(case.stride, case.padding, 1, 1)
    eager = F.conv2d(x, weight, None, case.stride, case.padding)
    for name in KERNELS:
        if name == "direct" or (case.kernel == (3, 3) and case.stride == 1):
            y = bind(name, x, weight, geometry)(x, relu=False)
            assert_within_budget(y, eager, truth(case, x, weight, None, None, None, False), name)


def _weights(kind, c_out, c_in):
    weight = torch.randn(c_out, c_in, 3, 3)
    if kind == "zero in the middle":
        weight[:, :, 1, 1] = 0
    elif kind == "zeros on the edges":
        weight[:, ::2, 0], weight[:, 1::2, :, 2] = 0, 0
    elif kind == "half zeros":
        weight[torch.rand_like(weight) < 0.5] = 0
    elif kind == "tiny in the middle":
        weight[:, :, 1, 1] = 1e-12
    elif kind == "tiny beside ones":
        weight = weight.sign()
        weight[::2, :, 1, 1], weight[1::2, :, 0, 1] = 1e-12, -1e-12
    return weight


def _assert_like_eager_next_to(value, weight):
    """A value at every pixel of an image."""
    x = torch.randn(30, 17, 5, 6).contiguous(memory_format=CHANNELS_LAST)
    for pixel in range(30):
        x[pixel, pixel % 17, pixel // 6, pixel % 6] = value
    expected = [F.conv2d(x.to(dtype), weight.to(dtype), padding=1) for dtype in (torch.float32, torch.float64)]
    for name in KERNELS:
        run = bind(name, x, weight, SAME_3X3)
        assert_like_eager(run(x, relu=False), *expected, name)
        assert_like_eager(run(x), *map(torch.relu, expected), f"{name} with ReLU")
    return expected[0]


KINDS = (
    "normal", "zero in the middle", "zeros on the edges", "half zeros", "tiny in the middle", "tiny beside ones"
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", (float("inf"), -float("inf"), float("nan")), ids=str)
def test_a_value_that_is_not_finite_spread_or_got_lost(value, kind):
    """Winograd's transform turns inf into NaN; zeros times inf are NaN, so the signs of taps have to stay."""
    assert not _assert_like_eager_next_to(value, _weights(kind, 24, 17)).isfinite().all()


@pytest.mark.parametrize("kind", ("normal", "half zeros", "zero in the middle"))
def test_a_large_value_overflowed(kind):
    """2e38, which overflows in Winograd's transform alone."""
    assert _assert_like_eager_next_to(2e38, _weights(kind, 24, 17) * 1e-3).isfinite().all()


@pytest.mark.parametrize("size", (1.0, 1e-3, 1e-38, 1e-41, 1e37))
@pytest.mark.parametrize("middle", (0.0, 1e-12, -1e-30))
def test_winograd_refused_a_pruned_weight(middle, size):
    """Regression: 1% of filters with random zeros, and a quarter of ternary ones, were refused, so each pruned layer was."""
    ternary = torch.cartesian_prod(*[torch.tensor((-1.0, 0.0, 1.0))] * 8)
    ternary = torch.cat((ternary[:, :4], torch.full((len(ternary), 1), middle), ternary[:, 4:]), 1).view(-1, 1, 3, 3)
    pruned = torch.randn(64, 64, 3, 3)
    pruned[torch.rand_like(pruned) < 0.3] = 0
    pruned[:8, :, 1, 1] = middle
    for weight in (ternary * size, pruned * size):
        packed = convolution.pack("winograd", weight)
        assert packed is not None
        back = convolution.unpack("winograd", packed, weight.shape)
        assert torch.equal(back.sign(), weight.sign())
        # The smallest denormal is a limit of its own.
        assert (back.double() - weight).norm() <= 2**-22 * weight.double().norm() + 2**-149 * weight.numel()


@pytest.mark.parametrize("value", (float("nan"), float("inf"), 3e38), ids=str)
def test_a_weight_that_overflows_was_taken(value):
    """At any place; panels have up to 32 output channels. 3e38 overflows in the transform."""
    for o in range(40):
        weight = torch.ones(40, 9, 3, 3)
        weight[o, o % 9] = value
        for for_gradient in (False, True):
            assert convolution.pack("winograd", weight, for_gradient) is None
            weight[o, o % 9] = 1e38
            assert convolution.pack("winograd", weight, for_gradient) is not None
            weight[o, o % 9] = value


@pytest.mark.parametrize("shape", ((16, 16, 3, 3), (17, 5, 3, 3), (33, 70, 3, 3), (9, 7, 2, 5)), ids=str)
@pytest.mark.parametrize("layout", (torch.contiguous_format, CHANNELS_LAST), ids=str)
def test_a_weight_for_the_gradient_is_that_of_the_rotated_taps(shape, layout):
    weight = torch.randn(shape)
    weight[torch.rand_like(weight) < 0.2] = 0
    rotated = weight.flip(2, 3).transpose(0, 1).contiguous()
    weight = weight.contiguous(memory_format=layout)
    for name in KERNELS if shape[2:] == (3, 3) else ("direct",):
        assert torch.equal(convolution.pack(name, weight, for_gradient=True), convolution.pack(name, rotated))


@pytest.mark.parametrize("name", KERNELS)
def test_denormals_were_lost(name):
    """Multiples of four of the smallest one: also Winograd's products of them are exact."""
    x = integers((2, 16, 7, 7), -20000, 20000, torch.float32, "cpu").contiguous(memory_format=CHANNELS_LAST) * 2**-147
    weight = integers((16, 16, 3, 3), -1, 1, torch.float32, "cpu")
    run, expected = bind(name, x, weight, SAME_3X3), F.conv2d(x.double(), weight.double(), padding=1)
    assert 0 < expected.abs().max() < torch.finfo(torch.float32).tiny
    assert torch.equal(run(x, relu=False).double(), expected)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush denormals")
    try:
        y = run(x, relu=False)
    finally:
        torch.set_flush_denormal(False)
    # Each thread has its own setting.
    assert ((y == 0) | (y.double() == expected)).all()


@pytest.mark.parametrize("shape", ((16, 16, 3, 3), (17, 5, 3, 3), (70, 33, 3, 3), (1, 1, 3, 3), (9, 7, 2, 5)), ids=str)
def test_a_weight_came_back_changed(shape):
    weight = torch.randn(shape)
    assert torch.equal(convolution.unpack("direct", convolution.pack("direct", weight), shape), weight)
    strided = weight.contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(convolution.pack("direct", strided), convolution.pack("direct", weight))
    if shape[2:] == (3, 3):
        back = convolution.unpack("winograd", convolution.pack("winograd", weight), shape)
        assert back.shape == shape and (back.double() - weight).norm() <= 2**-22 * weight.double().norm()


@pytest.mark.parametrize("inference", (False, True))
def test_the_op_ran_something_else(inference):
    """Also on layouts that our kernels don't read as they are."""
    case = Case("", 2, 24, 9, 8, 40)
    x, weight, bias, residual, scale = operands(case, torch.float32, "cpu")
    expected = truth(case, x, weight, bias, residual, scale, True)
    wide, rows = torch.randn(2, 24, 9, 16), torch.randn(40, 2)
    wide[..., ::2], rows[:, 0] = x, bias
    layouts = (
        (x, weight, bias, residual),
        (wide[..., ::2], weight.contiguous(memory_format=CHANNELS_LAST), rows[:, 0], residual.transpose(2, 3)),
    )
    for x, weight, bias, residual in layouts:
        residual = residual if residual.shape == expected.shape else residual.contiguous().transpose(2, 3)
        with torch.inference_mode(inference), torch.profiler.profile() as profiled:
            y = rk.ops.conv_bias_act(x, weight, bias, residual, scale=scale, padding=1, backend="cpu")
        assert any(event.key.startswith("resnet_kernels::conv_bias_act.") for event in profiled.key_averages())
        assert torch.equal(y.double(), expected)


def test_gradients_of_the_op():
    case, results = Case("", 2, 24, 9, 8, 40), []
    values = operands(case, torch.float32, "cpu", real=True)
    for backend, dtype in (("cpu", torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
        leaves = [value.to(dtype).requires_grad_() for value in values]
        x, weight, bias, residual, scale = leaves
        with torch.profiler.profile() as profiled:
            y = rk.ops.conv_bias_act(x, weight, bias, residual, scale=scale, padding=1, backend=backend)
        ran_ours = any(event.key.startswith("resnet_kernels::conv_bias_act.") for event in profiled.key_averages())
        assert ran_ours == (backend == "cpu")
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for what, *each in zip(("y", "x", "weight", "bias", "residual", "scale"), *results):
        assert_within_budget(*each, what)
