"""Random operands of a problem."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels.activations import PRELU, Activation, Last, PReLU
from ...ops.conv_problem import ConvProblem


def output_shape(conv: ConvProblem, batch: int) -> tuple[int, ...]:
    """Returns the shape of a convolution's output."""
    return conv.geometry.out_shape(conv.x_shape(batch), conv.weight_shape)


def random_conv(conv: ConvProblem, draw: Draw) -> nn.Conv2d:
    """Returns a convolution of a problem's shape with random weights; its bias belongs to the epilogue."""
    c_out, c_in, *size = conv.weight_shape
    kernel_size = (size[0], size[1])
    stride, padding, dilation, groups = conv.geometry
    module = nn.Conv2d(c_in * groups, c_out, kernel_size, stride, padding[::2], dilation, groups, bias=False)
    module.weight = nn.Parameter(draw(conv.weight_shape, math.prod(conv.weight_shape[1:]) ** -0.5), requires_grad=False)
    if not conv.geometry.symmetric:
        # Read by the runtime as Conv2dSame's method.
        module.same_padding = lambda *size: padding  # type: ignore[assignment]  # a stand-in for a method
    return module


def random_norm(channels: int, draw: Draw) -> nn.BatchNorm2d:
    """Returns a BN in eval mode with random vectors around 1."""
    bn = nn.BatchNorm2d(channels).to(draw.device).eval().requires_grad_(False)
    assert bn.running_mean is not None
    for vector in (bn.weight, bn.bias, bn.running_mean):
        vector.copy_(1 + draw((channels,), 0.1, dtype=torch.float32))
    return bn


def with_slopes(activation: Activation | None, channels: int, device: torch.device) -> Last:
    """Returns the activation of a problem as operations take it: PRELU with slopes."""
    return PReLU(torch.full((channels,), 0.25, device=device)) if activation == PRELU else activation


class Draw:
    """Generator of normal numbers on the device, the same for each problem; images are channels_last."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(0)
        self.dtype, self.device = dtype, device

    def __call__(self, shape: Sequence[int], deviation: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a tensor of normal numbers with mean 0; dtype None means the problem's."""
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        y = torch.empty(shape, dtype=dtype or self.dtype, device=self.device, memory_format=layout)
        return y.normal_(0, deviation, generator=self.generator)
