"""fp32 convolutions by TF32: factors are rounded as cuDNN rounds them, not cut off."""

import pytest
import torch

pytest.importorskip("triton")

from helpers.oracle import error
from resnet_kernels.kernels import conv_bias_act
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.kernels.operands import ConvOperands


def _rounded(x):
    """fp32 to TF32 in PyTorch, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@pytest.fixture
def as_compiled(monkeypatch):
    """Compile-time arguments as on a GPU where cuDNN may use TF32, which is PyTorch's default."""
    monkeypatch.setattr(conv_bias_act.target, "is_interpreted", lambda: False)
    monkeypatch.setattr(conv_bias_act.target, "allows_tf32", lambda dtype: dtype == torch.float32)
    conv_bias_act._plan.cache_clear()
    yield
    conv_bias_act._plan.cache_clear()


@pytest.mark.parametrize("c_in", (3, 32), ids=("taps by element", "whole chunks"))
def test_factors_are_rounded_before_a_tensor_core_cuts_them(c_in, device, as_compiled):
    x, weight = torch.randn(2, c_in, 6, 5, device=device), torch.randn(16, c_in, 3, 3, device=device)
    geometry = Geometry(padding=(1, 1, 1, 1))
    y = conv_bias_act.launch(ConvOperands(x, weight, geometry=geometry, activation=None))
    exact = torch.conv2d(_rounded(x).double(), _rounded(weight).double(), padding=1)
    unrounded = torch.conv2d(x.double(), weight.double(), padding=1)
    assert error(y, exact) < 1e-6 < 1e-4 < error(y, unrounded) < 2**-11


def test_what_tf32_can_not_hold_is_inf_and_nan_stays_nan(device, as_compiled):
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000, -0x800000, 0x7F7FFFFF, 0, 1, 0x3F801000, 0x3F800FFF])
    x = bits.to(torch.int32).view(torch.float32).to(device)
    weight = torch.ones(1, 1, 1, 1, device=device)
    y = conv_bias_act.launch(ConvOperands(x.view(1, 1, 2, 5), weight, geometry=Geometry(), activation=None)).flatten()
    inf, nan = float("inf"), float("nan")
    expected = torch.tensor([nan, nan, nan, inf, -inf, inf, 0, 0, 1 + 2**-10, 1])
    torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=0, equal_nan=True)
