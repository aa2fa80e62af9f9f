"""What one launch could hold, read off real blocks."""

import pytest
from torch import nn

import resnet_kernels as rk
from resnet_kernels.graph import reader
from resnet_kernels.models import resnet_v1, resnet_v2
from resnet_kernels.runtime.gpu import multi_layer, plan
from resnet_kernels.runtime.live_modules import LiveModules


def found(*blocks: nn.Module) -> list[list[str]]:
    """Each convolution that adds a residual, with its links as text; the number behind a name is its block's."""
    recipes = [reader.read(block).recipe() for block in blocks]
    parts, result = plan.parts_of([LiveModules(*pair) for pair in zip(blocks, recipes)], recipes, [""] * len(blocks))
    names = {id(m): f"{name}@{i}" for i, block in enumerate(blocks) for name, m in block.named_modules()}
    return [
        [" ".join(names[id(part[1])] for part in link.parts) for link in around]
        for around in multi_layer.find(parts, result)
    ]


def bottleneck(c_in, width, stride=1):
    downsample = None
    if c_in != 4 * width or stride > 1:
        downsample = nn.Sequential(nn.Conv2d(c_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
    return resnet_v1.Bottleneck(c_in, width, stride, downsample)


def test_a_stage_of_bottlenecks():
    assert found(bottleneck(16, 8, 2), bottleneck(32, 8), bottleneck(32, 8)) == [
        [
            "conv2@0 downsample.0@0 conv3@0 conv1@1",
            "conv2@0 downsample.0@0 conv3@0",
            "downsample.0@0 conv3@0",
        ],
        ["conv2@1 conv3@1 conv1@2", "conv2@1 conv3@1"],
        ["conv2@2 conv3@2"],
    ]


def test_into_a_block_with_a_projection():
    """Its conv1 and its shortcut both read the sum, which is stored anyway."""
    assert found(bottleneck(32, 8), bottleneck(32, 16, 2))[0][0] == "conv2@0 conv3@0 conv1@1"


def test_pre_activation():
    units = [resnet_v2.PreactBottleneck(16, 32, 8), resnet_v2.PreactBottleneck(32, 32, 8)]
    assert found(*units) == [
        ["conv2@0 shortcut@0 conv3@0 preact@1 conv1@1", "conv2@0 shortcut@0 conv3@0", "shortcut@0 conv3@0"],
        ["conv2@1 conv3@1"],
    ]
    # The second unit's projection reads its preact, too: no other launch could if it stayed inside this one.
    units[1] = resnet_v2.PreactBottleneck(32, 64, 16)
    assert found(*units)[0][0] == "conv2@0 shortcut@0 conv3@0"


def test_basic_blocks_only_merge():
    downsample = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    blocks = resnet_v1.BasicBlock(16, 32, 2, downsample), resnet_v1.BasicBlock(32, 32)
    assert found(*blocks) == [["downsample.0@0 conv2@0"], []]
    assert found(rk.models.d2l.Residual(8, 16, use_1x1conv=True, strides=2)) == [["conv3@0 conv2@0"]]


class Peeking(nn.Module):
    """A bottleneck that reads its 3x3's output twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(h)) + h)


class Activated(nn.Module):
    """A shortcut with a ReLU of its own, and one convolution more behind the sum."""

    def __init__(self, kernel_size=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, kernel_size, padding=kernel_size // 2), nn.BatchNorm2d(8)
        self.side = nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        h = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(h)) + self.relu(self.side(x)))


def test_values_with_other_readers_stay():
    assert found(Peeking()) == [[]]


@pytest.mark.parametrize("kernel_size, expected", ((1, [["conv1@0 conv2@0"]]), (3, [[]])))
def test_a_shortcut_with_a_relu_is_not_merged(kernel_size, expected):
    assert found(Activated(kernel_size)) == expected
