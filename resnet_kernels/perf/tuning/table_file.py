"""Tables as `tune` writes them: a device's records in a file, each with what it was measured with.

ops/tuned_table.py reads them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import threading
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...ops import tuned_table
from ...ops.tuned_table import DeviceKey


def environment(device: torch.device) -> dict[str, Any]:
    """What a time is worth nothing without: driver and versions, the commit where there is one, and when."""
    values = {**versions(), "driver": None, "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=40")}
    if device.type == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        values["driver"] = driver.splitlines()[0] if driver else None
    values["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return values


def versions() -> dict[str, str | int | None]:
    """Of what decides how fast a candidate is. A record of other ones is measured anew."""
    from ... import __version__

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    # As PyTorch was built, without a look at a GPU.
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {"resnet_kernels": __version__, "torch": torch.__version__, "triton": triton, "cudnn": cudnn}


_seen: dict[tuple[str, ...], str | None] = {}


def _output(*command: str) -> str | None:
    """What a command says, asked once; None if there is no such command, or it fails."""
    if command not in _seen:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=20, check=True, cwd=Path(__file__).parent
            )
            _seen[command] = done.stdout.strip() or None
        except (OSError, subprocess.SubprocessError):
            _seen[command] = None
    return _seen[command]


def no_device() -> DeviceKey:
    """The key of a dry run's table, which is nobody's."""
    return DeviceKey(f"dry run on a {platform.machine()} CPU", "none")


class Table:
    """A device's records, in a file that is whole at any time."""

    def __init__(self, path: Path, key: DeviceKey):
        """Reads what is there.

        Raises:
            ValueError: if that is no table of this device.
        """
        self.path, self.key = path, key
        try:
            records = tuned_table.read(path, key)
        except tuned_table.Unusable as reason:
            raise ValueError(f"{path} can't be added to: {reason}; move it away, or choose another file") from None
        self.records = {_identity(record): record for record in records}

    def has(self, key: str, batch: int, dtype: str) -> dict[str, Any] | None:
        """The record of a problem, if these versions measured it."""
        record = self.records.get((dtype, key, batch))
        measured = {} if record is None else record.get("measured") or {}
        return record if versions().items() <= measured.items() else None

    def put(self, record: dict[str, Any]) -> None:
        """Adds a record, or puts it in an older one's place, and writes the file.

        Raises:
            OSError: if the file can't be written; then it is as before.
        """
        self.records[_identity(record)] = record
        lines = ",\n".join(json.dumps(record) for _, record in sorted(self.records.items()))
        head = json.dumps({"schema": tuned_table.SCHEMA, "device": self.key._asdict()})
        write_whole(self.path, f'{head[:-1]}, "records": [\n{lines}\n]}}\n')


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is never seen half-written: beside it first, then in its place. Threads may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _identity(record: dict[str, Any]) -> tuple[str, str, int]:
    return record["dtype"], record["key"], record["batch"]
