"""The tests can fail: each classic bug, planted into the kernel's source, is caught by the exact-integer test."""

import importlib
import importlib.util
import inspect

import pytest
import torch

from helpers import epilogues, folded_weights
from helpers.batch_norms import compare, vectors
from helpers.convolutions import Case, operands, truth
from helpers.oracle import skip_unless_runnable
from helpers.planted import plant, planted
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.geometry import normalize
from resnet_kernels.kernels.operands import ConvOperands

CASES = (
    Case("", 2, 16, 7, 6, 24),
    Case("", 1, 3, 7, 6, 24, (3, 3), 2, 1),
    Case("", 1, 64, 5, 5, 40, (3, 2), 1, 1, (1, 2)),
)

BUGS = {
    "dropped ReLU": ("elementwise.activate(acc, ACT, elementwise.slope_of(slopes_ptr, SLOPE, offs_c, mask_n))", "acc"),
    "ReLU before the residual": ("if residual_ptr is not None:\n        acc +=",
                                 "if residual_ptr is not None:\n        acc = tl.maximum(acc, 0.0)\n        acc +="),
    "ragged tail of channels": ("mask_n = offs_n < c_out", "mask_n = offs_n < (c_out // 16) * 16"),
    "ragged tail of pixels": ("mask_m = offs_m < n_pixels", "mask_m = offs_m < (n_pixels // 64) * 64"),
    "ragged tail of the reduction": ("mask_k = offs_k < k_total", "mask_k = offs_k < k_total - 1"),
    "transposed taps": ("r = tap // KERNEL_W\n            s = tap % KERNEL_W",
                        "s = tap // KERNEL_W\n            r = tap % KERNEL_W"),
    "missing edge mask, right": ("(w >= 0) & (w < in_w)", "(w >= 0)"),
    "missing edge mask, top": ("(h >= 0) & (h < in_h)", "(h < in_h)"),
    "swapped scale and shift": ("(scale_ptr + offs_c", "(bias_ptr + offs_c"),
    "scale of another channel": ("(scale_ptr + offs_c", "(scale_ptr + offs_n * 0"),
    "residual of another row": ("residual_ptr + y_offset,", "residual_ptr + y_offset * 0 + offs_c[None, :],"),
    "dilation ignored": ("w = w_start + s * DILATION_W", "w = w_start + s"),
    "padding of the wrong side": ("STRIDE_H - pad_top", "STRIDE_H - pad_left - 1"),
    "stride ignored": ("(pixel % out_w) * STRIDE_W", "(pixel % out_w)"),
}  # fmt: skip


def failures(kernel, device) -> int:
    wrong = 0
    for case in CASES:
        x, weight, bias, residual, scale = operands(case, torch.float32, device)
        geometry = normalize(case.stride, case.padding, case.dilation, case.groups)
        for relu in (True, False):
            y = kernel.launch(ConvOperands(x, weight, bias, residual, scale, geometry, RELU if relu else None))
            wrong += not torch.equal(y.double().cpu(), truth(case, x, weight, bias, residual, scale, relu))
    return wrong


@pytest.mark.slow(unless=lambda name: name in [*BUGS][:3])
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name, tmp_path, device):
    skip_unless_runnable("triton", device, torch.float32)
    assert failures(planted("conv_bias_act", tmp_path, *BUGS[name]), device) > 0


def test_nothing_planted_nothing_caught(tmp_path, device):
    skip_unless_runnable("triton", device, torch.float32)
    assert failures(planted("conv_bias_act", tmp_path, "elementwise.activate", "elementwise.activate"), device) == 0


# Imported in this order: those after the first take its functions from it.
BATCH_NORM_FILES = ("batch_norm_device", "batch_norm_act", "batch_norm_act_backward")
BATCH_NORM_BUGS = {
    "E[x^2] - E[x]^2": ("difference = tl.where(mask, x - pivot, 0.0)", "difference = tl.where(mask, x, 0.0)"),
    "rows past the end counted": ("difference = tl.where(mask, x - pivot, 0.0)", "difference = x - pivot"),
    "splits' means taken for equal": ("squares + count * off_center * off_center, 0)\n    mean", "squares, 0)\n    mean"),
    "lanes' means taken for equal": ("lane_sum(squares + count * off_center * off_center)", "lane_sum(squares)"),
    "biased running variance": ("squares / (rows - 1)", "squares / rows"),
    "momentum the wrong way round": ("momentum * mean + (1 - momentum) * old", "(1 - momentum) * mean + momentum * old"),
    "dropped ReLU": ("    y = elementwise.activate(y, ACT, elementwise.slope_of(slopes_ptr, SLOPE, offs_c, mask_c))\n", ""),
    "ReLU ignored in the backward": ("tl.where(y.to(tl.float32) <= 0, 0.0, dy)", "dy"),
    "ReLU's mask without the bias": ("normalize(centered, scale, bias).to(DTYPE)",
                                     "normalize(centered, scale, 0 * bias).to(DTYPE)"),
    "statistics taken for constants": ("dz -= constant[None, :] + centered * factor[None, :]", "dz -= constant[None, :]"),
    "swapped weight and bias gradients": ("dweight_ptr + offs_c, dweight.to", "dweight_ptr + offs_c, dbias.to"),
    "weight forgotten": ("scale *= tl.load(weight_ptr", "scale *= 1 + 0 * tl.load(weight_ptr"),
    "eps forgotten": ("variance + eps", "variance + 0 * eps"),
    "residual of another row": ("tl.load(residual_ptr + at + offs,", "tl.load(residual_ptr + 0 * offs,"),
}  # fmt: skip


def batch_norm_failures(monkeypatch, device) -> int:
    """How many calls go wrong: shapes with several splits, ragged tiles, and a large mean."""
    # So few that a split has several tiles of rows, as it has in a large layer.
    for where in (*BATCH_NORM_FILES[1:], "batch_norm_tiles"):
        monkeypatch.setattr(importlib.import_module(f"resnet_kernels.kernels.{where}"), "MOST_SPLITS", 2)
    wrong = 0
    for shape, mean, with_residual in (
        ((2, 8, 40, 40), 3.0, True),
        ((2, 70, 7, 5), 3.0, False),
        ((2, 3, 9, 9), 1e3, False),
    ):
        x = torch.randn(shape, device=device) + mean + 10 * torch.randn(1, 1, shape[2], 1, device=device)
        residual = torch.randn(shape, device=device) if with_residual else None
        try:
            compare(x, residual, vectors(shape[1], device), torch.float32, training=True, eps=1e-2)
        except AssertionError:
            wrong += 1
    return wrong


@pytest.mark.slow(unless=lambda name: name == next(iter(BATCH_NORM_BUGS)))
@pytest.mark.parametrize("name", BATCH_NORM_BUGS)
def test_planted_bug_in_training_is_caught(name, tmp_path, device, monkeypatch):
    skip_unless_runnable("triton", device, torch.float32)
    old, new = BATCH_NORM_BUGS[name]
    sources = {f: inspect.getsource(importlib.import_module(f"resnet_kernels.kernels.{f}")) for f in BATCH_NORM_FILES}
    (spoilt,) = [file for file, source in sources.items() if old in source]
    for file in BATCH_NORM_FILES:
        plant(
            file, planted(file, tmp_path, *((old, new) if file == spoilt else ("import annotations",) * 2)), monkeypatch
        )
    assert batch_norm_failures(monkeypatch, device) > 0


def test_nothing_planted_in_training_nothing_caught(tmp_path, device, monkeypatch):
    skip_unless_runnable("triton", device, torch.float32)
    for where in BATCH_NORM_FILES:
        plant(where, planted(where, tmp_path, "import annotations", "import annotations"), monkeypatch)
    assert batch_norm_failures(monkeypatch, device) == 0


EPILOGUE_BUGS = {
    "dropped ReLU": ("    y = elementwise.activate(y, ACT, elementwise.slope_of(slopes_ptr, SLOPE, offs_c, mask_c))\n", ""),
    "ReLU before the residual": ("    if residual_ptr is not None:\n",
                                 "    y = tl.maximum(y, 0.0) if ACT == 'relu' else y\n    if residual_ptr is not None:\n"),
    "ragged tail of channels": ("mask_c = offs_c < n_channels", "mask_c = offs_c < (n_channels // 16) * 16"),
    "ragged tail of rows": ("(start + lane < n_rows)", "(start + lane < n_rows - 1)"),
    "swapped scale and shift": ("_affine(x, scale_ptr, shift_ptr,", "_affine(x, shift_ptr, scale_ptr,"),
    "scale of another channel": ("tl.load(scale_ptr + offs_c,", "tl.load(scale_ptr + offs_c * 0,"),
    "the residual's vectors left out": ("y += _affine(residual, residual_scale_ptr, residual_shift_ptr,",
                                        "y += _affine(residual, None, None,"),
    "the residual's vectors taken for x's": ("residual_scale_ptr, residual_shift_ptr, offs_c, mask_c)",
                                             "scale_ptr, shift_ptr, offs_c, mask_c)"),
    "residual of another row": ("tl.load(residual_ptr + at + offs,", "tl.load(residual_ptr + offs_c[None, :] + 0 * offs,"),
    "tiles of the same rows": ("(tl.program_id(0) // n_tiles) * BLOCK_ROWS", "(tl.program_id(0) // n_tiles) * 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*EPILOGUE_BUGS, "nothing"])
def test_planted_bug_in_the_epilogue_is_caught(name, tmp_path, device):
    skip_unless_runnable("triton", device, torch.float32)
    kernel = planted("epilogue", tmp_path, *EPILOGUE_BUGS.get(name, ("elementwise.activate", "elementwise.activate")))
    assert epilogues.is_exact(kernel, device) == (name not in EPILOGUE_BUGS)


FOLD_BUGS = {
    "scale of another channel": ("scale_ptr + scale_start + offs_o,", "scale_ptr + scale_start + 0 * offs_o,"),
    "scale of another layer": ("scale_ptr + scale_start + offs_o,", "scale_ptr + offs_o,"),
    "scale where there is none": ("tl.where(scale_start < 0, 0, c_out)", "c_out"),
    "the projection's shift left out": ("tl.where(more_start < 0, 0, c_out)", "0"),
    "swapped scale and shift": ("scale_ptr=scale, shift_ptr=shift,", "scale_ptr=shift, shift_ptr=scale,"),
    "taps left innermost": ("if inner == n_k:", "if n_k == n_k:"),
    "transposed taps": ("(offs_k % inner) * (n_k // inner) + offs_k // inner", "(offs_k // inner) * inner + offs_k % inner"),
    "ragged tail of taps and channels": ("(offs_k < n_k)[None, :]", "(offs_k < n_k // 4 * 4)[None, :]"),
    "ragged tail of output channels": ("mask_o = offs_o < c_out\n    mask =", "mask_o = offs_o < c_out // 8 * 8\n    mask ="),
    "the next layer's rows": ("owners += [i] * _programs(layer.weight)", "owners += [i] * (_programs(layer.weight) - 1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FOLD_BUGS, "nothing"])
def test_planted_bug_in_folding_is_caught(name, tmp_path, device):
    skip_unless_runnable("triton", device, torch.float32)
    kernel = planted("fold_weights", tmp_path, *FOLD_BUGS.get(name, ("if ALIGNED:", "if ALIGNED:")))
    assert folded_weights.is_exact(kernel, device) == (name not in FOLD_BUGS)
