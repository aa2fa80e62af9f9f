"""Geometry of a convolution: stride, padding of all four sides, dilation and groups.

torch.nn.functional.conv2d pads symmetrically. TensorFlow's SAME does not: a 3x3 at stride 2 on an even size pads (0, 1). So
padding is (top, bottom, left, right) throughout.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

IntOrPair = int | Sequence[int]
Padding = int | Sequence[int] | Sequence[Sequence[int]]


class Geometry(NamedTuple):
    """Normalized arguments of a 2-d convolution.

    Attributes:
        stride: (h, w).
        padding: (top, bottom, left, right), in pixels.
        dilation: (h, w).
        groups: channel groups.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def out_size(self, in_size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Returns (out_h, out_w) for an input of (h, w) and a kernel of (h, w)."""
        top, bottom, left, right = self.padding
        height = in_size[0] + top + bottom - self.dilation[0] * (kernel[0] - 1) - 1
        width = in_size[1] + left + right - self.dilation[1] * (kernel[1] - 1) - 1
        return height // self.stride[0] + 1, width // self.stride[1] + 1

    def out_shape(self, x_shape: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Returns (N, C_out, out_h, out_w)."""
        return (x_shape[0], weight_shape[0], *self.out_size(x_shape[2:], weight_shape[2:]))

    @property
    def symmetric(self) -> bool:
        """Whether conv2d's own (h, w) padding can express this padding."""
        top, bottom, left, right = self.padding
        return top == bottom and left == right

    @property
    def conv2d_padding(self) -> tuple[int, int]:
        """Padding (h, w) for conv2d; (0, 0) if the padding is not symmetric, so that the input has to be padded first."""
        return (self.padding[0], self.padding[2]) if self.symmetric else (0, 0)

    @classmethod
    def of_module(cls, conv: nn.Conv2d, in_size: Sequence[int]) -> Geometry:
        """Reads the geometry of a Conv2d as it is now.

        With `padding="same"` the odd pixel goes to the bottom and the right.

        Args:
            conv: the module.
            in_size: (h, w) of its input, on which the padding of models.Conv2dSame depends.

        Raises:
            Exception: eager's own, for settings that eager rejects.
        """
        # Anybody may have set them since: eager takes ints, lists and NumPy's ints, too.
        stride, dilation = plain_pair(conv.stride), plain_pair(conv.dilation)
        groups = conv.groups if type(conv.groups) is int else plain_int(conv.groups)
        same_padding = getattr(conv, "same_padding", None)
        sides: tuple[int, int, int, int] | None = None
        if same_padding is not None:
            sides = same_padding(*in_size)
        elif conv.padding == "valid":
            sides = (0, 0, 0, 0)
        elif conv.padding == "same" and dilation is not None and stride == (1, 1):
            height, width = (d * (k - 1) for d, k in zip(dilation, conv.weight.shape[2:]))
            sides = (height // 2, height - height // 2, width // 2, width - width // 2)
        elif not isinstance(conv.padding, str) and (padding := plain_pair(conv.padding)) is not None:
            sides = (padding[0], padding[0], padding[1], padding[1])
        if stride is None or dilation is None or groups is None or sides is None:
            raise _eager_error(conv, in_size)
        if min(*stride, *dilation, groups) < 1 or min(sides) < 0:
            raise _eager_error(conv, in_size)
        return cls(stride, sides, dilation, groups)


def plain_int(value: object) -> int | None:
    """An int as PyTorch's operations take it: Python's, NumPy's or a tensor's; None for anything else."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None  # an array of several


def plain_pair(value: object) -> tuple[int, int] | None:
    """A pair as PyTorch's operations take it: an int, or one or two ints in a tuple or a list; None for anything else."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value
    if not isinstance(value, (tuple, list)):
        number = plain_int(value)
        return None if number is None else (number, number)
    numbers = [*map(plain_int, value)]
    if len(numbers) not in (1, 2) or numbers[0] is None or numbers[-1] is None:
        return None
    return numbers[0], numbers[-1]


def _eager_error(conv: nn.Conv2d, in_size: Sequence[int]) -> Exception:
    """The error that eager raises for a convolution with settings like these."""
    weight = conv.weight.detach()
    try:
        conv._conv_forward(weight.new_zeros((1, conv.in_channels, *in_size)), weight, None)
    except (RuntimeError, TypeError, ValueError) as error:
        return error
    return TypeError(f"stride, padding, dilation and groups must be ints or pairs of ints, got {conv}")


def _is_int(value: object) -> TypeGuard[int]:
    # SymInt (torch.compile with dynamic shapes) is no numbers.Integral; bool is one.
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _pair(name: str, value: object, least: int) -> tuple[int, int]:
    pair = (value, value) if _is_int(value) else value
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 or not all(_is_int(v) for v in pair):
        raise TypeError(f"{name} must be an int or a pair of ints (h, w), got {value!r}")
    if min(pair) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return int(pair[0]), int(pair[1])


def normalize(stride: IntOrPair, padding: Padding, dilation: IntOrPair, groups: int) -> Geometry:
    """Checks a user's geometry and normalizes it.

    Args:
        stride: int or (h, w), at least 1.
        padding: int, (h, w) or ((top, bottom), (left, right)), at least 0.
        dilation: int or (h, w), at least 1.
        groups: int, at least 1.

    Raises:
        TypeError: if an argument is neither an int nor a sequence of ints as listed.
        ValueError: if a number is too small.
    """
    if (
        type(stride) is type(padding) is type(dilation) is type(groups) is int
        and min(stride, dilation, groups) > 0 <= padding
    ):
        # By far the commonest arguments take a tenth of the time here.
        return Geometry((stride, stride), (padding,) * 4, (dilation, dilation), groups)
    if not _is_int(groups):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if isinstance(padding, str) or not (_is_int(padding) or isinstance(padding, Sequence)):
        raise TypeError(f"padding must be an int, (h, w) or ((top, bottom), (left, right)), got {padding!r}")
    if isinstance(padding, Sequence) and len(padding) == 2 and all(isinstance(p, Sequence) for p in padding):
        sides = _pair("padding (top, bottom)", padding[0], 0) + _pair("padding (left, right)", padding[1], 0)
    else:
        height, width = _pair("padding", padding, 0)
        sides = (height, height, width, width)
    return Geometry(_pair("stride", stride, 1), sides, _pair("dilation", dilation, 1), int(groups))


def check_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None, geometry: Geometry
) -> None:
    """Checks types, shapes, dtypes and devices of a convolution's operands before any kernel is launched.

    Args:
        x: (N, C_in, H, W), floating point.
        weight: (C_out, C_in / groups, kernel_h, kernel_w), x's dtype.
        bias: (C_out,), x's dtype or fp32 (fp64 if x is), or None.
        residual: the output's shape, x's dtype, or None.
        scale: as bias.
        geometry: the checked geometry.

    Raises:
        TypeError: if an operand is no tensor or has the wrong dtype.
        ValueError: if shapes do not fit together, or an operand is on another device than x.
    """
    named: dict[str, Tensor | None] = {"x": x, "weight": weight, "bias": bias, "residual": residual, "scale": scale}
    for name, value in named.items():
        optional = name not in ("x", "weight")
        if not isinstance(value, Tensor) and not (optional and value is None):
            accepted = "a torch.Tensor or None" if optional else "a torch.Tensor"
            raise TypeError(f"{name} must be {accepted}, got {type(value).__name__}")
    for name, value, axes in (
        ("x", x, "(N, C, H, W)"),
        ("weight", weight, "(C_out, C_in / groups, kernel_h, kernel_w)"),
    ):
        if value.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions {axes}, got shape {tuple(value.shape)}")
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
    for name, vector in (("bias", bias), ("scale", scale)):
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
