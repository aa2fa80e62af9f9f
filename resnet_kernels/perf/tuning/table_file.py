"""Tables that `tune` writes: the records of a device in a file, each with the versions it was measured with.

ops/tuned_table.py reads them.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...ops import tuned_table
from ...ops.tuned_table import DeviceKey
from ..environment import versions


def no_device() -> DeviceKey:
    """Key of a dry run's table, which no device has."""
    return DeviceKey(f"dry run on a {platform.machine()} CPU", "none")


class Table:
    """Records of a device in a file that is complete at any time, and that several runs of `tune` may add to at once."""

    def __init__(self, path: Path, key: DeviceKey):
        """Reads the file's records, if it exists.

        Raises:
            ValueError: The file is not a table of this device, or can't be written: that shows before anything is measured.
        """
        self.path, self.key = path, key
        self.records: dict[_Identity, dict[str, Any]] = {}
        self._own: dict[_Identity, dict[str, Any]] = {}
        self._seen = _state(path)
        self._read()
        try:
            check_writable(path.parent)
        except OSError as error:
            raise ValueError(_why_not_written(path, error)) from error

    def has(self, key: str, batch: int, dtype: str) -> dict[str, Any] | None:
        """Record of a problem, or None unless the current versions measured it."""
        record = self.records.get((dtype, key, batch))
        if record is None or not {"default", "candidates", "measured"} <= record.keys():
            return None
        return record if versions().items() <= record["measured"].items() else None

    def put(self, record: dict[str, Any]) -> None:
        """Adds a record or replaces an older one, and writes the file, with what other runs have put there meanwhile.

        Raises:
            ValueError: The file can't be written, and stays as before; or something that is not a table of this device lies in
                its place by now.
        """
        self._own[_identity(record)] = record
        with _locked(self.path.parent):
            if _state(self.path) != self._seen:
                self._read()
            self.records |= self._own
            lines = ",\n".join(json.dumps(record) for _, record in sorted(self.records.items()))
            head = json.dumps({"schema": tuned_table.SCHEMA, "device": self.key._asdict()})
            try:
                write_whole(self.path, f'{head[:-1]}, "records": [\n{lines}\n]}}\n')
            except OSError as error:
                raise ValueError(_why_not_written(self.path, error)) from error
            self._seen = _state(self.path)

    def _read(self) -> None:
        try:
            records = tuned_table.read(self.path, self.key)
        except tuned_table.Unusable as reason:
            raise ValueError(f"{self.path} can't be added to: {reason}; move it away, or choose another file") from None
        self.records |= {_identity(record): record for record in records}


def _why_not_written(path: Path, error: OSError) -> str:
    return f"{path} can't be written ({error.strerror or error}): choose another file"


_Identity = tuple[str, str, int]


def _state(path: Path) -> tuple[int, int, int] | None:
    """What differs after every write of a file; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keeps other threads and processes out that lock this directory; where there are no such locks, it keeps nobody out."""
    with contextlib.ExitStack() as held:
        try:
            import fcntl

            # The directory itself: no file of ours remains, whoever is killed.
            descriptor = os.open(directory, os.O_RDONLY)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        yield


def check_writable(directory: Path) -> None:
    """Makes a directory, and a file in it that is gone at once.

    Raises:
        OSError: One of them fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


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


def _identity(record: dict[str, Any]) -> _Identity:
    return record["dtype"], record["key"], record["batch"]
