"""Runner of checks in forked children, several at a time, so that a crash or a hang costs one check."""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from resnet_kernels.perf.tuning import autotuner

CHILDREN = 14


# The longest silence of one check. A cold one starts CUDA and compiles for some seconds.
SILENCE_S = 40.0


Result = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One check. run: returns figures, with "refused" if something is wrong; an exception is a failure, too."""

    name: str
    run: Callable[[], Result]
    # The candidate that act 2 leaves out if this crashes or hangs, for one problem or (None) for all.
    candidate: str | None = None
    problem: str | None = None


@dataclass
class Job:
    """Checks that share a process."""

    name: str
    checks: list[Check]
    seconds: float = SILENCE_S


def is_cuda() -> bool:
    return os.environ.get("RESNET_KERNELS_DRY_RUN") is None


def device() -> torch.device:
    return torch.device("cuda", 0) if is_cuda() else torch.device("cpu")


@dataclass
class Child:
    job: Job
    at: int
    pid: int
    pipe: int
    deadline: float
    rest: bytes = b""


@dataclass
class Runner:
    """Process pool that forks children, several at a time, and collects their lines."""

    out: Path
    end: float
    lines: list[Result] = field(default_factory=list)
    denied: list[Result] = field(default_factory=list)

    def write(self, line: Result) -> None:
        self.lines.append(line)
        with (self.out / "checks.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def deny(self, check: Check, why: str) -> None:
        self.write({"check": check.name, "failed": why})
        if check.candidate:
            self.denied.append({"candidate": check.candidate, "problem": check.problem, "why": why})
            (self.out / "denied.json").write_text(json.dumps(self.denied, indent=1))

    def run(self, todo: Iterator[Job], children: int = CHILDREN) -> None:
        waiting: deque[tuple[Job, int]] = deque((job, 0) for job in todo)
        alive: dict[int, Child] = {}
        ready = selectors.DefaultSelector()
        while (waiting or alive) and time.monotonic() < self.end:
            while waiting and len(alive) < children:
                job, at = waiting.popleft()
                child = self._fork(job, at)
                alive[child.pipe] = child
                ready.register(child.pipe, selectors.EVENT_READ)
            for key, _ in ready.select(0.2):
                child = alive[key.fd]
                data = os.read(child.pipe, 65536)
                child.rest += data
                self._read(child)
                if not data:
                    self._bury(child, alive, ready, waiting, "died")
            for child in list(alive.values()):
                if time.monotonic() > child.deadline:
                    os.kill(child.pid, signal.SIGKILL)
                    self._bury(child, alive, ready, waiting, f"silent for {child.job.seconds:.0f} s")
        for child in alive.values():
            os.kill(child.pid, signal.SIGKILL)
            self.write({"check": child.job.checks[child.at].name, "failed": "no time left"})
        for job, at in waiting:
            self.write({"job": job.name, "not_run": len(job.checks) - at})

    def _read(self, child: Child) -> None:
        *lines, child.rest = child.rest.split(b"\n")
        for line in lines:
            values = json.loads(line)
            child.deadline = time.monotonic() + child.job.seconds
            if "done" in values:
                child.at = values.pop("done") + 1
            self.write(values)

    def _bury(self, child, alive, ready, waiting, why: str) -> None:
        ready.unregister(child.pipe)
        os.close(child.pipe)
        del alive[child.pipe]
        _, status = os.waitpid(child.pid, 0)
        if child.at < len(child.job.checks):
            signaled = f" (signal {os.WTERMSIG(status)})" if os.WIFSIGNALED(status) else f" ({status})"
            self.deny(child.job.checks[child.at], why + signaled)
            if child.at + 1 < len(child.job.checks):
                waiting.appendleft((child.job, child.at + 1))

    def _fork(self, job: Job, at: int) -> Child:
        reader, writer = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            status = 1
            try:
                status = _child(job, at, writer)
            finally:
                os._exit(status)
        os.close(writer)
        return Child(job, at, pid, reader, time.monotonic() + job.seconds)


def _child(job: Job, at: int, writer: int) -> int:
    def say(line: Result) -> None:
        os.write(writer, json.dumps(line).encode() + b"\n")

    for i, check in enumerate(job.checks[at:], at):
        say({"starting": check.name})
        begin, result = time.monotonic(), {}
        lost = False
        try:
            result = check.run()
            if is_cuda():
                torch.cuda.synchronize()
        except Exception as error:
            result = {"refused": f"{type(error).__name__}: {error}"[:800], "where": traceback.format_exc()[-1500:]}
            # After an illegal access nothing runs in this process any more: the parent continues in a new one.
            lost = isinstance(error, (autotuner.DeviceLost, torch.AcceleratorError))
        if lost:
            say({"check": check.name, **result})
            return 3
        say({"check": check.name, "seconds": round(time.monotonic() - begin, 2), **result, "done": i})
    return 0
