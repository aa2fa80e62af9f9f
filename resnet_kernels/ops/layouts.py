"""The layouts of 4-D tensors in memory, as eager's convolutions see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHANNELS_LAST = torch.channels_last


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a 4-D tensor is dense in memory, in channels_last, and eager takes it for that.

    A tensor with one channel, or of single pixels, is in both layouts at once: then its strides decide.
    """
    if not tensor.is_contiguous(memory_format=CHANNELS_LAST):
        return False
    return not tensor.is_contiguous() or has_channels_last_strides(tensor)


def has_channels_last_strides(tensor: Tensor) -> bool:
    """Whether eager takes a 4-D tensor for channels_last, and so gives a convolution's output that layout.

    A slice of a channels_last tensor's channels is such a tensor, too. The rule is ATen's: c10/core/MemoryFormat.h,
    is_channels_last_strides_2d_s4.
    """
    sizes, strides = tensor.shape, tensor.stride()
    smallest = 0
    if strides[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < smallest or (d == 0 and smallest == strides[1]):
            return False
        smallest = strides[d] * max(sizes[d], 1)
    return True


def counted(convert: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, int | None]:
    """convert(x), and its version if it is a copy: code that writes over a copy has meant x; see `write_back`.

    An inference tensor counts no changes, so in inference mode the copy is an ordinary tensor.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            copy = convert(x)
    else:
        copy = convert(x)
    return copy, None if copy is x or copy.is_inference() else copy._version


def write_back(x: Tensor, copy: Tensor, version: int | None) -> None:
    """Writes a copy that was changed since `counted` over x."""
    if version is not None and copy._version != version:
        x.copy_(copy)


def as_contiguous(value: Any) -> Any:
    """A tensor of three to five dimensions as a contiguous one; other values as they are.

    Of a 4-D tensor the strides of dimensions of size 1 are a contiguous one's, too. The others are what code makes of images:
    groups of their channels, sums over rows.
    """
    if not isinstance(value, Tensor) or value.dim() not in (3, 4, 5):
        return value
    value = value.contiguous()
    if value.dim() != 4:
        return value
    n, c, h, w = value.shape
    return (
        value if value.stride() == (c * h * w, h * w, w, 1) or value.numel() == 0 else value.flatten().view(n, c, h, w)
    )
