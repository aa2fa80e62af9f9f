"""The tests can fail: each classic bug, planted into the kernel's source, is caught by the exact-integer test."""

import importlib.util
import inspect
import sys

import pytest
import torch
from oracle import skip_unless_runnable
from test_conv_bias_act import Case, operands, truth

from resnet_kernels.ops.geometry import normalise

CASES = (
    Case("", 2, 16, 7, 6, 24),
    Case("", 1, 3, 7, 6, 24, (3, 3), 2, 1),
    Case("", 1, 64, 5, 5, 40, (3, 2), 1, 1, (1, 2)),
)

BUGS = {
    "dropped ReLU": ("if RELU:", "if RELU and False:"),
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
        geometry = normalise(case.stride, case.padding, case.dilation, case.groups)
        for relu in (True, False):
            y = kernel.launch(x, weight, bias, residual, scale, geometry, relu)
            wrong += not torch.equal(y.double().cpu(), truth(case, x, weight, bias, residual, scale, relu))
    return wrong


def planted(name: str, tmp_path, old: str, new: str):
    """The kernel's module, with a piece of its source replaced."""
    from resnet_kernels.kernels import conv_bias_act

    source = inspect.getsource(conv_bias_act)
    assert old in source, f"the kernel no longer has {old!r}: plant this bug anew"
    path = tmp_path / "planted.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("resnet_kernels.kernels.planted", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name, tmp_path, device):
    skip_unless_runnable("triton", device, torch.float32)
    assert failures(planted(name, tmp_path, *BUGS[name]), device) > 0


def test_nothing_planted_nothing_caught(tmp_path, device):
    skip_unless_runnable("triton", device, torch.float32)
    assert failures(planted("", tmp_path, "if RELU:", "if RELU:"), device) == 0
