"""python -m benchmarks.gpu.sections ceilings OUTDIR SECONDS [--dry-run]: measures this machine's ceilings, and tries which
tensor descriptors its driver accepts.

The file is rewritten after each result. session.py runs this in a process of its own, because a kernel that breaks the GPU's
context takes the process with it. precompile.py fills Triton's cache with `compile_candidate`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

from resnet_kernels.ops import tuned_table
from resnet_kernels.perf.environment import environment
from resnet_kernels.perf.tuning import autotuner, problems, table_file
from resnet_kernels.perf.tuning.table_file import write_whole

Write = Callable[[dict[str, Any]], None]


def compile_candidate(asked: Hashable, batch: int, name: str) -> dict[str, Any]:
    """Compiles the kernels of a candidate into the cache on disk, in a worker process."""
    from triton.runtime.jit import JITFunction

    if not hasattr(JITFunction, "launching_run"):
        JITFunction.launching_run = JITFunction.run

        @functools.wraps(JITFunction.run)
        def run(self, *arguments, grid, warmup, **options):
            return self.launching_run(*arguments, grid=grid, warmup=True, **options)

        JITFunction.run = run
    start, error = time.monotonic(), None
    try:
        built, operands = _built(asked, batch)
        with torch.no_grad():
            built.candidates[name](*operands)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"[:500]
    return {"key": str(asked), "batch": batch, "candidate": name, "seconds": time.monotonic() - start, "error": error}


@functools.lru_cache(maxsize=1)
def _built(asked: Hashable, batch: int) -> tuple[autotuner.Problem, tuple]:
    (built,) = problems.build([(asked, 1)], [batch], torch.bfloat16, torch.device("cuda", 0))
    return built, built.operands()


def ceilings(write: Write, seconds: float, dry: bool) -> None:
    from . import ceilings

    device = torch.device("cpu" if dry else "cuda:0")
    found: dict[str, Any] = {}
    for name, measure in ceilings.CEILINGS.items():
        try:
            found[name] = measure(device, seconds / 2 / len(ceilings.CEILINGS), dry)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        write({"ceilings": found, "descriptors": {}})
    # Descriptors come last, because a bad one may break the context.
    taken: dict[str, Any] = {}
    for name, view in ceilings.VIEWS.items():
        try:
            taken[name] = ceilings.read_through(view, device)
        except Exception as error:
            taken[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        write({"ceilings": found, "descriptors": taken})


SECTIONS: dict[str, Callable[[Write, float, bool], None]] = {"ceilings": ceilings}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda:0")
    key = table_file.no_device() if options.dry_run else tuned_table.device_key(device)
    assert key is not None, "a CUDA device has a key"
    header = {"device": key._asdict(), "dry_run": options.dry_run, "environment": environment(device)}
    if not options.dry_run:
        torch.backends.cudnn.benchmark = True

    def write(values: dict[str, Any]) -> None:
        write_whole(options.out / f"{options.name}.json", json.dumps({**header, **values}, indent=1) + "\n")

    SECTIONS[options.name](write, options.seconds, options.dry_run)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # os._exit, so that nothing that a worker left behind keeps the session waiting.
    os._exit(status)
