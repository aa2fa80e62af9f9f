"""python -m benchmarks.gpu.session OUTDIR [--seconds S] [--denied FILE] [--only ...] [--dry-run]: act 2, the measurements.

The most valuable come first.

    session.json      device, driver, versions, commit; the time of each section, and how it ended
    ceilings.json     copy, matmul, L2; the descriptors that the driver accepts
    <device>.json     the table of `python -m resnet_kernels tune`, which later sections use
    models.json       whole networks against their peers, inference and training: pytest-benchmark's format
    gpu_tests.json    the tests that a GPU runs, one by one, in the remaining time
    log.txt           the output of all sections

checks.py is act 1: fix the failures that it finds before measuring. Its denied.json lists candidates that crashed or hung;
they are not tried again.

Each section has a share of the remaining time. A crash or a hang costs its section alone; a section that ends early leaves
its time to the later ones. Without a GPU the session is a dry run: small cases on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .processes import ROOT, Session, end_group

# Shares of the budget, the most valuable section first.
SHARES = {
    "ceilings": 15,
    "tune": 170,
    "models": 330,
    "gpu_tests": 5,
}
MOST_SECONDS = 100.0  # for one case
# (direction, model, batch, peers). max-autotune takes minutes to compile, and JAX's peer is another program: they come last.
_QUICK = "not compile-max and not jax"
_SLOW = "compile-max or jax"
_STEP = "forward-backward"
MODELS = (
    *(("forward", "resnet50", batch, _QUICK) for batch in (256, 1)),
    ("forward", "resnet_v2_50", 256, _QUICK),
    *((_STEP, model, 256, _QUICK) for model in ("resnet50", "resnet_v2_50")),
    ("forward", "resnet50", 32, _QUICK),
    (_STEP, "resnet50", 32, _QUICK),
    *(("forward", "resnet18", batch, _QUICK) for batch in (256, 1)),
    ("forward", "resnet152", 256, _QUICK),
    (_STEP, "resnet18", 256, _QUICK),
    *(("forward", model, 1, _QUICK) for model in ("resnet_v2_50", "resnet152")),
    *(("forward", "resnet50", batch, _SLOW) for batch in (256, 1)),
)
DRY_CASES = tuple(f"op-{what}-add_relu_256-56px-b1-fp32-cpu" for what in ("forward", _STEP))
# The pattern finds test files that have tests for a GPU.
_FOR_GPUS = re.compile(r"mark\.gpu|skip_unless_runnable\(\s*\"triton\"|hopper_with_nan_outputs")


def in_a_process(name: str) -> Callable[[Session, float], dict[str, Any]]:
    """Returns the section of sections.py that has this name, to run in its own process."""

    def run(session: Session, seconds: float) -> dict[str, Any]:
        arguments = ["-m", "benchmarks.gpu.sections", name, str(session.out), f"{0.9 * seconds:.1f}"]
        if session.dry:
            return {"ended": session.command([*arguments, "--dry-run"], seconds, TRITON_INTERPRET="1")}
        return {"ended": session.command(arguments, seconds)}

    return run


def gpu_tests(session: Session, seconds: float) -> dict[str, Any]:
    """Runs the test files that use a GPU, one process a file, several at a time, as compiling is a CPU's work."""
    end = time.monotonic() + seconds
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if _FOR_GPUS.search(path.read_text())]
    # A whole network's parity takes longest and is worth most, so it starts first.
    files.sort(key=lambda path: path.name != "test_parity.py")
    if session.dry:
        files = [ROOT / "tests" / "perf" / "test_timing.py"]
    found: dict[str, Any] = {}

    def test(path: Path) -> None:
        with tempfile.TemporaryDirectory() as work:
            output = Path(work) / "output.txt"
            arguments = ["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", str(path.relative_to(ROOT))]
            # This -m replaces the default one, which leaves out tests that are slow under the interpreter but not on a GPU.
            arguments += ["-m", "not compile_only"]
            ended = session.command(arguments, end - time.monotonic(), output)
            found[path.name] = {"ended": ended, **_read_tests(output.read_text(errors="replace"))}
        session.write("gpu_tests.json", {"files": found})

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        try:
            list(pool.map(test, files))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(session.running):
                end_group(process)
            raise
    counts = {what: sum(f["counts"].get(what, 0) for f in found.values()) for what in ("PASSED", "FAILED", "ERROR")}
    return {"ended": "done", **counts}


def _read_tests(text: str) -> dict[str, Any]:
    """Counts and failures from the lines of pytest -v, so that a run that was cut off counts as far as it went."""
    results = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", text, re.M)
    counts: dict[str, int] = {}
    for _, result in results:
        counts[result] = counts.get(result, 0) + 1
    failures = [name for name, result in results if result in ("FAILED", "ERROR")]
    end = text[-6000:] if failures or not results else ""
    return {"counts": counts, "failures": failures, "end_of_output": end}


def tune(session: Session, seconds: float) -> dict[str, Any]:
    """Tunes ResNet-50 at batch 256 and 1 first, then training, then the other networks. A table in OUTDIR is continued."""
    end = time.monotonic() + seconds
    table = ["--output", str(session.out / session.key.file_name), "--samples"]
    if session.denied is not None:
        table += ["--without", str(session.denied)]
    runs: tuple[tuple[float, list[str]], ...] = (
        (0.6, ["--model", "resnet50", "--batch-size", "256", "1"]),
        (0.5, ["--model", "resnet50", "resnet_v2_50", "--batch-size", "256", "--training"]),
        (0.6, ["--model", "resnet_v2_50", "resnet18", "resnet152", "--batch-size", "256"]),
        (1.0, ["--model", "resnet_v2_50", "resnet18", "--batch-size", "1"]),
    )
    if session.dry:
        runs = ((1.0, ["--dry-run", "--model", "d2l_resnet18", "--image-size", "16"]),)
    ended = {}
    for share, arguments in runs:
        # A candidate that breaks the GPU ends the command with status 2; the next try continues after that candidate.
        for _ in range(4):
            left = share * (end - time.monotonic())
            if left < 1:
                break
            command = ["-m", "resnet_kernels", "tune", *arguments, *table, "--seconds", f"{0.8 * left:.1f}"]
            ended[" ".join(arguments)] = session.command(command, left)
            if ended[" ".join(arguments)] != "failed (2)":
                break
    return {"ended": "done" if set(ended.values()) == {"done"} else "in part", "runs": ended}


def models(session: Session, seconds: float) -> dict[str, Any]:
    """Runs cases of `pytest benchmarks` one after another, and adds each to models.json as it ends."""
    selections = [
        f"model-{what}-{model}-224px-b{batch}-bf16-cuda and ({peers})" for what, model, batch, peers in MODELS
    ]
    if session.dry:
        selections = list(DRY_CASES)
    end, whole = time.monotonic() + seconds, session.benchmarks
    ended: dict[str, str] = {}
    for selection in selections:
        left = end - time.monotonic()
        if left < 1:
            ended[selection] = "no time left"
            continue
        with tempfile.TemporaryDirectory() as work:
            written = Path(work) / "benchmarks.json"
            arguments = ["-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-k", selection]
            arguments += [f"--benchmark-json={written}", f"--benchmark-max-time={0.2 if session.dry else 1}"]
            ended[selection] = session.command(arguments + ([] if session.dry else ["--full"]), min(left, MOST_SECONDS))
            # pytest's status 5: no test was selected.
            ended[selection] = {"failed (5)": "no such case"}.get(ended[selection], ended[selection])
            if written.exists() and written.stat().st_size:
                values = json.loads(written.read_text())
                for name in ("benchmarks", "absent"):
                    whole[name] += values.pop(name, [])
                whole.update(values)
        session.write("models.json", whole)
    return {"ended": "done" if set(ended.values()) == {"done"} else "in part", "cases": ended}


SECTIONS: dict[str, Callable[[Session, float], dict[str, Any]]] = {
    **{name: in_a_process(name) for name in ("ceilings",)},
    "tune": tune,
    "models": models,
    "gpu_tests": gpu_tests,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUTDIR", help="made if it is not there")
    parser.add_argument("--seconds", type=float, default=440.0, help="for all of it (default: 440)")
    parser.add_argument("--denied", type=Path, help="act 1's denied.json (default: OUTDIR's, if there is one)")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, in small; goes without saying if there is no GPU"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(SHARES),
        default=list(SHARES),
        metavar="SECTION",
        help=f"of {', '.join(SHARES)}",
    )
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    denied = options.denied or options.out / "denied.json"
    if options.denied is not None and not denied.exists():
        parser.error(f"--denied: there is no file {denied}")
    session = Session(
        options.out.resolve(),
        options.seconds,
        options.dry_run or not torch.cuda.is_available(),
        denied.resolve() if denied.exists() else None,
    )
    # SIGTERM acts as Ctrl-C: the running command is ended, and the results so far are written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # In a dry run all sections have equally little to do.
    waiting = {name: 1 if session.dry else share for name, share in SHARES.items() if name in options.only}
    for name, run in SECTIONS.items():
        if name not in waiting:
            continue
        seconds = session.left * waiting[name] / sum(waiting.values())
        del waiting[name]
        session.sections[name] = {"ended": "running", "budget_s": round(seconds, 1)}
        session.report()
        print(f"{name}: {seconds:.0f} s", flush=True)
        start = time.monotonic()
        result: dict[str, Any] = {}
        try:
            result = run(session, seconds) if seconds > 0 else {"ended": "no time left"}
        except KeyboardInterrupt:
            result = {"ended": "stopped"}
            return 130
        except Exception as error:
            result = {"ended": f"{type(error).__name__}: {error}"}
        finally:
            session.sections[name] |= {**result, "seconds": round(time.monotonic() - start, 1)}
            session.report()
        print(f"  {result['ended']}, {session.sections[name]['seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
