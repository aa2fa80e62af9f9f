"""What is right: fp64 is the truth, eager in the working dtype is the budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_kernels.ops import backends, error_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def error(y: Tensor, oracle: Tensor) -> float:
    """||y - oracle|| / ||oracle||."""
    truth = oracle.double().cpu()
    return ((y.double().cpu() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def assert_within_budget(y: Tensor, eager: Tensor, oracle: Tensor, what: str = "") -> None:
    """At most twice eager's error, plus one rounding; same shape and dtype; NaN and inf in the same places."""
    assert y.shape == eager.shape and y.dtype == eager.dtype, what
    assert torch.equal(y.isnan().cpu(), oracle.isnan().cpu()), f"{what}: NaN elsewhere than in fp64"
    budget = error_budget.budget(error(eager, oracle), eager.dtype, eager.device)
    assert error(y, oracle) <= budget, f"{what}: error {error(y, oracle):.2e} over the budget of {budget:.2e}"


def skip_unless_eager_runs(device: torch.device, dtype: torch.dtype) -> None:
    """Skips where PyTorch itself has no convolution in this dtype: oneDNN held to AVX2 on a CPU that could do more."""
    try:
        x = torch.zeros(2, 16, 8, 8, device=device, dtype=dtype)
        torch.conv2d(x, torch.zeros(16, 16, 3, 3, device=device, dtype=dtype))
    except RuntimeError as error:
        pytest.skip(f"PyTorch's own convolution in {dtype} fails on this machine: {str(error).splitlines()[0]}")


def runnable(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend can't be tested here, None if it can."""
    reason = backends.why_not(backend, device_type, dtype)
    return None if reason is None else f"{backend} {reason}"


def skip_unless_runnable(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    reason = runnable(backend, device.type, dtype)
    if reason:
        pytest.skip(reason)
