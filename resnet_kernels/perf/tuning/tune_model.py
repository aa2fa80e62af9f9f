"""Tuning of a model's layers in the user's own process; `auto` uses the new table at once.

rk.tune and the command line share `measure`: it measures problems one after another, costliest first, within a time limit.
Each record is written at once, so an interrupted run keeps its records and the next call continues from there.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...graph import fusible
from ...kernels.cpu import library
from ...ops import cudnn, tuned_table
from ...ops.dtypes import autocast_dtype
from ...runtime import eligibility
from ...runtime.gpu import multi_layer
from ...runtime.state import state_of, states_in
from . import autotuner, problems, table_file
from .autotuner import Problem
from .trained_problem import step_records
from .tune_result import TunedLayer, TuneResult

# Per problem: enough rounds for a dozen candidates of about 0.3 ms each.
SECONDS_EACH = 2.0
# For a CPU's whole training steps, with and without our kernels.
SECONDS_STEP = 20.0


def tune(
    model: nn.Module, x: Tensor, *, training: bool = False, seconds: float | None = None, progress: bool = True
) -> TuneResult:
    """Measures every candidate for a fused model's layers on this device; `auto` uses the result from the next call on.

    A candidate wins only if its numbers are right and it is faster than the default, which runs without a table. The winners
    go into the table in the user's cache directory, where later processes find them. Problems that these versions of PyTorch,
    Triton and this package have measured already are not measured again. A copy of the model runs once; the model does not.

    Args:
        model: fused for `backend="auto"`, in eval mode unless `training`.
        x: a batch like those to come: the measurement is for its shape, dtype and device, under the current autocast.
        training: whether to measure a training step instead of inference: BN, add and ReLU; on a CPU 3x3 convolutions and
            the whole step.
        seconds: time limit in all; None for about 2 per layer. Another call continues with the layers that are left.
        progress: whether to show a bar on stderr: tqdm's, if it is installed, else a line per layer.

    Returns:
        A TuneResult: a row per layer, for `print`. It says "nothing to tune", and nothing was changed, if there are no
        candidates: on a CPU without our compiled kernels, for a model without a fused block, or one that was fused for
        another backend than "auto".

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, there is no home directory for the table, it can't be written, or the file in
            its place is not a table of this device.
        RuntimeError: A CUDA graph is being captured, or a candidate broke the GPU; the next call skips it.
    """
    _check(model, x, training, seconds)
    model = getattr(model, "_orig_mod", model)  # of torch.compile's wrapper
    reason = _why_nothing(model, x, training)
    if reason is None:
        with torch.inference_mode(False), torch.random.fork_rng([x.device] if x.is_cuda else []), _on(x.device):
            result = _tune(model, x, training, seconds, progress)
    else:
        result = TuneResult(reason=reason)
    if result.reason and progress:
        print(result, file=sys.stderr)
    return result


def _tune(model: nn.Module, x: Tensor, training: bool, seconds: float | None, progress: bool) -> TuneResult:
    deadline = None if seconds is None else time.perf_counter() + seconds
    dtype = _dtype(model, x)
    key = tuned_table.device_key(x.device)
    assert key is not None, "_why_nothing has seen a device with candidates"
    noted = problems.note(model, x, training=training, packed=key.is_cpu)
    with torch.autocast(x.device.type, enabled=False):
        own = problems.build(noted, [x.shape[0]], dtype, x.device)
        if not any(len(problem.candidates) > 1 for problem in own):
            return TuneResult(reason=f"in {dtype} no layer of this model has a choice on {x.device}")
        file = table_file.Table(default_path(key), key)
        try:
            summed = training and not key.is_cpu
            result = measure({_name(model, x): own}, file, training=summed, deadline=deadline, progress=progress)
            if training and key.is_cpu and not result.left:
                tuned_table.forget()  # so that the step uses the records made so far
                left = SECONDS_STEP if deadline is None else max(0.0, deadline - time.perf_counter())
                for record in step_records(model, x, _name(model, x), min(left, SECONDS_STEP)):
                    file.put(record)
            return result
        finally:
            tuned_table.forget()  # so that the next call reads the new file


def measure(
    layers: Mapping[str, Sequence[Problem]],
    file: table_file.Table,
    *,
    training: bool = False,
    deadline: float | None = None,
    again: bool = False,
    samples: bool = False,
    progress: bool = False,
) -> TuneResult:
    """Measures problems of models on one device, and writes each record into `file` at once.

    Args:
        layers: problems by the name of their model; a problem that two models share is measured once.
        file: The device's table.
        progress: whether to show a bar on stderr.
        training: whether to add a record for each whole model, which says if it trains on our kernels.
        deadline: by time.perf_counter(); None for SECONDS_EACH per problem.
        again: whether to measure problems again that these versions have measured already.
        samples: whether to keep all samples beside median, p20 and p80.

    Raises:
        RuntimeError: A candidate broke the GPU; the file notes it.
    """
    todo = {(problem.key, problem.batch): problem for own in layers.values() for problem in own}
    records = {
        identity: record
        for identity, problem in todo.items()
        if not again and (record := file.has(*identity, problem.dtype_name))
    }
    known = len(records)
    queue = [problem for identity, problem in todo.items() if identity not in records]
    left = len(queue)
    # The others have to beat cuDNN at its best.
    with cudnn.searching(True), contextlib.closing(_shown(queue, progress)) as shown:
        for problem in shown:
            seconds = _share(deadline, left)
            if seconds <= 0:
                break
            if problem.default == multi_layer.APART:
                tuned_table.forget()  # so that its layers, apart, use the records made so far
            try:
                record = autotuner.measure(problem, seconds, samples=samples)
            except autotuner.DeviceLost as lost:
                file.put(lost.record)
                raise RuntimeError(f"{lost}; it is noted in {file.path}, and will be passed over next time") from None
            records[problem.key, problem.batch] = record
            file.put(record)
            left -= 1
    if training:
        _sum_up(layers, records, file)
    rows = tuple(_row(records[identity]) for identity in todo if identity in records)
    return TuneResult(rows, file.path, known, left)


def default_path(key: tuned_table.DeviceKey) -> Path:
    """Path of a device's table in the user's cache directory."""
    directory = tuned_table.cache_directory()
    if directory is None:
        raise ValueError(f"there is no home directory to put the table in: set {tuned_table.CACHE_VARIABLE}")
    return directory / key.file_name


def _check(model: nn.Module, x: Tensor, training: bool, seconds: float | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not eligibility.is_ordinary(x):
        raise TypeError(f"x must be a tensor of images like those to come, got {type(x).__name__}")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x must be a batch of images, (N, C, H, W), got shape {tuple(x.shape)}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be more than 0, or None for {SECONDS_EACH:g} a layer, got {seconds!r}")
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune can't run while a CUDA graph is captured: it waits for the GPU; call it before")
    if model.training and not training:
        raise ValueError(
            "model is in train() mode: call model.eval() first, or tune(..., training=True) for a training step's layers"
        )
    weight = next(model.parameters(), x)
    if weight.device != x.device:
        raise ValueError(f"x is on {x.device} and the model on {weight.device}: move one to the other's device")


def _why_nothing(model: nn.Module, x: Tensor, training: bool) -> str | None:
    backends = {state.backend for state in states_in(model)}
    if not backends:
        return "no block of this model is fused; rk.fuse fuses it, rk.explain says what can't be"
    if "auto" not in backends:
        return f'the model is fused for backend="{min(backends)}", and only "auto" asks a table'
    key = tuned_table.device_key(x.device)
    if key is None:
        if x.device.type == "cpu":
            return f"oneDNN's is the only kernel of convolutions here; {library.describe()}"
        return f"only CUDA devices and CPUs have candidates to choose from, and the model is on {x.device}"
    if key.is_cpu and _dtype(model, x) != torch.float32:
        what = str(_dtype(model, x)).removeprefix("torch.")
        return f"on a CPU there are kernels to choose from in float32 alone, not in {what}"
    return None


def _dtype(model: nn.Module, x: Tensor) -> torch.dtype:
    """Dtype in which the model's convolutions compute x."""
    state = state_of(model)
    if state is not None and state.normalize is not None:
        x = next(p for p in model.parameters() if p.is_floating_point())
    return autocast_dtype(x) or x.dtype


def _name(model: nn.Module, x: Tensor) -> str:
    """Name of a whole model in its record; its size tells two of one class apart."""
    size = sum(p.numel() for p in model.parameters())
    return f"{fusible.original_class(model).__name__} of {size} parameters {'x'.join(map(str, x.shape[1:]))}"


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    # Graphs are captured, and kernels launched, on the current device.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _shown(queue: Sequence[Problem], progress: bool) -> Generator[Problem, None, None]:
    """Iterates over the queue; with `progress`, stderr shows the current problem and how many are left."""
    if not progress:
        yield from queue
        return
    try:
        from tqdm import tqdm
    except ImportError:
        for i, problem in enumerate(queue):
            print(f"tune [{i + 1}/{len(queue)}] {problem}", file=sys.stderr, flush=True)
            yield problem
        return
    with tqdm(queue, desc="tune", unit="layer", file=sys.stderr, dynamic_ncols=True) as bar:
        for problem in bar:
            bar.set_postfix_str(str(problem))
            yield problem


def _share(deadline: float | None, problems_left: int) -> float:
    """Seconds for the next problem's timing: half of its share of the time left, because it has to be compiled, too."""
    if deadline is None:
        return SECONDS_EACH
    return min(SECONDS_EACH, (deadline - time.perf_counter()) / problems_left / 2)


def _sum_up(
    layers: Mapping[str, Sequence[Problem]], records: Mapping[tuple[str, int], dict[str, Any]], file: table_file.Table
) -> None:
    """Writes a record for `tuned_table.trains` per model and batch, if all its layers were measured."""
    for whole, own in layers.items():
        for batch in dict.fromkeys(problem.batch for problem in own):
            asked = [p for p in own if p.batch == batch]
            if all((p.key, p.batch) in records for p in asked):
                mine = [(p.calls, records[p.key, p.batch]) for p in asked]
                file.put(problems.training_record(whole, mine))


def _row(record: dict[str, Any]) -> TunedLayer:
    rows = record["candidates"]
    times = {name: row.get("graph", row["call"])["median"] for name, row in rows.items() if "call" in row}
    winner, default = record["winner"], record["default"]
    seconds = times.get(winner)
    gain = times[default] / seconds if seconds and default in times else None
    refused = sum("refused" in row for row in rows.values())
    return TunedLayer(record["key"], record["batch"], len(rows), refused, winner, seconds, gain)
