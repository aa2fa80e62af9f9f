"""Blocks as users and other libraries write them, with operations in them that no kernel of ours has."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.other_models import Conv2d


class SqueezeExcitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x):
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class LinearExcitation(nn.Module):
    """The same with linear layers, as its authors have it: no step of ours."""

    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, channels // 2), nn.Linear(channels // 2, channels)

    def forward(self, x):
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3))))).sigmoid()[:, :, None, None]


class SEBlock(nn.Module):
    """A residual block with squeeze-and-excitation, as timm's seresnet has it: all of it is steps of ours."""

    excitation: type[nn.Module] = SqueezeExcitation

    def __init__(self, c_in=8, c_out=16, stride=2):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.act = nn.ReLU(inplace=True)
        self.se = self.excitation(c_out)
        self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        y = self.se(self.bn2(self.conv2(y)))
        y += self.downsample(x)
        return self.act(y)


class LinearSEBlock(SEBlock):
    """It has other operations in it: its forward is instructions."""

    excitation = LinearExcitation


class SplitBlock(nn.Module):
    """Res2Net's hierarchy: the channels are split, and each part is added to what the one before has become."""

    def __init__(self, channels=12, scale=3):
        super().__init__()
        width = channels // scale
        self.width, self.scale = width, scale
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(scale - 1))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(scale - 1))
        self.conv3, self.bn3 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        parts = torch.split(self.relu(self.bn1(self.conv1(x))), self.width, 1)
        done = []
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns)):
            part = parts[i] if i == 0 else part + parts[i]  # noqa: F821  # of the turn before
            part = self.relu(bn(conv(part)))
            done.append(part)
        y = self.bn3(self.conv3(torch.cat([*done, parts[-1]], 1)))
        return self.relu(y + x)


class SplitAttention(nn.Module):
    """ResNeSt's block, as timm has it: two groups of channels, weighted by a softmax over their averages."""

    def __init__(self, channels=8, radix=2):
        super().__init__()
        wide, self.radix = radix * channels, radix
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, wide, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(wide)
        self.fc1, self.fc2 = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, wide, 1)
        self.pool = nn.AvgPool2d(3, 1, padding=1)
        self.conv3, self.bn3 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        n, c, h, w = y.shape
        y = y.reshape(n, self.radix, c // self.radix, h, w)
        average = y.sum(dim=1).mean((2, 3), keepdim=True)
        weights = F.softmax(self.fc2(F.relu(self.fc1(average))).view(n, self.radix, -1), dim=1)
        y = (y * weights.reshape(n, self.radix, c // self.radix, 1, 1)).sum(dim=1).contiguous()
        return F.relu(self.bn3(self.conv3(self.pool(y))) + x)


class Shuffled(nn.Module):
    """ShuffleNet's unit: a half of the channels, and a shuffle of five dimensions."""

    def __init__(self, channels=16):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        one, other = x.chunk(2, dim=1)
        y = torch.cat((one, F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(other))))))), 1)
        n, c, h, w = y.shape
        y = y.reshape(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        rows = y.reshape(n, 2, c // 2, h, w).sum(3).view(n, c, 1, w)
        return F.relu(self.bn3(self.conv3(y)) + rows)


class DenseLayer(nn.Module):
    """torchvision's _DenseLayer: BN and ReLU come first, and its input is a tensor or a list of them."""

    def __init__(self, c_in, growth=4):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.relu1, self.relu2, self.drop_rate = nn.ReLU(inplace=True), nn.ReLU(inplace=True), 0.0

    def forward(self, x):
        features = [x] if isinstance(x, Tensor) else x
        y = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        y = self.conv2(self.relu2(self.norm2(y)))
        return F.dropout(y, self.drop_rate, training=self.training) if self.drop_rate > 0 else y


class DenseBlock(nn.ModuleDict):
    def __init__(self, c_in=8, layers=3, growth=4):
        super().__init__(OrderedDict((f"layer{i}", DenseLayer(c_in + i * growth)) for i in range(layers)))

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Detectron(nn.Module):
    """detectron2's BasicBlock."""

    def __init__(self, c_in=8, c_out=16):
        super().__init__()
        self.conv1 = Conv2d(c_in, c_out, 3, 2, 1, bias=False, norm=nn.BatchNorm2d(c_out))
        self.conv2 = Conv2d(c_out, c_out, 3, 1, 1, bias=False, norm=nn.BatchNorm2d(c_out))
        self.shortcut = Conv2d(c_in, c_out, 1, 2, bias=False, norm=nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = self.conv2(F.relu_(self.conv1(x)))
        y += self.shortcut(x)
        return F.relu_(y)


class QuietConv2d(Conv2d):
    """As Conv2d, with the context that later versions of detectron2 enter around the question."""

    def forward(self, x):
        with warnings.catch_warnings(record=True):
            if x.numel() == 0 and self.training:
                raise AssertionError("empty")
        return super().forward(x)


class Checkpointed(nn.Module):
    """OpenMMLab's block: with_cp asks whether its input wants gradients."""

    def __init__(self, channels=8, with_cp=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu, self.with_cp = nn.ReLU(inplace=True), with_cp

    def forward(self, x):
        def inner(x):
            identity = x
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            y += identity
            return y

        if self.with_cp and x.requires_grad:
            y = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
        else:
            y = inner(x)
        return self.relu(y)


class Cloned(nn.Module):
    """A block that keeps a clone of its input, and drops by a function."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        identity = x.clone()
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.dropout(y, 0.5, self.training)
        return F.relu(self.bn2(self.conv2(y)) + identity)


class Branch(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x, shortcut=None, children=None):
        shortcut = x if shortcut is None else shortcut
        return F.relu(self.bn(self.conv(x)) + shortcut)


class Tree(nn.Module):
    """DLA's tree: children get a shortcut, or a list, as a second and third argument."""

    def __init__(self, c_in=8, channels=16):
        super().__init__()
        self.project = nn.Sequential(nn.Conv2d(c_in, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.start = nn.Sequential(
            nn.Conv2d(c_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.tree1, self.tree2 = Branch(channels), Branch(channels)
        self.root, self.bn = nn.Conv2d(2 * channels, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x, shortcut=None, children=None):
        children = [] if children is None else children
        x1 = self.tree1(self.start(x), self.project(x))
        x2 = self.tree2(x1, None, children)
        return F.relu(self.bn(self.root(torch.cat([x2, x1, *children], 1))))


# By name: the block, the channels of its input, and how many of its convolutions run in fused kernels.
BLOCKS = {
    "squeeze-and-excitation": (SEBlock, 8, 5),
    "linear squeeze-and-excitation": (LinearSEBlock, 8, 3),
    "split": (SplitBlock, 12, 4),
    "split attention": (SplitAttention, 8, 3),
    "shuffled": (Shuffled, 16, 3),
    "dense": (DenseBlock, 8, 6),
    "detectron2": (Detectron, 8, 3),
    "checkpointed": (Checkpointed, 8, 2),
    "cloned": (Cloned, 8, 2),
    "tree": (Tree, 8, 5),
}
