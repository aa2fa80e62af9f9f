"""Timing on machines that drift: contenders take turns, round after round, and are compared pair by pair.

A throttled clock or another process that wakes up makes the contender that runs at that moment look slow. In rounds
A B C A B C ... it hits all contenders, and the ratio of two samples of one round hardly changes.

The clock is `time.perf_counter` on the CPU and CUDA events on a GPU. No function here fails because of a time.

    interleave    rounds for some seconds, after a warm-up; our own benchmarks use it
    time_run      the slim text's experiment: burn-in steps, a fixed number of steps, its lines; time_runs times several
"""

from __future__ import annotations

import math
import numbers
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, TextIO

import torch

from .clocks import clock_of, leading_in, rounds

_STEPS_BETWEEN_LINES = 10  # of time_run, as in the slim text

# Two calls trigger all lazy work: the first compiles, packs and allocates; the second may compile again for the state that
# the first has changed. During a tenth of the time caches and clocks settle.
_WARM_UP_ROUNDS = 2
_WARM_UP_SHARE = 0.1


@dataclass(frozen=True)
class Timing:
    """Times of one contender.

    samples: seconds, one per round, in the order of the rounds.

    Raises:
        ValueError: There is no sample, or one isn't finite or is below 0.
    """

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", tuple(map(float, self.samples)))
        if not self.samples:
            raise ValueError("samples must hold at least one sample, got none")
        wrong = [sample for sample in self.samples if not (math.isfinite(sample) and sample >= 0)]
        if wrong:
            raise ValueError(f"samples must be finite and at least 0 seconds, got {wrong[0]}")

    @property
    def median(self) -> float:
        """Median in seconds."""
        return self._percentile(50)

    @property
    def p20(self) -> float:
        """Seconds that a fifth of the samples stay below."""
        return self._percentile(20)

    @property
    def p80(self) -> float:
        """Seconds that four fifths of the samples stay below."""
        return self._percentile(80)

    @property
    def mean(self) -> float:
        """Mean in seconds."""
        return statistics.fmean(self.samples)

    @property
    def std(self) -> float:
        """Population standard deviation in seconds, never NaN and 0 for equal samples."""
        # pstdev adds up exactly; the slim text's sqrt(E[x^2] - E[x]^2) can take the root of a negative number.
        return statistics.pstdev(self.samples)

    def _percentile(self, percent: int) -> float:
        import numpy as np  # here, because importing the package must not import NumPy

        return float(np.percentile(self.samples, percent))

    def to_dict(self) -> dict:
        """Returns the summary and the samples in seconds, ready for json.dumps."""
        return {
            "median": self.median,
            "p20": self.p20,
            "p80": self.p80,
            "rounds": len(self.samples),
            "samples": list(self.samples),
        }


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 5.0,
    min_rounds: int = 5,
    device: torch.device | str | None = None,
    progress: Callable[[int, float], object] | None = None,
    lead_in: float = 0.0,
) -> dict[str, Timing]:
    """Times callables in turns: after a warm-up a round calls each of them once, in the mapping's order.

    Each call is waited for, so a sample is a latency: on a GPU it includes the time that the host keeps the GPU waiting.
    Each call finds the caches as the other contenders left them. A loop over one contender would give other times.
    Errors of a contender are passed on.

    Args:
        contenders: the callables to time, by name; called without arguments, results are dropped.
        seconds: time for rounds, at least 0. The warm-up takes a tenth of it on top, and at least two rounds.
        min_rounds: least number of rounds, however long they take; at least 1.
        device: where the work is done: CPU (None as well) or CUDA.
        progress: called after each round with (rounds done, seconds elapsed), outside of the timed calls.
        lead_in: If above 0, uncounted calls of the same contender come before each counted one: at least one, for this
            many seconds. It is for contenders with their own thread pools: waiting threads spin for some milliseconds and
            slow the next contender down. Each contender then finds the caches as its own call left them.

    Returns:
        name -> Timing, in the mapping's order; samples with the same index are of the same round.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: There are no contenders, a number is out of range, or the device has no clock or isn't here.
    """
    _check_contenders(contenders)
    _check_seconds("seconds", seconds)
    _check_seconds("lead_in", lead_in)
    _check_count("min_rounds", min_rounds, 1)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable or None, got {type(progress).__name__}")
    clock = clock_of(device)
    clock = leading_in(clock, lead_in) if lead_in else clock
    calls = dict(contenders)
    # The warm-up is the same loop as the measurement, so that caches are in the same state, too.
    rounds(calls, clock, seconds * _WARM_UP_SHARE, _WARM_UP_ROUNDS, None)
    samples = rounds(calls, clock, seconds, min_rounds, progress)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def ratio(a: Timing, b: Timing) -> float:
    """Returns the median over the rounds of a's time / b's; below 1, a is faster.

    It isn't the ratio of the medians: a disturbance of a whole round cancels in its ratio. Errors are those of `ratios`.
    """
    return statistics.median(ratios(a, b))


def ratios(a: Timing, b: Timing) -> tuple[float, ...]:
    """Returns a's time / b's for each round.

    Raises:
        TypeError: An argument is not a Timing.
        ValueError: They differ in their number of samples, so they can't be of one call of `interleave`, or `b` has a
            sample of 0 seconds.
    """
    for name, timing in (("a", a), ("b", b)):
        if not isinstance(timing, Timing):
            raise TypeError(f"{name} must be a Timing, got {type(timing).__name__}")
    if len(a.samples) != len(b.samples):
        raise ValueError(f"a and b must be of the same rounds, got {len(a.samples)} and {len(b.samples)} samples")
    if min(b.samples) == 0:
        raise ValueError("b must have no sample of 0 seconds: it is too short for the clock, let a call do more")
    return tuple(mine / others for mine, others in zip(a.samples, b.samples))


class BatchTime(NamedTuple):
    """Mean and standard deviation of a run's steps, in seconds."""

    mean: float
    std: float


def time_run(
    target: Callable[[], object],
    info: str,
    num_batches: int = 100,
    num_steps_burn_in: int = 10,
    device: torch.device | str | None = None,
    stream: TextIO | None = None,
) -> BatchTime:
    """Times the steps of a run as the slim text does, and prints a line every tenth step and one at the end.

        2026-11-22 04:30:00.123456: step:0. duration = 0.021
        2026-11-22 04:30:02.345678: Forward across 100 steps, 0.021 +/- 0.001 sec / batch

    Args:
        target: one step, called without arguments; its result is dropped.
        info: name of the timed run, for the last line.
        num_batches: number of counted steps, at least 1.
        num_steps_burn_in: number of uncounted steps before them, at least 0.
        device: where the work is done: CPU (None as well) or CUDA. Each step is waited for.
        stream: text stream for the lines, sys.stdout if None.

    Returns:
        (mean, std) of the steps in seconds; std is the population's, and 0 for one step.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A number is out of range, or the device has no clock or isn't here.

    Source: TF-slim's timing of resnet_v2_152, after the AlexNet benchmark of TensorFlow's tutorials.
    """
    if not callable(target):
        raise TypeError(f"target must be callable, got {type(target).__name__}")
    if not isinstance(info, str):
        raise TypeError(f"info must be a str, got {info!r}")
    timing = time_runs({info: target}, num_batches, num_steps_burn_in, device, stream)[info]
    return BatchTime(timing.mean, timing.std)


def time_runs(
    contenders: Mapping[str, Callable[[], object]],
    num_batches: int = 100,
    num_steps_burn_in: int = 10,
    device: torch.device | str | None = None,
    stream: TextIO | None = None,
) -> dict[str, Timing]:
    """Times several runs as `time_run` does: they take turns step by step, and each prints its own lines.

    A step's line ends with the contender's name if there are several. Errors and the arguments not listed are those of
    `time_run`.

    Returns:
        info -> Timing, in the mapping's order; samples with the same index are of the same turn, so `ratio` can pair them.
    """
    _check_contenders(contenders)
    _check_count("num_batches", num_batches, 1)
    _check_count("num_steps_burn_in", num_steps_burn_in, 0)
    if stream is not None and not callable(getattr(stream, "write", None)):
        raise TypeError(f"stream must be a text stream or None, got {type(stream).__name__}")
    clock = clock_of(device)
    samples: dict[str, list[float]] = {info: [] for info in contenders}
    for step in range(-num_steps_burn_in, num_batches):
        for info, target in contenders.items():
            seconds = clock(target)
            if step < 0:
                continue
            samples[info].append(seconds)
            if step % _STEPS_BETWEEN_LINES == 0:
                whose = f" ({info})" if len(contenders) > 1 else ""
                print(f"{datetime.now()}: step:{step}. duration = {seconds:.3f}{whose}", file=stream, flush=True)
    timings = {info: Timing(tuple(values)) for info, values in samples.items()}
    for info, timing in timings.items():
        print(summary_line(info, timing), file=stream, flush=True)
    return timings


def summary_line(info: str, timing: Timing) -> str:
    """Returns the slim text's last line about a run, with the present time of day and `info`, the run's name."""
    what = f"{info} across {len(timing.samples)} steps, {timing.mean:.3f} +/- {timing.std:.3f} sec / batch"
    return f"{datetime.now()}: {what}"


def _check_contenders(contenders: object) -> None:
    if not isinstance(contenders, Mapping):
        raise TypeError(f"contenders must map names to callables, got {type(contenders).__name__}")
    if not contenders:
        raise ValueError("contenders must hold at least one callable, got none")
    for name, call in contenders.items():
        if not isinstance(name, str):
            raise TypeError(f"contenders must have str names, got {name!r}")
        if not callable(call):
            raise TypeError(f"contenders[{name!r}] must be callable, got {type(call).__name__}")


def _check_seconds(name: str, value: float) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")


def _check_count(name: str, count: int, at_least: int) -> None:
    if not isinstance(count, numbers.Integral) or isinstance(count, bool):
        raise TypeError(f"{name} must be an int, got {count!r}")
    if count < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {count}")
