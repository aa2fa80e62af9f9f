"""Measured tables: which candidate is the fastest right one for a problem on this very device. Written by `tune`.

A problem is whatever asks for a choice: a hashable value whose `str` is its key, its shapes without the batch, as in
"conv 64x56x56->64 3x3/1 p1,1,1,1 d1 g1 scale bias relu". Whoever can run it in several ways asks

    choice(problem, batch, dtype, device, can_run)    -> the winner's name; None where there is none that can run

and takes what it would take without a table when it gets None.

One JSON file a device, in the package (resnet_kernels/tuned) and in the user's cache directory, whose records go over the
package's. Read at the first question about a device, never at import. A file that can't be used is ignored with a warning.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..kernels.target import allows_tf32
from .dtypes import short_name

CanRun = Callable[[str, Any, int, torch.dtype, torch.device], bool]

SCHEMA = 1
CACHE_VARIABLE = "RESNET_KERNELS_CACHE"
PACKAGE_DIRECTORY = Path(__file__).resolve().parent.parent / "tuned"
# A record of this kind says for a whole model whether its BN, add and ReLU train faster on our kernels: see `trains`.
TRAINING = "training"

# Answers kept: some 60 problems a net, times a few batch and image sizes.
_CACHED = 4096


class DeviceKey(NamedTuple):
    """What a table is measured for: the device's name, and its compute capability as "9.0"."""

    name: str
    capability: str

    @property
    def file_name(self) -> str:
        """The table's, as in nvidia-h200-sm90.json."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{name}-sm{self.capability.replace('.', '')}.json"


@lru_cache
def device_key(device: torch.device) -> DeviceKey | None:
    """The key of a device's tables; None for a device that has none, which is all but CUDA's."""
    # Fake tensors are on CUDA devices that are not here.
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return DeviceKey(torch.cuda.get_device_name(device), "{}.{}".format(*torch.cuda.get_device_capability(device)))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as tables name it. float32 whose convolutions may round to TF32 is "tf32", as if it were another dtype."""
    return "tf32" if allows_tf32(dtype) else short_name(dtype)


def cache_directory() -> Path | None:
    """Where the user's own tables are: $RESNET_KERNELS_CACHE, or resnet_kernels in XDG's cache; None without a home."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_kernels"
    except RuntimeError:  # no home directory
        return None


def covers(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a table has measurements of this device in this dtype."""
    if _noted is not None:
        return True
    # First what costs nothing: most devices have no tables.
    return device_key(device) is not None and dtype_name(dtype) in _measured_dtypes(device)


def choice(
    problem: Hashable, batch: int, dtype: torch.dtype, device: torch.device, can_run: CanRun | None = None
) -> str | None:
    """The name of the candidate that won a problem, about a microsecond after the first time.

    Args:
        problem: its `str` is the table's key.
        batch: images; the nearest measured batch, in logarithms, decides for others.
        dtype, device: of the data. float32 is looked up as "tf32" where cuDNN's setting allows that.
        can_run: asked once with (winner's name, problem, batch, dtype, device), as a table may be of another version, and the
            nearest batch another one. A winner that can't run even at the batch where it won is said once.

    Returns:
        The name, None if the problem was not measured, no candidate could win, or the winner can't run.
    """
    if _noted is not None:
        _noted.append((problem, batch))
        return None
    return _choice(problem, batch, dtype_name(dtype), dtype, device, can_run)


def trains(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether measurements show that batch_norm_act trains faster than PyTorch's own BN, add and ReLU, forward and backward.

    They are of whole models; all that were measured in this dtype have to agree.
    """
    if _noted is not None:
        return True
    return device_key(device) is not None and _trains(device, dtype_name(dtype))


_noted: list[tuple[Hashable, int]] | None = None


@contextlib.contextmanager
def noting() -> Iterator[list[tuple[Hashable, int]]]:
    """Notes what `choice` is asked for, as (problem, batch), call by call; meanwhile every answer is None.

    Whatever the device, `auto` looks its decisions up, and trains on own ops. Not for several threads at a time.
    """
    global _noted
    _noted, before = [], _noted
    try:
        yield _noted
    finally:
        _noted = before


_times_forgotten = 0
_said_unknown = False


def generation() -> int:
    """A number that is another one after `forget`: whoever keeps what follows from answers keeps this along."""
    return _times_forgotten


def decided(device: torch.device, dtype: torch.dtype) -> frozenset[str]:
    """The keys of all problems for which a table names a winner on a device in a dtype."""
    table = {} if device_key(device) is None else _table(device_key(device))
    name = dtype_name(dtype)
    return frozenset(key for (measured, key), winners in table.items() if measured == name and any(winners.values()))


def forget() -> None:
    """Drops all that was read, so that the next question reads the files anew."""
    global _times_forgotten, _said_unknown
    _times_forgotten, _said_unknown = _times_forgotten + 1, False
    for function in (_choice, _trains, _measured_dtypes, _table, device_key):
        # A test may have put something else in device_key's place.
        getattr(function, "cache_clear", lambda: None)()


# typed: problems of two kinds, tuples both, may be equal.
@lru_cache(_CACHED, typed=True)
def _choice(
    problem: Hashable, batch: int, table_dtype: str, dtype: torch.dtype, device: torch.device, can_run: CanRun | None
) -> str | None:
    measured = _table(device_key(device)).get((table_dtype, str(problem)))
    if not measured or batch < 1:
        return None
    # Of two that are equally near, the larger.
    nearest = min(measured, key=lambda other: (abs(math.log(other / batch)), -other))
    winner = measured[nearest]
    if winner is None or can_run is None or can_run(winner, problem, batch, dtype, device):
        return winner
    if not can_run(winner, problem, nearest, dtype, device):
        _say_unknown(winner, problem, device)
    return None


def _say_unknown(winner: str, problem: Hashable, device: torch.device) -> None:
    """Warns once that a table names what can't run here: it is another version's, or was edited."""
    global _said_unknown
    if not _said_unknown:
        _said_unknown = True
        warnings.warn(
            f'resnet_kernels: the table of {device_key(device).name} names {winner!r} for "{problem}", which can\'t run here; '
            "such records are ignored (python -m resnet_kernels tune measures them anew)",
            RuntimeWarning,
            2,
        )


@lru_cache
def _trains(device: torch.device, dtype: str) -> bool:
    table = _table(device_key(device))
    winners = [
        winner
        for (measured, key), batches in table.items()
        if measured == dtype and key.startswith(f"{TRAINING} ")
        for winner in batches.values()
    ]
    return bool(winners) and all(winner == "triton" for winner in winners)


@lru_cache
def _measured_dtypes(device: torch.device) -> frozenset[str]:
    return frozenset(dtype for dtype, _ in _table(device_key(device)))


@lru_cache
def _table(key: DeviceKey | None) -> dict[tuple[str, str], dict[int, str | None]]:
    """(dtype, problem's key) -> {batch: winner}; of the package, and over it the user's own."""
    table: dict[tuple[str, str], dict[int, str | None]] = {}
    for directory in (PACKAGE_DIRECTORY, cache_directory()) if key is not None else ():
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
    """The records of a device's table; none if there is no file.

    Raises:
        Unusable: damaged, of another schema or device.
    """
    try:
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
    return (
        isinstance(record, dict)
        and isinstance(record.get("key"), str)
        and isinstance(record.get("dtype"), str)
        and type(record.get("batch")) is int
        and record["batch"] > 0
        and isinstance(record.get("winner", 0), str | None)
    )
