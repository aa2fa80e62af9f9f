"""Model zoo in plain PyTorch. `resnet_kernels.fuse` fuses its models."""

from .d2l import Residual, d2l_resnet18, d2l_resnet18_keras, print_shapes, resnet_block
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
from .resnet_v2 import (
    Block,
    PreactBottleneck,
    ResNetV2,
    resnet_v2_50,
    resnet_v2_101,
    resnet_v2_152,
    resnet_v2_200,
    resnet_v2_block,
)
from .same_padding import Conv2dSame, MaxPool2dSame

# Models that the command line's --model accepts.
BY_NAME = {
    f.__name__: f
    for f in (
        resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x4d, wide_resnet50_2, resnet_v2_50, resnet_v2_101,
        resnet_v2_152, resnet_v2_200, d2l_resnet18, d2l_resnet18_keras,
    )
}  # fmt: skip

__all__ = [
    "BY_NAME",
    "Block",
    "Conv2dSame",
    "MaxPool2dSame",
    "PreactBottleneck",
    "ResNet",
    "ResNetV2",
    "Residual",
    "conv1x1",
    "conv3x3",
    "d2l_resnet18",
    "d2l_resnet18_keras",
    "print_shapes",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet_block",
    "resnet_v2_50",
    "resnet_v2_101",
    "resnet_v2_152",
    "resnet_v2_200",
    "resnet_v2_block",
    "resnext50_32x4d",
    "wide_resnet50_2",
]
