"""The network to train, by its name, with the input channels and the classes of a data set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import models
from ...models import by_name, from_file
from .data import DataSet

# Where timm and torchvision are asked for classes and channels; torchvision's models all take 3 channels.
_ARGUMENTS = {"timm": ("num_classes", "in_chans"), "torchvision": ("num_classes", None)}


def build(name: str, images: DataSet, size: int) -> nn.Module:
    """Builds a network with random weights for a data set.

    Args:
        name: as by_name.build takes it. A file's function is called without arguments, so its network must fit the data.
        images: the data set.
        size: height and width of its images as the network gets them.

    Raises:
        ValueError: if the name is unknown, or the network takes other channels or gives other classes than the data has.
        TypeError: if a file's function returns no nn.Module.
    """
    if name in models.BY_NAME:
        return by_name.build(name, num_classes=images.classes, in_channels=images.channels)
    classes, channels = _ARGUMENTS.get(name.partition(":")[0], (None, None))
    arguments = {} if classes is None or from_file.is_file(name) else {classes: images.classes}
    if channels is not None and arguments:
        arguments[channels] = images.channels
    model = by_name.build(name, **arguments)
    _check_fits(name, model, images, size)
    return model


def _check_fits(name: str, model: nn.Module, images: DataSet, size: int) -> None:
    takes = by_name.first_convolution(model).in_channels
    if takes != images.channels:
        raise ValueError(f"--model {name} takes images of {takes} channels, and --data has {images.channels}")
    x = torch.zeros(2, images.channels, size, size)
    was_training = model.training
    with torch.no_grad():
        y = model.eval()(x)
    model.train(was_training)
    if not isinstance(y, Tensor) or y.shape != (2, images.classes):
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"--model {name} must give (N, {images.classes}) for --data, got {shape} for N = 2")
