"""Models by name ("resnet50", "torchvision:resnet50", "timm:resnet50", "path.py:build"), and a batch of images for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from . import from_file


def build(name: str, **arguments: Any) -> nn.Module:
    """Builds a model with random weights.

    Args:
        name: of the zoo, "torchvision:NAME", "timm:NAME", or "path.py:FUNCTION" (see from_file.py).
        **arguments: of the function of the zoo, torchvision or timm. A file's function is called without arguments.

    Raises:
        ValueError: if the name is unknown, or its package isn't installed, or the file's function can't be called.
        TypeError: if the file's function returns no nn.Module.
    """
    if from_file.is_file(name):
        return from_file.build(name)
    source, _, rest = name.rpartition(":")
    if not source and rest in models.BY_NAME:
        return models.BY_NAME[rest](**arguments)
    if source == "torchvision":
        return _import("torchvision.models", "vision").get_model(rest, weights=None, **arguments)
    if source == "timm":
        return _import("timm", "timm").create_model(rest, pretrained=False, **arguments)
    known = ", ".join(models.BY_NAME)
    raise ValueError(f"--model must be one of {known}, torchvision:NAME, timm:NAME or FILE.py:FUNCTION, got {name!r}")


def _import(package: str, extra: str):
    try:
        return __import__(package, fromlist=["_"])
    except ImportError as error:
        raise ValueError(
            f'{package} is needed for this model: pip install "resnet_kernels[{extra}]" ({error})'
        ) from error
    except Exception as error:  # torchvision built for another PyTorch raises RuntimeError
        raise ValueError(
            f"{package} is installed, but its import fails ({error}): is torchvision built for torch {torch.__version__}?"
        ) from error


def image_size(name: str) -> int:
    """Returns the height and width of images for a model by its name: 28 for d2l's, 224 for all others."""
    return 28 if name.startswith("d2l_") else 224


def example_input(name: str) -> Tensor | None:
    """Returns the batch of images that a file brings for its model; None for any other name, and for a file without one."""
    return from_file.example_input(name) if from_file.is_file(name) else None


def image_batch(model: nn.Module, batch_size: int, size: int | tuple[int, int]) -> Tensor:
    """Returns random images, channels_last, of the first convolution's dtype and device.

    Args:
        model: the model.
        batch_size: N.
        size: height and width, one number for both or a pair.

    Returns:
        Images, (N, C, height, width).

    Raises:
        ValueError: if the model has no Conv2d.
    """
    first = first_convolution(model)
    height, width = (size, size) if isinstance(size, int) else size
    # Drawn on the CPU in fp32 whatever the defaults are: every device and dtype gets the same images.
    x = torch.randn(batch_size, first.in_channels, height, width, dtype=torch.float32, device="cpu")
    return x.to(first.weight.device, first.weight.dtype, memory_format=torch.channels_last)


def first_convolution(model: nn.Module) -> nn.Conv2d:
    """Returns the first Conv2d among a model's modules.

    Raises:
        ValueError: if there is none.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"--model must have a Conv2d, and a {type(model).__name__} has none: there is nothing to fuse")
    return first
