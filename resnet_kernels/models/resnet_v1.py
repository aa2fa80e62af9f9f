"""ResNet v1.5 in plain PyTorch, with torchvision's constructor options and state_dict keys.

Sources: He et al. 2016 (arXiv:1512.03385), table 1; v1.5 has the stride of a Bottleneck on its 3x3 (Goyal et al. 2017,
arXiv:1706.02677); ResNeXt: Xie et al. 2017 (arXiv:1611.05431); wide: Zagoruyko and Komodakis 2016 (arXiv:1605.07146).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Builds a 3x3 convolution without bias that keeps the image's size at stride 1."""
    return nn.Conv2d(in_planes, out_planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """Builds a 1x1 convolution without bias."""
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions: (N, inplanes, H, W) -> (N, planes, H / stride, W / stride).

    Args:
        inplanes: input channels.
        planes: output channels.
        stride: stride of the first 3x3.
        downsample: the shortcut; the identity if None.
        groups: 1, as in torchvision.
        base_width: 64, as in torchvision.
        dilation: 1, as in torchvision.
        norm_layer: makes a norm from its channel count; BatchNorm2d if None.

    Raises:
        ValueError: if groups is not 1 or base_width not 64.
        NotImplementedError: if dilation is above 1.

    Source: arXiv:1512.03385, figure 5, left.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock only supports groups=1 and base_width=64, got {groups} and {base_width}")
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock only supports dilation=1, got {dilation}")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Returns relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions: (N, inplanes, H, W) -> (N, 4 * planes, H / stride, W / stride).

    Args:
        inplanes: input channels.
        planes: a quarter of the output channels.
        stride: stride of the 3x3.
        downsample: the shortcut; the identity if None.
        groups: groups of the 3x3.
        base_width: width of the 3x3 is planes * base_width / 64 * groups.
        dilation: dilation of the 3x3.
        norm_layer: makes a norm from its channel count; BatchNorm2d if None.

    Source: arXiv:1512.03385, figure 5, right; arXiv:1706.02677 for the stride.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ):
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Returns relu(bn3(conv3(h)) + shortcut(x)) with h = relu(bn2(conv2(relu(bn1(conv1(x))))))."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet of four stages: (N, in_channels, H, W) -> (N, num_classes).

    Args:
        block: BasicBlock, Bottleneck, or a class with their signature, such as resnet_kernels.Bottleneck.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the classifier.
        zero_init_residual: whether each block starts as the identity, with a weight of zero in its last BN
            (arXiv:1706.02677, section 5.1).
        groups: groups of the 3x3 convolutions; 32 in ResNeXt 32x4d.
        width_per_group: channels of each group in the first stage; 4 in ResNeXt 32x4d.
        replace_stride_with_dilation: for each of stages 2 to 4, whether to dilate and keep the resolution.
        norm_layer: makes a norm from its channel count; BatchNorm2d if None.
        in_channels: channels of the images. torchvision has no such argument, so it is the last.

    Raises:
        ValueError: if replace_stride_with_dilation has other than three elements.

    Source: arXiv:1512.03385, table 1.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        in_channels: int = 3,
    ):
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation must be None or have three elements, got {dilate}")
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = self._norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        self._initialize(zero_init_residual)

    def _initialize(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(module.weight, 1)
                nn.init.constant_(module.bias, 0)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    weight = (module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight
                    if isinstance(weight, Tensor):
                        nn.init.constant_(weight, 0)

    def _make_layer(
        self, block: type[nn.Module], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        out_planes = planes * block.expansion  # type: ignore[attr-defined]  # blocks have it; torchvision's signature says Module
        shortcut = None
        if stride != 1 or self.inplanes != out_planes:
            shortcut = nn.Sequential(conv1x1(self.inplanes, out_planes, stride), self._norm_layer(out_planes))
        shared = (self.groups, self.base_width)
        units = [block(self.inplanes, planes, stride, shortcut, *shared, first_dilation, self._norm_layer)]
        self.inplanes = out_planes
        units += [
            block(out_planes, planes, 1, None, *shared, self.dilation, self._norm_layer) for _ in range(1, blocks)
        ]
        return nn.Sequential(*units)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(**options: Any) -> ResNet:
    """Builds ResNet-18. Options are those of ResNet."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Any) -> ResNet:
    """Builds ResNet-34. Options are those of ResNet."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Any) -> ResNet:
    """Builds ResNet-50. Options are those of ResNet."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options: Any) -> ResNet:
    """Builds ResNet-101. Options are those of ResNet."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def resnet152(**options: Any) -> ResNet:
    """Builds ResNet-152. Options are those of ResNet."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


def resnext50_32x4d(**options: Any) -> ResNet:
    """Builds ResNeXt-50: 3x3 convolutions in 32 groups of 4 channels (arXiv:1611.05431). Options are those of ResNet."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **{"groups": 32, "width_per_group": 4, **options})


def wide_resnet50_2(**options: Any) -> ResNet:
    """Builds ResNet-50 with 3x3 convolutions twice as wide (arXiv:1605.07146). Options are those of ResNet."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **{"width_per_group": 128, **options})
