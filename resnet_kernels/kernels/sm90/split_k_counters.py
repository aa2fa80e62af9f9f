"""Counters that tell the programs of a launch which of them finishes last. They are zero before a launch and after it.

Zeroing them in each call would be a second launch. So counters are kept, and two launches that may overlap must not share
them. Launches of one stream run one after another and share theirs. A captured launch may be replayed on any stream, beside
any other, so it owns its counters. It does not overlap with itself, because replays of one graph don't.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor

_PER_STREAM = 2**12
# 256 KiB serve some 500 captured launches, a dozen ResNet-50s. Counters of later ones are zeroed in each replay.
_FOR_GRAPHS = 2**16
_LOCK = threading.Lock()
# By device, the counters that no graph owns yet.
_LEFT: dict[torch.device, Tensor] = {}


def zeros(count: int, device: torch.device) -> Tensor:
    """Returns (count,) int32 zeros for one launch on the current stream, which must leave zeros behind."""
    if _is_capturing(device):
        return _take(count, device)
    # Now, because a later capture can't run the zeroing: it would only record it.
    _prepare_for_graphs(device)
    if count > _PER_STREAM:
        return torch.zeros(count, dtype=torch.int32, device=device)
    return _of_stream(device, _stream(device))[:count]


def _take(count: int, device: torch.device) -> Tensor:
    with _LOCK:
        left = _LEFT.get(device)
        if left is None or len(left) < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _LEFT[device] = left[count:]
        return left[:count]


def _prepare_for_graphs(device: torch.device) -> None:
    with _LOCK:
        if device not in _LEFT:
            _LEFT[device] = torch.zeros(_FOR_GRAPHS, dtype=torch.int32, device=device)
            if device.type == "cuda":
                # A replay may run on a stream that does not wait for this one.
                torch.cuda.current_stream(device).synchronize()


@lru_cache
def _of_stream(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(_PER_STREAM, dtype=torch.int32, device=device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
