"""Names of dtypes, and the dtype that autocast asks for."""

from __future__ import annotations

import torch
from torch import Tensor

# Spelled as in tables, results, reports and on the command line.
SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
BY_SHORT_NAME = {name: dtype for dtype, name in SHORT_NAMES.items()}


def short_name(dtype: torch.dtype) -> str:
    """Returns "fp32" for float32, and so on; a dtype without a short name keeps PyTorch's."""
    return SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the dtype that autocast would give a convolution of x; None where it leaves x alone (off, fp64, no float)."""
    if x.dtype == torch.float64 or not x.is_floating_point():
        return None
    kind = x.device.type
    # The CPU and CUDA always have autocast, and torch.compile of PyTorch 2.11 can't trace is_autocast_available.
    if not (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
