"""Arguments that several commands share, the model and the images that they name, and lines about the machine."""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import resnet_kernels as rk

from .. import models
from ..kernels.cpu import library
from ..models import by_name, from_file
from ..models.random_weights import randomise_batch_norms_
from ..ops.dtypes import BY_SHORT_NAME, SHORT_NAMES

DTYPES = ("fp32", "fp16", "bf16", "fp64")
MODELS = (
    f"{', '.join(models.BY_NAME)}, torchvision:NAME, timm:NAME, or FILE.py:FUNCTION, a function that is called without "
    "arguments and returns an nn.Module (FILE.py alone: build)"
)


def add_model_arguments(parser: argparse.ArgumentParser, model: str = "resnet50") -> None:
    """Adds --model with a default, --dtype, --device, --backend, --seed and --json."""
    add_model_name(parser, model)
    add_dtype(parser)
    add_device(parser)
    add_backend(parser)
    add_seed(parser)
    add_json(parser)


def add_model_name(parser: argparse.ArgumentParser, model: str, several: bool = False) -> None:
    """Adds --model alone, with a default; with `several` it takes one or more names, and the option is a list."""
    nargs, default = ("+", [model]) if several else (None, model)
    parser.add_argument("--model", nargs=nargs, default=default, metavar="NAME", help=f"{MODELS} (default: {model})")


def add_dtype(parser: argparse.ArgumentParser, names: Sequence[str] = DTYPES, default: str = "fp32") -> None:
    """Adds --dtype, which takes the short names given here and PyTorch's names for them; the option is the short name.

    A default with more words than a name is a text for the help: the option is then None unless it is given.
    """
    long_names = {str(dtype).removeprefix("torch."): short for dtype, short in SHORT_NAMES.items()}

    def parse(text: str) -> str:
        name = long_names.get(text, text)
        if name not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {text!r}")
        return name

    what = f"{', '.join(names)}, or PyTorch's names, such as float32 (default: {default})"
    parser.add_argument("--dtype", type=parse, default=default if default in names else None, help=what)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device, which `device_for` reads."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one, else cpu)")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Adds --backend."""
    parser.add_argument("--backend", default="auto", help="auto, triton, cudnn, cpu or eager (default: auto)")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Adds --seed."""
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn at random (default: 0)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_sizes(
    parser: argparse.ArgumentParser,
    batch_size: str,
    image_size: str = "224, and 28 for d2l's networks",
    several: bool = False,
) -> None:
    """Adds --batch-size and --image-size, which `images_for` reads, with the text of their defaults.

    With `several`, --batch-size takes one or more numbers, and the option is a list.
    """
    what = f"images in a batch (default: {batch_size})"
    parser.add_argument("--batch-size", nargs="+" if several else None, type=positive, metavar="N", help=what)
    parser.add_argument(
        "--image-size",
        type=positive,
        metavar="N",
        help=f"height and width of the images (default: {image_size}; of a FILE.py both sizes are those of its "
        "example_input(), if it has that function)",
    )


def add_seconds(parser: argparse.ArgumentParser, default: float) -> None:
    """Adds --seconds, with a default."""
    what = f"seconds to spend on measuring (default: {default:g})"
    parser.add_argument("--seconds", type=positive_float, default=default, metavar="S", help=what)


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


def at_least_zero(text: str) -> float:
    """Parses an argument that is a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0 and finite, got {text}")
    return value


# See at_least.
positive_float.__name__ = at_least_zero.__name__ = "number"


def device_for(options: argparse.Namespace) -> torch.device:
    """Returns the device of the options.

    Raises:
        ValueError: if PyTorch doesn't know it, or it is a GPU that isn't there.
    """
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda, cuda:1 ..., got {options.device!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: PyTorch sees no GPU here; --device cpu runs on the CPU")
    return device


def model_for(options: argparse.Namespace) -> nn.Module:
    """Seeds PyTorch and returns the model of the options: on their device, in their dtype, channels_last, in eval mode.

    A model of a file keeps its weights. All others are untrained, and their BNs get values that a trained one could have.
    """
    device = device_for(options)
    torch.manual_seed(options.seed)
    model = by_name.build(options.model).to(device, BY_SHORT_NAME[options.dtype])
    # PyTorch's stubs of Module.to lack memory_format.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's types want more
    model.eval()
    return model if from_file.is_file(options.model) else randomise_batch_norms_(model, options.seed)


def images_for(options: argparse.Namespace, model: nn.Module, batch_size: int, image_size: int | None = None) -> Tensor:
    """Returns the images of the options, (N, C, H, W), channels_last, in the dtype and on the device of the model.

    They are those of the file's example_input(), if the model is a file's and no size was given; random ones otherwise.

    Args:
        options: with batch_size and image_size, each None unless it was given.
        model: the model of the options.
        batch_size: default of --batch-size.
        image_size: default of --image-size; None is the size that the model is made for.
    """
    example = by_name.example_input(options.model)
    if example is None:
        return by_name.image_batch(
            model,
            options.batch_size or batch_size,
            options.image_size or image_size or by_name.image_size(options.model),
        )
    if options.batch_size or options.image_size:
        height, width = example.shape[2:]
        return by_name.image_batch(model, options.batch_size or len(example), options.image_size or (height, width))
    weight = by_name.first_convolution(model).weight
    return example.to(weight.device, weight.dtype, memory_format=torch.channels_last)


def size_of(x: Tensor) -> str:
    """Returns the height and width of images as "224x224"."""
    return f"{x.shape[2]}x{x.shape[3]}"


def size_value(x: Tensor) -> int | list[int]:
    """Returns the height and width of images as a value of JSON: one number where both are the same, else two."""
    height, width = x.shape[2:]
    return height if height == width else [height, width]


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
