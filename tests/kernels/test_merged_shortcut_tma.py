"""Hopper's kernel with a projection merged in, in the interpreter: exact on integers, and within eager's error."""

from dataclasses import replace

import pytest
import torch

from helpers.convolutions import Case
from helpers.merged_shortcuts import MERGED, Merged, merge, merged_operands, name_of
from helpers.oracle import assert_within_budget

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_kernels.kernels.sm90 import conv as sm90_conv
from resnet_kernels.kernels.sm90.conv_tiles import CONFIGS

pytestmark = pytest.mark.usefixtures("hopper_with_nan_outputs")

WHOLE = [config for config in CONFIGS if config.split_k == 1]
# Scales that can't be factored out, and those that can: zeros, signs, sizes.
AWKWARD = (
    (1, 0),
    (0, 1),
    (0, 0),
    (-2, 4),
    (2, -1),
    (1, 2.0**-60),
    (2.0**-60, 1),
    (0, -2),
    (-4, 0.5),
    (2.0**60, 2.0**60),
)


@pytest.mark.parametrize("merged", MERGED, ids=lambda merged: str(merged.conv))
def test_merged_shortcut_is_exact(merged, device):
    tensors = merged_operands(merged, device)
    for use in ((True,) * 4, (False,) * 4, (True, True, False, True), (False, False, True, True)):
        y, expected = merge(merged, *tensors, use)
        assert expected.abs().max() <= 2048 and torch.equal(y.double().cpu(), expected)
        assert y.dtype == torch.float16 and y.is_contiguous(memory_format=torch.channels_last)
    y, expected = merge(merged, *tensors, relu=False, residual=True)
    assert torch.equal(y.double().cpu(), expected)


@pytest.mark.slow(unless=lambda config: config == WHOLE[0])
@pytest.mark.parametrize("config", WHOLE, ids=name_of)
def test_merged_shortcut_is_exact_in_every_config(config, device, monkeypatch):
    """Several tiles a program, the first of them parked: its memory is used again."""
    monkeypatch.setattr(sm90_conv, "multiprocessors", lambda device: 1)
    config = replace(config, programs_per_sm=1)
    for merged in (MERGED[0], MERGED[3]):
        conv, shortcut = merged_operands(merged, device)
        for zero in ((), (0,), (0, -1)):
            shortcut[4][list(zero)] = 0.0
            y, expected = merge(merged, conv, shortcut, config=config)
            assert torch.equal(y.double().cpu(), expected)


@pytest.mark.parametrize("channels", (1, len(AWKWARD)), ids=("one a tile", "all at once"))
def test_merged_shortcut_takes_any_scale(channels, device):
    merged = MERGED[3]
    (*conv, scale), (*shortcut, scale0) = merged_operands(merged, device)
    for first in range(0, len(AWKWARD), channels):
        new, new0 = scale.clone(), scale0.clone()
        values = torch.tensor(AWKWARD[first : first + channels], device=device)
        new[3 : 3 + channels], new0[3 : 3 + channels] = values.unbind(1)
        y, expected = merge(merged, (*conv, new), (*shortcut, new0), (True, False) * 2, relu=False)
        assert torch.equal(y.cpu(), expected.to(torch.float16))


def test_merged_shortcut_keeps_nan_and_inf(device):
    """Of scales and of either input, as PyTorch has them; inf times 0 included."""
    merged = Merged(Case("", 2, 32, 5, 5, 32, (1, 1), padding=0), 32, 2, (9, 9))
    (x, weight, bias, residual, scale), (x0, weight0, bias0, none, scale0) = merged_operands(merged, device)
    nan, inf = float("nan"), float("inf")
    x[0, 0, 1, 1], x[0, 1, 2, 2], x0[1, 0, 2, 2], x0[1, 1, 4, 4] = nan, inf, nan, -inf
    awkward = torch.tensor([nan, inf, -inf, 0.0, 1.0], device=device)
    grid = torch.cartesian_prod(awkward, awkward)
    scale[: len(grid)], scale0[: len(grid)] = grid.unbind(1)
    y, expected = merge(merged, (x, weight, bias, residual, scale), (x0, weight0, bias0, none, scale0))
    expected = torch.where(expected.isnan(), expected, expected.clamp_min(0))
    assert expected.isnan().any() and expected.isinf().any() and expected.isfinite().any()
    assert torch.equal(y.double().cpu().nan_to_num(1e5, 2e5, 3e5), expected.nan_to_num(1e5, 2e5, 3e5))


@pytest.mark.parametrize("least", (0.5, 1e-12), ids=("as trained", "with dead channels"))
def test_merged_shortcut_is_as_accurate_as_eager(least, device):
    merged = MERGED[0]
    conv, shortcut = merged_operands(merged, device, real=True)
    dead = torch.arange(len(shortcut[4]), device=device) % 7 == 0
    shortcut = (*shortcut[:4], torch.where(dead, shortcut[4] * least, shortcut[4]))
    y, expected = merge(merged, conv, shortcut)
    branches = []
    for case, (x, weight, bias, _, scale) in ((merged.conv, conv), (merged.shortcut, shortcut)):
        z = torch.conv2d(x, weight, None, case.stride, case.padding)
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        branches.append(torch.batch_norm(z, scale, bias, zero, one, False, 0.0, 0.0, False))
    assert_within_budget(y, torch.relu(sum(branches)), expected)
