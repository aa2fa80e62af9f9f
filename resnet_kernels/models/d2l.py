"""Residual network of Dive into Deep Learning in plain PyTorch, as in the book's PyTorch text and in its Keras text.

All convolutions have a bias, and the 1x1 shortcut has no BN. The two texts differ by the defaults of their libraries:

                  PyTorch text                     Keras text (tf_padding=True)
    padding       the same on both sides           SAME, which depends on the input's size
    BN            eps 1e-5, momentum 0.1           eps 1e-3, momentum 0.01 (Keras' 0.99)
    weights       PyTorch's, biases too            glorot-uniform, biases zero
    output        logits                           probabilities

Both have the state_dict keys of the PyTorch text.

Source: Zhang et al., d2l.ai, section 8.6, after He et al. 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import at_least_one
from .same_padding import Conv2dSame, MaxPool2dSame


def _conv(in_channels: int, channels: int, kernel_size: int, strides: int, tf_padding: bool) -> nn.Conv2d:
    # At stride 1, and for a 1x1, SAME pads both sides alike: a plain Conv2d does, which can be fused.
    if tf_padding and strides > 1 and kernel_size > 1:
        return Conv2dSame(in_channels, channels, kernel_size, strides)
    return nn.Conv2d(in_channels, channels, kernel_size, strides, kernel_size // 2)


def _batch_norm(channels: int, tf_padding: bool) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01) if tf_padding else nn.BatchNorm2d(channels)


def _initialize_as_keras(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Residual(nn.Module):
    """Residual block of two 3x3 convolutions: (N, C_in, H, W) -> (N, C_out, ceil(H / strides), ceil(W / strides)).

    Args:
        input_channels: C_in.
        num_channels: C_out.
        use_1x1conv: whether the shortcut is a 1x1 convolution, which it has to be if the shape changes.
        strides: stride of the first 3x3 and of the shortcut.
        tf_padding: whether to build the Keras text's block.

    Raises:
        TypeError: if input_channels, num_channels or strides is no int.
        ValueError: if one of them is below 1.
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
            self.apply(_initialize_as_keras)

    def forward(self, x: Tensor) -> Tensor:
        """Returns relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""
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
    """Builds the blocks of a stage, for an nn.Sequential. The first one halves height and width and changes the channels.

    Args:
        input_channels: channels of the stage's input.
        num_channels: channels of all blocks' outputs.
        num_residuals: number of blocks.
        first_block: whether this is the first stage, after the stem's max-pool. Then no block halves the size, and
            input_channels must equal num_channels.
        tf_padding: whether to build the Keras text's blocks.

    Raises:
        TypeError: if a number is no int.
        ValueError: if a number is below 1, or a first_block would have to change the channels.
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
    """Builds the text's ResNet-18: (N, in_channels, H, W) -> (N, num_classes). Keys are the Sequential's indices.

    Args:
        in_channels: channels of the images.
        num_classes: number of classes.
        width: channels of the first stage, doubled in each later one. The text has 64.
        num_blocks: number of blocks in each stage. The text has two in each of four.
        tf_padding: whether to build the Keras text's network. It ends in a softmax, so it returns probabilities, not logits.

    Raises:
        TypeError: if a number is no int.
        ValueError: if a number is below 1, num_blocks is empty, or a stage is.

    Source: Zhang et al., d2l.ai, section 8.6.
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
        stem.apply(_initialize_as_keras)
        _initialize_as_keras(classifier)
        head.append(nn.Softmax(1))
    return nn.Sequential(stem, *stages, *head)


def d2l_resnet18_keras(**options: Any) -> nn.Sequential:
    """Builds the Keras text's ResNet-18. Options are those of d2l_resnet18."""
    return d2l_resnet18(tf_padding=True, **options)


def print_shapes(net: nn.Sequential, size: Sequence[int] = (1, 1, 224, 224)) -> list[torch.Size]:
    """Prints the output shape of each layer, as the text does.

    The layers run on zeros, in eval mode and without gradients. Afterwards each module is in the mode that it had before.

    Args:
        net: the network.
        size: shape of its input, (N, C, H, W).

    Returns:
        The printed shapes.

    Raises:
        TypeError: if net is no nn.Sequential.
    """
    if not isinstance(net, nn.Sequential):
        raise TypeError(f"net must be an nn.Sequential, got {type(net).__name__}")
    modes = [(module, module.training) for module in net.modules()]
    parameter = next(net.parameters(), torch.empty(0))
    x, shapes = torch.zeros(*size, dtype=parameter.dtype, device=parameter.device), list[torch.Size]()
    net.eval()
    try:
        with torch.no_grad():
            for layer in net:
                x = layer(x)
                shapes.append(x.shape)
                print(f"{type(layer).__name__} output shape:\t {x.shape}")
    finally:
        # train() lets fused modules drop the weights that eval mode packed. It sets one mode for all modules, though.
        net.train(modes[0][1])
        for module, mode in modes:
            module.training = mode
    return shapes
