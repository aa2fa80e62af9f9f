"""python -m resnet_kernels tune: measures what is fastest on this very GPU, and writes it where `auto` finds it.

Each distinct problem of the models (a convolution with its epilogue, a BN with add and ReLU, ...) at each batch size: every
candidate is checked against fp64, then timed in turns with the others. A record is written as soon as it is there, so a run
that was stopped goes on where it was: what these versions have measured already is passed over, unless --again is given.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from .. import problems, tables, tuning
from ..ops import tuned
from ..report import table
from ..tuning import Problem
from . import common

HELP = "measure what is fastest on this GPU, for backend=auto to use"

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# Per problem: rounds enough for some dozen candidates of some 0.3 ms.
_SECONDS_EACH = 2.0
_BATCHES, _DRY_BATCHES = (256, 1), (2,)
_DRY_IMAGE_SIZE = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("--model", nargs="+", default=["resnet50"], metavar="NAME", help="default: resnet50")
    parser.add_argument("--batch-size", nargs="+", type=common.positive, metavar="N", help="default: 256 1")
    parser.add_argument("--image-size", type=common.positive, help="default: 224, and 28 for d2l")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="tf32: float32 that may round to it (default: bf16)")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--training", action="store_true", help="measure training's BN, add and ReLU, not inference")
    parser.add_argument(
        "--seconds", type=float, help=f"for all of it (default: {_SECONDS_EACH:g} a problem, for timing)"
    )
    parser.add_argument("--output", type=Path, help="the table's file (default: in the user's cache directory)")
    parser.add_argument("--again", action="store_true", help="measure what these versions have measured already, too")
    parser.add_argument("--samples", action="store_true", help="write all samples, and not only medians, p20 and p80")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="the same on the CPU, on small images, into --output: no table for any GPU",
    )


def run(options: argparse.Namespace) -> int:
    device, key = _device(options)
    path = options.output or _default_path(key)
    dtype_name = options.dtype or ("fp32" if options.dry_run else "bf16")
    file = tables.Table(path, key)
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark
    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype_name == "tf32" else "ieee"
    # cuDNN at its best is what the others have to beat.
    torch.backends.cudnn.benchmark = True
    try:
        done = _Run(options, device, _DTYPES[dtype_name], file)
        try:
            done.measure()
        except KeyboardInterrupt:
            done.say(f"stopped; what was measured is in {path}")
            return 130
        except tuning.DeviceLost as lost:
            file.put(lost.record)
            raise RuntimeError(f"{lost}; it is noted in {path}, and will be passed over next time") from None
    finally:
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark = before
    done.report()
    return 0


def _device(options: argparse.Namespace) -> tuple[torch.device, tuned.DeviceKey]:
    if options.dry_run:
        if options.output is None:
            raise ValueError("--dry-run needs --output FILE: what it writes is no table for any GPU")
        return torch.device("cpu"), tables.no_device()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("tune measures a GPU, and PyTorch sees none here; --dry-run --output FILE tries it on the CPU")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    key = tuned.device_key(device)
    if key is None:
        raise ValueError(f"--device must be a CUDA device, got {device}")
    return device, key


def _default_path(key: tuned.DeviceKey) -> Path:
    directory = tuned.cache_directory()
    if directory is None:
        raise ValueError(
            f"there is no home directory to put the table in: set {tuned.CACHE_VARIABLE}, or give --output"
        )
    return directory / key.file_name


class _Run:
    """One call of the command: its problems, what became of each, and the clock of its budget."""

    def __init__(self, options: argparse.Namespace, device: torch.device, dtype: torch.dtype, file: tables.Table):
        self.options, self.device, self.dtype, self.file = options, device, dtype, file
        self.begin = time.perf_counter()
        self.announce = common.announce(False)
        self.records: list[dict[str, Any]] = []
        self.known = self.left = 0

    def measure(self) -> None:
        # The same problem of two models is measured once.
        todo: dict[tuple[str, int], Problem] = {}
        layers: dict[str, list[Problem]] = {}
        for name in self.options.model:
            self.announce(f"running {name}")
            whole, own = self._problems(name)
            todo |= {(problem.key, problem.batch): problem for problem in own}
            layers[whole] = own
        queue = list(todo.values())
        for i, problem in enumerate(queue):
            dtype = tuned.dtype_name(problem.dtype)
            if not self.options.again and (record := self.file.has(problem.key, problem.batch, dtype)):
                self.known += 1
                self.records.append(record)
                continue
            seconds = self._share(len(queue) - i)
            if seconds <= 0:
                self.left = len(queue) - i
                break
            self.announce(f"[{i + 1}/{len(queue)}] {problem}")
            if problem.default == problems.APART:
                tuned.forget()  # apart, its layers run as this table says by now
            self.records.append(tuning.measure(problem, seconds, samples=self.options.samples))
            self.file.put(self.records[-1])
        self.announce("")
        if self.options.training:
            self._sum_up(layers)

    def _problems(self, name: str) -> tuple[str, list[Problem]]:
        """(the model's name with its images' shape, its problems), at each batch size."""
        options = self.options
        torch.manual_seed(0)
        model = common.build(name).to(self.device, self.dtype, memory_format=torch.channels_last).eval()
        size = options.image_size or (_DRY_IMAGE_SIZE if options.dry_run else common.image_size(name))
        x = common.image_batch(model, 2, size)
        noted = problems.note(model, x, training=options.training)
        batches = options.batch_size or (_DRY_BATCHES if options.dry_run else _BATCHES)
        whole = f"{name} {'x'.join(map(str, x.shape[1:]))}"
        return whole, problems.build(noted, dict.fromkeys(batches), self.dtype, self.device)

    def _share(self, problems_left: int) -> float:
        """Seconds for the next problem's timing; half of its share of what is left, as it has to be compiled, too."""
        if self.options.seconds is None:
            return _SECONDS_EACH
        left = self.options.seconds - (time.perf_counter() - self.begin)
        return min(_SECONDS_EACH, left / problems_left / 2)

    def _sum_up(self, layers: dict[str, list[Problem]]) -> None:
        """A record a model and batch, if all its layers were measured: what `ops.tuned.trains` reads."""
        measured = {(record["key"], record["batch"]): record for record in self.records}
        for whole, own in layers.items():
            for batch in dict.fromkeys(problem.batch for problem in own):
                mine = [(p.calls, measured.get((p.key, p.batch))) for p in own if p.batch == batch]
                if all(record is not None for _, record in mine):
                    self.file.put(problems.training_record(whole, mine))

    def say(self, what: str) -> None:
        self.announce("")
        print(what, flush=True)

    def report(self) -> None:
        rows = []
        for record in self.records:
            times = {name: _best_clock(row) for name, row in record["candidates"].items() if "call" in row}
            winner, default = record["winner"], record["default"]
            refused = sum("refused" in row for row in record["candidates"].values())
            cells = ["", ""]
            if winner in times:
                cells[0] = f"{1e6 * times[winner]:.1f}"
                cells[1] = f"{times[default] / times[winner]:.2f}x" if default in times else ""
            rows.append((record["key"], str(record["batch"]), winner or "none", *cells, str(refused)))
        print(table(("problem", "batch", "winner", "us", "against default", "refused"), rows))
        words = [f"{len(rows) - self.known} problems measured, {self.known} known already: {self.file.path}"]
        if self.left:
            words.append(f"{self.left} were left when the time was up: the same command goes on")
        if self.options.dry_run:
            words.append("a dry run on the CPU: nothing will use it")
        print("\n".join(words))


def _best_clock(row: dict[str, Any]) -> float:
    return row.get("graph", row["call"])["median"]
