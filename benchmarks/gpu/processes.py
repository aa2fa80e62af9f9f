"""Commands of a session, each in its own process group, which is ended when its time is up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from resnet_kernels.ops import tuned_table
from resnet_kernels.perf.environment import environment
from resnet_kernels.perf.tuning import table_file
from resnet_kernels.perf.tuning.table_file import write_whole

ROOT = Path(__file__).resolve().parents[2]


PYTHON = [sys.executable, "-u"]


@dataclass
class Session:
    """State of a session: output directory, time budget, and the results of its sections."""

    out: Path
    seconds: float
    dry: bool
    denied: Path | None = None
    begin: float = field(default_factory=time.monotonic)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    benchmarks: dict[str, Any] = field(default_factory=lambda: {"benchmarks": [], "absent": []})
    running: set[subprocess.Popen] = field(default_factory=set)

    def __post_init__(self):
        self.device = torch.device("cpu" if self.dry else "cuda:0")
        self.key = table_file.no_device() if self.dry else tuned_table.device_key(self.device)
        self.header = {
            "device": self.key._asdict(),
            "dry_run": self.dry,
            "environment": environment(self.device),
        }
        self.log = (self.out / "log.txt").open("a")
        # Later sections use the table that `tune` writes into this folder.
        self.environment = {**os.environ, tuned_table.CACHE_VARIABLE: str(self.out), "PYTHONPATH": _python_path()}
        self.environment.pop("TRITON_INTERPRET", None)
        if self.dry:
            # One thread, because waiting threads spin, and others use this machine, too.
            self.environment["OMP_NUM_THREADS"] = "1"

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Writes a file of the session, headed by device and versions."""
        write_whole(self.out / name, json.dumps({**self.header, **values}, indent=1) + "\n")

    def report(self) -> None:
        self.write("session.json", {"budget_s": self.seconds, "sections": self.sections})

    def command(self, arguments: list[str], seconds: float, output: Path | None = None, **environment: str) -> str:
        """Runs a Python command; returns "done", "failed (status)" or "out of time". Its children end with it."""
        print(f"+ {' '.join(arguments)}", file=self.log, flush=True)
        with (output or Path(os.devnull)).open("w") as separate:
            stream = separate if output else self.log
            process = subprocess.Popen(
                [*PYTHON, *arguments],
                cwd=ROOT,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.add(process)
            try:
                status = process.wait(max(seconds, 0.1))
                return "done" if status == 0 else f"failed ({status})"
            except subprocess.TimeoutExpired:
                return "out of time"
            finally:
                end_group(process)
                self.running.discard(process)


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def end_group(process: subprocess.Popen) -> None:
    """Ends a command's whole process group."""
    # SIGINT first: pytest-benchmark then still writes its file, which it does not after SIGTERM.
    for which, patience in ((signal.SIGINT, 5), (signal.SIGTERM, 2), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, which)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
