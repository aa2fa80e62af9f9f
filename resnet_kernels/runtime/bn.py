"""A BN's tensors, and its scale and shift in eval mode."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import reference


def scale_shift(conv_bias: Tensor | None, bn: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns (scale, shift), (C_out,) in fp32 each, from the live tensors; without a BN (None, the convolution's bias)."""
    return (None, conv_bias) if bn is None else reference.bn_scale_shift(*bn_tensors(bn), conv_bias, bn.eps)


def bn_tensors(bn: nn.Module | None) -> tuple[Tensor | None, ...]:
    """A BN's (weight, bias, running_mean, running_var); four times None for no BN."""
    return (None,) * 4 if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var)
