"""Clocks of a device (perf_counter on the CPU, CUDA events on a GPU), and rounds timed with one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

Clock = Callable[[Callable[[], object]], float]


def leading_in(clock: Clock, lead_in: float) -> Clock:
    """Returns a clock that precedes the counted call with uncounted ones, at least one and for `lead_in` seconds."""

    def seconds(call: Callable[[], object]) -> float:
        end = time.perf_counter() + lead_in
        clock(call)
        while time.perf_counter() < end:
            clock(call)
        return clock(call)

    return seconds


def clock_of(device: torch.device | str | None) -> Clock:
    """Returns a function that calls a callable and returns the seconds until its work on the device was done.

    Raises:
        TypeError: `device` is no device, no str and not None.
        ValueError: There is no clock for the device, or it isn't here.
    """
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


def _cuda_clock(device: torch.device) -> Clock:
    stream = torch.cuda.current_stream(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # Work queued earlier must not count in the first sample.
    torch.cuda.synchronize(device)

    def seconds(call: Callable[[], object]) -> float:
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3  # from milliseconds

    return seconds


def rounds(
    calls: Mapping[str, Callable[[], object]],
    clock: Clock,
    seconds: float,
    min_rounds: int,
    progress: Callable[[int, float], object] | None,
) -> dict[str, list[float]]:
    """Returns each contender's seconds, by round; rounds go on for `seconds`, and there are at least `min_rounds`."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    done, elapsed = 0, 0.0
    while done < min_rounds or elapsed < seconds:
        for name, call in calls.items():
            samples[name].append(clock(call))
        done += 1
        elapsed = time.perf_counter() - begin
        if progress is not None:
            progress(done, elapsed)
    return samples
