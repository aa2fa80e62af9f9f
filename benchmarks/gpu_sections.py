"""python -m benchmarks.gpu_sections NAME OUTDIR SECONDS [--dry-run]: a GPU session's sections that run kernels themselves.

    precompile   every candidate's kernels of the networks that will be timed, 16 processes at a time, launched by nobody
    ceilings     what this machine can do at most, and which tensor descriptors its driver takes
    forms        one 3x3 of each stage in each form, and the dearest chains, checked and timed as `tune` would

Each writes its file whenever it knows more. gpu_session.py calls them, each in a process of its own: a kernel that breaks the
GPU's context takes the process with it.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Hashable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from resnet_kernels import problems, tables, tuning
from resnet_kernels.commands import common
from resnet_kernels.ops import tuned
from resnet_kernels.ops.conv_candidates import ConvProblem
from resnet_kernels.ops.geometry import Geometry
from resnet_kernels.tables import write_whole

# (model, batch, training)
PRECOMPILED = (
    ("resnet50", 256, False),
    ("resnet50", 1, False),
    ("resnet50", 256, True),
    ("resnet18", 256, False),
    ("resnet_v2_50", 256, False),
)
WORKERS = 16
# (channels, height and width) of the 3x3 of each of ResNet-50's stages.
FORMS = ((64, 56), (256, 14), (128, 28), (512, 7))
BATCH = 256
LINKS = 4

Write = Callable[[dict[str, Any]], None]


def precompile(write: Write, seconds: float, dry: bool) -> None:
    if dry:
        write({"skipped": "compiling needs a GPU here; tests/test_compile.py compiles without one", "kernels": []})
        return
    end = time.monotonic() + seconds
    jobs = _jobs()
    rows: list[dict[str, Any]] = []
    # spawn: a fork would take CUDA along half-dead.
    pool = ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn"))
    waiting = {pool.submit(compile_candidate, *job) for job in jobs}
    while waiting and time.monotonic() < end:
        done, waiting = wait(waiting, timeout=max(0.0, end - time.monotonic()), return_when=FIRST_COMPLETED)
        rows += [
            future.result() if future.exception() is None else {"error": str(future.exception())} for future in done
        ]
        write({"jobs": len(jobs), "kernels": rows})
    write({"jobs": len(jobs), "kernels": rows})
    # The workers may be in the middle of something; nobody waits for them.
    pool.shutdown(wait=False, cancel_futures=True)
    for process in list((pool._processes or {}).values()):
        process.kill()


def _jobs() -> list[tuple[Hashable, int, str]]:
    """(problem, batch, candidate) of all of our kernels, nothing twice; those that have most to win first."""
    jobs: dict[tuple[Hashable, int, str], None] = {}
    device = torch.device("cuda", 0)
    for name, batch, training in PRECOMPILED:
        model = common.build(name).to(device, torch.bfloat16, memory_format=torch.channels_last).eval()
        x = common.image_batch(model, 2, 224)
        for asked, _ in problems.note(model, x, training=training):
            (built,) = problems.build([(asked, 1)], [batch], torch.bfloat16, device)
            ours = [n for n in built.candidates if n != built.default and not n.startswith("cudnn")]
            jobs |= dict.fromkeys((asked, batch, n) for n in ours)
    return sorted(jobs, key=lambda job: job[2].startswith("pointer"))


def compile_candidate(asked: Hashable, batch: int, name: str) -> dict[str, Any]:
    """Compiles what a candidate would launch; in a worker process, for the cache on disk."""
    from triton.runtime.jit import JITFunction

    if not getattr(JITFunction.run, "only_compiles", False):
        launch = JITFunction.run

        @functools.wraps(launch)
        def run(self, *arguments, grid, warmup, **options):
            return launch(self, *arguments, grid=grid, warmup=True, **options)

        run.only_compiles = True
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
def _built(asked: Hashable, batch: int) -> tuple[tuning.Problem, tuple]:
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
    # Last, as a bad one may break the context.
    taken: dict[str, Any] = {}
    for name, view in ceilings.VIEWS.items():
        try:
            taken[name] = ceilings.read_through(view, device)
        except Exception as error:
            taken[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        write({"ceilings": found, "descriptors": taken})


def forms(write: Write, seconds: float, dry: bool) -> None:
    device, dtype = (torch.device("cpu"), torch.float32) if dry else (torch.device("cuda", 0), torch.bfloat16)
    sizes, batch = (((8, 5),), 2) if dry else (FORMS, BATCH)
    records = []
    asked = [
        ConvProblem(
            channels, size, size, (channels, channels, 3, 3), Geometry(padding=(1, 1, 1, 1)),
            scale=True, bias=True, residual=False, relu=True,
        )
        for channels, size in sizes
    ]  # fmt: skip
    todo = [built for conv in asked for built in problems.build([(conv, 1)], [batch], dtype, device)]
    if not dry:
        todo += _dearest_links(batch, dtype, device)
    for built in todo:
        try:
            records.append(tuning.measure(built, 0.0 if dry else seconds / 2 / len(todo), samples=True))
        except tuning.DeviceLost as lost:
            write({"records": [*records, lost.record], "lost": str(lost)})
            raise
        write({"records": records})


def _dearest_links(batch: int, dtype: torch.dtype, device: torch.device) -> list[tuning.Problem]:
    """The chains, merged shortcuts and the stem on which ResNet-50 spends most, as one launch and apart."""
    model = common.build("resnet50").to(device, dtype, memory_format=torch.channels_last).eval()
    noted = problems.note(model, common.image_batch(model, 2, 224))
    return [built for built in problems.build(noted, [batch], dtype, device) if built.default == problems.APART][:LINKS]


SECTIONS = {"precompile": precompile, "ceilings": ceilings, "forms": forms}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda:0")
    key = tables.no_device() if options.dry_run else tuned.device_key(device)
    header = {"device": key._asdict(), "dry_run": options.dry_run, "environment": tables.environment(device)}
    if not options.dry_run:
        torch.backends.cudnn.benchmark = True

    def write(values: dict[str, Any]) -> None:
        write_whole(options.out / f"{options.name}.json", json.dumps({**header, **values}, indent=1) + "\n")

    SECTIONS[options.name](write, options.seconds, options.dry_run)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Nothing that a worker left behind may keep the session waiting.
    os._exit(status)
