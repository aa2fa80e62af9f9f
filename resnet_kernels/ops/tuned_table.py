"""Measured tables: the fastest right candidate for each problem on this very device. `tune` writes them.

A problem is a hashable value whose `str` is its key: its shapes without the batch, as in
"conv 64x56x56->64 3x3/1 p1,1,1,1 d1 g1 scale bias relu". A call site that can run it in several ways asks

    choice(problem, batch, dtype, device, can_run)    -> the winner's name; None where there is none that can run

and takes the candidate that it takes without a table when it gets None.

A device has one JSON file in the package (resnet_kernels/tuned) and one in the user's cache directory, whose records override
the package's. The first question about a device reads them, never the import. A file that can't be used is ignored with a
warning.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.target import allows_tf32
from .device_key import DeviceKey, device_key, gpu_key
from .dtypes import short_name
from .layouts import is_channels_last

CanRun = Callable[[str, Any, int, torch.dtype, torch.device], bool]

SCHEMA = 1
CACHE_VARIABLE = "RESNET_KERNELS_CACHE"
PACKAGE_DIRECTORY = Path(__file__).resolve().parent.parent / "tuned"
# The kind of record that says for a whole model whether its BN, add and ReLU train faster on our kernels (`trains`).
TRAINING = "training"

# Answers kept: some 60 problems a net, times a few batch and image sizes.
_CACHED = 4096


def dtype_name(dtype: torch.dtype, is_cpu: bool = False) -> str:
    """Returns a dtype's name in a GPU's tables or a CPU's.

    It is "tf32", as if that were a dtype, for float32 whose convolutions may round to it on a GPU.
    """
    return "tf32" if allows_tf32(dtype) and not is_cpu else short_name(dtype)


def cache_directory() -> Path | None:
    """Returns the user's folder of tables: $RESNET_KERNELS_CACHE, or resnet_kernels in XDG's cache; None without a home."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_kernels"
    except RuntimeError:  # no home directory
        return None


def covers(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a table decides op by op on this device in this dtype; a CPU's decides for packed weights alone."""
    if _noted is not None:
        return not _noting_packed
    key = device_key(device)
    return key is not None and not key.is_cpu and dtype_name(dtype) in _measured_dtypes(key)


def choice(
    problem: Hashable, batch: int, dtype: torch.dtype, device: torch.device, can_run: CanRun | None = None
) -> str | None:
    """Returns the name of the candidate that won a problem; it takes about a microsecond after the first time.

    Args:
        problem: its `str` is the table's key.
        batch: images; the nearest measured batch, in logarithms, decides for others.
        dtype: of the data. float32 is looked up as "tf32" where cuDNN's setting allows that.
        device: of the data.
        can_run: is asked once with (winner's name, problem, batch, dtype, device), since the table may come from another
            version and the winner from another batch. One warning names a winner that can't run even at the batch where it
            won.

    Returns:
        The name; None if the problem was not measured, no candidate could win, or the winner can't run.
    """
    if _noted is not None:
        _noted.append((problem, batch))
        return None
    key = device_key(device)
    if key is None:
        return None
    return _choice(key, problem, batch, dtype_name(dtype, key.is_cpu), dtype, device, can_run)


class TrainedShape(NamedTuple):
    """Shape of what a fused module trains on, without the batch. `str` begins the key in a CPU's table."""

    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{TRAINING} {self.channels}x{self.height}x{self.width}"


def trains(device: torch.device, dtype: torch.dtype, images: Tensor | None = None) -> bool:
    """Whether measurements show that training is faster on our kernels than on PyTorch's, forward and backward.

    Whole models are measured, and all that were measured in this dtype have to agree. On a CPU these are the models with a
    module whose input has this size, and the images have to be channels_last: elsewhere PyTorch's gradients are too accurate
    for an error of at most twice theirs (docs/decisions.md).

    Args:
        device: of the data.
        dtype: of the data.
        images: a fused module's input; None to ask whether any has won.
    """
    key = device_key(device)
    if key is None or not key.is_cpu or (_noted is not None and not _noting_packed):
        return _noted is not None or (key is not None and _trains(key, dtype_name(dtype)))
    if images is None:
        return _trains_on_cpu(key, dtype_name(dtype, is_cpu=True), None, 1)
    if images.dim() != 4 or images.numel() == 0 or not is_channels_last(images):
        return False
    if _training is not None:
        return _training
    asked, batch = TrainedShape(*images.shape[1:]), images.shape[0]
    if _noted is not None:
        _noted.append((asked, batch))
        return True
    return _trains_on_cpu(key, dtype_name(dtype, is_cpu=True), asked, batch)


_training: bool | None = None


@contextlib.contextmanager
def training(on: bool) -> Iterator[None]:
    """Decides in the place of a CPU's table whether training runs on our kernels. Only one thread may use it at a time."""
    global _training
    before, _training = _training, on
    try:
        yield
    finally:
        _training = before


_noted: list[tuple[Hashable, int]] | None = None
_noting_packed = False


@contextlib.contextmanager
def noting(packed: bool = False) -> Iterator[list[tuple[Hashable, int]]]:
    """Lists each question to `choice` as (problem, batch), call by call; meanwhile every answer is None.

    Only one thread may use it at a time.

    Args:
        packed: whether to note a CPU's questions, for packed weights. Otherwise `auto` asks for all its decisions on any
            device, as on a GPU, and trains on our ops.
    """
    global _noted, _noting_packed
    (_noted, _noting_packed), before = ([], packed), (_noted, _noting_packed)
    try:
        yield _noted
    finally:
        _noted, _noting_packed = before


_times_forgotten = 0
_said_unknown = False


def generation() -> int:
    """Returns a number that `forget` changes: keep it beside anything that was decided by answers."""
    return _times_forgotten


def decided(device: torch.device, dtype: torch.dtype) -> frozenset[str]:
    """Returns the keys of all problems for which a table names a winner on a device in a dtype."""
    key = device_key(device)
    name = dtype_name(dtype, key is not None and key.is_cpu)
    table = {} if key is None else _table(key)
    return frozenset(key for (measured, key), winners in table.items() if measured == name and any(winners.values()))


def forget() -> None:
    """Drops all that was read, so that the next question reads the files anew."""
    global _times_forgotten, _said_unknown
    _times_forgotten, _said_unknown = _times_forgotten + 1, False
    for function in (_choice, _trains, _trains_on_cpu, _measured_dtypes, _table, gpu_key):
        function.cache_clear()


# typed: problems are tuples, and two of different kinds may be equal.
@lru_cache(_CACHED, typed=True)
def _choice(
    key: DeviceKey, problem: Hashable, batch: int, table_dtype: str, dtype: torch.dtype, device: torch.device,
    can_run: CanRun | None,
) -> str | None:  # fmt: skip
    measured = _table(key).get((table_dtype, str(problem)))
    if not measured or batch < 1:
        return None
    nearest = _nearest(measured, batch)
    winner = measured[nearest]
    if winner is None or can_run is None or can_run(winner, problem, batch, dtype, device):
        return winner
    if not can_run(winner, problem, nearest, dtype, device):
        _say_unknown(winner, problem, key)
    return None


def _nearest(measured: Iterable[int], batch: int) -> int:
    """Returns the nearest batch in logarithms; the larger of two that are equally near."""
    return min(measured, key=lambda other: (abs(math.log(other / batch)), -other))


def _say_unknown(winner: str, problem: Hashable, key: DeviceKey) -> None:
    """Warns once of a winner that can't run here: the table is another version's, or was edited."""
    global _said_unknown
    if not _said_unknown:
        _said_unknown = True
        warnings.warn(
            f'resnet_kernels: the table of {key.name} names {winner!r} for "{problem}", which can\'t run here; '
            "such records are ignored (python -m resnet_kernels tune measures them anew)",
            RuntimeWarning,
            2,
        )


@lru_cache
def _trains(device: DeviceKey, dtype: str) -> bool:
    winners = [
        winner
        for (measured, key), batches in _table(device).items()
        if measured == dtype and key.startswith(f"{TRAINING} ")
        for winner in batches.values()
    ]
    return bool(winners) and all(winner == "triton" for winner in winners)


@lru_cache(_CACHED)
def _trains_on_cpu(device: DeviceKey, dtype: str, shape: TrainedShape | None, batch: int) -> bool:
    begin = f"{TRAINING} " if shape is None else f"{shape} in "
    winners = [
        batches[_nearest(batches, batch)]
        for (measured, key), batches in _table(device).items()
        if measured == dtype and key.startswith(begin)
    ]
    agree = any if shape is None else all
    return bool(winners) and agree(winner == "own" for winner in winners)


@lru_cache
def _measured_dtypes(key: DeviceKey) -> frozenset[str]:
    return frozenset(dtype for dtype, _ in _table(key))


@lru_cache
def _table(key: DeviceKey) -> dict[tuple[str, str], dict[int, str | None]]:
    """Returns {(dtype, problem's key): {batch: winner}}; the user's records override the package's."""
    table: dict[tuple[str, str], dict[int, str | None]] = {}
    for directory in (PACKAGE_DIRECTORY, cache_directory()):
        if directory is None:
            continue
        path = directory / key.file_name
        try:
            records = read(path, key)
        except Unusable as reason:
            warnings.warn(f"resnet_kernels: the table {path} is ignored: {reason}", RuntimeWarning, 2)
            continue
        for record in records:
            table.setdefault((record["dtype"], record["key"]), {})[record["batch"]] = record["winner"]
    return table


class Unusable(ValueError):
    """A table that can't be used; the message says why."""


def read(path: Path, key: DeviceKey) -> list[dict[str, Any]]:
    """Returns the records of a device's table; none if there is no file.

    Raises:
        Unusable: the file is damaged, or of another schema or device.
    """
    try:
        if stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise Unusable("it is no file")  # reading a pipe would wait for a writer
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"it can't be read ({error})") from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"it is no JSON ({error})") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        schema = values.get("schema") if isinstance(values, dict) else None
        raise Unusable(f"its schema is {schema!r}, this version reads {SCHEMA}")
    device = values.get("device")
    if device != key._asdict():
        raise Unusable(f"it was measured on {device!r}, this is {key._asdict()!r}")
    records = values.get("records")
    if not isinstance(records, list) or not all(map(_is_record, records)):
        raise Unusable("its records are damaged")
    return records


def _is_record(record: Any) -> bool:
    """Whether a record holds what is read of it: here, and where `tune` goes on with a table."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("key"), str)
        and isinstance(record.get("dtype"), str)
        and type(record.get("batch")) is int
        and 0 < record["batch"] < 2**31
        and isinstance(record.get("winner", 0), str | None)
        and isinstance(record.get("default", ""), str)
        and isinstance(record.get("measured", {}), dict)
        and isinstance(record.get("candidates", {}), dict)
        and all(map(_is_candidate, record.get("candidates", {}).values()))
    )


def _is_candidate(row: Any) -> bool:
    return isinstance(row, dict) and all(_is_timing(row[clock]) for clock in ("call", "graph") if clock in row)


def _is_timing(timing: Any) -> bool:
    median = timing.get("median") if isinstance(timing, dict) else None
    return isinstance(median, int | float) and not isinstance(median, bool) and 0 < median <= sys.float_info.max
