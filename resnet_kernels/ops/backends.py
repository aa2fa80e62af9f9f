"""The choice of a backend: what each can run, and one rule for `auto`.

triton  our kernels, on CUDA or ROCm GPUs, or on CPU tensors under TRITON_INTERPRET=1
cudnn   cuDNN's fused convolution + bias (+ add) + ReLU, on NVIDIA GPUs
cpu     oneDNN's fused convolution + bias (+ add), on CPU tensors
eager   plain PyTorch, anywhere
auto    a measured table's winners where the device has a table (tuned_table.py). Elsewhere it is cudnn on NVIDIA GPUs, with
        Triton's elementwise passes around it, cpu on the CPU, and eager on other devices and where Triton can't launch
        (triton_check.py)

`auto` resolves to "tuned" where it decides op by op: on NVIDIA GPUs, and wherever there is a table. Each op then looks its
problem up, and takes the candidate of fewer bytes and launches where the table has no answer. No user can ask for "tuned".
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
    """Returns a user's `backend` if it is a name in BACKENDS.

    Raises:
        ValueError: it is not.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def requested(backend: str) -> str:
    """Returns the backend asked for: the environment variable RESNET_KERNELS_BACKEND overrides the argument.

    Raises:
        ValueError: the variable is set to a name that is not in BACKENDS.
    """
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if not override:
        return backend
    if override not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACKENDS)}, got {override!r}")
    return override


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Turns a requested backend into the one that will run; "tuned", given or returned, decides op by op.

    Raises:
        RuntimeError: an explicit backend can't run on this device in this dtype. Only `auto` falls back.
    """
    backend = requested(backend)
    if backend == "auto":
        name = untuned(device, dtype)
        if name == "eager" and is_switched_off(_PREFERRED.get(device.type, "eager")):
            return name  # a table may name the library that is switched off
        # Whatever wins in a table, Triton writes its scales and shifts.
        by_table = tuned_table.covers(device, dtype) and triton_check.why_not(device) is None
        return "tuned" if name == "cudnn" or by_table else name
    if backend == "tuned":
        return backend
    reason = why_not_on(backend, device, dtype)
    if reason is not None:
        raise RuntimeError(f'backend="{backend}" {reason}')
    return backend


def as_requested(backend: str) -> str:
    """Returns the name by which a public function takes a resolved backend."""
    return "auto" if backend == "tuned" else backend


def untuned(device: torch.device, dtype: torch.dtype) -> str:
    """The backend of `auto` where no measurement says otherwise: "cudnn", "cpu" or "eager"."""
    preferred = _PREFERRED.get(device.type, "eager")
    if why_not(preferred, device.type, dtype) is not None:
        return "eager"
    if preferred == "cudnn" and (reason := why_not_on("triton", device, dtype)) is not None:
        # Folding BN by ATen operations takes more launches than it saves, so nothing is gained over eager.
        say_once(f'backend="auto" runs PyTorch\'s own operations on {device}: Triton {reason}')
        return "eager"
    return preferred


def passes_on_triton(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a resolved backend runs an unmeasured elementwise pass on Triton, which takes fewer bytes and launches."""
    return backend == "tuned" and untuned(device, dtype) == "cudnn"


_said: set[str] = set()


def say_once(text: str, stacklevel: int = 3) -> None:
    """Warns of each text once in a process; `stacklevel` is that of warnings.warn."""
    if text not in _said:
        _said.add(text)
        warnings.warn(f"resnet_kernels: {text}", RuntimeWarning, stacklevel)


def why_not_on(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why a backend can't run a dtype on this very device, as the end of a sentence; None if it can."""
    reason = why_not(backend, device.type, dtype)
    return triton_check.why_not(device) if reason is None and backend == "triton" else reason


def why_eager(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns why `auto` falls back to eager on a device that has a faster backend; "" if it does not.

    The answer takes no launch and no table, since `fuse` asks for it. Where Triton can't launch, a call says so (`untuned`).
    """
    preferred = _PREFERRED.get(device.type)
    if requested(backend) != "auto" or preferred is None:
        return ""
    reason = why_not(preferred, device.type, dtype)
    return "" if reason is None else f'the "{preferred}" backend {reason}'


# By backend, the switch that turns a vendor's library off for all of PyTorch, and its name.
_SWITCHES = {
    "cpu": (torch._C._get_mkldnn_enabled, "oneDNN is switched off (torch.backends.mkldnn.flags)"),
    "cudnn": (torch._C._get_cudnn_enabled, "cuDNN is switched off (torch.backends.cudnn.enabled)"),
}


def is_switched_off(backend: str) -> bool:
    """Whether the library behind a backend is switched off now, as eager would find it. It takes 0.1 us."""
    return backend in _SWITCHES and not _SWITCHES[backend][0]()


def why_not(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Returns why a backend can't run a dtype on a kind of device now, as the end of a sentence; None if it can."""
    reason = why_never(backend, device_type, dtype)
    if reason is None and is_switched_off(backend):
        return f"can't run: {_SWITCHES[backend][1]}"
    return reason


@functools.cache
def why_never(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Returns `why_not`, apart from what a user can switch on and off while the process runs."""
    if backend == "eager":
        return None
    if backend == "triton":
        return _why_not_triton(device_type, dtype)
    if backend == "cudnn":
        if device_type != "cuda" or torch.version.hip is not None:
            return f"needs an NVIDIA GPU, got {'an AMD GPU' if torch.version.hip else f'{device_type} tensors'}"
        if not torch.backends.cudnn.is_available():
            return "needs cuDNN, which this PyTorch lacks"
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
