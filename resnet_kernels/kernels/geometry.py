"""The geometry of a convolution: stride, padding of all four sides, dilation, groups; checked once, used everywhere.

torch.nn.functional.conv2d pads symmetrically. TensorFlow's SAME does not (3x3 stride 2 on an even size pads (0, 1)), so
padding is kept as (top, bottom, left, right) throughout.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

IntOrPair = int | Sequence[int]
Padding = int | Sequence[int] | Sequence[Sequence[int]]


class Geometry(NamedTuple):
    """Normalised arguments of a 2-d convolution.

    stride, dilation: (h, w). padding: (top, bottom, left, right), in pixels.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def out_size(self, in_size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Returns (out_h, out_w) for an input of (h, w) and a kernel of (h, w)."""
        top, bottom, left, right = self.padding
        padded = (in_size[0] + top + bottom, in_size[1] + left + right)
        return tuple((padded[i] - self.dilation[i] * (kernel[i] - 1) - 1) // self.stride[i] + 1 for i in (0, 1))

    def out_shape(self, x_shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Returns (N, C_out, out_h, out_w)."""
        return (x_shape[0], weight_shape[0], *self.out_size(x_shape[2:], weight_shape[2:]))

    @property
    def symmetric(self) -> bool:
        """Whether conv2d's own (h, w) padding can express it."""
        top, bottom, left, right = self.padding
        return top == bottom and left == right

    @property
    def conv2d_padding(self) -> tuple[int, int]:
        """The (h, w) padding to hand to conv2d; (0, 0) where the input has to be padded beforehand."""
        return (self.padding[0], self.padding[2]) if self.symmetric else (0, 0)

    @classmethod
    def of_module(cls, conv: nn.Conv2d, in_size: Sequence[int]) -> Geometry:
        """Reads a Conv2d as it is now, for an input of (h, w): TensorFlow's SAME (models/same_padding.py) depends on it.

        `padding="same"` included: the odd pixel goes to the bottom and the right.
        """
        if hasattr(conv, "same_padding"):
            return cls(conv.stride, conv.same_padding(*in_size), conv.dilation, conv.groups)
        if isinstance(conv.padding, str):
            # Conv2d keeps the resolved string padding as (left, right, top, bottom).
            left, right, top, bottom = conv._reversed_padding_repeated_twice
        else:
            top, left = conv.padding
            bottom, right = conv.padding
        return cls(conv.stride, (top, bottom, left, right), conv.dilation, conv.groups)


def _is_int(value: object) -> bool:
    # SymInt (torch.compile with dynamic shapes) is no numbers.Integral; bool is one.
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _pair(name: str, value: IntOrPair, least: int) -> tuple[int, int]:
    pair = (value, value) if _is_int(value) else value
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 or not all(_is_int(v) for v in pair):
        raise TypeError(f"{name} must be an int or a pair of ints (h, w), got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return int(pair[0]), int(pair[1])


def normalise(stride: IntOrPair, padding: Padding, dilation: IntOrPair, groups: int) -> Geometry:
    """Checks a user's geometry.

    Args:
        stride: int or (h, w), at least 1.
        padding: int, (h, w) or ((top, bottom), (left, right)), at least 0.
        dilation: as stride.
        groups: int, at least 1.

    Raises:
        TypeError: if one is no int or pair of ints. ValueError: if one is out of range.
    """
    if (
        type(stride) is type(padding) is type(dilation) is type(groups) is int
        and min(stride, dilation, groups) > 0 <= padding
    ):
        # By far the commonest arguments, in a tenth of the time.
        return Geometry((stride, stride), (padding,) * 4, (dilation, dilation), groups)
    if not _is_int(groups):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    nested = isinstance(padding, Sequence) and len(padding) == 2 and all(isinstance(p, Sequence) for p in padding)
    if nested and not isinstance(padding, str):
        sides = _pair("padding (top, bottom)", padding[0], 0) + _pair("padding (left, right)", padding[1], 0)
    else:
        if isinstance(padding, str) or not (_is_int(padding) or isinstance(padding, Sequence)):
            raise TypeError(f"padding must be an int, (h, w) or ((top, bottom), (left, right)), got {padding!r}")
        height, width = _pair("padding", padding, 0)
        sides = (height, height, width, width)
    return Geometry(_pair("stride", stride, 1), sides, _pair("dilation", dilation, 1), int(groups))


def check_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None, geometry: Geometry
) -> None:
    """Raises the error a user should see before any kernel is launched: shapes, dtypes and devices of a convolution."""
    named = {"x": x, "weight": weight, "bias": bias, "residual": residual, "scale": scale}
    for name, value in named.items():
        optional = name not in ("x", "weight")
        if not isinstance(value, Tensor) and not (optional and value is None):
            accepted = "a torch.Tensor or None" if optional else "a torch.Tensor"
            raise TypeError(f"{name} must be {accepted}, got {type(value).__name__}")
    for name, rank, axes in (("x", 4, "(N, C, H, W)"), ("weight", 4, "(C_out, C_in / groups, kernel_h, kernel_w)")):
        if named[name].dim() != rank:
            raise ValueError(f"{name} must have {rank} dimensions {axes}, got shape {tuple(named[name].shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    for name, value in named.items():
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")

    c_out, c_in_per_group, kernel_h, kernel_w = weight.shape
    groups = geometry.groups
    if c_out % groups or x.shape[1] % groups:
        raise ValueError(f"groups must divide C_in and C_out, got groups={groups}, C_in={x.shape[1]}, C_out={c_out}")
    if x.shape[1] != c_in_per_group * groups:
        raise ValueError(
            f"x must have {c_in_per_group * groups} channels (weight {tuple(weight.shape)}, groups={groups}), "
            f"got {x.shape[1]}"
        )
    if kernel_h < 1 or kernel_w < 1:
        raise ValueError(f"weight must have a kernel of at least 1x1, got {kernel_h}x{kernel_w}")
    out_h, out_w = geometry.out_size(x.shape[2:], (kernel_h, kernel_w))
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"the kernel must fit into the padded input: kernel {kernel_h}x{kernel_w} with dilation "
            f"{geometry.dilation}, input {x.shape[2]}x{x.shape[3]} with padding (top, bottom, left, right) "
            f"{geometry.padding}"
        )
    for name in ("bias", "scale"):
        vector = named[name]
        if vector is None:
            continue
        if tuple(vector.shape) != (c_out,):
            raise ValueError(f"{name} must have shape ({c_out},), one value per output channel, got "
                             f"{tuple(vector.shape)}")  # fmt: skip
        if vector.dtype not in (x.dtype, _vector_dtype(x)):
            raise TypeError(f"{name} must be {_vector_dtype(x)} or x's dtype {x.dtype}, got {vector.dtype}")
    if residual is not None:
        out_shape = geometry.out_shape(x.shape, weight.shape)
        if tuple(residual.shape) != out_shape:
            raise ValueError(f"residual must have the output's shape {out_shape}, got {tuple(residual.shape)}")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must have x's dtype {x.dtype}, got {residual.dtype}")


def _vector_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
