"""Every op in plain PyTorch: the oracle (in fp64), the baseline and the fallback in one.

All are differentiable by PyTorch's own autograd, on any device and in any dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import activations
from ..kernels.activations import RELU, Last
from ..kernels.geometry import Geometry


def pad_if_asymmetric(x: Tensor, geometry: Geometry) -> Tensor:
    """Returns x, zero-padded where conv2d's own (h, w) padding, `geometry.conv2d_padding`, can't express it."""
    if geometry.symmetric:
        return x
    top, bottom, left, right = geometry.padding
    return F.pad(x, (left, right, top, bottom))


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    geometry: Geometry = Geometry(),
    activation: Last = RELU,
) -> Tensor:
    """Returns act(conv(x, weight) * scale + bias + residual); ConvOperands' fields are its arguments.

    It rounds to x's dtype after the convolution and at the end.
    """
    padded = pad_if_asymmetric(x, geometry)
    y = torch.conv2d(padded, weight, None, geometry.stride, geometry.conv2d_padding, geometry.dilation, geometry.groups)
    # All that follows the convolution is in fp32 at least, as eager PyTorch's BN on half-precision data is.
    wide = y if y.dtype == torch.float64 else y.float()
    if scale is not None:
        wide = wide * scale.to(wide.dtype)[:, None, None]
    if bias is not None:
        wide = wide + bias.to(wide.dtype)[:, None, None]
    if residual is not None:
        wide = wide + residual
    return activations.apply(activation, wide).to(x.dtype)


def add_relu(x: Tensor, residual: Tensor) -> Tensor:
    """Returns relu(x + residual)."""
    return torch.relu(x + residual)


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    activation: Last = RELU,
) -> Tensor:
    """Returns act(BN(x) + residual), rounded to x's dtype after the BN and at the end."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    # BN's backward needs only BN's input, so the add and a ReLU may overwrite its output. Other activations' backward reads
    # what they have read.
    if residual is not None:
        y = y.add_(residual)
    keeps = activation != RELU and y.requires_grad
    return activations.apply(activation, y) if keeps else activations.apply_over(activation, y)


def bn_scale_shift(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, conv_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns BN's scale and shift in eval mode: y = conv * scale + shift, in fp32 (fp64 for fp64).

    Source: Ioffe and Szegedy 2015, algorithm 2, line 11.
    """
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    # 1 / sqrt: an error of the approximate rsqrt would be one of a whole channel.
    scale = 1 / torch.sqrt(var.to(dtype) + eps)
    if weight is not None:
        scale = scale * weight.to(dtype)
    center = mean.to(dtype) if conv_bias is None else mean.to(dtype) - conv_bias.to(dtype)
    shift = -center * scale
    return scale, shift if bias is None else shift + bias.to(dtype)
