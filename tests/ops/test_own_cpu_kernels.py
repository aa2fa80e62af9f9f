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
from helpers.own_kernels import assert_like_eager, bind, group_sizes, of_groups, skip_unless_compiled
from resnet_kernels.kernels.activations import RELU
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
@settings(max_examples=225, deadline=None, derandomize=True)
def test_any_geometry_is_exact_on_integers(
    name, n, c_in, c_out, size, kernel, stride, dilation, padding, uses, pool, seed
):
    """Also with an activation on the way, a max-pool behind, x as NCHW and a residual that is overwritten."""
    torch.manual_seed(seed)
    has_scale, has_bias, has_residual, overwrites, relu, activates, pools, planar = uses
    if name == "winograd":
        kernel, stride, dilation, pools, planar = (3, 3), (1, 1), (1, 1), False, False
    groups, width = 1, c_in
    if name == "grouped":
        sizes, pools = group_sizes(), False
        groups, width = 2 + c_in % 4, sizes[c_out % len(sizes)]
        c_in = c_out = groups * width
    if name == "depthwise":
        groups, width, pools, planar, activates = 1 + c_in, 1, False, False, False
        c_in = c_out = groups
    geometry = Geometry(stride, padding, dilation, groups)
    shape = (n, c_out, *geometry.out_size(size, kernel))
    if min(shape) < 1:
        assert plans.why_not(name, Shapes((n, c_in, *size), (c_out, width, *kernel), geometry), torch.float32, 1)
        return
    copies = name == "grouped" or (name == "direct" and (activates or pools or planar or seed % 2 == 1))
    pools = pools and min(shape[2:]) > 2
    draw = lambda *shape: integers(shape, -2, 2, torch.float32, "cpu")  # noqa: E731
    # Winograd's transform of the weight divides by four.
    x, weight = draw(n, c_in, *size), draw(c_out, width, *kernel) * (4 if name == "winograd" else 1)
    scale, bias = draw(c_out) if has_scale else None, draw(c_out) if has_bias else None
    residual = draw(*shape) if has_residual and not pools else None
    activation = (draw(c_in), draw(c_in), relu) if activates else None
    top, bottom, left, right = padding
    y = x.double()
    if activation is not None:
        y = y * activation[0].double()[:, None, None] + activation[1].double()[:, None, None]
        y = y.relu() if relu else y
    y = F.conv2d(F.pad(y, (left, right, top, bottom)), weight.double(), None, stride, 0, dilation, groups)
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
    ours = run(x, residual, RELU if relu else None, overwrite_residual=overwrites)
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
    Case("32 groups of 4", 1, 128, 56, 56, 128, groups=32),
    Case("32 groups of 8, stride 2", 1, 256, 56, 56, 256, stride=2, groups=32),
    Case("32 groups of 16", 1, 512, 14, 14, 512, groups=32),
    Case("32 groups of 32", 1, 1024, 7, 7, 1024, groups=32),
    Case("8 groups of 64", 1, 512, 7, 7, 512, groups=8),
    Case("2 groups of 128 to 256", 1, 256, 14, 14, 512, groups=2),
    Case("2 groups of 512, 1x1", 1, 1024, 7, 7, 1024, (1, 1), padding=0, groups=2),
    Case("depthwise", 1, 144, 56, 56, 144, groups=144),
    Case("depthwise 5x5, stride 2", 1, 72, 28, 28, 72, (5, 5), 2, 2, groups=72),
    Case("depthwise 7x7", 1, 96, 14, 14, 96, (7, 7), padding=3, groups=96),
    Case("16x16 taps of groups of 4", 1, 32, 24, 24, 32, (16, 16), padding=8, groups=8),
)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_sums_are_as_accurate_as_eagers(case, threads):
    """Eager's error depends on the threads: on one it takes a GEMM for some 1x1 convolutions."""
    torch.set_num_threads(threads)
    x, weight, *_ = operands(case, torch.float32, "cpu", real=True)
    x, geometry = x.contiguous(memory_format=CHANNELS_LAST), normalize(case.stride, case.padding, 1, case.groups)
    eager = F.conv2d(x, weight, None, case.stride, case.padding, 1, case.groups)
    for name in of_groups(case.groups, case.c_in):
        if name != "winograd" or (case.kernel == (3, 3) and case.stride == 1):
            y = bind(name, x, weight, geometry)(x, activation=None)
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
    for name in ("winograd", "direct"):
        run = bind(name, x, weight, SAME_3X3)
        assert_like_eager(run(x, activation=None), *expected, name)
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


@pytest.mark.parametrize("value", (float("inf"), -float("inf"), float("nan"), 2e38), ids=str)
@pytest.mark.parametrize("kind", ("normal", "half zeros"))
def test_a_value_left_its_group(value, kind):
    """The last group has lanes without channels beside it, or other groups."""
    for width in (1, *group_sizes()):
        weight, x = _weights(kind, 3 * width, width) * 1e-3, torch.randn(30, 3 * width, 5, 6)
        for pixel in range(30):
            x[pixel, pixel * 7 % (3 * width), pixel // 6, pixel % 6] = value
        x = x.contiguous(memory_format=CHANNELS_LAST)
        expected = [F.conv2d(x.to(d), weight.to(d), padding=1, groups=3) for d in (torch.float32, torch.float64)]
        y = bind("depthwise" if width == 1 else "grouped", x, weight, normalize(1, 1, 1, 3))(x, activation=None)
        assert_like_eager(y, *expected, f"groups of {width}")
        assert y.isfinite().view(30, 3, width, 5, 6).all((2, 3, 4)).sum() == (90 if value == 2e38 else 60)


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
    for name in ("winograd", "direct") if shape[2:] == (3, 3) else ("direct",):
        assert torch.equal(convolution.pack(name, weight, for_gradient=True), convolution.pack(name, rotated))


@pytest.mark.parametrize("name", KERNELS)
def test_denormals_were_lost(name):
    """Multiples of four of the smallest one: also Winograd's products of them are exact."""
    x = integers((2, 16, 7, 7), -20000, 20000, torch.float32, "cpu").contiguous(memory_format=CHANNELS_LAST) * 2**-147
    groups = {"grouped": 4, "depthwise": 16}.get(name, 1)
    weight = integers((16, 16 // groups, 3, 3), -1, 1, torch.float32, "cpu")
    run = bind(name, x, weight, normalize(1, 1, 1, groups))
    expected = F.conv2d(x.double(), weight.double(), padding=1, groups=groups)
    assert 0 < expected.abs().max() < torch.finfo(torch.float32).tiny
    assert torch.equal(run(x, activation=None).double(), expected)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush denormals")
    try:
        y = run(x, activation=None)
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


def test_a_weight_of_groups_came_back_changed():
    for width in (1, *group_sizes()):
        name = "depthwise" if width == 1 else "grouped"
        weight = torch.randn(5 * width, width, 3, 2)
        for copy in (weight, weight.contiguous(memory_format=CHANNELS_LAST)):
            packed = convolution.pack(name, copy)
            assert torch.equal(convolution.unpack(name, packed, tuple(weight.shape)), weight), width
        weight[-1, -1, 2, 1] = float("nan")
        assert convolution.pack(name, weight) is None


SIZED = Shapes((2, 24, 9, 8), (24, 4, 3, 3), normalize(1, 1, 1, 6), True)
REFUSED = {
    "without groups": (SIZED._replace(weight=(24, 24, 3, 3), geometry=SAME_3X3), "with groups, got groups=1"),
    "more outputs": (SIZED._replace(weight=(48, 4, 3, 3)), "got 4 to 8"),
    "fewer outputs": (SIZED._replace(weight=(18, 4, 3, 3)), "got 4 to 3"),
    "another input": (SIZED._replace(x=(2, 30, 9, 8)), "for 6 groups"),
    "depthwise": (SIZED._replace(weight=(24, 1, 3, 3), geometry=normalize(1, 1, 1, 24)), "got 1 to 1"),
    "three channels": (SIZED._replace(weight=(24, 3, 3, 3), geometry=normalize(1, 1, 1, 8)), "got 3"),
    "a pool": (SIZED._replace(pool=Pool(2, 2, (0, 0, 0, 0))), "has no pool behind it"),
    "x as it is": (SIZED._replace(copies=False), "copies rows"),
    "many taps": (
        Shapes((1, 8, 40, 40), (8, 2, 17, 16), normalize(1, 0, 1, 4), True), "adds up at most 256 taps"
    ),
    "no pixels": (SIZED._replace(x=(2, 24, 9, 0)), "sizes of at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_groups_that_are_refused(what):
    shapes, reason = REFUSED[what]
    assert reason in plans.why_not("grouped", shapes, torch.float32, 1)
    assert plans.why_not("grouped", SIZED, torch.float32, 1) is None
    assert "without groups, got groups=6" in plans.why_not("direct", SIZED, torch.float32, 1)
    assert "float32, got torch.bfloat16" in plans.why_not("grouped", SIZED, torch.bfloat16, 1)


DEPTHWISE = Shapes((2, 24, 9, 8), (24, 1, 3, 3), normalize(1, 1, 1, 24))
REFUSED_DEPTHWISE = {
    "no groups": (DEPTHWISE._replace(weight=(24, 24, 3, 3), geometry=SAME_3X3), "with groups, got groups=1"),
    "two channels": (
        DEPTHWISE._replace(weight=(24, 2, 3, 3), geometry=normalize(1, 1, 1, 12)),
        "groups of one channel",
    ),
    "two outputs": (DEPTHWISE._replace(weight=(48, 1, 3, 3)), "groups of one channel"),
    "another input": (DEPTHWISE._replace(x=(2, 48, 9, 8)), "groups of one channel"),
    "a pool": (DEPTHWISE._replace(pool=Pool(2, 2, (0, 0, 0, 0))), "has no pool behind it"),
    "copied rows": (DEPTHWISE._replace(copies=True), "reads channels_last images"),
    "many taps": (DEPTHWISE._replace(x=(1, 24, 40, 40), weight=(24, 1, 17, 16)), "adds up at most 256 taps"),
}


@pytest.mark.parametrize("what", REFUSED_DEPTHWISE)
def test_depthwise_convolutions_that_are_refused(what):
    shapes, reason = REFUSED_DEPTHWISE[what]
    assert reason in plans.why_not("depthwise", shapes, torch.float32, 1)
    assert plans.why_not("depthwise", DEPTHWISE, torch.float32, 1) is None
    assert plans.why_not("direct", DEPTHWISE, torch.float32, 1) and plans.why_not(
        "grouped", DEPTHWISE, torch.float32, 1
    )


@pytest.mark.parametrize("inference", (False, True))
@pytest.mark.parametrize(
    "case",
    (
        Case("", 2, 24, 9, 8, 40),
        Case("groups", 2, 40, 9, 8, 40, groups=10),
        Case("depthwise", 2, 40, 9, 8, 40, groups=40),
    ),
    ids=str,
)
def test_the_op_ran_something_else(case, inference):
    """Also on layouts that our kernels don't read as they are."""
    x, weight, bias, residual, scale = operands(case, torch.float32, "cpu")
    expected = truth(case, x, weight, bias, residual, scale, True)
    wide, rows = torch.randn(2, case.c_in, 9, 16), torch.randn(40, 2)
    wide[..., ::2], rows[:, 0] = x, bias
    layouts = (
        (x, weight, bias, residual),
        (wide[..., ::2], weight.contiguous(memory_format=CHANNELS_LAST), rows[:, 0], residual.transpose(2, 3)),
    )
    for x, weight, bias, residual in layouts:
        residual = residual if residual.shape == expected.shape else residual.contiguous().transpose(2, 3)
        with torch.inference_mode(inference), torch.profiler.profile() as profiled:
            y = rk.ops.conv_bias_act(
                x, weight, bias, residual, scale=scale, padding=1, groups=case.groups, backend="cpu"
            )
        ours = [
            event.key for event in profiled.key_averages() if event.key.startswith("resnet_kernels::conv_bias_act.")
        ]
        assert len(ours) == 1 and ours[0].rpartition(".")[2] in of_groups(case.groups, case.c_in)
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


def test_a_weight_of_more_channels_was_taken_for_depthwise():
    with pytest.raises(ValueError, match=r"must have one input channel, got \(24, 2, 3, 3\)"):
        convolution.pack("depthwise", torch.ones(24, 2, 3, 3))


def test_depthwise_activated_on_the_way_in():
    x, weight = torch.ones(1, 24, 5, 5).contiguous(memory_format=CHANNELS_LAST), torch.ones(24, 1, 3, 3)
    run = bind("depthwise", x, weight, normalize(1, 1, 1, 24), None, None, (torch.ones(24), torch.ones(24), True))
    with pytest.raises(ValueError, match="depthwise activates x only where it copies rows"):
        run(x)
