"""Activations in our Triton kernels: each one in each kernel, against fp64; their gradients, against autograd's in fp64."""

from __future__ import annotations

import pytest
import torch

from helpers.activations import EACH, INF, NAN, assert_activated, special
from helpers.batch_norms import compare, nothing_but, vectors
from helpers.convolutions import Case, arguments, operands, truth
from helpers.oracle import DTYPES, assert_within_budget, skip_unless_runnable
from resnet_kernels import ops
from resnet_kernels.kernels.activations import RELU, Activation
from resnet_kernels.kernels.geometry import Geometry, normalize
from resnet_kernels.kernels.operands import ConvOperands

CHANNELS_LAST = torch.channels_last
FP16 = torch.float16
# One of each formula, for what takes long.
FEW = (Activation("silu"), Activation("gelu"), Activation("leaky_relu", 0.1))


@pytest.fixture
def triton_fp32(device):
    skip_unless_runnable("triton", device, torch.float32)


@pytest.mark.parametrize("activation", EACH, ids=str)
def test_the_pass_after_a_convolution(triton_fp32, activation, device):
    from resnet_kernels.kernels import epilogue

    for channels in (3, 64):
        x = special(2, channels, 5, 7).to(device, memory_format=CHANNELS_LAST)
        scale, shift = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
        for residual in (None, x):
            z = epilogue.launch(x, scale, shift, residual, activation=None)
            y = epilogue.launch(x, scale, shift, residual, activation=activation)
            assert_activated(y.cpu(), activation, z.cpu())


@pytest.mark.parametrize("activation", EACH, ids=str)
def test_the_portable_convolution(triton_fp32, activation, device):
    from resnet_kernels.kernels import conv_bias_act

    case = Case("", 2, 16, 5, 6, 24)
    x, weight, bias, _, scale = operands(case, torch.float32, device, real=True)
    residual = special(2, 24, 5, 6).to(device, memory_format=CHANNELS_LAST)
    given = ConvOperands(x, weight, bias, residual, scale, normalize(1, 1, 1, 1))
    z = conv_bias_act.launch(given._replace(activation=None))
    assert_activated(conv_bias_act.launch(given._replace(activation=activation)).cpu(), activation, z.cpu())


def _in_half(run, case, activation, device):
    """A kernel of Hopper's on fp16 operands, which it rounds once, beside eager and fp64."""
    x, weight, bias, residual, scale = operands(case, FP16, device, real=True)
    y = run(x, weight, bias, residual, scale)
    oracle = activation(truth(case, x, weight, bias, residual, scale, False))
    eager = ops.conv_bias_act(
        x, weight, bias, residual, scale=scale, activation=activation, backend="eager", **arguments(case)
    )
    assert_within_budget(y, eager, oracle, str(activation))
    linear = truth(case, x, weight, bias, residual, scale, False)
    assert not torch.allclose(y.double().cpu(), linear, atol=0.05), "the activation is left out"


@pytest.mark.usefixtures("hopper_with_nan_outputs")
@pytest.mark.parametrize("activation", EACH, ids=str)
def test_hoppers_convolution(activation, device):
    from resnet_kernels.kernels.sm90 import conv, tap_sharing

    case = Case("", 2, 24, 6, 5, 40)

    def run(x, weight, bias, residual, scale):
        return conv.launch(ConvOperands(x, weight, bias, residual, scale, normalize(1, 1, 1, 1), activation))

    _in_half(run, case, activation, device)
    if activation in FEW:
        case = Case("", 1, 32, 4, 6, 40)

        def share(x, weight, bias, residual, scale):
            geometry = Geometry(padding=(1, 1, 1, 1))
            return tap_sharing.launch(ConvOperands(x, weight, bias, residual, scale, geometry, activation))

        _in_half(share, case, activation, device)


@pytest.mark.slow(unless=lambda dtype, **_: dtype == torch.float32)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("with_residual", (True, False), ids=("residual", "alone"))
@pytest.mark.parametrize("activation", EACH, ids=str)
def test_batch_norm_and_all_its_gradients(activation, with_residual, training, dtype, device):
    skip_unless_runnable("triton", device, dtype)
    x = (3 * torch.randn(2, 24, 9, 7, device=device) + 1).contiguous(memory_format=CHANNELS_LAST)
    residual = 2 * torch.randn(2, 24, 9, 7, device=device) if with_residual else None
    given = vectors(24, device)
    given["weight"] *= 3
    compare(x, residual, given, dtype, activation=activation, training=training)


@pytest.mark.parametrize("activation", EACH, ids=str)
def test_gradients_at_kinks_and_far_from_zero(triton_fp32, activation, device):
    """The gradient of what is exactly z, with PyTorch's choices at kinks; a NaN stays one, where PyTorch has one way only."""
    z = torch.tensor([0.0, 3.0, -3.0, 6.0, NAN, 20.5, -20.5, 88.0, -88.0, 104.0, -104.0, 1e4, -1e4], device=device)
    if activation.kind in ("relu6", "hardswish"):  # PyTorch's vectors and what is left of them differ
        z = z.nan_to_num(0.5)
    z = z.view(1, 1, 1, -1).expand(2, 3, 1, -1).contiguous()
    upstream = torch.randn_like(z)

    def gradient(run, dtype):
        x = z.to(dtype).requires_grad_()
        return torch.autograd.grad(run(x), x, upstream.to(dtype))[0].cpu()

    def ours(x):
        return nothing_but(activation, x)

    dx, eager, oracle = (
        gradient(*how) for how in ((ours, torch.float32), (activation, torch.float32), (activation, torch.float64))
    )
    assert torch.equal(dx.isnan(), oracle.isnan())
    assert_within_budget(*(values.nan_to_num() for values in (dx, eager, oracle)))


def test_a_gradient_through_huge_values_stays_finite(triton_fp32, device):
    """PyTorch's own GELU of tanh has NaN there."""
    for activation in EACH:
        x = torch.tensor([1e20, -1e20, 3e38, -3e38], device=device).view(1, 1, 2, 2).requires_grad_()
        y = nothing_but(activation, x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(x))
        assert dx.isfinite().all(), str(activation)


def test_only_relu_keeps_the_output_for_its_backward(triton_fp32, device):
    saved = []
    for activation in (RELU, Activation("silu"), None):
        x, residual = (torch.randn(2, 4, 3, 3, device=device, requires_grad=True) for _ in range(2))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(t.data_ptr()), t)[1], lambda t: t
        ):
            y = ops.batch_norm_act(
                x, residual, None, None, None, None, training=True, momentum=0.1, eps=1e-5, relu=False,
                activation=activation, backend="triton",
            )  # fmt: skip
        saved.append((y.data_ptr() in kept, residual.data_ptr() in kept))
    assert saved == [(True, False), (False, True), (False, False)]


def test_minus_infinity_is_as_in_torch(triton_fp32, device):
    from resnet_kernels.kernels import epilogue

    x = torch.tensor([-INF, INF, NAN, 0.0], device=device).view(1, 1, 2, 2)
    for activation in EACH:
        y = epilogue.launch(x, None, None, activation=activation)
        torch.testing.assert_close(y.double(), activation(x.double()), rtol=0, atol=0, equal_nan=True)
