"""Tables that `tune` writes: the records of a device in a file, each with the versions it was measured with.

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
    """Key of a dry run's table, which no device has."""
    return DeviceKey(f"dry run on a {platform.machine()} CPU", "none")


class Table:
    """Records of a device in a file that is complete at any time."""

    def __init__(self, path: Path, key: DeviceKey):
        """Reads the file's records, if it exists.

        Raises:
            ValueError: The file is not a table of this device.
        """
        self.path, self.key = path, key
        try:
            records = tuned_table.read(path, key)
        except tuned_table.Unusable as reason:
            raise ValueError(f"{path} can't be added to: {reason}; move it away, or choose another file") from None
        self.records = {_identity(record): record for record in records}

    def has(self, key: str, batch: int, dtype: str) -> dict[str, Any] | None:
        """Record of a problem, or None unless the current versions measured it."""
        record = self.records.get((dtype, key, batch))
        if record is None or not {"default", "candidates", "measured"} <= record.keys():
            return None
        return record if versions().items() <= record["measured"].items() else None

    def put(self, record: dict[str, Any]) -> None:
        """Adds a record or replaces an older one, and writes the file.

        Raises:
            OSError: The file can't be written; it stays as before.
        """
        self.records[_identity(record)] = record
        lines = ",\n".join(json.dumps(record) for _, record in sorted(self.records.items()))
        head = json.dumps({"schema": tuned_table.SCHEMA, "device": self.key._asdict()})
        write_whole(self.path, f'{head[:-1]}, "records": [\n{lines}\n]}}\n')


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically: a temporary file beside it first, then a rename. Threads may write the same file."""
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
