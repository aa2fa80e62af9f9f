"""Hopper's kernel in the interpreter: exact on integers in every tile and view, and what keeps a convolution from it."""

import itertools
from dataclasses import replace

import pytest
import torch

from helpers.convolutions import Case, operands, truth
from helpers.merged_shortcuts import MERGED, merge, merged_operands, name_of
from helpers.oracle import assert_within_budget
from helpers.planted import planted
from resnet_kernels import ops
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.geometry import Geometry, normalize
from resnet_kernels.kernels.operands import ConvOperands

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_kernels.kernels import conv_bias_act, target
from resnet_kernels.kernels.sm90 import conv as sm90_conv
from resnet_kernels.kernels.sm90 import split_k_counters
from resnet_kernels.kernels.sm90.conv_layout import ConvShape, plan, why_not, why_not_merged
from resnet_kernels.kernels.sm90.conv_tiles import CONFIGS, choose_box, choose_config

WHOLE, SPLIT = ([config for config in CONFIGS if (config.split_k > 1) is split] for split in (False, True))

pytestmark = pytest.mark.usefixtures("hopper_with_nan_outputs")

FP16 = torch.float16

# Layers of ResNet-18 and ResNet-50 made small, then what is awkward.
CASES = (
    Case("3x3, 64 channels", 2, 64, 8, 8, 64),
    Case("3x3, 128 channels", 1, 128, 7, 7, 128),
    Case("1x1 up", 1, 64, 6, 6, 256, (1, 1), padding=0),
    Case("1x1 down", 3, 256, 7, 7, 64, (1, 1), padding=0),
    Case("3x3/2", 2, 64, 14, 14, 128, stride=2),
    Case("3x3/2, to 7x7", 1, 128, 14, 14, 64, stride=2),
    Case("1x1/2", 2, 64, 8, 8, 128, (1, 1), 2, 0),
    Case("1x1/2, odd size", 3, 64, 7, 7, 72, (1, 1), 2, 0),
    Case("1x1/(3, 2)", 1, 32, 8, 7, 32, (1, 1), (3, 2), 0),
    Case("1x1 with padding", 1, 32, 5, 4, 32, (1, 1), padding=1),
    Case("14x14 of one image", 1, 32, 14, 14, 64),
    Case("24 channels to 40", 3, 24, 7, 5, 40),
    Case("8 channels to 8", 1, 8, 6, 6, 8),
    Case("72 channels to 264", 1, 72, 3, 3, 264),
    Case("padding at the bottom and right", 2, 32, 6, 7, 64, padding=((0, 1), (0, 1))),
    Case("padding at the top alone", 1, 32, 6, 5, 64, padding=((2, 0), (0, 0))),
    Case("SAME 3x3/2", 1, 32, 8, 6, 64, stride=2, padding=((0, 1), (0, 1))),
    Case("3x3/2, padding of every parity", 1, 32, 8, 6, 64, stride=2, padding=((3, 0), (2, 1))),
    Case("7x7/2", 1, 32, 8, 8, 32, (7, 7), 2, 3),
    Case("3x3/2, 7x7", 3, 64, 7, 7, 128, stride=2),
    Case("3x3/2, odd rows", 1, 24, 9, 6, 40, stride=2, padding=((1, 0), (2, 1))),
    Case("3x3/2, odd columns", 2, 40, 4, 5, 16, stride=2, padding=((0, 1), (3, 0))),
    Case("3x3/2, even, ragged steps", 1, 72, 8, 6, 24, stride=2),
    Case("SAME 3x3/2, odd size", 1, 32, 9, 7, 64, stride=2),
    Case("7x7/2, odd size", 1, 16, 9, 7, 32, (7, 7), 2, 3),
    Case("1x3/2, odd size", 1, 16, 5, 7, 32, (1, 3), 2, ((0, 0), (1, 1))),
    Case("3x3/2, three pixels", 2, 16, 3, 3, 8, stride=2, padding=0),
    Case("2x5", 1, 16, 6, 9, 16, (2, 5), padding=((0, 1), (2, 2))),
    Case("1x1 image", 5, 64, 1, 1, 64),
    Case("one pixel of 64 images", 64, 16, 3, 5, 24),
    Case("one pixel of 70 images, uneven padding", 70, 24, 4, 3, 16, (3, 2), padding=((2, 0), (0, 3))),
    Case("one pixel of 64 images, 3x3/2", 64, 16, 5, 3, 24, stride=2),
    Case("one row", 1, 32, 1, 33, 32),
    Case("padding wider than the image", 1, 16, 2, 2, 16, padding=3),
)


def run(kernel, case, x, weight, bias, residual, scale, relu, config=None):
    geometry = normalize(case.stride, case.padding, case.dilation, case.groups)
    assert why_not(x.shape, weight.shape, geometry, x.dtype) is None
    return kernel.launch(ConvOperands(x, weight, bias, residual, scale, geometry, RELU if relu else None), config)


@pytest.mark.slow(unless=lambda case: case.n < 8 and case.c_out < 128)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_on_integers_as_the_pointer_kernel_is(case, device):
    x, weight, bias, residual, scale = operands(case, FP16, device)
    for use in ((bias, residual, scale, True), (None, None, None, False)):
        expected = truth(case, x, weight, *use)
        assert expected.abs().max() <= 2048, "the test's own sums must be exact"
        y = run(sm90_conv, case, x, weight, *use)
        assert torch.equal(y.double().cpu(), expected)
        assert y.dtype == FP16 and y.is_contiguous(memory_format=torch.channels_last)
        smallest = conv_bias_act.CONFIGS[3]
        assert torch.equal(y, run(conv_bias_act, case, x, weight, *use, config=smallest))


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_every_shipped_config_is_exact(config, device, monkeypatch):
    """Ragged in every axis, several tiles a program; 64 input channels for stride 2 in pairs."""
    monkeypatch.setattr(sm90_conv, "multiprocessors", lambda device: 1)
    config = replace(config, programs_per_sm=1)
    for case in (
        Case("", 2, 40, 7, 7, 72),
        Case("", 1, 72, 7, 7, 40, (1, 1), padding=0),
        Case("", 3, 64, 10, 6, 24, stride=2),
        *([Case("", 2, 40, 9, 7, 24, stride=2)] if config.split_k == 1 else []),
        Case("", 1, 64, 7, 7, 24, (1, 1), 2, 0),
    ):
        x, weight, bias, residual, scale = operands(case, FP16, device)
        y = run(sm90_conv, case, x, weight, bias, residual, scale, True, config)
        assert torch.equal(y.double().cpu(), truth(case, x, weight, bias, residual, scale, True))


def test_every_epilogue_is_exact(device):
    case = Case("", 2, 32, 6, 6, 40)
    x, weight, *vectors = operands(case, FP16, device)
    for given in itertools.product((True, False), repeat=3):
        use = [vector if is_given else None for vector, is_given in zip(vectors, given)]
        for relu in (True, False):
            y = run(sm90_conv, case, x, weight, *use, relu)
            assert torch.equal(y.double().cpu(), truth(case, x, weight, *use, relu))
    half = [vector.half() for vector in vectors]
    y = run(sm90_conv, case, x, weight, *half, True)
    assert torch.equal(y.double().cpu(), truth(case, x, weight, *vectors, True))


def test_few_pixels_and_a_long_loop_are_split(device):
    """As a batch of 1 is chosen to be; again and again, on counters that the last program left at zero."""
    case = Case("", 1, 256, 7, 7, 64)
    assert plan(ConvShape((1, 256, 7, 7), (64, 256, 3, 3), Geometry(padding=PAD)), RELU).config in SPLIT
    for _ in range(3):
        x, weight, bias, residual, scale = operands(case, FP16, device)
        y = run(sm90_conv, case, x, weight, bias, residual, scale, True)
        assert torch.equal(y.double().cpu(), truth(case, x, weight, bias, residual, scale, True))
        assert not split_k_counters.zeros(10, device).any()


def test_counters_are_not_shared_by_what_may_run_at_a_time(monkeypatch, device):
    def address(stream):
        monkeypatch.setattr(split_k_counters, "_stream", lambda _: stream)
        return split_k_counters.zeros(8, device).data_ptr()

    streams = {stream: address(stream) for stream in (1, 2)}
    assert streams[1] != streams[2] and address(1) == streams[1]
    assert not split_k_counters.zeros(split_k_counters._PER_STREAM + 1, device).any()
    # Captured launches: none has another's, nor a stream's, until the block is spent.
    monkeypatch.setattr(split_k_counters, "_is_capturing", lambda _: True)
    monkeypatch.setitem(split_k_counters._LEFT, device, torch.zeros(20, dtype=torch.int32, device=device))
    kept = [split_k_counters.zeros(8, device) for _ in range(3)]
    taken = [tensor.data_ptr() for tensor in kept]
    assert len({*taken, *streams.values()}) == 5 and taken[1] - taken[0] == 32
    monkeypatch.delitem(split_k_counters._LEFT, device)
    assert not split_k_counters.zeros(8, device).any()


@pytest.mark.parametrize("case", (Case("3x3", 1, 128, 7, 7, 64), Case("3x3/2", 1, 64, 8, 8, 64, stride=2)), ids=str)
def test_as_accurate_as_eager(case, device):
    x, weight, bias, residual, scale = operands(case, FP16, device, real=True)
    y = run(sm90_conv, case, x, weight, bias, residual, scale, True)
    z = torch.conv2d(x, weight, None, case.stride, case.padding)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    eager = torch.relu(torch.batch_norm(z, scale, bias, zero, one, False, 0.0, 0.0, False) + residual)
    assert_within_budget(y, eager, truth(case, x, weight, bias, residual, scale, True))


def test_bf16_in_the_interpreter_is_upcast(device):
    case = Case("", 1, 32, 6, 6, 32)
    x, weight, bias, residual, scale = operands(case, torch.bfloat16, device)
    y = run(sm90_conv, case, x, weight, bias, residual, scale, True)
    assert torch.equal(y.double().cpu(), truth(case, x, weight, bias, residual, scale, True))


def test_nan_stays_nan_and_inf_stays_inf(device):
    x = torch.randn(1, 24, 6, 6).to(device, FP16)
    weight = torch.randn(16, 24, 1, 1).abs().to(device, FP16)
    case = Case("", 1, 24, 6, 6, 16, (1, 1), padding=0)
    x[0, 3, 2, 2], x[0, 5, 4, 4] = float("nan"), float("inf")
    y = run(sm90_conv, case, x, weight, None, None, None, True)
    assert y[0, :, 2, 2].isnan().all() and y.isnan().sum() == 16
    assert y[0, :, 4, 4].isposinf().all() and y.isinf().sum() == 16
    residual = torch.zeros_like(y)
    residual[0, 0, 0, 0] = float("nan")
    y = run(sm90_conv, case, x, weight, None, residual, None, True)
    assert y[0, 0, 0, 0].isnan() and y.isnan().sum() == 17


@pytest.mark.parametrize("size", (6, 7))
@pytest.mark.parametrize("stride", (1, 2))
def test_an_image_does_not_see_its_neighbors(stride, size, device):
    """Through the padding neither the next image nor, at stride 2, the other column's channels leak in."""
    x = torch.full((3, 32, size, size), float("nan"), device=device, dtype=FP16)
    x[1] = 1.0
    case = Case("", 3, 32, size, size, 16, stride=stride)
    y = run(sm90_conv, case, x, torch.ones(16, 32, 3, 3, device=device, dtype=FP16), None, None, None, True)
    assert y[1].isfinite().all() and y[[0, 2]].isnan().all()


def test_layouts_and_addresses_do_not_matter(device):
    case = Case("", 2, 16, 8, 8, 16)
    x, weight, bias, residual, scale = operands(case, FP16, device)
    expected = truth(case, x, weight, bias, residual, scale, True)
    wide = torch.randn(2, 16, 8, 16, device=device).half()
    wide[..., ::2] = x
    # channels_last as it should be, two bytes after a multiple of 16.
    shifted = torch.empty(x.numel() + 1, device=device, dtype=FP16)[1:].view(2, 8, 8, 16).permute(0, 3, 1, 2)
    shifted.copy_(x)
    assert shifted.data_ptr() % 16 and shifted.is_contiguous(memory_format=torch.channels_last)
    strided_bias = torch.stack([bias, bias], 1)[:, 0]
    for image in (x, x.contiguous(memory_format=torch.channels_last), wide[..., ::2], shifted):
        y = run(sm90_conv, case, image, weight, strided_bias, residual, scale, True)
        assert torch.equal(y.double().cpu(), expected)


def test_the_predicate_says_why_not_merged():
    conv = ConvShape((2, 64, 7, 7), (256, 64, 1, 1), Geometry())
    shortcut = ConvShape((2, 128, 14, 14), (256, 128, 1, 1), Geometry((2, 2)))
    narrow = shortcut._replace(x=(2, 12, 14, 14), weight=(256, 12, 1, 1))
    large = shortcut._replace(weight=(256, 128, 3, 3), geometry=Geometry((2, 2), PAD))
    assert why_not_merged(conv, shortcut, FP16) is None
    for first, second, dtype, reason in (
        (conv, shortcut, torch.float32, "the convolution: dtype must be float16 or bfloat16"),
        (conv, narrow, FP16, "the shortcut: channels must be multiples"),
        (conv, large, FP16, "must be 1x1 without padding"),
        (conv, shortcut._replace(x=(2, 128, 16, 16)), FP16, r"output shape \(2, 256, 7, 7\), got \(2, 256, 8, 8\)"),
        (conv._replace(geometry=Geometry(groups=2)), shortcut, FP16, "the convolution: groups must be 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            raise ValueError(why_not_merged(first, second, dtype))


X, W, PAD = (2, 64, 8, 8), (64, 64, 3, 3), (1, 1, 1, 1)
REASONS = [
    (X, W, Geometry(padding=PAD), FP16, None),
    (X, W, Geometry((2, 2), PAD), torch.bfloat16, None),
    ((2, 64, 7, 7), (64, 64, 1, 1), Geometry((2, 2)), FP16, None),
    (X, W, Geometry(), torch.float32, "dtype must be float16 or bfloat16, got torch.float32"),
    (X, (64, 32, 3, 3), Geometry(groups=2), FP16, "groups must be 1, got 2"),
    (X, W, Geometry(dilation=(2, 1)), FP16, r"dilation must be 1, got \(2, 1\)"),
    ((0, 64, 8, 8), W, Geometry(), FP16, "x must not be empty"),
    ((2, 3, 8, 8), (64, 3, 7, 7), Geometry((2, 2)), FP16, "multiples of 8, got C_in=3, C_out=64"),
    (X, (33, 64, 3, 3), Geometry(), FP16, "multiples of 8, got C_in=64, C_out=33"),
    ((2**16, 8, 2**8, 2**8), (8, 8, 1, 1), Geometry(), FP16, "at most 2147483519 pixels"),
    (X, W, Geometry((3, 3)), FP16, r"stride must be 1 or 2, got \(3, 3\) with a kernel of 3x3"),
    (X, W, Geometry((2, 1)), FP16, "stride must be 1 or 2"),
    ((2, 64, 8, 7), W, Geometry((2, 2), PAD), FP16, None),
    ((2, 40, 8, 8), (64, 40, 3, 3), Geometry((2, 2)), FP16, None),
    ((2, 64, 8, 1), W, Geometry((2, 2), PAD), FP16, "at least 2x2 pixels, got 8x1"),
]


@pytest.mark.parametrize("x_shape, weight_shape, geometry, dtype, reason", REASONS)
def test_the_predicate_says_why(x_shape, weight_shape, geometry, dtype, reason):
    said = why_not(x_shape, weight_shape, geometry, dtype)
    if reason is None:
        assert said is None
    else:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(said)


def test_triton_is_this_kernel_on_hopper_where_it_can(monkeypatch, device):
    taken = []

    original = sm90_conv.launch
    monkeypatch.setattr(
        sm90_conv, "launch", lambda operands, *rest: (taken.append(len(operands.x)), original(operands, *rest))[1]
    )
    monkeypatch.setattr(target, "is_hopper", lambda device: True)
    for case, expected in (
        (CASES[0], [2]),
        (Case("", 2, 64, 7, 7, 64, stride=2), [2]),
        (Case("", 2, 64, 7, 7, 64, stride=3), []),
        (Case("", 1, 3, 6, 6, 8), []),
    ):
        taken.clear()
        x, weight, bias, residual, scale = operands(case, FP16, device)
        y = ops.conv_bias_act(
            x, weight, bias, residual, scale=scale, stride=case.stride, padding=1, backend="triton"
        )  # fmt: skip
        assert torch.equal(y.double().cpu(), truth(case, x, weight, bias, residual, scale, True))
        assert taken == expected


def test_it_runs_on_compute_capability_9_alone(monkeypatch):
    for capability, expected in (((9, 0), True), ((8, 0), False), ((10, 0), False)):
        monkeypatch.setattr(target, "_capability", lambda device, value=capability: value)
        assert target.is_hopper(torch.device("cuda", 0)) is (expected and torch.version.hip is None)
        is_blackwell = target.is_data_center_blackwell(torch.device("cuda", 0))
        assert is_blackwell is (capability == (10, 0) and torch.version.hip is None)
    assert not target.is_hopper(torch.device("cpu")) and not target.is_data_center_blackwell(torch.device("cpu"))


def test_boxes_waste_nothing_where_they_need_not():
    for pixels, box in (
        ((256, 7, 7), (128, 1, 1)),
        ((256, 14, 14), (32, 2, 2)),
        ((256, 28, 28), (8, 4, 4)),
        ((256, 56, 56), (2, 8, 8)),
        ((1, 1, 3136), (1, 1, 128)),
        ((1, 56, 56), (1, 2, 64)),
    ):
        assert choose_box(128, pixels) == box


def test_choice_of_tiles():
    wide, large, tall, square, short_k, split_4, split_8, split_16, *_ = CONFIGS
    for layer, expected in {
        (256 * 14 * 14, 9, 256, 256): wide,
        (256 * 56 * 56, 1, 64, 256): large,  # one step of the loop: storing has to overlap
        (256 * 56 * 56, 9, 64, 64): tall,
        (7 * 7, 9, 512, 512): square,
        (256 * 56 * 56, 9, 96, 64): short_k,
    }.items():
        assert choose_config(*layer) is expected
    for layer, expected in {
        (28 * 28, 9, 128, 128): split_4,
        (14 * 14, 9, 256, 256): split_8,
        (7 * 7, 9, 512, 512): split_16,
        (7 * 7, 1, 512, 2048): square,  # eight steps
        (256 * 7 * 7, 9, 512, 512): large,
    }.items():
        assert choose_config(*layer, may_split=True) is expected


BUG_CASES = (
    Case("", 2, 40, 7, 6, 72),
    Case("", 1, 64, 6, 5, 24, (3, 2), padding=((1, 0), (0, 2))),
    Case("", 2, 64, 8, 6, 40, stride=2, padding=((1, 0), (1, 2))),
    Case("", 2, 40, 5, 7, 24, stride=2, padding=((1, 0), (0, 1))),
    Case("", 64, 16, 3, 3, 8, padding=((1, 1), (2, 0))),
)
KERNEL, PARTS, PLAN = "sm90.conv", "sm90.conv_device", "sm90.conv_layout"
BUGS = {
    "images of one tile": (KERNEL, "box // (tiles_w * tiles_h) * BOX_N", "box // (tiles_w * tiles_h) * 0"),
    "every other tile left out": (KERNEL, "SPLIT_K, tl.num_programs(0),", "SPLIT_K, 2 * tl.num_programs(0),"),
    "dropped residual": (PARTS, "if residual_desc is not None:", "if False:"),
    "residual of another tile": (PARTS, "residual_desc.load(at)", "residual_desc.load([0, 0, 0, 0])"),
    "dropped ReLU": (PARTS, "elementwise.activate(acc, ACT,", "elementwise.activate(acc, None,"),
    "swapped scale and shift": (PARTS, "acc *= tl.load(scale_ptr + offs_c", "acc *= tl.load(bias_ptr + offs_c"),
    "second half's pixels": (PARTS, "PARTS // 2, FIRST + HALF, shortcut", "PARTS // 2, FIRST, shortcut"),
    "transposed taps": (PARTS, "r = tap // columns + skipped_r\n        s = tap % columns + skipped_s",
                        "s = tap // columns + skipped_r\n        r = tap % columns + skipped_s"),
    "weight of another tap": (PARTS, "w_desc.load([channel, tap * (N_CHUNKS * BLOCK_K) + c])",
                              "w_desc.load([channel, r * (N_CHUNKS * BLOCK_K) + c])"),
    "channel chunks forgotten": (PARTS, "c = chunk * BLOCK_K", "c = 0"),
    "edge filled with what lies beside it": (KERNEL, "h - lead_h, w - lead_w,", "h - lead_h, w,"),
    "wrong row parity": (PARTS, "r % 2, w + s // 2", "1 - r % 2, w + s // 2"),
    "wrong column parity": (PARTS, "column = s % 2", "column = (1 - s % 2)"),
    "row skew forgotten": (PARTS, "r += SKEW_H", "r += 0"),
    "column skew forgotten": (PARTS, "s += SKEW_W", "s += 0"),
    "first tap of another parity": (PARTS, "tl.constexpr = (SKEW_H + PARITY_H) % 2", "tl.constexpr = PARITY_H"),
    "a parity's last column of taps": (PARTS, "(KERNEL_W - FIRST_S + 1) // 2", "(KERNEL_W - FIRST_S) // 2"),
    "a parity's lead": (PARTS, "h + SKEW_H * (1 - PARITY_H)", "h"),
    "a tap too many skipped above": (PARTS, "skipped_r = tl.maximum(-h, 0)", "skipped_r = tl.maximum(1 - h, 0)"),
    "skipped taps' weights": (PARTS, "s = tap % columns + skipped_s", "s = tap % columns"),
    "a tap too many skipped on the right": (PARTS, "tl.minimum(in_w - w, COLUMNS)", "tl.minimum(in_w - w - 1, COLUMNS)"),
    "one parity for another": (PARTS, "x_descs[parity]", "x_descs[parity // 2 * 2]"),
    "edge filled with the next row": (PLAN, "dense_view((batch, in_h, in_w, c_in), (*box, config.block_k))",
                                      "dense_view((batch, in_h, in_w, c_in), (*box, config.block_k))"
                                      "._replace(shape=(batch, in_h - 1, in_w + 1, c_in))"),
    "padding of the wrong side": (PLAN, "geometry.padding[0], geometry.padding[2]",
                                  "geometry.padding[1], geometry.padding[3]"),
    "image's last pair of rows": (PLAN, "(batch, in_h // 2, 2,", "(batch, in_h // 2 - 1, 2,"),
    "a parity's last column": (PLAN, "(in_w + 1 - q) // 2, c_in)", "(in_w - 1) // 2, c_in)"),
    "a parity's first pixel": (PLAN, "(p * in_w + q) * c_in)", "q * c_in)"),
    "a share's sums left out": (PARTS, "for i in range(N_SUMS):", "for i in range(1, N_SUMS):"),
    "every share does it all": (PARTS, "range(steps * part // SPLIT_K,", "range(0,"),
    "the first share stores": (PARTS, "== SPLIT_K - 1", "== SPLIT_K - 2"),
    "counter not left at zero": (PARTS, "tl.store(counter_ptr + share // SPLIT_K, 0)", "share += 0"),
    "another tile's shares": (KERNEL, "tile * (SPLIT_K * TILE)", "tile * TILE"),
    "shortcut's scale for both": (PARTS, "scale = tl.load(scale_ptr + offs_c, mask=offs_c < c_out, other=1.0)",
                                  "scale = tl.load(shortcut_scale_ptr + offs_c, mask=offs_c < c_out, other=1.0)"),
    "never parked": (KERNEL, "if PARKS and must_park", "if False and must_park"),
    "parked without its scale": (KERNEL, "park(acc * scale[:, None], ", "park(acc, "),
    "parked in one place": (PARTS, "PARTS // 2, FIRST + HALF)", "PARTS // 2, FIRST)"),
    "shortcut's bias forgotten": (PARTS, "if shortcut_bias_ptr is not None:", "if False:"),
    "shortcut's last channels": (PLAN, "SHORTCUT_CHUNKS=cdiv(shortcut.weight[1], config.block_k)", "SHORTCUT_CHUNKS=1"),
    "shortcut without its stride": (PLAN, "step_h * in_w * c_in, step_w * c_in, 1), box)", "in_w * c_in, c_in, 1), box)"),
    "fewer tiles of channels": (PLAN, "tiles_c=tiles[3]", "tiles_c=1"),
}  # fmt: skip


def failures(device):
    """Whether each of some calls goes wrong; in the first configuration one program walks over all tiles."""
    for zero in ([], [0]):
        conv, shortcut = merged_operands(MERGED[3], device)
        shortcut[4][zero] = 0.0
        y, expected = merge(MERGED[3], conv, shortcut, config=replace(CONFIGS[4], block_k=16))
        yield not torch.equal(y.double().cpu(), expected)
    for case, config in itertools.product(
        BUG_CASES, (replace(CONFIGS[4], parts=4), replace(CONFIGS[3], programs_per_sm=1), SPLIT[0])
    ):
        if config.split_k > 1 and case.stride == 2:
            continue
        x, weight, bias, residual, scale = operands(case, FP16, device)
        y = run(sm90_conv, case, x, weight, bias, residual, scale, True, config)
        yield not torch.equal(y.double().cpu(), truth(case, x, weight, bias, residual, scale, True))


def plant(where, old, new, tmp_path, monkeypatch) -> None:
    """Puts a module with a piece of its source replaced in the place of one of the kernel's three."""
    module = planted(where, tmp_path, old, new)
    if where == KERNEL:
        monkeypatch.setattr(module, "multiprocessors", lambda device: 1)
        monkeypatch.setattr(sm90_conv, "launch", module.launch)
        return
    for name in vars(module).keys() & vars(sm90_conv).keys():
        if getattr(module, name) is not getattr(sm90_conv, name) and not name.startswith("__"):
            monkeypatch.setattr(sm90_conv, name, getattr(module, name))


@pytest.mark.slow(unless=lambda name: name in [*BUGS][:2])
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name, tmp_path, device, monkeypatch):
    plant(*BUGS[name], tmp_path, monkeypatch)
    assert any(failures(device))


@pytest.mark.slow(unless=lambda where: where == KERNEL)
@pytest.mark.parametrize("where", (KERNEL, PARTS, PLAN))
def test_nothing_planted_nothing_caught(where, tmp_path, device, monkeypatch):
    plant(where, "import annotations", "import annotations", tmp_path, monkeypatch)
    assert not any(failures(device))
