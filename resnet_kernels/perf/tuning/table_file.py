"""Tables as `tune` writes them: a device's records in a file, each with what it was measured with.

ops/tuned_table.py reads them.
"""

from __future__ import annotations

import json
import os
import platform
import threading
from pathlib import Path
from typing import Any

from ...ops import tuned_table
from ...ops.tuned_table import DeviceKey
from ..environment import versions


def no_device() -> DeviceKey:
    """The key of a dry run's table, which is nobody's."""
    return DeviceKey(f"dry run on a {platform.machine()} CPU", "none")


class Table:
    """A device's records, in a file that is whole at any time."""

    def __init__(self, path: Path, key: DeviceKey):
        """Reads what is there.

        Raises:
            ValueError: The file is no table of this device.
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
            OSError: The file can't be written; then it is as before.
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
