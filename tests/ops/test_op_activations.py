"""The argument `activation` of the operations, on every backend: values, gradients, keys of tables, candidates, errors."""

from __future__ import annotations

import pickle

import pytest
import torch

from helpers import pretend
from helpers.activations import EACH
from helpers.convolutions import Case, arguments, operands, truth
from helpers.oracle import assert_within_budget, skip_unless_runnable
from helpers.tuned_tables import CONV
from resnet_kernels import ops
from resnet_kernels.kernels import activations
from resnet_kernels.kernels.activations import KINDS, PRELU, RELU, Activation, PReLU
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.kernels.operands import ConvOperands
from resnet_kernels.ops import conv_candidates, cudnn
from resnet_kernels.ops.batch_norm_act import NormProblem

CASE = Case("", 2, 16, 7, 6, 24)
SILU, LEAKY = Activation("silu"), Activation("leaky_relu", 0.1)


def convolution(tensors, dtype, **more):
    x, weight, bias, residual, scale = (t.to(dtype) for t in tensors)
    return ops.conv_bias_act(x, weight, bias, residual, scale=scale, **arguments(CASE), **more)


@pytest.mark.parametrize("backend", ("triton", "cpu", "eager", "auto"))
@pytest.mark.parametrize("activation", EACH, ids=str)
def test_values_and_gradients(activation, backend, device):
    skip_unless_runnable("eager" if backend == "auto" else backend, device, torch.float32)
    tensors = operands(CASE, torch.float32, device, real=True)
    upstream = torch.randn(2, 24, 7, 6, device=device)

    def run(dtype, backend):
        y = convolution(tensors, dtype, activation=activation, backend=backend)
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        again = convolution(leaves, dtype, activation=activation, backend=backend)
        return [y, again.detach(), *torch.autograd.grad(again, leaves, upstream.to(dtype))]

    oracle = run(torch.float64, "eager")
    assert torch.allclose(oracle[0].cpu(), activation(truth(CASE, *tensors, False)))
    for found in zip(run(torch.float32, backend), run(torch.float32, "eager"), oracle, strict=True):
        assert_within_budget(*found, str(activation))


@pytest.mark.parametrize("backend", ("triton", "cpu", "eager", "auto"))
@pytest.mark.parametrize("number", (1, 24))
def test_values_and_gradients_of_a_prelu(number, backend, device):
    skip_unless_runnable("eager" if backend == "auto" else backend, device, torch.float32)
    tensors = (*operands(CASE, torch.float32, device, real=True), torch.linspace(-1.7, 2.3, number, device=device))
    upstream = torch.randn(2, 24, 7, 6, device=device)

    def run(dtype, backend):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        y = convolution(leaves[:5], dtype, activation=PReLU(leaves[5]), backend=backend)
        with torch.no_grad():
            again = convolution(leaves[:5], dtype, activation=PReLU(leaves[5].detach()), backend=backend)
        (alone,) = torch.autograd.grad(
            convolution(tensors[:5], dtype, activation=PReLU(leaves[5]), backend=backend), leaves[5], upstream.to(dtype)
        )
        return [y.detach(), again, alone, *torch.autograd.grad(y, leaves, upstream.to(dtype))]

    oracle = run(torch.float64, "eager")
    for found in zip(run(torch.float32, backend), run(torch.float32, "eager"), oracle, strict=True):
        assert_within_budget(*found, backend)


def test_autocast_takes_slopes_in_fp32():
    """As a module's weight is."""
    x, weight, last = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 1, 1), PReLU(torch.tensor([-1.0, 0.5, 2.0, 3.0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.conv_bias_act(x, weight, activation=last, backend="eager")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), last(torch.conv2d(x, weight)), rtol=2e-2, atol=2e-2)


def test_a_name_overrides_relu():
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 1, 1)
    for relu in (True, False):
        y = ops.conv_bias_act(x, weight, relu=relu, activation="silu", backend="eager")
        assert torch.equal(y, ops.conv_bias_act(x, weight, relu=not relu, activation=SILU, backend="eager"))
        vectors = [torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4)]
        settings = dict(training=False, momentum=0.1, eps=0.0)
        y = ops.batch_norm_act(x, None, *vectors, **settings, relu=relu, activation="gelu_tanh")
        assert torch.equal(y, torch.nn.functional.gelu(x, approximate="tanh"))
    linear = torch.conv2d(x, weight)
    assert torch.equal(ops.conv_bias_act(x, weight, activation="relu", backend="eager"), linear.relu())
    assert torch.equal(ops.conv_bias_act(x, weight, relu=False, backend="eager"), linear)


def test_errors_say_what_came_and_what_is_accepted():
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 1, 1)
    with pytest.raises(
        ValueError, match=r"activation must be one of relu, relu6, .*, an Activation or a PReLU, got 'swish'"
    ):
        ops.conv_bias_act(x, weight, activation="swish")
    with pytest.raises(TypeError, match="activation must be a str, an Activation, a PReLU or None, got SiLU"):
        ops.conv_bias_act(x, weight, activation=torch.nn.SiLU())
    with pytest.raises(ValueError, match=r"kind must be one of relu, .*, got 'elu'"):
        Activation("elu")
    with pytest.raises(ValueError, match="slope must be finite, got inf"):
        Activation("leaky_relu", float("inf"))
    with pytest.raises(ValueError, match=r"alone, got 0.5 for 'silu'"):
        Activation("silu", 0.5)
    with pytest.raises(TypeError, match="slope must be a number, got Tensor"):
        Activation("leaky_relu", torch.tensor(0.1))
    with pytest.raises(TypeError, match=r"slopes must be a floating-point tensor, got torch\.int64"):
        PReLU(torch.ones(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="slopes must be a floating-point tensor, got float"):
        PReLU(0.25)
    with pytest.raises(ValueError, match=r"slopes must have shape \(C,\) or \(1,\), got \(\)"):
        PReLU(torch.tensor(0.25))
    vectors = [torch.ones(4)] * 4
    for run in (
        lambda last: ops.conv_bias_act(x, weight, activation=last),
        lambda last: ops.batch_norm_act(x, None, *vectors, training=False, momentum=0.1, eps=0.0, activation=last),
    ):
        with pytest.raises(ValueError, match=r"PReLU's slopes must have shape \(4,\) or \(1,\), got \(3,\)"):
            run(PReLU(torch.ones(3)))
        with pytest.raises(ValueError, match="PReLU's slopes must be on x's device cpu, got meta"):
            run(PReLU(torch.ones(4, device="meta")))
        with pytest.raises(ValueError, match=r"must be of dtype torch\.float32, got torch\.float64"):
            run(PReLU(torch.ones(4, dtype=torch.float64)))


def test_an_activation_is_a_value():
    assert ops.Activation is Activation
    assert Activation("leaky_relu") == Activation("leaky_relu", 0.01) != LEAKY
    for activation in (*EACH, RELU, None):
        assert activations.from_arguments(*activations.as_arguments(activation)) == activation
        assert pickle.loads(pickle.dumps(activation)) == activation
    assert {str(Activation(kind)) for kind in KINDS if kind != "leaky_relu"} == {*KINDS} - {"leaky_relu"}
    assert str(LEAKY) == "leaky_relu(0.1)"


def test_gain_bounds_each_activation():
    x = torch.cat([torch.linspace(-30, 30, 60001), torch.tensor([1e30, -1e30])]).double()
    for activation in (*EACH, RELU):
        assert (activation(x).abs() <= activation.gain * x.abs()).all(), str(activation)


def test_over_writes_over_its_input():
    for activation in (*EACH, RELU):
        x = torch.randn(2, 3, 4, 5)
        expected = activation(x)
        assert activation.over(x) is x and torch.equal(x, expected)


def test_keys_of_tables():
    """ReLU's are those that shipped tables have."""
    assert str(CONV) == "conv 8x6x5->16 3x3/1 p1,1,1,1 d1 g1 scale bias relu"
    assert str(CONV._replace(activation=LEAKY)) == "conv 8x6x5->16 3x3/1 p1,1,1,1 d1 g1 scale bias leaky_relu(0.1)"
    assert str(CONV._replace(activation=PRELU)) == "conv 8x6x5->16 3x3/1 p1,1,1,1 d1 g1 scale bias prelu"
    assert str(CONV._replace(activation=None)) == "conv 8x6x5->16 3x3/1 p1,1,1,1 d1 g1 scale bias"
    assert str(NormProblem(4, 3, 2, True, SILU, True)) == "norm 4x3x2 residual silu training"
    assert str(NormProblem(4, 3, 2, False, None, False)) == "norm 4x3x2"


def test_the_operation_itself_has_no_gradient_but_relus():
    x, weight = torch.randn(1, 4, 5, 5, requires_grad=True), torch.randn(4, 4, 1, 1)
    op = torch.ops.resnet_kernels.conv_bias_act.default
    rest = (None, None, None, [1, 1], [0] * 4, [1, 1], 1)
    with pytest.raises(NotImplementedError, match="no gradient through silu"):
        op(x, weight, *rest, "silu", 0.0, "eager")
    with torch.no_grad():
        assert torch.equal(
            op(x, weight, *rest, "silu", 0.0, "eager"), torch.nn.functional.silu(torch.conv2d(x, weight))
        )


def test_cudnn_fuses_relu_alone(monkeypatch):
    """Its fused operations can't end in anything else."""
    x, weight, bias, residual, _ = operands(CASE, torch.float32, torch.device("cpu"), real=True)
    called = pretend.nvidia(monkeypatch)
    prelu = PReLU(torch.randn(24))
    for activation, expected in ((RELU, ["fused add"]), (SILU, ["conv2d"]), (prelu, ["conv2d"]), (None, ["conv2d"])):
        called.clear()
        y = cudnn.conv_bias_act(
            ConvOperands(x, weight, bias, residual, None, Geometry(padding=(1, 1, 1, 1)), activation)
        )
        assert called == expected
        z = truth(CASE, x, weight, bias, residual, None, False)
        assert torch.allclose(y.double(), activations.apply(activation, z), atol=1e-4)
        y = cudnn.conv_then_epilogue(
            ConvOperands(x, weight, bias, residual, None, Geometry(padding=(1, 1, 1, 1)), activation)
        )
        assert torch.allclose(y.double(), activations.apply(activation, z), atol=1e-4)
    names = [
        conv_candidates.untuned(CONV._replace(scale=False, activation=one), torch.float32, torch.device("cpu"))
        for one in (RELU, SILU, LEAKY, PRELU, None)
    ]
    assert names == ["cudnn", *["cudnn+epilogue"] * 4]


@pytest.mark.slow(unless=lambda training, backend: training and backend == "triton")
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("backend", ("triton", "eager"))
def test_compile(training, backend, device):
    skip_unless_runnable(backend, device, torch.float32)
    x, residual = (torch.randn(2, 8, 5, 5, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, 8, 3, 3, device=device, requires_grad=True)
    vectors = [torch.rand(8, device=device) + 0.5 for _ in range(4)]
    slopes = torch.randn(8, device=device, requires_grad=True)

    def both(x, residual):
        y = ops.conv_bias_act(x, weight, None, residual, padding=1, activation="silu", backend=backend)
        for last in (LEAKY, PReLU(slopes)):
            y = ops.batch_norm_act(
                y, residual, *vectors, training=training, momentum=0.0, eps=1e-5, activation=last, backend=backend
            )
        return ops.conv_bias_act(y, weight, activation=PReLU(slopes), backend=backend)

    def results(function):
        y = function(x, residual)
        return [y, *torch.autograd.grad(y.square().sum(), (x, residual, weight, slopes))]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(both), results(compiled), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(both(x, residual), compiled(x, residual))


@pytest.mark.slow
def test_opcheck(device):
    skip_unless_runnable("triton", device, torch.float32)
    x, residual = (torch.randn(2, 8, 5, 5, device=device, requires_grad=True) for _ in range(2))
    vectors = [torch.rand(8, device=device) + 0.5 for _ in range(4)]
    for training in (True, False):
        torch.library.opcheck(
            torch.ops.resnet_kernels.batch_norm_act.default,
            (x, residual, *vectors, training, 0.1, 1e-5, "leaky_relu", 0.1, "triton"),
        )
        slopes = torch.randn(8, device=device, requires_grad=True)
        torch.library.opcheck(
            torch.ops.resnet_kernels.batch_norm_act.default,
            (x, residual, *vectors, training, 0.1, 1e-5, "prelu", 0.0, "triton", slopes),
        )
