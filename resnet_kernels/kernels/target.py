"""The device and the settings that kernels run under."""

from __future__ import annotations

import torch


def allows_tf32(dtype: torch.dtype) -> bool:
    """Whether fp32 factors may be rounded to TF32 on a CUDA device.

    cuDNN's own setting decides. Reading the older `allow_tf32` raises once the newer one was set.
    """
    return dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # PyTorch's stubs lack it
