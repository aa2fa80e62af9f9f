"""TensorFlow's SAME padding, which depends on the input's size: convolution and max-pooling with out = ceil(in / stride).

Along each axis, with k the kernel's extent, dilation included:

    total = max((ceil(in / stride) - 1) * stride + k - in, 0),  total // 2 of it before, the rest after

so an odd row or column goes to the bottom or the right. At stride 1 it is k - 1 whatever the size, and for k <= stride
nothing: a plain Conv2d does there.

Source: TensorFlow's notes on padding (tf.nn), "SAME".
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

IntPair = int | tuple[int, int]


def same_padding(size: int, kernel_size: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Rows or columns to add (before, after) along one axis of an input of `size`."""
    extent = dilation * (kernel_size - 1) + 1
    total = max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
    return total // 2, total - total // 2


class Conv2dSame(nn.Conv2d):
    """nn.Conv2d with SAME padding by zeros: (N, C_in, H, W) -> (N, C_out, ceil(H / stride), ceil(W / stride)).

    Arguments and state_dict keys are nn.Conv2d's, without padding. The attribute `padding` means nothing here: ask
    `same_padding` for what an input of some size gets.
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
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias, device=device, dtype=dtype
        )

    def same_padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns (top, bottom, left, right) for an input of that size."""
        rows, columns = zip((height, width), self.kernel_size, self.stride, self.dilation)
        return (*same_padding(*rows), *same_padding(*columns))

    def forward(self, x: Tensor) -> Tensor:
        top, bottom, left, right = self.same_padding(*x.shape[-2:])
        padding = (top, left)
        if (top, left) != (bottom, right):
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class MaxPool2dSame(nn.MaxPool2d):
    """nn.MaxPool2d with SAME padding by -inf: (N, C, H, W) -> (N, C, ceil(H / stride), ceil(W / stride)).

    A padded place is never the maximum, so a map of negative numbers stays negative at the edge.
    """

    def __init__(self, kernel_size: IntPair, stride: IntPair | None = None):
        super().__init__(kernel_size, stride)

    def same_padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns (top, bottom, left, right) for an input of that size."""
        rows, columns = zip((height, width), _pair(self.kernel_size), _pair(self.stride))
        return (*same_padding(*rows), *same_padding(*columns))

    def forward(self, x: Tensor) -> Tensor:
        top, bottom, left, right = self.same_padding(*x.shape[-2:])
        stride_h, stride_w = _pair(self.stride)
        if (stride_h == 1 and top != bottom) or (stride_w == 1 and left != right):
            x = F.pad(x, (left, right, top, bottom), value=-math.inf)
            return F.max_pool2d(x, self.kernel_size, self.stride)
        # ceil_mode lets the last window hang over the edge: that is the odd row, without a padded copy of the input. At
        # stride 1 the window that would hang over is one that ceil_mode doesn't add.
        return F.max_pool2d(x, self.kernel_size, self.stride, (top, left), ceil_mode=True)
