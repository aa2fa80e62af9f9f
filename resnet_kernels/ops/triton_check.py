"""Can Triton launch on this device? Asked once a device, by launching: nothing else tells for sure.

Its package may be there and still fail: a GPU older than it compiles for, a container without a C compiler (Triton builds its
launchers with one at first use), a driver that is older than its code. Whatever the first launch raises is the reason.
"""

from __future__ import annotations

import torch

# NVIDIA's oldest that Triton compiles for.
LEAST_CAPABILITY = (8, 0)

_known: dict[torch.device, str | None] = {}


def why_not(device: torch.device) -> str | None:
    """Why Triton can't launch on a device, as the end of a sentence; None if it can, or where nobody can tell now."""
    if device.type != "cuda":
        return None
    if device in _known:
        return _known[device]
    # Fake tensors are on devices that are not here, and under a mode of theirs, or in a capture, nothing can be tried.
    if not torch.cuda.is_available() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if torch.cuda.is_current_stream_capturing():
        return None
    _known[device] = _ask(device)
    return _known[device]


def _ask(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        least, own = (".".join(map(str, numbers)) for numbers in (LEAST_CAPABILITY, capability))
        return f"needs a GPU of compute capability {least} or later, got {own}"
    try:
        from ..kernels import first_launch

        first_launch.launch(device)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"can't launch here ({type(error).__name__}: {lines[0][:200]})"
    return None
