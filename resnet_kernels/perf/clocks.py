"""Clocks of a device: perf_counter on the CPU, CUDA events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def leading_in(clock: Callable, lead_in: float) -> Callable[[Callable[[], object]], float]:
    def seconds(call: Callable[[], object]) -> float:
        end = time.perf_counter() + lead_in
        clock(call)
        while time.perf_counter() < end:
            clock(call)
        return clock(call)

    return seconds


def clock_of(device: torch.device | str | None) -> Callable[[Callable[[], object]], float]:
    """A function that calls a callable and returns the seconds until its work on the device was done."""
    if device is not None and not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch.device, a str or None, got {type(device).__name__}")
    try:
        device = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"device must name a device, got {device!r}") from error
    if device.type == "cpu":
        return _cpu_seconds
    if device.type != "cuda":
        raise ValueError(f"device must be a CPU or CUDA device, got {device}")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one that is here, got {device} with {torch.cuda.device_count()} CUDA devices")
    return _cuda_clock(device)


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    stream = torch.cuda.current_stream(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # Nothing that was queued before may count as the first sample's.
    torch.cuda.synchronize(device)

    def seconds(call: Callable[[], object]) -> float:
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3  # from milliseconds

    return seconds
