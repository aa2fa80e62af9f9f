"""Properties of the process and of a device that kernels depend on: the interpreter, Hopper's instructions, TF32.

Importing this module does not import Triton, which may be absent.
"""

from __future__ import annotations

from functools import cache

import torch


def allows_tf32(dtype: torch.dtype) -> bool:
    """Whether fp32 factors may be rounded to TF32 on a CUDA device.

    cuDNN's own setting decides. Reading the older `allow_tf32` raises once the newer one was set.
    """
    return dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # PyTorch's stubs lack it


@cache
def is_interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter (TRITON_INTERPRET=1 before Triton was imported)."""
    from triton import JITFunction, language

    # A function of Triton's own, which was decorated as our kernels are.
    return not isinstance(language.cdiv, JITFunction)


@cache
def has_gluon() -> bool:
    """Whether kernels in Gluon can run: this Triton has the names that they need. Its interpreter has no Gluon."""
    try:
        from .sm90 import gluon_names  # noqa: F401
    except (ImportError, AttributeError):  # Gluon is experimental: its names change
        return False
    return not is_interpreted()


def dot_needs_fp32(dtype: torch.dtype) -> bool:
    """Whether kernels have to convert a product's operands to fp32: the interpreter's tl.dot is wrong in bf16.

    Source: triton-lang/triton#11584.
    """
    return dtype == torch.bfloat16 and is_interpreted()


def is_hopper(device: torch.device) -> bool:
    """Whether a device has the instructions that kernels/sm90 needs: compute capability 9."""
    return device.type == "cuda" and torch.version.hip is None and _capability(device)[0] == 9


def is_data_center_blackwell(device: torch.device) -> bool:
    """Whether a device has compute capability 10. There Triton compiles kernels/sm90/conv.py to that generation's products."""
    return device.type == "cuda" and torch.version.hip is None and _capability(device)[0] == 10


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
