"""The residual network of Dive into Deep Learning (PyTorch text), in plain PyTorch, with the text's keys.

Source: Zhang et al., d2l.ai, section 8.6, after He et al. 2016: all convolutions have a bias, and the 1x1 shortcut no BN.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two 3x3 convolutions: (N, input_channels, H, W) -> (N, num_channels, H / strides, W / strides).

    Args:
        use_1x1conv: put a 1x1 convolution on the shortcut; needed where the shape changes.
        strides: of the first 3x3 and of the shortcut.
    """

    def __init__(self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(input_channels, num_channels, 3, strides, 1)
        self.conv2 = nn.Conv2d(num_channels, num_channels, 3, 1, 1)
        self.conv3 = nn.Conv2d(input_channels, num_channels, 1, strides) if use_1x1conv else None
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.conv3 is None else self.conv3(x)))


def _stage(in_channels: int, channels: int, num_blocks: int, first: bool) -> nn.Sequential:
    blocks = [Residual(in_channels, channels, not first, 1 if first else 2)]
    blocks += [Residual(channels, channels) for _ in range(1, num_blocks)]
    return nn.Sequential(*blocks)


def d2l_resnet18(
    in_channels: int = 1, num_classes: int = 10, width: int = 64, num_blocks: Sequence[int] = (2, 2, 2, 2)
) -> nn.Sequential:
    """ResNet-18 of the text: (N, in_channels, H, W) -> (N, num_classes); keys are the Sequential's indices.

    Args:
        width: channels of the first stage, doubled in each later one. The text has 64.
        num_blocks: blocks in each stage. The text has two in each of four.

    Raises:
        ValueError: if num_blocks is empty or names an empty stage.
    """
    if not num_blocks or min(num_blocks) < 1:
        raise ValueError(f"num_blocks must name at least one stage of at least one block, got {num_blocks}")
    stem = nn.Sequential(
        nn.Conv2d(in_channels, width, 7, 2, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    stages = [
        _stage(width * 2 ** max(i - 1, 0), width * 2**i, blocks, first=i == 0) for i, blocks in enumerate(num_blocks)
    ]
    features = width * 2 ** (len(num_blocks) - 1)
    head = (nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(features, num_classes))
    return nn.Sequential(stem, *stages, *head)
