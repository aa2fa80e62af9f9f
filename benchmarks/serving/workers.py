"""Callers as processes, each with its own copy of the model, and a neighbor that burns a core.

Processes are spawned. After `fork`, GNU OpenMP's pool hangs in the child once the parent has used it. They share nothing but
barriers. None outlives its `with` block, nor its parent: a closed pipe ends it.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .loops import START_TIMEOUT_S, Load, Loop, Station
from .models import Demand

COUNTS = (1, 2, 4, 8)
_READY_TIMEOUT_S = 300.0  # for importing PyTorch and making models, in eight processes at the same time
_END_TIMEOUT_S = 5.0


class WorkerError(Exception):
    """An error in a worker, with its traceback as text, or its death or silence."""


class Workers:
    """Processes of one caller each. As a context manager it starts them, waits until they are ready, and ends them."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        demand: Demand,
        count: int,
        environment: Mapping[str, str] | None = None,
    ):
        """Takes the arguments of `Station`.

        count: number of processes. environment: variables that are set before they import PyTorch.
        """
        self._work = (folder, tuple(names), demand)
        self._count = count
        self._environment = {"OMP_NUM_THREADS": str(demand.threads), **(environment or {})}
        self._processes: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Workers:
        context = multiprocessing.get_context("spawn")
        barriers = {count: context.Barrier(count) for count in COUNTS if count <= self._count}
        try:
            with _environment(self._environment):
                for _ in range(self._count):
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs, barriers, *self._work), daemon=True)
                    self._processes.append((process, ours))
                    process.start()
                    theirs.close()  # or the end of the process would not be seen
            _answers(self._connections(), _READY_TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections():
            connection.close()
        started = [process for process, _ in self._processes if process.pid is not None]
        for end in (lambda process: None, lambda process: process.terminate(), lambda process: process.kill()):
            for process in started:
                if process.is_alive():
                    end(process)
            for process in started:
                process.join(_END_TIMEOUT_S)
        self._processes.clear()

    def round(self, name: str, active: int, load: Load) -> list[Loop]:
        """Lets the first `active` processes call one contender, all from the same moment on."""
        connections = self._connections()[:active]
        try:
            for number, connection in enumerate(connections):
                connection.send((name, active, load, number))
        except BrokenPipeError:
            raise WorkerError("a process died") from None
        return _answers(connections, load.seconds + 2 * START_TIMEOUT_S)

    def peak_megabytes(self) -> list[float | None]:
        """Peak resident memory of each process so far."""
        return [_peak_megabytes(process.pid) for process, _ in self._processes]

    def _connections(self) -> list[Connection]:
        return [connection for _, connection in self._processes]


def _answers(connections: Sequence[Connection], seconds: float) -> list[Any]:
    """Answers in the order of the connections. The first error ends the wait: the others may wait for who failed."""
    end = time.monotonic() + seconds
    found: dict[Connection, Any] = {}
    while waiting := [connection for connection in connections if connection not in found]:
        ready = wait(waiting, max(0.0, end - time.monotonic()))
        if not ready:
            raise WorkerError(f"{len(waiting)} processes didn't answer within {seconds:.0f} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            try:
                error, found[connection] = connection.recv()
            except (EOFError, ConnectionResetError):
                raise WorkerError("a process died") from None
            if error:
                raise WorkerError(error)
    return [found[connection] for connection in connections]


def _serve(
    connection: Connection, barriers: Mapping[int, Any], folder: Path, names: Sequence[str], demand: Demand
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which closes the pipe
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            station = Station(folder, names, demand)
            connection.send((None, None))
            while True:
                name, active, load, number = connection.recv()
                own = Load(load.seconds, load.batches, load.calls, load.seed + number)
                (loop,) = station.round(name, 1, own, functools.partial(barriers[active].wait, START_TIMEOUT_S))
                connection.send((None, loop))
        except (EOFError, BrokenPipeError):
            raise
        except Exception:
            connection.send((traceback.format_exc(), None))


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _peak_megabytes(pid: int) -> float | None:
    # Not getrusage's maximum: a child's starts at its parent's.
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 / 1e6 if found else None


_BURN = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
while True:
    pass
"""


@contextlib.contextmanager
def busy_neighbor() -> Iterator[subprocess.Popen]:
    """Keeps one core busy with a plain Python loop, in a process that ends with this one."""
    # A session of its own: Ctrl-C is not for it.
    process = subprocess.Popen([sys.executable, "-c", _BURN], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait(_END_TIMEOUT_S)
        assert process.stdin is not None  # a pipe was asked for
        process.stdin.close()
