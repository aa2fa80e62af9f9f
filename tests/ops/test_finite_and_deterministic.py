"""What eager's convolution keeps to and a fused one has to: values that stay finite, and a demand for determinism."""

import pytest
import torch

from helpers import pretend
from helpers.oracle import skip_unless_runnable
from resnet_kernels import ops
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.operands import ConvOperands
from resnet_kernels.ops import backends, cudnn, reference

# Scales that overflow in a weight, and weights whose folded sums cancel.
HUGE = {
    "scale": (1e-6, 3e38, 4.0),
    "cancelling": (1e10, 1e30, 1.0),
    "weight and scale": (1e-25, 1e21, 3e18),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("backend", ("auto", "cpu", "triton", "cudnn", "eager"))
@pytest.mark.parametrize("what", HUGE)
def test_a_finite_output_became_nan_by_folding_a_scale(what, backend, dtype, device):
    skip_unless_runnable(backend, device, dtype)
    size, factor, filled = HUGE[what]
    x = torch.rand(2, 8, 24, 24, device=device).add(0.5).mul(size).to(dtype)
    weight = torch.full((8, 8, 3, 3), filled, device=device)
    if what == "cancelling":
        weight[:, ::2] = -1
        x[:, ::2] = x[:, 1::2]
    weight[::3] = 0.1
    scale = torch.full((8,), factor, device=device)
    scale[3:] = -0.5
    arguments = dict(scale=scale, bias=torch.ones(8, device=device), residual=None)
    expected = ops.conv_bias_act(x, weight.to(dtype), backend="eager", relu=False, **arguments)
    y = ops.conv_bias_act(x, weight.to(dtype), backend=backend, relu=False, **arguments)
    finite = expected.isfinite()
    assert finite.any() and y[finite].isfinite().all()
    if what != "cancelling":
        torch.testing.assert_close(y[finite], expected[finite], rtol=2e-2, atol=0)


@pytest.mark.parametrize("relu", (False, True))
def test_a_finite_output_became_nan_by_folding_a_scale_for_cudnn(relu, device, monkeypatch):
    """Also where Triton cannot launch."""
    skip_unless_runnable("triton", device, torch.float32)
    x = torch.rand(2, 8, 9, 9, device=device) * 1e-6
    weight, scale = torch.full((8, 8, 3, 3), 4.0, device=device), torch.full((8,), 3e38, device=device)
    operands = ConvOperands(x, weight, torch.ones(8, device=device), None, scale, activation=RELU if relu else None)
    expected = reference.conv_bias_act(*operands)
    assert expected.isfinite().all()
    torch.testing.assert_close(cudnn.conv_bias_act(operands), expected)
    monkeypatch.setattr(backends, "why_not_on", lambda *question: "is absent")
    torch.testing.assert_close(cudnn.conv_bias_act(operands), expected)


@pytest.mark.parametrize("demand", ("cudnn", "all algorithms"))
@pytest.mark.parametrize("has_residual", (False, True))
def test_cudnn_was_not_told_of_the_demand_for_determinism(demand, has_residual, monkeypatch):
    """PyTorch's fused operations of cuDNN have no such argument; its convolution obeys."""
    called = pretend.nvidia(monkeypatch)
    x, weight, bias = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3), torch.randn(8)
    operands = ConvOperands(x, weight, bias, torch.randn(2, 8, 7, 7) if has_residual else None)
    expected = cudnn.conv_bias_act(operands)
    assert called == ["fused add" if has_residual else "fused"]
    called.clear()
    if demand == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    torch.testing.assert_close(cudnn.conv_bias_act(operands), expected)
    assert called == ["conv2d"]
