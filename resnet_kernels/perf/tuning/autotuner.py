"""Measurement of a problem: checks every candidate against fp64, then times the right ones against each other.

A candidate that is wrong or raises can't win; the record says why. It is wrong if its relative norm error exceeds the budget:
twice that of eager PyTorch in the same dtype, plus one rounding.

The winner has to beat the default, which runs without a table, by every clock: as a call, which on a GPU includes the time
that the host keeps the GPU waiting, and on a GPU also as a CUDA graph, which does not. So a table makes neither slower.

    problems.py   the problems of a model, and their candidates
    measure       one problem -> one record, ready for JSON
    table_file.py     a device's records in a file
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops import error_budget, tuned_table
from ...ops.error_budget import relative_error
from ..environment import environment
from ..timing import Timing, interleave, ratio

Outputs = Tensor | tuple[Tensor, ...]

# A graph repeats the call until it lasts this long, so that its launch and reading the clock don't count.
_GRAPH_SECONDS, _MOST_CALLS = 2e-4, 20


@dataclass(frozen=True)
class Problem:
    """Problem to measure.

    key: what `ops.tuned_table.choice` looks up. batch: images.
    operands: makes the operands of all callables below: random, but equal in each call.
    candidates: by name, including `default`, which runs without a table.
    eager: plain PyTorch in `dtype`, whose error sets the budget. reference: the oracle, in fp64, or rounded to fp32 where
        that is precise enough for the dtype.
    flops, bytes: of one call; bytes from and to HBM, each tensor once.
    calls: number of times that the model has this problem. is_cpu: whether it is a CPU's, with a packed weight.
    """

    key: str
    batch: int
    dtype: torch.dtype
    device: torch.device
    default: str
    candidates: Mapping[str, Callable[..., Outputs]]
    operands: Callable[[], tuple]
    eager: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    flops: int
    bytes: int
    calls: int = 1
    is_cpu: bool = False

    @property
    def dtype_name(self) -> str:
        """The dtype's name in the device's tables."""
        return tuned_table.dtype_name(self.dtype, self.is_cpu)

    def __str__(self) -> str:
        return f"{self.key}, batch {self.batch}, {self.dtype_name}"


class DeviceLost(RuntimeError):
    """Error of a candidate that left the GPU in a state in which nothing runs. record: the problem's, which names it."""

    def __init__(self, message: str, record: dict[str, Any]):
        super().__init__(message)
        self.record = record


def measure(problem: Problem, seconds: float, *, samples: bool = False) -> dict[str, Any]:
    """Checks and times a problem's candidates.

    Args:
        problem: The problem.
        seconds: time for timing, all candidates together; the checks and, on a GPU, compiling come on top.
        samples: whether to keep every sample beside median, p20 and p80.

    Returns:
        The record. `winner` is a name, or None if no candidate is right or the problem does not fit into memory (`failed`).
        Times are in seconds per call.

    Raises:
        DeviceLost: A candidate broke the GPU; the record then has no winner.
    """
    record: dict[str, Any] = {
        "key": problem.key,
        "batch": problem.batch,
        "dtype": problem.dtype_name,
        "winner": None,
        "default": problem.default,
        "flops": problem.flops,
        "bytes": problem.bytes,
        "candidates": {},
        "measured": environment(problem.device),
    }
    with torch.no_grad():
        try:
            operands = problem.operands()
            check_candidates(problem, operands, record)
        except torch.OutOfMemoryError as error:
            record["failed"] = f"{error}"[:500]
            return record
        calls: dict[str, Callable[[], object]] = {
            name: partial(problem.candidates[name], *operands)
            for name, row in record["candidates"].items()
            if "refused" not in row
        }
        if not calls:
            return record
        calls = _near_the_best(calls, problem, record)
        clocks = _time(calls, seconds, problem.device)
    for clock, timings in clocks.items():
        for name, timing in timings.items():
            values = timing.to_dict()
            if not samples:
                del values["samples"]
            record["candidates"][name][clock] = values
    record["winner"] = fastest(problem.default, list(clocks.values()))
    return record


def fastest(default: str, clocks: list[dict[str, Timing]]) -> str:
    """Name of the fastest candidate, by the last clock, of those that beat the default by every clock; else the default.

    Candidate and default are compared within rounds. A default without times was wrong: then the fastest right one wins.
    """
    names = list(clocks[-1])
    if default in names:
        names = [n for n in names if n == default or all(ratio(clock[n], clock[default]) < 1 for clock in clocks)]
    return min(names, key=lambda name: clocks[-1][name].median)


def check_candidates(problem: Problem, operands: tuple, record: dict[str, Any]) -> None:
    """Fills record["candidates"] with the error and budget of each, and the reason if it is refused.

    Raises:
        DeviceLost: A candidate has left the GPU in a state in which nothing runs any more.
    """
    truth = as_tuple(problem.reference(*operands))
    eager = as_tuple(problem.eager(*operands))
    budgets = [
        error_budget.budget(relative_error(y, oracle), problem.dtype, problem.device)
        for y, oracle in zip(eager, truth, strict=True)
    ]
    del eager
    for name, run in problem.candidates.items():
        row = record["candidates"][name] = {}
        try:
            for oracle in truth:
                # The allocator hands this memory out again: it holds NaN then, not the last candidate's right values.
                torch.full_like(oracle, math.nan, dtype=problem.dtype)
            outputs = as_tuple(run(*operands))
            _synchronize(problem.device)
            row.update(_judge(outputs, truth, budgets, problem.dtype))
        except Exception as error:
            row["refused"] = f"{type(error).__name__}: {error}"[:500]
            try:
                _synchronize(problem.device)
            except RuntimeError as lost:
                row["refused"] += " (and the GPU with it)"
                raise DeviceLost(f"{name} on {problem}: {lost}", record) from error


def _judge(outputs: tuple, truth: tuple, budgets: list[float], dtype: torch.dtype) -> dict[str, Any]:
    if len(outputs) != len(truth):
        return {"refused": f"gives {len(outputs)} tensors, not {len(truth)}"}
    for y, oracle in zip(outputs, truth):
        if y.shape != oracle.shape:
            return {"refused": f"gives shape {tuple(y.shape)}, not {tuple(oracle.shape)}"}
    if outputs[0].dtype != dtype:
        return {"refused": f"gives {outputs[0].dtype}, not {dtype}"}
    errors = [relative_error(y, oracle) for y, oracle in zip(outputs, truth)]
    # `not <=`: NaN exceeds any budget, and an eager result that overflows sets no budget.
    worst = max(range(len(errors)), key=lambda i: (not errors[i] <= budgets[i], errors[i] / budgets[i]))
    # JSON has no NaN.
    row: dict[str, Any] = {
        what: x if math.isfinite(x) else None for what, x in (("error", errors[worst]), ("budget", budgets[worst]))
    }
    if not errors[worst] <= budgets[worst] < math.inf:
        row["refused"] = f"errs by {errors[worst]:.2e}, more than {budgets[worst]:.2e}"
    return row


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    """Outputs of a Problem's callable as a tuple, even of one tensor."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _near_the_best(
    calls: dict[str, Callable[[], object]], problem: Problem, record: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    """Calls that take at most three times the fastest's time at first sight, and the default; the record names the others."""
    quick = {name: glance(call, problem.device) for name, call in calls.items()}
    best = min(quick.values())
    for name, seconds in quick.items():
        if seconds > 3 * best and name != problem.default:
            record["candidates"][name]["dropped"] = f"{seconds / best:.1f} times as long as the fastest at first sight"
    return {name: call for name, call in calls.items() if "dropped" not in record["candidates"][name]}


def glance(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, in the better of two rounds of three calls: precise enough to see a factor of 3, not to choose."""
    rounds = []
    for _ in range(2):
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(3):
            call()
        _synchronize(device)
        rounds.append((time.perf_counter() - begin) / 3)
    return min(rounds)


def _time(calls: dict[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, dict[str, Timing]]:
    if device.type != "cuda":
        return {"call": interleave(calls, seconds=seconds, device=device)}
    clocks = {"call": interleave(calls, seconds=seconds / 2, device=device)}
    shortest = min(timing.median for timing in clocks["call"].values())
    repeats = max(1, min(_MOST_CALLS, round(_GRAPH_SECONDS / max(shortest, 1e-9))))
    try:
        graphs = {name: _captured(call, repeats, device) for name, call in calls.items()}
    except RuntimeError:
        return clocks  # one of them can't be captured, so calls alone decide
    timings = interleave({name: graph.replay for name, graph in graphs.items()}, seconds=seconds / 2, device=device)
    clocks["graph"] = {
        name: Timing(tuple(sample / repeats for sample in timing.samples)) for name, timing in timings.items()
    }
    return clocks


def _captured(call: Callable[[], object], repeats: int, device: torch.device) -> torch.cuda.CUDAGraph:
    # Not torch.cuda.graph: it empties the allocator's cache each time, and there are hundreds of graphs to capture.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()  # makes per-stream state, such as cuDNN's handle
        stream.synchronize()
        graph.capture_begin()
        try:
            for _ in range(repeats):
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph
