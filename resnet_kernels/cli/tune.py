"""python -m resnet_kernels tune: the fastest candidates on this GPU, measured and written where `auto` finds them.

It does for models by name what rk.tune does for the user's model: it measures each distinct problem (a convolution with its
epilogue, a BN with add and ReLU, ...) at each batch size. A run that was stopped goes on where it was: problems that these
versions have measured already are passed over, unless --again is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..kernels.cpu import library
from ..models import by_name
from ..ops import tuned_table
from ..ops.dtypes import BY_SHORT_NAME
from ..perf.tuning import problems, table_file, tune_model
from ..perf.tuning.autotuner import Problem
from . import arguments, terminal

HELP = "measure what is fastest on this device, for backend=auto to use"
EXAMPLES = (
    "--model resnet50 resnet101 --batch-size 256 1",
    "--model my_model.py:build --dtype fp32",
    "--dry-run --output table.json",
)

_DTYPES = ("bf16", "fp16", "fp32", "tf32")
_BATCHES, _DRY_BATCHES = (256, 1), (2,)
_DRY_IMAGE_SIZE = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.set_defaults(run=run)
    arguments.add_model_name(parser, "resnet50", several=True)
    arguments.add_dtype(parser, _DTYPES, "bf16 on a GPU, fp32 on a CPU; tf32 is fp32 that may round to TF32")
    arguments.add_device(parser)
    arguments.add_seed(parser)
    arguments.add_json(parser)
    arguments.add_sizes(parser, " ".join(map(str, _BATCHES)), several=True)
    parser.add_argument("--training", action="store_true", help="measure training's BN, add and ReLU, not inference")
    parser.add_argument(
        "--seconds",
        type=arguments.at_least_zero,
        metavar="S",
        help=f"seconds to spend on measuring (default: {tune_model.SECONDS_EACH:g} for each problem)",
    )
    parser.add_argument("--output", type=Path, help="the table's file (default: in the user's cache directory)")
    parser.add_argument(
        "--again", action="store_true", help="also measure the problems that these versions have measured already"
    )
    parser.add_argument(
        "--without",
        type=Path,
        metavar="FILE",
        help='candidates to leave out: JSON, a list of {candidate, problem}; "*" is every candidate, null every problem',
    )
    parser.add_argument("--samples", action="store_true", help="write all samples, not only medians, p20 and p80")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run on the CPU with small images and write to --output: a table that no GPU uses",
    )


def run(options: argparse.Namespace) -> int:
    """Measures and writes the table; returns the exit status, 130 if it was stopped."""
    deadline = None if options.seconds is None else time.perf_counter() + options.seconds
    device, key = _device(options)
    file = table_file.Table(options.output or tune_model.default_path(key), key)
    dtype_name = options.dtype or ("fp32" if device.type == "cpu" else "bf16")
    tf32 = dtype_name == "tf32"
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # PyTorch's stubs lack it
    before, conv.fp32_precision = conv.fp32_precision, "tf32" if tf32 else "ieee"
    announce = terminal.announce(False)
    denied = set() if options.without is None else _denied(options.without)
    try:
        layers = {}
        for name in options.model:
            announce(f"running {name}")
            dtype = BY_SHORT_NAME["fp32" if tf32 else dtype_name]
            for whole, found in _problems(options, name, device, key.is_cpu, dtype).items():
                layers[whole] = [_left(problem, denied) for problem in found]
        announce("")
        result = tune_model.measure(
            layers,
            file,
            training=options.training,
            deadline=deadline,
            again=options.again,
            samples=options.samples,
            progress=sys.stderr.isatty(),
        )
    except KeyboardInterrupt:
        announce("")
        print(f"stopped; what was measured is in {file.path}", file=sys.stderr if options.json else sys.stdout)
        return 130
    finally:
        conv.fp32_precision = before
    if options.json:
        print(json.dumps({**asdict(result), "path": result.path and str(result.path)}, indent=2))
        return 0
    terminal.show(result)
    if options.dry_run:
        print("a dry run on the CPU: nothing will use it")
    return 0


def _device(options: argparse.Namespace) -> tuple[torch.device, tuned_table.DeviceKey]:
    if options.dry_run:
        if options.output is None:
            raise ValueError("--dry-run needs --output FILE: what it writes is no table for any GPU")
        return torch.device("cpu"), table_file.no_device()
    try:
        device = arguments.device_for(options)
    except ValueError as error:
        raise ValueError(f"{error}; --dry-run --output FILE tries a GPU's kernels on the CPU") from None
    if device.type == "cpu" and options.training:
        raise ValueError(
            "--training measures GPUs; on a CPU call rk.tune(model, x, training=True), which times whole steps"
        )
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    key = tuned_table.device_key(device)
    if key is None:
        if device.type == "cpu":
            raise ValueError(f"on this CPU there is nothing to choose from. {library.describe()}")
        raise ValueError(f"--device must be a CUDA device or cpu, got {device}")
    return device, key


def _denied(path: Path) -> set[tuple[str, str | None]]:
    try:
        return {(row["candidate"], row["problem"]) for row in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--without: {path} must hold a JSON list of objects with candidate and problem ({type(error).__name__}: {error})"
        ) from None


def _left(problem: Problem, denied: set[tuple[str, str | None]]) -> Problem:
    """Returns a problem without the denied candidates. The default stays: it runs without a table anyway."""
    candidates = {
        name: run
        for name, run in problem.candidates.items()
        if name == problem.default or denied.isdisjoint({(name, None), (name, problem.key), ("*", problem.key)})
    }
    return replace(problem, candidates=candidates)


def _problems(
    options: argparse.Namespace, name: str, device: torch.device, packed: bool, dtype: torch.dtype
) -> dict[str, list[Problem]]:
    """Returns a model's problems at each batch size, by its name with its images' shape."""
    torch.manual_seed(options.seed)
    model = by_name.build(name).to(device, dtype).eval()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's stubs lack it
    # Layers are noted at batch 2, and measured at each batch size.
    example = by_name.example_input(name)
    size = _DRY_IMAGE_SIZE if options.dry_run else by_name.image_size(name)
    made_for = (size, size) if example is None else (example.shape[2], example.shape[3])
    x = by_name.image_batch(model, 2, options.image_size or made_for)
    noted = problems.note(model, x, training=options.training, packed=packed)
    own = _BATCHES if example is None else (len(example),)
    batches = options.batch_size or (_DRY_BATCHES if options.dry_run else own)
    whole = f"{name} {'x'.join(map(str, x.shape[1:]))}"
    return {whole: problems.build(noted, dict.fromkeys(batches), dtype, device)}
