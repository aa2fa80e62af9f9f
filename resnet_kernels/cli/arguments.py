"""What the commands share: their arguments, the model and images that these name, and lines about the machine."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import resnet_kernels as rk

from .. import models
from ..models.by_name import build
from ..models.random_weights import randomise_batch_norms_


def add_model_arguments(parser: argparse.ArgumentParser, model: str = "resnet50") -> None:
    """--model, with that default, --dtype, --device, --backend, --seed and --json."""
    add_model_name(parser, model)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16", "float64"))
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--backend", default="auto", help="auto, triton, cudnn, cpu or eager (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def add_model_name(parser: argparse.ArgumentParser, model: str) -> None:
    """--model alone, with that default."""
    parser.add_argument(
        "--model",
        default=model,
        help=f"{', '.join(models.BY_NAME)}, torchvision:NAME or timm:NAME (default: {model})",
    )


def at_least(minimum: int) -> Callable[[str], int]:
    """An argument's type: an int of at least `minimum`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    # argparse names the type in its message about what is no number at all.
    parse.__name__ = "integer"
    return parse


positive = at_least(1)


def model_for(options: argparse.Namespace) -> nn.Module:
    """Seeds, and returns the model that the options name: on its device, in its dtype, channels_last, in eval mode."""
    torch.manual_seed(options.seed)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = build(options.model).to(device, getattr(torch, options.dtype), memory_format=torch.channels_last)
    return randomise_batch_norms_(model.eval(), options.seed)


def announce(quiet: bool) -> Callable[[str], None]:
    """A line on a terminal's stderr that says what is being done, rewritten in place."""
    if quiet or not sys.stderr.isatty():
        return lambda what: None
    return lambda what: print(f"\r\033[K{what}", end="" if what else "\r", file=sys.stderr, flush=True)


def machine(x: Tensor) -> str:
    """Versions, the device that x is on, and its dtype."""
    if x.is_cuda:
        name = torch.cuda.get_device_name(x.device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"resnet_kernels {rk.__version__}, torch {torch.__version__}, {name}, {str(x.dtype).removeprefix('torch.')}"
