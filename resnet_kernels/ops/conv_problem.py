"""A convolution and what follows it, without tensors: what tables are asked by."""

from __future__ import annotations

from typing import NamedTuple

from ..kernels.activations import Activation, without_slopes
from ..kernels.geometry import Geometry
from ..kernels.operands import ConvOperands


class ConvProblem(NamedTuple):
    """A convolution and what follows it, without tensors and batch. `str` is the key in a table, with sizes as C x H x W.

    Attributes:
        activation: PRELU for a PReLU.
    """

    c_in: int
    in_h: int
    in_w: int
    weight_shape: tuple[int, ...]
    geometry: Geometry
    scale: bool
    bias: bool
    residual: bool
    activation: Activation | None

    def __str__(self) -> str:
        c_out, _, kernel_h, kernel_w = self.weight_shape
        stride, padding, dilation, groups = self.geometry
        epilogue = [name for name in ("scale", "bias", "residual") if getattr(self, name)]
        if self.activation is not None:
            epilogue.append(str(self.activation))
        return " ".join(
            (
                f"conv {self.c_in}x{self.in_h}x{self.in_w}->{c_out} {kernel_h}x{kernel_w}/{_pair(stride)}",
                f"p{','.join(map(str, padding))} d{_pair(dilation)} g{groups}",
                *epilogue,
            )
        )

    @classmethod
    def of(cls, operands: ConvOperands) -> ConvProblem:
        """Returns the problem of some operands."""
        x, weight, bias, residual, scale, geometry, activation = operands
        _, c_in, in_h, in_w = x.shape
        return cls(
            c_in, in_h, in_w, tuple(weight.shape), geometry,
            scale is not None, bias is not None, residual is not None, without_slopes(activation),
        )  # fmt: skip

    def x_shape(self, batch: int) -> tuple[int, int, int, int]:
        """Returns the input's shape, (N, C_in, H, W)."""
        return batch, self.c_in, self.in_h, self.in_w


def _pair(values: tuple[int, int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]},{values[1]}"


class PackedProblem(NamedTuple):
    """A convolution on the CPU whose weight was packed beforehand, with a BN folded in. `str` is the key in a table.

    Attributes:
        conv: with a bias, and without scale and residual, whatever follows: that makes no difference to the choice.
    """

    conv: ConvProblem

    def __str__(self) -> str:
        return f"packed {self.conv}"
