"""The residual network of Dive into Deep Learning, in plain PyTorch: its PyTorch text and its Keras text.

All convolutions have a bias, and the 1x1 shortcut no BN. The two texts differ in what their libraries do by default:

                  PyTorch text                     Keras text (tf_padding=True)
    padding       the same on both sides           SAME, by the input's size
    BN            eps 1e-5, momentum 0.1           eps 1e-3, momentum 0.01 (Keras' 0.99)
    weights       PyTorch's, biases too            glorot-uniform, biases zero
    output        logits                           probabilities

State_dict keys are those of the PyTorch text in both.

Source: Zhang et al., d2l.ai, section 8.6, after He et al. 2016.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import at_least_one
from .same_padding import Conv2dSame, MaxPool2dSame


def _conv(in_channels: int, channels: int, kernel_size: int, strides: int, tf_padding: bool) -> nn.Conv2d:
    # At stride 1, and for a 1x1, SAME is the same on both sides, too: a plain Conv2d, which can be fused.
    if tf_padding and strides > 1 and kernel_size > 1:
        return Conv2dSame(in_channels, channels, kernel_size, strides)
    return nn.Conv2d(in_channels, channels, kernel_size, strides, kernel_size // 2)


def _batch_norm(channels: int, tf_padding: bool) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01) if tf_padding else nn.BatchNorm2d(channels)


def _initialise_as_keras(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Residual(nn.Module):
    """Two 3x3 convolutions: (N, input_channels, H, W) -> (N, num_channels, ceil(H / strides), ceil(W / strides)).

    Args:
        use_1x1conv: put a 1x1 convolution on the shortcut; needed where the shape changes.
        strides: of the first 3x3 and of the shortcut.
        tf_padding: the Keras text's block.

    Raises:
        TypeError, ValueError: if input_channels, num_channels or strides is no int of at least 1.
    """

    def __init__(
        self,
        input_channels: int,
        num_channels: int,
        use_1x1conv: bool = False,
        strides: int = 1,
        *,
        tf_padding: bool = False,
    ):
        super().__init__()
        at_least_one(input_channels=input_channels, num_channels=num_channels, strides=strides)
        self.conv1 = _conv(input_channels, num_channels, 3, strides, tf_padding)
        self.conv2 = _conv(num_channels, num_channels, 3, 1, tf_padding)
        self.conv3 = _conv(input_channels, num_channels, 1, strides, tf_padding) if use_1x1conv else None
        self.bn1 = _batch_norm(num_channels, tf_padding)
        self.bn2 = _batch_norm(num_channels, tf_padding)
        if tf_padding:
            self.apply(_initialise_as_keras)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.conv3 is None else self.conv3(x)))


def resnet_block(
    input_channels: int,
    num_channels: int,
    num_residuals: int,
    first_block: bool = False,
    *,
    tf_padding: bool = False,
) -> list[Residual]:
    """The blocks of a stage, for an nn.Sequential: the first halves height and width and changes the channels.

    Args:
        first_block: of the network's first stage, which comes after the stem's max-pool: it halves nothing, and
            input_channels must be num_channels.
        tf_padding: the Keras text's blocks.

    Raises:
        TypeError: if a number is no int. ValueError: if one is below 1, or first_block would have to change channels.
    """
    at_least_one(input_channels=input_channels, num_channels=num_channels, num_residuals=num_residuals)
    if first_block and input_channels != num_channels:
        raise ValueError(f"input_channels must be num_channels, {num_channels}, in a first_block, got {input_channels}")
    head = Residual(input_channels, num_channels, not first_block, 1 if first_block else 2, tf_padding=tf_padding)
    return [head, *(Residual(num_channels, num_channels, tf_padding=tf_padding) for _ in range(1, num_residuals))]


def d2l_resnet18(
    in_channels: int = 1,
    num_classes: int = 10,
    width: int = 64,
    num_blocks: Sequence[int] = (2, 2, 2, 2),
    *,
    tf_padding: bool = False,
) -> nn.Sequential:
    """ResNet-18 of the text: (N, in_channels, H, W) -> (N, num_classes); keys are the Sequential's indices.

    Args:
        width: channels of the first stage, doubled in each later one. The text has 64.
        num_blocks: blocks in each stage. The text has two in each of four.
        tf_padding: the Keras text's network, which ends in a softmax: the output is probabilities, not logits.

    Raises:
        TypeError: if a number is no int. ValueError: if one is below 1, or num_blocks is empty or names an empty stage.
    """
    at_least_one(in_channels=in_channels, num_classes=num_classes, width=width)
    if not num_blocks or min(num_blocks) < 1:
        raise ValueError(f"num_blocks must name at least one stage of at least one block, got {num_blocks}")
    pool = MaxPool2dSame(3, 2) if tf_padding else nn.MaxPool2d(3, 2, 1)
    conv, bn = _conv(in_channels, width, 7, 2, tf_padding), _batch_norm(width, tf_padding)
    stem = nn.Sequential(conv, bn, nn.ReLU(), pool)
    stages = [
        nn.Sequential(*resnet_block(width * 2 ** max(i - 1, 0), width * 2**i, blocks, i == 0, tf_padding=tf_padding))
        for i, blocks in enumerate(num_blocks)
    ]
    classifier = nn.Linear(width * 2 ** (len(num_blocks) - 1), num_classes)
    head = [nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), classifier]
    if tf_padding:
        stem.apply(_initialise_as_keras)
        _initialise_as_keras(classifier)
        head.append(nn.Softmax(1))
    return nn.Sequential(stem, *stages, *head)


def d2l_resnet18_keras(**options) -> nn.Sequential:
    """The Keras text's ResNet-18; options as d2l_resnet18's."""
    return d2l_resnet18(tf_padding=True, **options)


def print_shapes(net: nn.Sequential, size: Sequence[int] = (1, 1, 224, 224)) -> list[torch.Size]:
    """Prints each layer's output shape for an input of that size, as the text does, and returns the shapes.

    The layers run in eval mode and without gradients; each module's own mode is as before afterwards.

    Raises:
        TypeError: if net is no nn.Sequential.
    """
    if not isinstance(net, nn.Sequential):
        raise TypeError(f"net must be an nn.Sequential, got {type(net).__name__}")
    modes = [(module, module.training) for module in net.modules()]
    parameter = next(net.parameters(), torch.empty(0))
    x, shapes = torch.zeros(*size, dtype=parameter.dtype, device=parameter.device), []
    net.eval()
    try:
        with torch.no_grad():
            for layer in net:
                x = layer(x)
                shapes.append(x.shape)
                print(f"{type(layer).__name__} output shape:\t {x.shape}")
    finally:
        # By train() first: a fused module drops what it has packed for eval mode. It sets one mode for all, though.
        net.train(modes[0][1])
        for module, mode in modes:
            module.training = mode
    return shapes
