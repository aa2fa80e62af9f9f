"""The operands of a convolution as one value: every launcher and every vendor's operation takes them in this form."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .activations import RELU, Last
from .geometry import Geometry


class ConvOperands(NamedTuple):
    """A convolution and all that follows it: act(conv(x, weight) * scale + bias + residual).

    Attributes:
        x: (N, C_in, H, W).
        weight: (C_out, C_in / groups, kernel_h, kernel_w), x's dtype.
        bias: (C_out,), fp32 or x's dtype; None for zeros.
        residual: the output's shape and x's dtype; None for zeros.
        scale: (C_out,), fp32 or x's dtype; None for ones.
        geometry: of the convolution.
        activation: comes last; None for none.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    scale: Tensor | None = None
    geometry: Geometry = Geometry()
    activation: Last = RELU

    def folded(self) -> ConvOperands:
        """Returns operands without a scale: a copy of the weight has it, in x's dtype."""
        if self.scale is None:
            return self
        return self._replace(weight=(self.weight * self.scale[:, None, None, None]).to(self.x.dtype), scale=None)
