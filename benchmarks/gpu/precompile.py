"""Compilation of `tune`'s candidates in advance, on all CPU cores, into Triton's cache."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch

from resnet_kernels.ops.batch_norm_act import NormProblem
from resnet_kernels.perf.tuning import problems

from . import jobs
from .runner import device


def precompile(noted: list[jobs.Noted], end: float, out: Path) -> None:
    """Compiles act 2's candidates in child processes: BNs last, batch 256 before 1, networks in the order noted."""
    from . import sections

    wanted: dict[tuple, None] = {}
    for batch in (256, 1):
        for network in noted:
            if network.image_size == 224 and network.network != "resnet152":
                wanted |= dict.fromkeys((asked, batch) for asked, _ in network.problems)
    order = sorted(wanted, key=lambda pair: isinstance(pair[0], NormProblem))
    workers, pids = 15, []
    for worker in range(workers):
        pid = os.fork()
        if pid == 0:
            try:
                for asked, batch in order[worker::workers]:
                    (built,) = problems.build([(asked, 1)], [batch], torch.bfloat16, device())
                    for name in built.candidates:
                        if time.monotonic() > end:
                            os._exit(0)
                        if name == built.default or name.startswith(("cudnn", "pointer")):
                            continue
                        row = sections.compile_candidate(asked, batch, name)
                        with (out / f"compiled-{worker}.jsonl").open("a") as file:
                            file.write(json.dumps(row) + "\n")
            finally:
                os._exit(0)
        pids.append(pid)
    while pids and time.monotonic() < end + 3:
        pids = [pid for pid in pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        time.sleep(0.1)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    rows = [line for path in sorted(out.glob("compiled-*.jsonl")) for line in path.read_text().splitlines()]
    for path in out.glob("compiled-*.jsonl"):
        path.unlink()
    (out / "compiled.jsonl").write_text("\n".join(rows))
