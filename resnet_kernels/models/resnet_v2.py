"""ResNet v2 (full pre-activation) in plain PyTorch, as in TF-slim.

BN and ReLU come before a block's convolutions, and nothing after its add, so a BN and a ReLU follow the last block. A block of
units has its stride in its LAST unit. A strided 3x3 or 7x7 pads both sides alike, whatever the input's size. slim's L2 of 1e-4
on the convolutions' weights is left to the optimizer's weight_decay.

Sources: He et al. 2016, "Identity Mappings in Deep Residual Networks" (arXiv:1603.05027), figure 1(b) and appendix; TF-slim,
nets/resnet_v2.py and nets/resnet_utils.py.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import at_least_one
from .same_padding import MaxPool2dSame

_UNIT_SCOPE = "bottleneck_v2"


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """Builds a convolution with slim's initial weights: truncated normal over the fan-in, zero bias."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias)
    # 1.3 restores the variance of 2 / fan_in, which truncation at two deviations reduces.
    std = math.sqrt(1.3 * 2.0 / (in_channels * kernel_size**2))
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.003)  # slim's decay of 0.997


class PreactBottleneck(nn.Module):
    """slim's bottleneck_v2: (N, in_channels, H, W) -> (N, depth, ceil(H / stride), ceil(W / stride)).

        preact = relu(bn(x));  y = shortcut + conv1x1(relu(bn(conv3x3(relu(bn(conv1x1(preact)))))))

    If in_channels differs from depth, the shortcut is a 1x1 convolution of preact, with bias and without BN. Otherwise it is x
    itself, before BN and ReLU, subsampled by the stride.

    Args:
        in_channels: channels of the input.
        depth: channels of the output.
        depth_bottleneck: channels of the 3x3 convolution.
        stride: stride of the 3x3 convolution and of the shortcut.

    Raises:
        TypeError: if an argument is no int.
        ValueError: if an argument is below 1.

    Source: arXiv:1603.05027, figure 1(b).
    """

    def __init__(self, in_channels: int, depth: int, depth_bottleneck: int, stride: int = 1):
        super().__init__()
        at_least_one(in_channels=in_channels, depth=depth, depth_bottleneck=depth_bottleneck, stride=stride)
        self.preact = _batch_norm(in_channels)
        self.conv1 = _conv(in_channels, depth_bottleneck, 1)
        self.bn1 = _batch_norm(depth_bottleneck)
        self.conv2 = _conv(depth_bottleneck, depth_bottleneck, 3, stride)
        self.bn2 = _batch_norm(depth_bottleneck)
        self.conv3 = _conv(depth_bottleneck, depth, 1, bias=True)
        projects = in_channels != depth
        self.shortcut = _conv(in_channels, depth, 1, stride, bias=True) if projects else None
        self.subsample = nn.MaxPool2d(1, stride) if stride > 1 and not projects else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns y of the class's formula."""
        preact = F.relu(self.preact(x))
        if self.shortcut is not None:
            shortcut = self.shortcut(preact)
        else:
            shortcut = x if self.subsample is None else self.subsample(x)
        y = F.relu(self.bn1(self.conv1(preact)))
        y = F.relu(self.bn2(self.conv2(y)))
        return shortcut + self.conv3(y)


class Block(NamedTuple):
    """Description of successive units at one depth.

    Attributes:
        scope: name in the end points, and attribute of the network.
        unit_fn: makes a unit from (in_channels, depth, depth_bottleneck, stride), such as PreactBottleneck.
        args: (depth, depth_bottleneck, stride) of each unit.
    """

    scope: str
    unit_fn: Callable[[int, int, int, int], nn.Module]
    args: Sequence[tuple[int, int, int]]


def resnet_v2_block(scope: str, base_depth: int, num_units: int, stride: int) -> Block:
    """Describes a block of bottlenecks that are 4 * base_depth deep.

    Args:
        scope: the block's name.
        base_depth: channels of the 3x3 convolutions.
        num_units: number of bottlenecks.
        stride: stride of the last one.

    Raises:
        TypeError: if base_depth, num_units or stride is no int.
        ValueError: if one of them is below 1.
    """
    at_least_one(base_depth=base_depth, num_units=num_units, stride=stride)
    strides = [1] * (num_units - 1) + [stride]
    return Block(scope, PreactBottleneck, [(4 * base_depth, base_depth, s) for s in strides])


class ResNetV2(nn.Module):
    """ResNet v2, a network of blocks of units.

    The input is (N, in_channels, H, W), of the parameters' dtype. num_classes and global_pool determine the output:

        num_classes, global_pool        (N, num_classes)          logits
        num_classes, no global_pool     (N, num_classes, h, w)    a map of logits
        None,        global_pool        (N, C)                    mean features, after the last BN and ReLU
        None,        no global_pool     (N, C, h, w)              their map

    Submodules: conv1 and pool1 (the root), one nn.Sequential of unit_1, unit_2, ... under each block's scope, postnorm,
    logits.

    Args:
        blocks: the blocks, first to last.
        num_classes: number of classes, or None for features.
        in_channels: channels of the input.
        global_pool: whether to average over the map before the logits.
        include_root_block: whether to start with a 7x7 convolution and a max-pool, each of stride 2. Without them the first
            block gets the input, which should then come from a convolution without activation.
        scope: the network's name in its end points.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if there is no block, a block has no unit, a scope is taken twice or by a submodule, or a number is
            below 1.

    Source: TF-slim, nets/resnet_v2.py.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        num_classes: int | None = 1000,
        in_channels: int = 3,
        global_pool: bool = True,
        include_root_block: bool = True,
        *,
        scope: str = "resnet_v2",
    ):
        super().__init__()
        at_least_one(in_channels=in_channels)
        if num_classes is not None:
            at_least_one(num_classes=num_classes)
        if not isinstance(scope, str):
            raise TypeError(f"scope must be a str, got {scope!r}")
        self.scope = scope
        self.global_pool = global_pool
        self.conv1 = _conv(in_channels, 64, 7, 2, bias=True) if include_root_block else None
        self.pool1 = MaxPool2dSame(3, 2) if include_root_block else None
        channels, self._block_scopes = self._add_blocks(blocks, 64 if include_root_block else in_channels)
        self.postnorm = _batch_norm(channels)
        self.logits = None if num_classes is None else _conv(channels, num_classes, 1, bias=True)

    def _add_blocks(self, blocks: Sequence[Block], channels: int) -> tuple[int, tuple[str, ...]]:
        """Adds each block's units and returns the channels of the last one, and the blocks' scopes."""
        blocks = list(blocks)
        if not blocks:
            raise ValueError("blocks must hold at least one Block, got none")
        for block in blocks:
            if not isinstance(block, Block):
                raise TypeError(f"blocks must be of Block, got {type(block).__name__}")
            if not block.args:
                raise ValueError(f"blocks must have at least one unit each, got none in {block.scope!r}")
            if not isinstance(block.scope, str):
                raise TypeError(f"blocks must have scopes of type str, got {block.scope!r}")
            if not block.scope.isidentifier() or hasattr(self, block.scope) or block.scope in ("postnorm", "logits"):
                raise ValueError(f"blocks must have scopes that are free as attribute names, got {block.scope!r}")
            units: OrderedDict[str, nn.Module] = OrderedDict()
            for number, (depth, depth_bottleneck, stride) in enumerate(block.args, 1):
                units[f"unit_{number}"] = block.unit_fn(channels, depth, depth_bottleneck, stride)
                channels = depth
            self.add_module(block.scope, nn.Sequential(units))
        return channels, tuple(block.scope for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits or features, as the class describes."""
        x = self._root(x)
        for scope in self._block_scopes:
            x = getattr(self, scope)(x)
        return self._head(x)

    def end_points(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Runs the network and returns the outputs of its units and blocks, in order, by slim's names.

            <scope>/block1/unit_1/bottleneck_v2    each unit's output
            <scope>/block1                         each block's output, which is its last unit's
            logits                                 the network's own output
            predictions                            softmax of the logits over the classes

        The last two exist only if there are classes.
        """
        points: OrderedDict[str, Tensor] = OrderedDict()
        x = self._root(x)
        for scope in self._block_scopes:
            path = f"{self.scope}/{scope}"
            for name, unit in getattr(self, scope).named_children():
                x = unit(x)
                points[f"{path}/{name}/{_UNIT_SCOPE}"] = x
            points[path] = x
        if self.logits is not None:
            points["logits"] = self._head(x)
            points["predictions"] = torch.softmax(points["logits"], 1)
        return points

    def _root(self, x: Tensor) -> Tensor:
        for layer in (self.conv1, self.pool1):
            x = x if layer is None else layer(x)
        return x

    def _head(self, x: Tensor) -> Tensor:
        x = F.relu(self.postnorm(x))
        if self.global_pool:
            x = x.mean((2, 3), keepdim=True)
        if self.logits is not None:
            x = self.logits(x)
        return torch.flatten(x, 1) if self.global_pool else x


def _standard(scope: str, num_units: tuple[int, int, int, int], options: dict[str, Any]) -> ResNetV2:
    depths, strides = (64, 128, 256, 512), (2, 2, 2, 1)
    blocks = [
        resnet_v2_block(f"block{number}", depth, units, stride)
        for number, (depth, units, stride) in enumerate(zip(depths, num_units, strides), 1)
    ]
    return ResNetV2(blocks, **{"scope": scope, **options})


def resnet_v2_50(**options: Any) -> ResNetV2:
    """Builds ResNet-50 v2. Options are those of ResNetV2."""
    return _standard("resnet_v2_50", (3, 4, 6, 3), options)


def resnet_v2_101(**options: Any) -> ResNetV2:
    """Builds ResNet-101 v2. Options are those of ResNetV2."""
    return _standard("resnet_v2_101", (3, 4, 23, 3), options)


def resnet_v2_152(**options: Any) -> ResNetV2:
    """Builds ResNet-152 v2. Options are those of ResNetV2."""
    return _standard("resnet_v2_152", (3, 8, 36, 3), options)


def resnet_v2_200(**options: Any) -> ResNetV2:
    """Builds ResNet-200 v2. Options are those of ResNetV2."""
    return _standard("resnet_v2_200", (3, 24, 36, 3), options)
