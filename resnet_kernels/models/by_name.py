"""Models by name ("resnet50", "torchvision:resnet50", "timm:resnet50"), and a batch of images for one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import models


def build(name: str) -> nn.Module:
    """A new model by its name.

    Raises:
        ValueError: if nothing has that name, or its package isn't installed.
    """
    source, _, rest = name.rpartition(":")
    if not source and rest in models.BY_NAME:
        return models.BY_NAME[rest]()
    if source == "torchvision":
        return _import("torchvision.models", "vision").get_model(rest, weights=None)
    if source == "timm":
        return _import("timm", "timm").create_model(rest, pretrained=False)
    known = ", ".join(models.BY_NAME)
    raise ValueError(f"--model must be one of {known}, torchvision:NAME or timm:NAME, got {name!r}")


def _import(package: str, extra: str):
    try:
        return __import__(package, fromlist=["_"])
    except ImportError as error:
        raise ValueError(
            f'{package} is needed for this model: pip install "resnet_kernels[{extra}]" ({error})'
        ) from error


def image_size(name: str) -> int:
    """Height and width of the images that a model by that name is made for."""
    return 28 if name.startswith("d2l_") else 224


def image_batch(model: nn.Module, batch_size: int, size: int) -> Tensor:
    """Random images as the model takes them, (batch_size, C, size, size)."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    x = torch.randn(batch_size, first.in_channels, size, size)
    return x.to(first.weight.device, first.weight.dtype, memory_format=torch.channels_last)
