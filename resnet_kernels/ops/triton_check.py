"""A check of whether Triton can launch on a device: one launch, as nothing else tells for sure.

Triton may be installed and still fail: the GPU is older than it compiles for, the container has no C compiler (Triton builds
its launchers with one at first use), or the driver is older than its code. The reason is what the first launch raises.
"""

from __future__ import annotations

import torch

from . import apart

# The oldest compute capability of NVIDIA's that Triton compiles for.
LEAST_CAPABILITY = (8, 0)

_known: dict[torch.device, str | None] = {}


def why_not(device: torch.device) -> str | None:
    """Returns why Triton can't launch on a device, as the end of a sentence; None if it can, or if a try is impossible now."""
    if device.type != "cuda":
        return None
    if device in _known:
        return _known[device]
    # A fake tensor's device may be absent, and nothing can be launched under a fake mode or during a capture.
    if not torch.cuda.is_available() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if torch.cuda.is_current_stream_capturing():
        return None
    _known[device] = _try(device)
    return _known[device]


def _try(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        least, own = (".".join(map(str, numbers)) for numbers in (LEAST_CAPABILITY, capability))
        return f"needs a GPU of compute capability {least} or later, got {own}"
    try:
        from ..kernels import first_launch

        apart.call(lambda: first_launch.launch(device))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"can't launch here ({type(error).__name__}: {lines[0][:200]})"
    return None
