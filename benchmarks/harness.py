"""Measurement of a case: prepares and gates every contender, then times them all in the same rounds.

A contender's fault costs its own row only: one that can't be imported, prepared or run is Absent with the reason. With wrong
numbers a contender of ours gets no time. A peer keeps its time, and its failure stands beside it.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from resnet_kernels.perf.schema import Conditions, ContenderInfo, ExtraInfo, Kernel, Spread
from resnet_kernels.perf.timing import Timing, interleave, ratios, summary_line

from . import extra_info
from .cases import Case
from .contenders.base import Contender
from .contenders.ours import Eager, Fused, FusedGraph
from .contenders.peers import LEAD_IN_SECONDS, PEERS
from .neighbors import Neighbors
from .parity import Gate
from .workload import Operands, Runner, Workload

CONTENDERS: tuple[Contender, ...] = (
    Eager(),
    Fused("fused", "auto"),
    Fused("triton", "triton"),
    Fused("frozen", "auto", freeze=True),
    FusedGraph("fused-graph"),
    FusedGraph("frozen-graph", freeze=True),
    *PEERS,
)


@dataclass(frozen=True)
class Absent:
    """A contender that has no row in a case. error: the exception that it raised, if that is the reason."""

    case: str
    contender: str
    reason: str
    error: BaseException | None = field(default=None, compare=False)

    @staticmethod
    def crashed(case: str, contender: str, error: BaseException) -> Absent:
        """Returns the row of a contender that raised an error; the reason holds the error's first line."""
        first = (str(error).strip() or "no message").splitlines()[0]
        return Absent(case, contender, f"crashed: {type(error).__name__}: {first[:200]}", error)


@dataclass(frozen=True)
class Gated:
    """A contender's row in a case without a time. prepare_s, gate_s: seconds for preparing it, and for its gate."""

    case: str
    contender: str
    gate: Gate
    prepare_s: float
    gate_s: float


@dataclass(frozen=True)
class Measured(Gated):
    """A contender's row in a case. line: its summary as the slim text prints it."""

    timing: Timing
    line: str
    info: ExtraInfo


Row = Absent | Gated


class ContenderError(Exception):
    """An exception of a contender's call, kept as the cause."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def contenders(case: Case, full: bool = False, known: Sequence[Contender] = CONTENDERS) -> list[Contender]:
    """Returns the contenders of a case, eager first, installed or not."""
    return [contender for contender in known if contender.covers(case, full)]


def measure(
    case: Case, chosen: Sequence[Contender], seconds: float, min_rounds: int = 5, profiled: bool = False
) -> dict[str, Row]:
    """Prepares contenders and times those that pass the gate, in rounds.

    Args:
        chosen: contenders, with eager among them.
        seconds: time for rounds, per contender other than eager; 0 times nothing.
        profiled: whether to add the kernels of a model's contenders, from calls after the timed ones.

    Returns:
        contender's name -> its row, in the order of `chosen`. A row of ours that fails the gate has no timing.
    """
    workload = Workload(case)
    rows: dict[str, Row] = {}
    runners: dict[str, Runner] = {}
    for contender in chosen:
        runner, rows[contender.name] = _ready(contender, workload)
        if runner is not None:
            runners[contender.name] = runner
    if not seconds:
        return rows
    calls = {}
    for name, runner in runners.items():
        try:
            calls[name] = [_named(name, runner.bind(operands)) for operands in workload.copies]
        except Exception as error:
            rows[name] = Absent.crashed(str(case), name, error)
    by_name = {contender.name: contender for contender in chosen}
    neighbors = Neighbors()
    timings = _interleaved(calls, by_name, rows, workload, seconds, min_rounds)
    shared, versions = extra_info.of_case(workload, neighbors.cores()), extra_info.versions(workload.device)
    work, machine = extra_info.work(workload), extra_info.ceilings(workload.device, case.platform.dtype)
    for name, timing in timings.items():
        row, runner = rows[name], runners[name]
        assert isinstance(row, Gated)
        has_kernels = profiled and case.level == "model" and name in extra_info.PROFILED
        info = ExtraInfo(
            shared,
            versions,
            _of_contender(by_name[name], row.gate, _kernels(name, runner, workload) if has_kernels else ()),
            _spread(timings, name),
            extra_info.of_time(work, machine, case.batch, timing.median),
            Conditions(
                case=str(case),
                tf32=extra_info.tf32(workload.device),
                input_copies=len(workload.copies),
                prepare_s=row.prepare_s,
                gate_s=row.gate_s,
                saved_mib=_saved_mib(runner, workload.operands) if case.backward else None,
            ),
        )
        line = summary_line(f"{case.direction.capitalize()}, {name}", timing)
        rows[name] = Measured(**vars(row), timing=timing, line=line, info=info)
    return rows


def _ready(contender: Contender, workload: Workload) -> tuple[Runner | None, Row]:
    """Prepares and gates a contender: (its runner, or None if it is not to be timed; its row, without a time)."""
    case, name = str(workload.case), contender.name
    reason = contender.why_absent(workload.case)
    if reason:
        return None, Absent(case, name, reason)
    start = time.perf_counter()
    try:
        runner = contender.prepare(workload)
        prepared = time.perf_counter()
        gate = contender.gate(workload, runner)
    except Exception as error:
        return None, Absent.crashed(case, name, error)
    # A wrong result of ours gets no time. A peer's rounding is not ours to fix.
    row = Gated(case, name, gate, prepared - start, time.perf_counter() - prepared)
    return (None if contender.ours and gate.failure else runner), row


def _interleaved(
    calls: dict[str, list[Callable[[], object]]],
    by_name: dict[str, Contender],
    rows: dict[str, Row],
    workload: Workload,
    seconds: float,
    min_rounds: int,
) -> dict[str, Timing]:
    """Times all calls in rounds. A contender that raises becomes Absent, and the others start again."""
    while "eager" in calls:
        lead_in = LEAD_IN_SECONDS if any(by_name[name].own_threads for name in calls) else 0.0
        whole = seconds * max(1, len(calls) - 1)
        try:
            return interleave(
                in_rotation(calls),
                seconds=whole,
                min_rounds=min_rounds,
                device=workload.device,
                lead_in=lead_in if workload.device.type == "cpu" else 0.0,
            )
        except ContenderError as error:
            del calls[error.name]
            rows[error.name] = Absent.crashed(str(workload.case), error.name, error.__cause__ or error)
    eager = rows["eager"]
    reason = eager.reason if isinstance(eager, Absent) else "it was not timed"
    for name in calls:
        rows[name] = Absent(str(workload.case), name, f"eager has no time to compare with: {reason}")
    return {}


def in_rotation(calls: dict[str, list[Callable[[], object]]]) -> dict[str, Callable[[], object]]:
    """Returns one callable per contender that rotates through its calls, one for each copy of the operands.

    All contenders share one counter: with a counter each, the second of a round would find in the L2 cache the copy that the
    first has just read.
    """
    turn = itertools.count()

    def rotating(copies: list[Callable[[], object]]) -> Callable[[], object]:
        return lambda: copies[next(turn) % len(copies)]()

    return {name: copies[0] if len(copies) == 1 else rotating(copies) for name, copies in calls.items()}


def _named(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def named():
        try:
            call()
        except Exception as error:
            raise ContenderError(name) from error

    return named


def _of_contender(contender: Contender, gate: Gate, kernels: tuple[Kernel, ...]) -> ContenderInfo:
    return ContenderInfo(
        contender=contender.name,
        label=contender.label,
        ours=contender.ours,
        settings=contender.settings,
        version=contender.version,
        parity_error=gate.error,
        parity_budget=gate.budget,
        parity_failure=gate.failure,
        kernels=kernels,
    )


def _spread(timings: dict[str, Timing], name: str) -> Spread:
    own = timings[name]
    paired = {
        other: Timing(ratios(own, timings[other]))
        for other in ("eager", "fused")
        if other in timings and name not in ("eager", other)
    }
    eager, fused = (
        (paired[other].median, paired[other].p20, paired[other].p80) if other in paired else (None,) * 3
        for other in ("eager", "fused")
    )
    return Spread(
        p20=own.p20,
        p80=own.p80,
        interleaved_ratio_to_eager=eager[0],
        interleaved_ratio_to_eager_p20=eager[1],
        interleaved_ratio_to_eager_p80=eager[2],
        interleaved_ratio_to_fused=fused[0],
        interleaved_ratio_to_fused_p20=fused[1],
        interleaved_ratio_to_fused_p80=fused[2],
    )


def _kernels(contender: str, runner: Runner, workload: Workload) -> tuple[Kernel, ...]:
    try:
        return extra_info.kernels(contender, runner, workload)
    except Exception as error:
        # The times are measured already, and they are worth more than their split by kernel.
        warnings.warn(f"{workload.case}: no kernels of {contender}: {error}", RuntimeWarning, stacklevel=2)
        return ()


def _saved_mib(runner: Runner, operands: Operands) -> float | None:
    """MiB that a forward pass keeps for its backward; None where the runner can't see the tensors."""
    saved_bytes = getattr(runner, "saved_bytes", None)
    return None if saved_bytes is None else saved_bytes(operands) / 2**20
