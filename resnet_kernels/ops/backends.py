"""Which backend runs an op: one table of what each can do, one rule for `auto`.

triton  our kernels, on CUDA or ROCm GPUs, or on CPU tensors under TRITON_INTERPRET=1
cudnn   cuDNN's fused convolution + bias (+ add) + ReLU, on NVIDIA GPUs
cpu     oneDNN's fused convolution + bias (+ add), on CPU tensors
eager   plain PyTorch, anywhere
auto    what a measured table says where the device has one (tuned_table.py); else cudnn on NVIDIA GPUs, with Triton's
        elementwise passes around it, cpu on the CPU, eager elsewhere, also where Triton can't launch (triton_check.py)

"tuned" is what `auto` resolves to where it decides op by op: on NVIDIA GPUs, and wherever there is a table. It names no
backend that a user can ask for: each op looks its problem up, and where the table has no answer takes what counting says.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

from . import triton_check, tuned_table

BACKENDS = ("auto", "triton", "cudnn", "cpu", "eager")
ENVIRONMENT_VARIABLE = "RESNET_KERNELS_BACKEND"
_PREFERRED = {"cuda": "cudnn", "cpu": "cpu"}
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_name(backend: object) -> str:
    """Returns `backend`; ValueError unless it is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def requested(backend: str) -> str:
    """The backend asked for: the environment variable RESNET_KERNELS_BACKEND goes over the argument."""
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if not override:
        return backend
    if override not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACKENDS)}, got {override!r}")
    return override


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Turns a requested backend, or "tuned", into the one that will run; "tuned" where a table decides op by op.

    Raises:
        RuntimeError: if an explicit backend can't run on this device in this dtype. Only `auto` falls back.
    """
    backend = requested(backend)
    if backend == "auto":
        name = untuned(device, dtype)
        # A table's winners, too, rest on scales and shifts that Triton writes.
        by_table = tuned_table.covers(device, dtype) and triton_check.why_not(device) is None
        return "tuned" if name == "cudnn" or by_table else name
    if backend == "tuned":
        return backend
    reason = why_not_on(backend, device, dtype)
    if reason is not None:
        raise RuntimeError(f'backend="{backend}" {reason}')
    return backend


def as_requested(backend: str) -> str:
    """The name under which a public function takes a resolved backend."""
    return "auto" if backend == "tuned" else backend


def untuned(device: torch.device, dtype: torch.dtype) -> str:
    """The backend of `auto` where no measurement says otherwise: "cudnn", "cpu" or "eager"."""
    preferred = _PREFERRED.get(device.type, "eager")
    if why_not(preferred, device.type, dtype) is not None:
        return "eager"
    if preferred == "cudnn" and (reason := why_not_on("triton", device, dtype)) is not None:
        # By ATen operations folding BN takes more launches than it saves, so nothing there is to be gained over eager.
        say_once(f'backend="auto" runs PyTorch\'s own operations on {device}: Triton {reason}')
        return "eager"
    return preferred


def passes_on_triton(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a resolved backend runs an elementwise pass that nobody measured on Triton: fewer bytes, fewer launches."""
    return backend == "tuned" and untuned(device, dtype) == "cudnn"


_said: set[str] = set()


def say_once(text: str, stacklevel: int = 3) -> None:
    """Warns; once a text and process. stacklevel: of warnings.warn."""
    if text not in _said:
        _said.add(text)
        warnings.warn(f"resnet_kernels: {text}", RuntimeWarning, stacklevel)


def why_not_on(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend can't run a dtype on this very device, as the end of a sentence; None if it can."""
    reason = why_not(backend, device.type, dtype)
    return triton_check.why_not(device) if reason is None and backend == "triton" else reason


def why_eager(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why `auto` falls back to eager on a device that has a faster backend; "" if it does not.

    Nothing is launched and no table read for that: `fuse` asks, too. Where Triton can't launch, `untuned` says it in a call.
    """
    preferred = _PREFERRED.get(device.type)
    if requested(backend) != "auto" or preferred is None:
        return ""
    reason = why_not(preferred, device.type, dtype)
    return "" if reason is None else f'the "{preferred}" backend {reason}'


@functools.cache
def why_not(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend can't run a dtype on a kind of device, as the end of a sentence; None if it can."""
    if backend == "eager":
        return None
    if backend == "triton":
        return _why_not_triton(device_type, dtype)
    if backend == "cudnn":
        if device_type != "cuda" or torch.version.hip is not None:
            return f"needs an NVIDIA GPU, got {'an AMD GPU' if torch.version.hip else f'{device_type} tensors'}"
        if not (torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled):
            return "needs cuDNN, which this PyTorch lacks or has disabled"
        return None if dtype in _TRITON_DTYPES else f"runs float32, float16 and bfloat16, got {dtype}"
    from . import onednn

    if device_type != "cpu":
        return f"runs on CPU tensors, got {device_type} tensors"
    return onednn.why_not(dtype)


def _why_not_triton(device_type: str, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed (it has no build for Windows or macOS)"
    if dtype not in _TRITON_DTYPES:
        return f"runs float32, float16 and bfloat16, got {dtype}"
    if device_type == "cuda":
        return None
    if device_type == "cpu":
        from ..kernels.target import is_interpreted

        if is_interpreted():
            return None
        return (
            "runs on CPU tensors only in Triton's interpreter: set TRITON_INTERPRET=1 in the environment before Python "
            'starts, or use backend="cpu"'
        )
    return f"needs a GPU, got {device_type} tensors"
