"""add_relu: exact, keeps layout and NaN, differentiable, kind to bad input."""

import pytest
import torch

from helpers.oracle import DTYPES, skip_unless_runnable
from resnet_kernels import ops

BACKENDS = ("triton", "cudnn", "cpu", "eager")


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 64, 8, 8), (1025,), (4, 16, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_and_in_x_layout(shape, dtype, backend, device):
    skip_unless_runnable(backend, device, dtype)
    x, residual = (torch.randint(-9, 10, shape, device=device).to(dtype) for _ in range(2))
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)  # the residual stays contiguous: to be converted
    y = ops.add_relu(x, residual, backend=backend)
    assert torch.equal(y, torch.relu(x + residual))
    assert y.stride() == x.stride() and y.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf(backend, device):
    skip_unless_runnable(backend, device, torch.float32)
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0, -1.0], device=device)
    residual = torch.tensor([1.0, 1.0, 1.0, float("nan"), 0.0], device=device)
    y = ops.add_relu(x, residual, backend=backend)
    torch.testing.assert_close(y, torch.relu(x + residual), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_compile_and_empty(backend, device):
    skip_unless_runnable(backend, device, torch.float32)
    x, residual, upstream = (torch.randn(2, 8, 5, 5, device=device) for _ in range(3))
    leaves = x.requires_grad_(), residual.requires_grad_()
    expected = torch.autograd.grad(torch.relu(x + residual), leaves, upstream)
    run = torch.compile(lambda a, b: ops.add_relu(a, b, backend=backend), fullgraph=True, backend="aot_eager")
    for function in (lambda a, b: ops.add_relu(a, b, backend=backend), run):
        for gradient, right in zip(torch.autograd.grad(function(*leaves), leaves, upstream), expected):
            assert torch.equal(gradient, right)
    torch.library.opcheck(torch.ops.resnet_kernels.add_relu.default, (x, residual, backend))
    assert ops.add_relu(x[:0], residual[:0], backend=backend).shape == (0, 8, 5, 5)


@pytest.mark.parametrize(
    "x, residual, kind, message",
    [
        ([1.0], torch.ones(1), TypeError, "x must be a torch.Tensor, got list"),
        (torch.ones(1), None, TypeError, "residual must be a torch.Tensor, got NoneType"),
        (torch.ones(2).int(), torch.ones(2).int(), TypeError, "x must be floating point"),
        (torch.ones(2, 3), torch.ones(3), ValueError, r"residual must have x's shape \(2, 3\), got \(3,\)"),
        (torch.ones(2), torch.ones(2).half(), ValueError, "residual must have x's dtype torch.float32"),
        (torch.ones(2), torch.ones(2, device="meta"), ValueError, "residual must have x's device cpu, got meta"),
        (torch.ones(4)[::2], torch.ones(2), ValueError, "x must be dense in memory"),
    ],
)
def test_bad_input(x, residual, kind, message):
    with pytest.raises(kind, match=message):
        ops.add_relu(x, residual)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, cudnn, cpu, eager, got 'gpu'"):
        ops.add_relu(torch.ones(1), torch.ones(1), backend="gpu")
