"""Arguments that several commands share, the model that they name, and lines about the machine."""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import resnet_kernels as rk

from .. import models
from ..kernels.cpu import library
from ..models.by_name import build
from ..models.random_weights import randomise_batch_norms_


def add_model_arguments(parser: argparse.ArgumentParser, model: str = "resnet50") -> None:
    """Adds --model with a default, --dtype, --device, --backend, --seed and --json."""
    add_model_name(parser, model)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16", "float64"))
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--backend", default="auto", help="auto, triton, cudnn, cpu or eager (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and images (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def add_model_name(parser: argparse.ArgumentParser, model: str) -> None:
    """Adds --model alone, with a default."""
    parser.add_argument(
        "--model",
        default=model,
        help=f"{', '.join(models.BY_NAME)}, torchvision:NAME or timm:NAME (default: {model})",
    )


def at_least(minimum: int) -> Callable[[str], int]:
    """Returns an argument's type: an int of at least `minimum`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    # argparse puts this name into its message about a text that is no number.
    parse.__name__ = "integer"
    return parse


positive = at_least(1)


def positive_float(text: str) -> float:
    """Parses an argument that is a positive and finite number."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


# See at_least.
positive_float.__name__ = "number"


def model_for(options: argparse.Namespace) -> nn.Module:
    """Seeds PyTorch and returns the model of the options: on their device, in their dtype, channels_last, in eval mode."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = build(options.model).to(device, getattr(torch, options.dtype))
    # PyTorch's stubs of Module.to lack memory_format.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's types want more
    return randomise_batch_norms_(model.eval(), options.seed)


def announce(quiet: bool) -> Callable[[str], None]:
    """Returns a function that shows its text as a progress line on a terminal's stderr, written over the line before it."""
    if quiet or not sys.stderr.isatty():
        return lambda what: None
    return lambda what: print(f"\r\033[K{what}", end="" if what else "\r", file=sys.stderr, flush=True)


def machine(x: Tensor) -> str:
    """Returns the versions, the device that x is on, and its dtype, as one line."""
    if x.is_cuda:
        name = torch.cuda.get_device_name(x.device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"resnet_kernels {rk.__version__}, torch {torch.__version__}, {name}, {str(x.dtype).removeprefix('torch.')}"


def about_kernels(device: torch.device) -> str:
    """Returns a line about the kernels of a CPU, with its end; "" for any other device."""
    return f"{library.describe()}\n" if device.type == "cpu" else ""
