"""Model zoo, in plain PyTorch: fuse what it builds with `resnet_kernels.fuse`."""

from .d2l import d2l_resnet18
from .resnet_v1 import (
    ResNet,
    conv1x1,
    conv3x3,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    wide_resnet50_2,
)
from .same_padding import Conv2dSame, MaxPool2dSame

# What the command line's --model knows.
BY_NAME = {
    f.__name__: f
    for f in (
        resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x4d, wide_resnet50_2, d2l_resnet18,
    )
}  # fmt: skip

__all__ = [
    "BY_NAME",
    "Conv2dSame",
    "MaxPool2dSame",
    "ResNet",
    "conv1x1",
    "conv3x3",
    "d2l_resnet18",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
]
