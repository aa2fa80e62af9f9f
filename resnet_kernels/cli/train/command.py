"""python -m resnet_kernels train: a network of the zoo, trained on digits, MNIST, Fashion-MNIST or CIFAR-10.

It prints a line per epoch, and the accuracy on the test set at the end. The output directory gets `checkpoint.pt`, rewritten
after each epoch, and `curve.png`. Under torchrun it trains data parallel on several GPUs or machines.

    torch.load("checkpoint.pt")["model"]    is the plain model's state_dict, whether it was trained fused or not.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import resnet_kernels as rk

from .. import arguments
from . import checkpoint, curve, data, network, presets
from .loop import Progress, Training
from .presets import Settings
from .processes import Processes, SharedError, join

HELP = "train a network of the zoo on digits, MNIST, Fashion-MNIST or CIFAR-10"
EXAMPLES = (
    "",
    "--preset cifar --download --amp",
    "--model my_model.py:build --epochs 3",
)

# Running statistics lag 1 / momentum steps behind the network; after ten times as many steps the lag no longer matters.
_STEPS_OF_MOMENTUM = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.set_defaults(run=run)
    default = presets.DEFAULT
    option = parser.add_argument
    option("--data", help=f"{', '.join(data.READERS)} (default: {default.data}, resized from 8x8 to 32x32)")
    option("--model", metavar="NAME", help=f"{arguments.MODELS} (default: {default.model})")
    option("--preset", help=f"a text's recipe: {', '.join(presets.PRESETS)}; options on the command line override it")
    option("--epochs", type=arguments.positive, help=f"default: {default.epochs}, or the preset's")
    option(
        "--batch-size",
        type=arguments.positive,
        metavar="N",
        help=f"images in a batch of all processes together (default: {default.batch_size})",
    )
    option("--optimizer", help=f"{', '.join(presets.OPTIMIZERS)} (default: {default.optimizer.name})")
    option("--lr", type=arguments.positive_float, help=f"learning rate (default: {default.optimizer.lr:g} for adam)")
    option(
        "--image-size",
        type=arguments.positive,
        metavar="N",
        help="height and width of the images, which are resized (default: 32 for digits, else as is)",
    )
    option("--output", type=Path, help="directory of checkpoint.pt and curve.png (default: runs/DATA-MODEL)")
    option("--resume", action="store_true", help="go on from the checkpoint in the output directory")
    option("--data-dir", default="data", help="where torchvision's data sets are (default: data)")
    option("--download", action="store_true", help="download a data set that is missing; never done without")
    option(
        "--fused", action=argparse.BooleanOptionalAction, default=True, help="on the kernels of this package (default)"
    )
    arguments.add_backend(parser)
    option("--amp", action="store_true", help="mixed precision: float16 on GPUs, bfloat16 on the CPU")
    arguments.add_device(parser)
    option("--workers", type=arguments.at_least(0), default=0, help="processes that load data (default: 0)")
    arguments.add_seed(parser)


@dataclass
class _Stop:
    """Whether a signal asked to stop, and the text about what a stopped run leaves behind."""

    asked: bool = False
    kept: str = "no epoch was done, nothing is saved"


def run(options: argparse.Namespace) -> int:
    """Trains; returns the exit status: 0, 130 when stopped, or 2 after an error, which is one line on stderr."""
    rank = int(os.environ.get("RANK", 0))
    stop = _Stop()
    try:
        with _signals(stop), join(options.device) as processes:
            return _train(options, processes, stop)
    except (KeyboardInterrupt, ValueError, TypeError, RuntimeError, OSError) as error:
        # Among several processes, the first to stop breaks the connections of the others. Their errors are not reported.
        if isinstance(error, KeyboardInterrupt) or stop.asked:
            if rank == 0:
                print(f"\nstopped; {stop.kept}", file=sys.stderr)
            return 130
        if rank == 0 or not isinstance(error, SharedError):
            # Without torchrun, which ends all, the others hear of a stopped process by their broken connections.
            alone = int(os.environ.get("WORLD_SIZE", 1)) == 1 or not isinstance(error, RuntimeError)
            print(f"error: {error}" if alone else f"error: {data.first_line(error)}; {stop.kept}", file=sys.stderr)
        return 2


def _train(options: argparse.Namespace, processes: Processes, stop: _Stop) -> int:
    say: Callable[..., None] = print if processes.first else lambda *_, **__: None
    settings = presets.settings(
        options.preset,
        **{name: getattr(options, name) for name in ("data", "model", "epochs", "batch_size", "optimizer", "lr")},
        **{name: getattr(options, name) for name in ("image_size", "amp", "seed")},
    )
    if settings.batch_size % processes.size:
        raise SharedError(
            f"--batch-size must be a multiple of the {processes.size} processes, got {settings.batch_size}"
        )
    # A file's path and function are no name for a folder.
    output = options.output or Path("runs") / f"{settings.data}-{re.sub(r'[^A-Za-z0-9_]+', '-', settings.model)}"
    path = output / "checkpoint.pt"
    if path.exists():
        stop.kept = f"no epoch was done, and {path} is as it was"
    # Before the hours of training, not after.
    processes.together(lambda: checkpoint.check_writable(path) if processes.first else None)

    def load() -> data.DataSet:
        return data.load(settings.data, options.data_dir, settings.held_out, options.download)

    images = processes.in_turn(load) if options.download else processes.together(load)
    model, blocks = processes.together(lambda: _build(settings, images, options, processes))
    training = Training(model, images, settings, processes, options.workers, _progress(processes))
    if options.resume:
        # The first process reads it for all: on several machines no other has it.
        state = processes.from_first(
            processes.together(lambda: checkpoint.load(path, settings.fingerprint()) if processes.first else {})
        )
        processes.together(lambda: training.load_state(state))
    say(_summary(settings, images, model, blocks, processes), flush=True)
    stop.kept = f"{path} holds epoch {training.epoch}: add --resume to go on" if training.epoch else stop.kept
    while training.epoch < settings.epochs:
        row = training.train_epoch()
        if processes.first:
            if training.epoch == 1 and path.exists():
                say(f"the checkpoint of an earlier run is now {checkpoint.set_aside(path)}")
            checkpoint.save(path, training.state())
        stop.kept = f"{path} holds epoch {training.epoch}: add --resume to go on"
        accuracy = 100 * row["validation_accuracy"]
        say(f"[{training.epoch}] loss: {row['loss']:.3f}, validation accuracy: {accuracy:.1f} %", flush=True)
    _, correct, count = training.evaluate(images.test)
    if processes.first:
        _draw(training, f"{settings.model} on {settings.data}", output / "curve.png")
    # The share is rounded down, so 100 % means all of them.
    say(f"Accuracy on the test set: {100 * correct // count} % [{correct}/{count}]", flush=True)
    return 0


def _build(
    settings: Settings, images: data.DataSet, options: argparse.Namespace, processes: Processes
) -> tuple[nn.Module, int]:
    """Returns the model on its device, fused if asked for, and the number of its fused blocks."""
    torch.manual_seed(settings.seed)
    model = network.build(settings.model, images, settings.image_size or images.image_size)
    if settings.xavier:
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
    # BN takes the whole batch's statistics, not those of one process' part. It refuses CPU tensors. Fusing reads the BNs, so
    # they are converted before.
    if processes.size > 1 and processes.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # PyTorch's stubs of Module.to lack memory_format.
    model.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's types want a device, too
    blocks = len(rk.fuse_(model, backend=options.backend).fused) if options.fused else 0
    return model, blocks


def _summary(settings: Settings, images: data.DataSet, model: nn.Module, blocks: int, processes: Processes) -> str:
    size = settings.image_size or images.image_size
    parameters = sum(p.numel() for p in model.parameters())
    counts = f"{len(images.train)} to train on, {len(images.validation)} to validate, {len(images.test)} to test"
    if images.validation is images.test:
        counts = f"{len(images.train)} to train on, {len(images.test)} to validate and test"
    lines = [
        f"{settings.model} ({parameters:,} parameters, {f'{blocks} blocks fused' if blocks else 'not fused'}) on "
        f"{settings.data} ({images.channels}x{size}x{size}; {counts}), {processes.device}"
    ]
    if processes.size > 1:
        lines.append(
            f"{processes.size} processes, each with {settings.batch_size // processes.size} of a batch's images"
        )
        if processes.device.type != "cuda":
            lines.append("BN statistics are of each process' images: SyncBatchNorm needs GPUs")
    steps = settings.epochs * math.ceil(len(images.train) / settings.batch_size)
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.momentum]
    if momenta and steps < _STEPS_OF_MOMENTUM / min(momenta):
        lines.append(
            f"BN's running statistics take up {min(momenta):g} of a batch's, a step: after {steps} steps in all the accuracy "
            "lags behind the loss; more --epochs or a smaller --batch-size help"
        )
    return "\n".join(lines)


def _draw(training: Training, title: str, path: Path) -> None:
    try:
        curve.draw(training.history, title, path)
    except ImportError as error:
        print(f'no curve drawn: pip install "resnet_kernels[train]" ({error})', file=sys.stderr)


def _progress(processes: Processes) -> Progress:
    """Returns the first process' progress bar on a terminal's stderr; elsewhere, or without tqdm, nothing is shown."""
    if processes.first and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return lambda batches, label: tqdm(batches, desc=label, unit="batch", leave=False)
    return lambda batches, label: batches


@contextmanager
def _signals(stop: _Stop) -> Iterator[None]:
    """Lets SIGTERM, a scheduler's or torchrun's, stop a run as Ctrl-C does. Only the main thread gets Python's signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_: Any) -> None:
        stop.asked = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
