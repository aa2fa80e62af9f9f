"""Models by name ("resnet50", "torchvision:resnet50", "timm:resnet50"), and a batch of images for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import models


def build(name: str) -> nn.Module:
    """Builds a model with random weights.

    Args:
        name: of the zoo, "torchvision:NAME" or "timm:NAME".

    Raises:
        ValueError: if the name is unknown, or its package isn't installed.
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
    """Returns the height and width of images for a model by its name: 28 for d2l's, 224 for all others."""
    return 28 if name.startswith("d2l_") else 224


def image_batch(model: nn.Module, batch_size: int, size: int) -> Tensor:
    """Returns random images, (batch_size, C, size, size), channels_last, of the first convolution's dtype and device."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    # Drawn on the CPU in fp32 whatever the defaults are: every device and dtype gets the same images.
    x = torch.randn(batch_size, first.in_channels, size, size, dtype=torch.float32, device="cpu")
    return x.to(first.weight.device, first.weight.dtype, memory_format=torch.channels_last)
