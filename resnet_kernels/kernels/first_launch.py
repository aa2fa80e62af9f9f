"""Smallest possible launch, which shows whether Triton can launch on a device at all. ops/triton_check.py uses it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ANSWER = 42


@triton.jit
def _first_launch_kernel(answer_ptr, ANSWER: tl.constexpr):
    tl.store(answer_ptr, ANSWER)


def launch(device: torch.device) -> None:
    """Launches once and waits for the answer.

    Raises:
        RuntimeError: if the kernel wrote something else. Any error of Triton's or the driver's is passed on.
    """
    # Before there is any tensor: Triton builds its part of the driver here, for which it needs a C compiler.
    triton.runtime.driver.active.get_current_device()
    answer = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        # One program.
        _first_launch_kernel[(1,)](answer, ANSWER=_ANSWER, num_warps=1)
    if answer.item() != _ANSWER:
        raise RuntimeError(f"the first kernel wrote {answer.item()}, not {_ANSWER}")
