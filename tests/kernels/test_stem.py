"""The stem kernel in the interpreter: exact on integers, NaN and inf where eager has them, what the packing pass makes."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers.oracle import assert_within_budget
from helpers.planted import planted
from helpers.stems import SIZES, integers, reals, truth, with_value
from resnet_kernels.kernels.geometry import Geometry

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_kernels.kernels.sm90 import stem
from resnet_kernels.kernels.sm90.stem_layout import CONFIGS, GEOMETRY, POOL, choose_config, plan, split_rows, why_not

pytestmark = pytest.mark.usefixtures("hopper_with_nan_outputs")

FP16, BF16 = torch.float16, torch.bfloat16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def label(config) -> str:
    return f"{config.block_w}{' descriptor' if config.descriptor else ''}"


@pytest.mark.parametrize("config", CONFIGS, ids=label)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_exact_on_integers(size, config, device):
    operands = integers(*size, device)
    x, weight, *_ = operands
    assert why_not(x.shape, x.dtype, weight.shape, GEOMETRY, (3, 2, 1, 1, False), FP16) is None
    expected = truth(*operands)
    assert 0 < expected.max() <= 2048, "the test's own sums must be exact"
    y = stem.launch(*operands, config=config)
    assert torch.equal(y.double().cpu(), expected)
    assert y.dtype == FP16 and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow(unless=lambda config: config == CONFIGS[0])
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_segments_of_rows_are_exact(config, device, monkeypatch):
    """As on a machine with more processors than strips: the row above a segment is computed again."""
    operands = integers(1, 19, 12, 16, device)
    for multiprocessors in (1, 2, 100):
        monkeypatch.setattr(stem, "multiprocessors", lambda device, n=multiprocessors: n)
        y = stem.launch(*operands, config=replace(config, programs_per_sm=1))
        assert torch.equal(y.double().cpu(), truth(*operands))


def test_without_scale_or_shift_and_with_half_ones(device):
    x, weight, scale, shift = integers(1, 16, 16, 16, device)
    for use in itertools.product((scale, None), (shift, None)):
        assert torch.equal(stem.launch(x, weight, *use).double().cpu(), truth(x, weight, *use))
    assert torch.equal(stem.launch(x, weight, scale.half(), shift.half()), stem.launch(x, weight, scale, shift))


def test_bfloat16_is_exact(device):
    operands = integers(1, 20, 22, 16, device, BF16, most=1)
    operands = (*operands[:2], operands[2].sign(), operands[3])
    expected = truth(*operands)
    assert expected.max() <= 256, "the test's own sums must be exact"
    y = stem.launch(*operands)
    assert y.dtype == BF16 and torch.equal(y.double().cpu(), expected)


@pytest.mark.slow(unless=lambda value, config: value != value and config == CONFIGS[0])
@pytest.mark.parametrize("config", CONFIGS[::2], ids=label)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_nan_and_inf_spread_as_in_eager_and_no_further(value, config, device):
    """Each column parity and both edges: the eighth pixel of a window has no say, zero weight or not."""
    for h, w in ((7, 0), (8, 7), (9, 8), (5, 9), (0, 10), (10, 19), (19, 18)):
        operands, expected = with_value(value, h, w, device)
        y = stem.launch(*operands, config=config)
        torch.testing.assert_close(y.double().cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_nan_in_the_vectors_and_the_weight_stays(device):
    x, weight, scale, shift = integers(1, 12, 12, 16, device)
    scale[3], shift[5], weight[7, 1, 3, 3] = float("nan"), float("nan"), float("nan")
    expected = truth(x, weight, scale, shift)
    y = stem.launch(x, weight, scale, shift)
    assert expected[:, (3, 5, 7)].isnan().all()
    torch.testing.assert_close(y.double().cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("config", CONFIGS[::2], ids=label)
def test_as_accurate_as_eager(config, device):
    operands, eager = reals(2, 30, 34, device)
    assert_within_budget(stem.launch(*operands, config=config), eager, truth(*operands))


# What the packing pass makes.


def packed_by_pytorch(x, dtype, todo, mean=None, std=None):
    """The image in four channels and with its padding, as PyTorch would compute it."""
    v = x.float().cpu()
    if mean is not None:
        mean, std = (torch.tensor(s)[:, None, None] for s in (mean, std))
        v = ((v / 255 if x.dtype == torch.uint8 else v) - mean) / std
    _, rows, columns, _ = todo.image_shape
    v = F.pad(v, (3, columns - 3 - x.shape[3], 3, rows - 3 - x.shape[2], 0, 1))
    return v.permute(0, 2, 3, 1).to(dtype)


@pytest.mark.parametrize("statistics", ((None, None), (MEAN, STD)), ids=("as it is", "normalized"))
@pytest.mark.parametrize("x_dtype", (torch.float32, FP16, BF16, torch.uint8), ids=str)
def test_packing_is_pytorchs_own_bit_for_bit(x_dtype, statistics, device):
    for (h, w), channels_last in itertools.product(((20, 23), (33, 18)), (False, True)):
        x = torch.rand(2, 3, h, w, device=device)
        x = (x * 255).to(x_dtype) if x_dtype == torch.uint8 else x.to(x_dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        todo = plan(tuple(x.shape), 16, 1).packing
        weight = torch.randn(16, 3, 7, 7, device=device).half()
        packed, _ = stem.pack(x, weight, *statistics, todo)
        assert torch.equal(packed.cpu().view(todo.image_shape), packed_by_pytorch(x, FP16, todo, *statistics))


def test_a_weight_is_packed_with_zeros_at_the_eighth_pixel_fourth_channel_and_behind(device):
    x = torch.zeros(1, 3, 8, 8, device=device)
    weight = torch.randn(32, 3, 7, 7, device=device).half().contiguous(memory_format=torch.channels_last)
    _, packed = stem.pack(x, weight, None, None, plan((1, 3, 8, 8), 32, 1).packing)
    assert packed.shape == (64, 7, 8, 4)
    assert torch.equal(packed[:32, :, :7, :3], weight.permute(0, 2, 3, 1))
    assert packed[32:].abs().max() == packed[:, :, 7].abs().max() == packed[..., 3].abs().max() == 0


def test_slices_and_uint8_images_go_through_the_whole_kernel(device):
    x, weight, scale, shift = integers(2, 20, 22, 16, device)
    wide = torch.zeros(2, 5, 23, 30, device=device)
    wide[:, 1:4, 2:22, 5:27] = x
    assert torch.equal(stem.launch(wide[:, 1:4, 2:22, 5:27], weight, scale, shift).double().cpu(),
                       truth(x, weight, scale, shift))  # fmt: skip
    images = torch.randint(0, 3, x.shape, device=device).to(torch.uint8)
    assert torch.equal(stem.launch(images, weight, scale, shift).double().cpu(), truth(images, weight, scale, shift))
    # Exact in fp16 as well: (v / 255 - 0) / (1 / 255) is not, but of 0 and 255 it is.
    mean, std = (0.5, 0.0, 1.0), (0.5, 1.0, 0.25)
    black_and_white = images.clamp(max=1) * 255
    normal = (black_and_white.double() / 255 - torch.tensor(mean, device=device)[:, None, None]) / torch.tensor(
        std, device=device
    )[:, None, None]
    y = stem.launch(black_and_white, weight, scale, shift, mean, std)
    assert torch.equal(y.double().cpu(), truth(normal, weight, scale, shift))


# The predicate and the plan.

W = (64, 3, 7, 7)
REFUSED = {
    "dtype must be": dict(dtype=torch.float32),
    "x must be float32": dict(x_dtype=torch.float64),
    "7x7 on 3 channels": dict(weight_shape=(64, 3, 3, 3)),
    "on 1 channels": dict(x_shape=(1, 1, 224, 224), weight_shape=(64, 1, 7, 7)),
    "multiple of 16 up to 64, got 56": dict(weight_shape=(56, 3, 7, 7)),
    "up to 64, got 96": dict(weight_shape=(96, 3, 7, 7)),
    "stride 2 and padding 3": dict(geometry=GEOMETRY._replace(stride=(1, 1))),
    "padding 3, got": dict(geometry=Geometry((2, 2), (2, 3, 2, 3))),
    "groups=3": dict(geometry=GEOMETRY._replace(groups=3), weight_shape=W),
    "max-pool must be": dict(pool=(3, 2, 0, 1, False)),
    "ceil_mode": dict(pool=(3, 2, 1, 1, True)),
    "(2, 1)": dict(pool=((3, 3), (2, 1), 1, 1, False)),
    "not be empty": dict(x_shape=(0, 3, 224, 224)),
    "smaller": dict(x_shape=(1, 3, 40000, 40000)),
}
TAKEN = dict(x_shape=(8, 3, 224, 224), x_dtype=torch.uint8, weight_shape=W, geometry=GEOMETRY, pool=POOL, dtype=BF16)


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_and_why(reason):
    assert why_not(**TAKEN) is None
    assert reason in why_not(**TAKEN | REFUSED[reason])


def test_layout_of_a_224_image():
    todo = plan((256, 3, 224, 224), 64, 132)
    assert todo.config is CONFIGS[0]
    assert todo.packing.image_shape == (256, 229, 230, 4) and todo.y_shape == (256, 64, 56, 56)
    assert (todo.integers["pairs"], todo.integers["tiles_w"]) == (56, 1)
    # Every window of the descriptor lies inside of the packed image.
    last = sum((size - 1) * stride for size, stride in zip(todo.windows.shape, todo.windows.strides))
    assert last < 256 * 229 * 230 * 4


def test_strips_and_segments_fill_the_machine():
    assert choose_config(256, 56, 56, 132) is CONFIGS[0]
    assert choose_config(256, 16, 16, 132) is CONFIGS[1]
    assert choose_config(1, 56, 56, 132) is CONFIGS[1]
    assert split_rows(264, 56, 264) == (1, 56)
    assert split_rows(256, 56, 264)[0] == 1
    segments, rows = split_rows(1, 56, 396)
    assert (segments, rows) == (56, 1)
    for strips, pooled_h in itertools.product((1, 7, 64, 256), (1, 5, 56)):
        segments, rows = split_rows(strips, pooled_h, 264)
        assert (segments - 1) * rows < pooled_h <= segments * rows


# Planted bugs.

# 2 x 34 pooled pixels: two strips of 31, two segments, an odd height and width; and two images.
BUG_SIZES = ((1, 5, 133, 16), (2, 1, 1, 16))
KERNEL_BUGS = {
    "eighth pixel read": ("< 28)", "< 32)"),
    "fourth channel not zero": ("tl.join(green, tl.zeros_like(green))", "tl.join(green, green / 0.0)"),
    "green and blue swapped": ("tl.join(tl.join(red, blue), tl.join(green,", "tl.join(tl.join(red, green), tl.join(blue,"),
    "padding normalized": ("return tl.where(mask, v, 0.0)", "return v"),
    "not divided by 255": ("if UNIT:", "if False:"),
    "std forgotten": ("tl.div_rn(v - mean, tl.zeros_like(v) + std)", "v - mean"),
    "mean of another channel": ("inside, mean1, std1", "inside, mean0, std1"),
    "bottom not padded": ("(h >= 0) & (h < in_h)", "(h >= 0) & (h < in_h - 1)"),
    "transposed taps": ("r * stride_r + s * stride_s", "s * stride_r + r * stride_s"),
    "odd column's window": ("(packed_w * 4) + 8)", "(packed_w * 4) + 4)"),
    "swapped scale and shift": ("tl.load(scale_ptr + offs_c", "tl.load(shift_ptr + offs_c"),
    "scale behind the maximum": ("even *= scale[:, None]", "even *= tl.abs(scale)[:, None]"),
    "row above left out": ("even = elementwise.maximum(above_even, even)", "even = elementwise.maximum(even, even)"),
    "row above's odd columns left out": ("odd = elementwise.maximum(above_odd, odd)", "odd = elementwise.maximum(odd, odd)"),
    "row below left out": ("even = elementwise.maximum(even, above_even)", "even = elementwise.maximum(even, even)"),
    "row of padding below taken for one": ("tl.maximum(h, 0), out_h - 1)", "tl.maximum(h, 0), out_h // 2)"),
    "row above taken for another": ("tl.maximum(h, 0)", "tl.maximum(h, 2)"),
    "left neighbor of the first": ("tl.maximum(lane - 1, 0)", "tl.maximum(lane - 1, 2)"),
    "own lane for the left one": ("tl.maximum(lane - 1, 0)", "tl.maximum(lane, 0)"),
    "last column's right neighbor": ("(2 * j + 1 < out_w)", "(2 * j < out_w)"),
    "dropped ReLU": ("tl.zeros_like(even))", "even)"),
    "NaN lost": ("y = elementwise.maximum(", "y = tl.maximum("),
    "strips side by side": ("tiles_w * (BLOCK_W - 1)", "tiles_w * BLOCK_W"),
    "halo column stored": ("(lane >= tl.minimum(column, 1))", "(lane >= 0)"),
    "segments of the first rows": ("% segments * rows", "% segments * 0"),
    "first image for all": ("image = x + n.to(tl.int64)", "image = x + 0 * n.to(tl.int64)"),
}  # fmt: skip
PLAN_BUGS = {
    "eighth pixel described": ("pooled_w, 28)", "pooled_w, 32)"),
    "row parity for column parity": ("packed_w * 4, 8, 16, 1)", "packed_w * 4, 16, 8, 1)"),
    "too few strips": ("cdiv(pooled_w - 1, config.block_w - 1)", "cdiv(pooled_w - 2, config.block_w)"),
    "too few segments": ("strips * segments,", "strips,"),
}  # fmt: skip


def failures(device, monkeypatch) -> int:
    """How many of some calls go wrong: normalized images, a NaN and an inf, several strips, segments and channel tiles."""
    monkeypatch.setattr(stem, "multiprocessors", lambda device: 5)
    wrong = 0
    for size, config in itertools.product(BUG_SIZES, (CONFIGS[1], CONFIGS[3])):
        torch.manual_seed(0)
        x, weight, scale, shift = integers(*size, device)
        scale[scale == 0] = -1
        mean, std = (1.0, 0.0, -2.0), (0.5, 1.0, 0.25)
        offset, factor = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
        normal = (x - offset) / factor
        spoilt = x.clone()
        if x.shape[3] > 43:
            spoilt[0, 0, 3, 10], spoilt[0, 1, 4, 43] = float("nan"), float("inf")
        images = torch.randint(0, 2, x.shape, device=device).to(torch.uint8) * 255
        for image, true, statistics in (
            (x, normal, (mean, std)),
            (spoilt, spoilt, ()),
            (images, images.double() / 255, ((0.0,) * 3, (1.0,) * 3)),
        ):
            y = stem.launch(image, weight, scale, shift, *statistics, config=config)
            expected = truth(true, weight, scale, shift)
            wrong += not torch.equal(y.double().cpu().nan_to_num(-1.0), expected.nan_to_num(-1.0))
    return wrong


@pytest.mark.slow(unless=lambda name: name == next(iter(KERNEL_BUGS)))
@pytest.mark.parametrize("name", KERNEL_BUGS)
def test_planted_bug_is_caught(name, tmp_path, device, monkeypatch):
    module = planted("sm90.stem", tmp_path, *KERNEL_BUGS[name])
    for function in ("_pack_kernel", "_stem_kernel"):
        monkeypatch.setattr(stem, function, getattr(module, function))
    assert failures(device, monkeypatch) > 0


@pytest.mark.slow(unless=lambda name: name == next(iter(PLAN_BUGS)))
@pytest.mark.parametrize("name", PLAN_BUGS)
def test_planted_bug_in_the_plan_is_caught(name, tmp_path, device, monkeypatch):
    monkeypatch.setattr(stem, "plan", planted("sm90.stem_layout", tmp_path, *PLAN_BUGS[name]).plan)
    assert failures(device, monkeypatch) > 0


@pytest.mark.slow
def test_nothing_planted_nothing_caught(tmp_path, device, monkeypatch):
    module = planted("sm90.stem", tmp_path, "import annotations", "import annotations")
    for function in ("_pack_kernel", "_stem_kernel"):
        monkeypatch.setattr(stem, function, getattr(module, function))
    monkeypatch.setattr(
        stem, "plan", planted("sm90.stem_layout", tmp_path, "import annotations", "import annotations").plan
    )
    assert failures(device, monkeypatch) == 0
