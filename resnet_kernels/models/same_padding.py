"""TensorFlow's SAME padding, which depends on the input's size: convolution and max-pooling with out = ceil(in / stride).

Along each axis, with k the kernel's extent including dilation:

    total = max((ceil(in / stride) - 1) * stride + k - in, 0),  total // 2 of it before, the rest after

So an odd row or column goes to the bottom or the right. At stride 1 the total is k - 1 for every size, and a 1x1 is never
padded: a plain Conv2d suffices.

Source: TensorFlow's notes on padding (tf.nn), "SAME".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

IntPair = int | tuple[int, int]


def same_padding(size: int, kernel_size: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Returns the padding (before, after) along one axis of an input.

    Args:
        size: the input's rows or columns.
        kernel_size: the kernel's.
        stride: along this axis.
        dilation: along this axis.
    """
    extent = dilation * (kernel_size - 1) + 1
    total = max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
    return total // 2, total - total // 2


class Conv2dSame(nn.Conv2d):
    """nn.Conv2d with SAME padding by zeros: (N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride)).

    Arguments and state_dict keys are those of nn.Conv2d, without padding. The attribute `padding` has no meaning here:
    `same_padding` returns the padding for an input.

    Source: TensorFlow's notes on padding (tf.nn), "SAME".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias, device=device, dtype=dtype
        )

    def same_padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns (top, bottom, left, right) for an input of this size."""
        rows, columns = zip((height, width), self.kernel_size, self.stride, self.dilation)
        return (*same_padding(*rows), *same_padding(*columns))

    def forward(self, x: Tensor) -> Tensor:
        """Pads and convolves x."""
        top, bottom, left, right = self.same_padding(*x.shape[-2:])
        padding = (top, left)
        if (top, left) != (bottom, right):
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class MaxPool2dSame(nn.MaxPool2d):
    """nn.MaxPool2d with SAME padding by -inf: (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)).

    A padded pixel is never the maximum, so a map of negative numbers stays negative at the edge.

    Args:
        kernel_size: int or (h, w).
        stride: int or (h, w); kernel_size if None.

    Source: TensorFlow's notes on padding (tf.nn), "SAME".
    """

    def __init__(self, kernel_size: IntPair, stride: IntPair | None = None):
        super().__init__(kernel_size, stride)

    def same_padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns (top, bottom, left, right) for an input of this size."""
        rows, columns = zip((height, width), _pair(self.kernel_size), _pair(self.stride))
        return (*same_padding(*rows), *same_padding(*columns))

    def forward(self, x: Tensor) -> Tensor:
        """Pads and pools x."""
        top, bottom, left, right = self.same_padding(*x.shape[-2:])
        stride_h, stride_w = _pair(self.stride)
        if (stride_h == 1 and top != bottom) or (stride_w == 1 and left != right):
            x = F.pad(x, (left, right, top, bottom), value=-math.inf)
            return F.max_pool2d(x, self.kernel_size, self.stride)
        # ceil_mode lets the last window reach over the edge, in place of the odd row: no padded copy of the input is needed.
        # At stride 1 it would not add that window.
        return F.max_pool2d(x, self.kernel_size, self.stride, (top, left), ceil_mode=True)
