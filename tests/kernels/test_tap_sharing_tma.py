"""Hopper's 3x3 that shares its loads, under the interpreter: exact on integers, and what it refuses."""

import itertools
from dataclasses import replace

import pytest
import torch

from helpers.convolutions import Case, operands, truth
from helpers.oracle import assert_within_budget
from helpers.planted import planted
from resnet_kernels.kernels import target
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.kernels.operands import ConvOperands
from resnet_kernels.kernels.sm90 import tap_sharing as kernel

pytestmark = pytest.mark.usefixtures("hopper_with_nan_outputs")

FP16 = torch.float16
SAME = Geometry(padding=(1, 1, 1, 1))
CASES = (
    Case("stage 1", 2, 64, 8, 12, 64),
    Case("one pair of columns", 3, 32, 5, 2, 72),
    Case("ragged in every axis", 3, 96, 7, 6, 40),
    Case("one row of many pairs", 1, 32, 1, 70, 8),
    Case("one pixel of 70 images", 70, 32, 2, 2, 16),
)


def run(case, x, weight, bias, residual, scale, relu, config=kernel.CONFIGS[0]):
    assert kernel.why_not(x.shape, weight.shape, SAME, x.dtype) is None
    return kernel.launch(ConvOperands(x, weight, bias, residual, scale, SAME, RELU if relu else None), config)


@pytest.mark.slow(unless=lambda case, config: config == kernel.CONFIGS[0] or case is CASES[0])
@pytest.mark.parametrize("config", kernel.CONFIGS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_on_integers(case, config, device, monkeypatch):
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 1)
    config = replace(config, programs_per_sm=1)
    x, weight, bias, residual, scale = operands(case, FP16, device)
    for use in ((bias, residual, scale, True), (None, None, None, False)):
        expected = truth(case, x, weight, *use)
        assert expected.abs().max() <= 2048, "the test's own sums must be exact"
        y = run(case, x, weight, *use, config)
        assert torch.equal(y.double().cpu(), expected)
        assert y.dtype == FP16 and y.is_contiguous(memory_format=torch.channels_last)


def test_as_accurate_as_eager(device):
    case = CASES[0]
    x, weight, bias, residual, scale = operands(case, FP16, device, real=True)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    z = torch.conv2d(x, weight, None, 1, 1)
    eager = torch.relu(torch.batch_norm(z, scale, bias, zero, one, False, 0.0, 0.0, False) + residual)
    y = run(case, x, weight, bias, residual, scale, True)
    assert_within_budget(y, eager, truth(case, x, weight, bias, residual, scale, True))


def test_bf16_in_the_interpreter_is_upcast(device):
    case = CASES[1]
    given = operands(case, torch.bfloat16, device)
    assert torch.equal(run(case, *given, True).double().cpu(), truth(case, *given, True))


def test_nan_stays_where_its_windows_are(device):
    x = torch.ones(1, 32, 6, 8, device=device, dtype=FP16)
    x[0, 3, 2, 5] = float("nan")
    y = run(CASES[0], x, torch.ones(16, 32, 3, 3, device=device, dtype=FP16), None, None, None, True)
    seen = torch.zeros(6, 8, dtype=torch.bool)
    seen[1:4, 4:7] = True
    assert torch.equal(y.isnan().cpu(), seen.expand_as(y))


X, W = (2, 32, 6, 8), (64, 32, 3, 3)


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "geometry", "reason"),
    (
        (X, W, Geometry((2, 2), (1, 1, 1, 1)), "only 3x3 at stride 1 with padding 1"),
        (X, (64, 32, 1, 1), Geometry(), "only 3x3 at stride 1 with padding 1"),
        (X, W, Geometry(padding=(0, 1, 0, 1)), "only 3x3 at stride 1 with padding 1"),
        ((2, 32, 6, 7), W, SAME, "the width must be even, got 7"),
        ((2, 40, 6, 8), (64, 40, 3, 3), SAME, "C_in must be a multiple of 32, got 40"),
        ((2, 32, 6, 8), (33, 32, 3, 3), SAME, "channels must be multiples of 8"),
    ),
)
def test_the_predicate_says_why(x_shape, weight_shape, geometry, reason):
    assert reason in kernel.why_not(x_shape, weight_shape, geometry, FP16)
    assert kernel.why_not(X, W, SAME, FP16) is None


BUGS = {
    "columns swapped": ("x0 = _column(odd_desc, n, h - 1 + r, w - 1,", "x0 = _column(odd_desc, n, h - 1 + r, w,"),
    "the far column forgotten": ("even_desc, n, h - 1 + r, w + 1,", "even_desc, n, h - 1 + r, w,"),
    "rows not padded": ("x1 = _column(even_desc, n, h - 1 + r,", "x1 = _column(even_desc, n, h + r,"),
    "taps swapped": ("even = tl.dot(left, x0, even)", "even = tl.dot(right, x0, even)"),
    "middle tap of the row before": ("first + C_IN, UPCAST", "first, UPCAST"),
    "channel chunks forgotten": ("c = k % N_CHUNKS * BLOCK_K", "c = 0 * k"),
    "the odd columns' residual": (
        "odd, scale_ptr, bias_ptr, odd_residual_desc",
        "odd, scale_ptr, bias_ptr, even_residual_desc",
    ),
    "every other tile left out": ("n_tiles, tl.num_programs(0))", "n_tiles, 2 * tl.num_programs(0))"),
    "odd columns where the even are": ("strides, sides, odd * channels)", "strides, sides, 0 * channels)"),
    "images of one tile": ("box // (tiles_w * tiles_h) * BOX_N", "box // (tiles_w * tiles_h) * 0"),
}


def failures(module, device) -> int:
    """How many of some calls go wrong, one program walking over all tiles."""
    count = 0
    for case, config in itertools.product(CASES[2:3], (kernel.CONFIGS[-1],)):
        x, weight, bias, residual, scale = operands(case, FP16, device)
        given = ConvOperands(x, weight, bias, residual, scale, SAME)
        y = module.launch(given, replace(config, programs_per_sm=1))
        count += not torch.equal(y.double().cpu(), truth(case, x, weight, bias, residual, scale, True))
    return count


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name, tmp_path, device):
    module = planted("sm90.tap_sharing", tmp_path, *BUGS[name])
    module.multiprocessors = lambda device: 1
    assert failures(module, device) > 0


def test_nothing_planted_nothing_caught(tmp_path, device):
    module = planted("sm90.tap_sharing", tmp_path, "if (reason", "if (reason")
    module.multiprocessors = lambda device: 1
    assert failures(module, device) == 0


def test_a_table_can_choose_it(device, monkeypatch):
    from resnet_kernels.ops import conv_candidates

    monkeypatch.setattr(target, "is_hopper", lambda device: True)
    case = CASES[0]
    x, weight, bias, residual, scale = operands(case, FP16, device)
    asked = conv_candidates.ConvProblem(64, 8, 12, tuple(weight.shape), SAME, True, True, True, RELU)
    names = [name for name in conv_candidates.candidates(asked, 2, FP16, device) if name.startswith("shared ")]
    assert len(names) == len(kernel.CONFIGS)
    for name in names:
        y = conv_candidates.run(name, ConvOperands(x, weight, bias, residual, scale, SAME))
        assert torch.equal(y.double().cpu(), truth(case, x, weight, bias, residual, scale, True))
