"""Convolutions of the networks that the project is for, as the kernels see them."""

from __future__ import annotations

import torch
from torch import nn

from resnet_kernels import models
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.kernels.sm90.conv_layout import ConvShape
from resnet_kernels.models.by_name import image_size


def convolutions_of(name: str, batch: int) -> list[ConvShape]:
    """Each different convolution of a network of models/."""
    found: dict[ConvShape, None] = {}

    def note(module: nn.Conv2d, inputs, output) -> None:
        x = tuple(inputs[0].shape)
        found[ConvShape(x, tuple(module.weight.shape), Geometry.of_module(module, x[2:]))] = None

    with torch.device("meta"):
        net = models.BY_NAME[name]().eval()
        first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        net(torch.empty(batch, first.in_channels, image_size(name), image_size(name)))
    return list(found)
