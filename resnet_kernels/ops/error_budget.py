"""The error that a result may have: twice eager's own, plus one rounding of the dtype.

Nobody can say which error is right, but eager PyTorch's can be measured: the same computation in fp64, the oracle, is the
truth, and errors are relative norm errors against it. `verify`, `tune`, the tests and the benchmarks judge by this budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.target import allows_tf32

# Elements widened to fp64 at a time: fp64 copies of a whole activation at batch 256 take gigabytes.
_COMPARED = 2**25


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of rounding to a dtype; 2**-11 for float32 whose products may be TF32 on this device.

    TF32 keeps 10 bits of each factor; its sums are fp32.
    """
    if device.type == "cuda" and allows_tf32(dtype):
        return 2.0**-11
    return torch.finfo(dtype).eps / 2


def budget(eager_error: float, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error that a result may have.

    Args:
        eager_error: eager's relative norm error in the working dtype.
        dtype: the working dtype.
        device: computed the result.
    """
    return 2 * eager_error + rounding(dtype, device)


def relative_error(y: Tensor, oracle: Tensor) -> float:
    """||y - oracle|| / ||oracle||, summed in fp64; ||y|| where the oracle is all zeros.

    Args:
        y: any shape, dtype and device.
        oracle: the truth, of the same shape and on the same device, fp64 or fp32.
    """
    step = max(1, _COMPARED // max(1, oracle[:1].numel())) if oracle.dim() else 1
    difference = size = 0.0
    for part, truth in zip(y.split(step), oracle.split(step)) if oracle.dim() else [(y, oracle)]:
        truth = truth.double()
        difference += float((part.double() - truth).square().sum())
        size += float(truth.square().sum())
    return (difference / size if size else difference) ** 0.5
