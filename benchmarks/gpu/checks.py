"""python -m benchmarks.gpu.checks OUTDIR JOBS.json [--seconds 150] [--dry-run]: act 1 checks every kernel for failures.

A parent that never touches CUDA forks a child for each kernel and configuration, several at a time. A child reports
"starting X" before each check and the result after it. A child that is silent for too long is killed, and a new process
continues after X, so a crash or a hang costs one check. Outputs lie in memory filled with NaN, and each kernel runs twice: a
second result that differs in a bit is a race.

    checks.jsonl    one line per check, as it ends: ok, or the failure
    denied.json     candidates that crashed or hung; act 2 leaves them out
    sanitizer.txt   compute-sanitizer on a chain, a split K and a stem

The remaining time compiles act 2's kernels into Triton's cache (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from resnet_kernels.kernels.activations import KINDS, PRELU, RELU, Activation
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.ops import conv_candidates
from resnet_kernels.ops.batch_norm_act import NormProblem
from resnet_kernels.ops.conv_problem import ConvProblem
from resnet_kernels.perf.tuning import autotuner, problems
from resnet_kernels.runtime.gpu.multi_layer import StemProblem

from . import jobs as gpu_jobs
from .precompile import precompile
from .runner import CHILDREN, Check, Job, Result, Runner, device, is_cuda

NETWORK_S = 120.0


# Convolutions (problem, batch) that together take every path of a kernel.
_PAD1 = dict(padding=(1, 1, 1, 1))


def _conv(
    c_in: int, size: tuple[int, int], c_out: int, kernel: int, residual=False, relu=True, **geometry
) -> ConvProblem:
    groups, last = geometry.get("groups", 1), RELU if relu else None
    weight_shape = c_out, c_in // groups, kernel, kernel
    return ConvProblem(c_in, *size, weight_shape, Geometry(**geometry), True, True, residual, last)


CONVOLUTIONS = {
    "3x3": (_conv(64, (56, 56), 64, 3, **_PAD1), 8),
    "3x3 ragged, residual": (_conv(72, (15, 13), 40, 3, residual=True, **_PAD1), 3),
    "3x3 ragged, narrow": (_conv(24, (9, 10), 72, 3, relu=False, **_PAD1), 2),
    "3x3, one pixel of many images": (_conv(512, (7, 7), 512, 3, **_PAD1), 128),
    "1x1, residual": (_conv(64, (28, 28), 256, 1, residual=True), 16),
    "1x1, no ReLU": (_conv(256, (14, 14), 512, 1, relu=False), 5),
    "3x3 stride 2, even": (_conv(128, (56, 56), 128, 3, stride=(2, 2), **_PAD1), 8),
    "3x3 stride 2, odd": (_conv(64, (15, 13), 128, 3, stride=(2, 2), **_PAD1), 5),
    "1x1 stride 2": (_conv(256, (28, 28), 512, 1, relu=False, stride=(2, 2)), 6),
    "batch 1, late": (_conv(512, (7, 7), 512, 3, **_PAD1), 1),
    "3x3 to ragged channels, residual": (_conv(128, (15, 13), 200, 3, residual=True, **_PAD1), 9),
}
PORTABLE_ONLY = {
    "7x7 stem": (_conv(3, (75, 75), 64, 7, stride=(2, 2), padding=(3, 3, 3, 3)), 2),
    "grouped": (_conv(128, (14, 14), 128, 3, groups=32, **_PAD1), 3),
    "dilated, SAME": (_conv(64, (15, 15), 64, 3, padding=(2, 2, 2, 2), dilation=(2, 2)), 2),
}
# Kernels for a part of the convolutions, on Hopper.
HOPPER_ONLY = ("tma ", "shared ", "specialized ")
# One of each formula, and PReLU, which reads its slopes.
ACTIVATIONS = (*(Activation(kind) for kind in KINDS if kind != "relu"), PRELU)
DRY = {"3x3 ragged, residual": (_conv(24, (5, 6), 16, 3, residual=True, **_PAD1), 2)}


def check_problem(problem: autotuner.Problem, name: str) -> Result:
    """Compares one candidate of a problem with fp64, in memory filled with NaN, and two of its runs with each other."""
    own = replace(problem, candidates={name: problem.candidates[name]})
    record: Result = {"candidates": {}}
    with torch.no_grad():
        operands = own.operands()
        autotuner.check_candidates(own, operands, record)
        row = record["candidates"][name]
        if "refused" not in row:
            runs = [autotuner.as_tuple(own.candidates[name](*operands)) for _ in range(2)]
            if not all(torch.equal(a, b) for a, b in zip(*runs)):
                row["refused"] = "two runs on the same operands differ"
    return row


def _conv_checks(candidate: str, dtype: torch.dtype) -> list[Check]:
    shapes = CONVOLUTIONS | (PORTABLE_ONLY if not candidate.startswith(HOPPER_ONLY) else {})
    checks = []
    for what, (asked, batch) in (shapes if is_cuda() else DRY).items():

        def run(asked=asked, batch=batch) -> Result:
            problem = problems.conv_problem(asked, batch, dtype, device())
            if candidate not in problem.candidates:
                return {"skipped": "not a candidate here"}
            return check_problem(problem, candidate)

        checks.append(Check(f"{candidate} | {what} | {str(dtype)[6:]}", run, candidate))
    return checks


def _activation_checks(candidate: str) -> list[Check]:
    """A candidate with every activation but ReLU behind a residual; for "norm", BN in training and in inference."""
    checks = []
    for last in ACTIVATIONS if is_cuda() else ACTIVATIONS[-1:]:
        if candidate == "norm":
            for training in (True, False):
                checks += _problem_checks(NormProblem(72, 15, 13, True, last, training), 3, torch.bfloat16, "")
            continue
        asked, batch = next(iter(DRY.values())) if not is_cuda() else CONVOLUTIONS["3x3 ragged, residual"]
        if candidate.startswith(HOPPER_ONLY[1:]):
            asked, batch = _conv(64, (14, 12), 72, 3, residual=True, **_PAD1), 3
        asked = asked._replace(activation=last)

        def run(asked=asked, batch=batch) -> Result:
            problem = problems.conv_problem(asked, batch, torch.bfloat16, device())
            if candidate not in problem.candidates:
                return {"skipped": "not a candidate here"}
            return check_problem(problem, candidate)

        checks.append(Check(f"{candidate} | {last}", run, candidate))
    return checks


def _problem_checks(asked, batch: int, dtype: torch.dtype, prefix: str) -> list[Check]:
    """One check with all our candidates of a link, stem or BN, because only the device knows their names."""

    def run() -> Result:
        problem = problems.BUILDERS[type(asked)](asked, batch, dtype, device())
        rows = {name: check_problem(problem, name) for name in problem.candidates if name != problem.default}
        refused = {name: row["refused"] for name, row in rows.items() if "refused" in row}
        return {"candidates": rows, **({"refused": str(refused)} if refused else {})}

    return [Check(f"{prefix} {asked}, batch {batch}, {str(dtype)[6:]}", run, "*", str(asked))]


def jobs(noted: list[gpu_jobs.Noted]) -> Iterator[Job]:
    """Jobs, ordered so that the likeliest and costliest failures come first."""
    bf16 = torch.bfloat16
    links, norms = {}, {}
    for network in noted:
        for asked, _ in network.problems:
            if isinstance(asked, NormProblem):
                norms[str(asked)] = (asked, 16 if network.image_size > 100 else 3)
            elif not isinstance(asked, ConvProblem):
                links[str(asked)] = (asked, 8 if network.image_size > 100 else 3)
    tiles = [*conv_candidates.tiles(), "cudnn", "cudnn+epilogue"]
    ours = [name for name in tiles if name.startswith(HOPPER_ONLY)]
    # Networks take longest, as each compiles some forty kernels, so they come first.
    yield from (Job(name, checks, NETWORK_S) for name, checks in NETWORKS())
    yield from (Job(name, _conv_checks(name, bf16)) for name in ours)
    yield Job("small", SMALL())
    for asked, batch in links.values():
        yield Job("stem" if isinstance(asked, StemProblem) else "link", _problem_checks(asked, batch, bf16, ""))
    yield from (Job(name, _conv_checks(name, bf16)) for name in tiles if name not in ours)
    rest = list(norms.values())
    yield from (
        Job("norm", [c for asked, batch in rest[i::4] for c in _problem_checks(asked, batch, bf16, "")])
        for i in range(4)
    )
    # Gluon's kernels are absent from the interpreter.
    first = (next((name for name in tiles if name.startswith(kind)), None) for kind in ("pointer ", *HOPPER_ONLY))
    some = [name for name in first if name is not None]
    yield from (Job(f"activations {name}", _activation_checks(name)) for name in (*some, "cudnn+epilogue", "norm"))
    yield from (Job(name, _conv_checks(name, torch.float16)) for name in (ours[1], ours[-1]))
    yield from (Job(name, _conv_checks(name, torch.float32)) for name in tiles if name not in ours)


def NETWORKS() -> Iterator[tuple[str, list[Check]]]:
    from . import networks

    return networks.jobs()


def SMALL() -> list[Check]:
    from . import small_checks

    return [Check(name, run) for name, run in small_checks.small_checks().items()]


def sanitize(out: Path) -> list[subprocess.Popen]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        (out / "sanitizer.txt").write_text("no compute-sanitizer here\n")
        return []
    runs = []
    for what in ("chain", "split", "stem"):
        log = (out / f"sanitizer-{what}.log").open("w")
        command = [tool, "--tool", "memcheck", sys.executable, "-m", "benchmarks.gpu.networks", what]
        runs.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
    return runs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--precompile", action="store_true", help="compile act 2's kernels with --only, too")
    parser.add_argument("--only", help="jobs whose name matches this expression")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    end = begin + options.seconds
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.dry_run:
        os.environ["RESNET_KERNELS_DRY_RUN"] = "1"
    noted = gpu_jobs.read(options.jobs)
    runner = Runner(out, end - (0 if options.dry_run else 12))
    sanitizers = [] if options.dry_run or options.only else sanitize(out)
    todo = [job for job in jobs(noted) if not options.only or re.search(options.only, job.name)]
    if options.dry_run:
        todo = todo[:2] + [job for job in todo if job.name in ("small", "crash")]
    runner.run(iter(todo), 2 if options.dry_run else CHILDREN)
    print(f"checks: {time.monotonic() - begin:.0f} s", flush=True)
    if not options.dry_run and (options.precompile or not options.only):
        precompile(noted, end, out)
        for run in sanitizers:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
        text = [f"== {p.name}\n{p.read_text(errors='replace')[-6000:]}" for p in sorted(out.glob("sanitizer-*.log"))]
        (out / "sanitizer.txt").write_text("\n".join(text))
        for path in out.glob("sanitizer-*.log"):
            path.unlink()
    checked = [line for line in runner.lines if "check" in line]
    wrong = [line for line in checked if "refused" in line or "failed" in line]
    for line in wrong:
        print("WRONG", line["check"], "|", str(line.get("refused") or line.get("failed"))[:400])
    skipped = sum("skipped" in line for line in checked)
    print(f"{len(checked)} checks, {len(wrong)} wrong, {skipped} skipped, {time.monotonic() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
