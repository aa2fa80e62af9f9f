"""cuDNN's convolutions, with what follows them inside (PyTorch's own two fused ops) or in a Triton pass of its own.

The fused ops have no per-channel scale: it has to be in the weight. A plan (constants.py) brings such weights along, all made
in one launch a call, or once if they are frozen; a scale that comes here is multiplied into a copy, in three launches. Nothing
folded is kept here: it could go stale unseen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.geometry import Geometry
from . import reference


@contextlib.contextmanager
def searching(wanted: bool) -> Iterator[None]:
    """Sets `torch.backends.cudnn.benchmark`, whether cuDNN chooses its algorithms by measuring all of them."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    geometry: Geometry,
    relu: bool,
) -> Tensor:
    """relu(conv(x, weight) * scale + bias + residual), channels_last."""
    # cuDNN's fused ops refuse empty batches.
    if x.shape[0] == 0:
        return reference.conv_bias_act(x, weight, bias, residual, scale, geometry, relu)
    x, weight, bias, arguments = _operands(x, weight, bias, scale, geometry)
    if not relu:
        # Nor do they end in anything but a ReLU. The convolution's output is nobody else's, so the sum can go over it.
        y = torch.conv2d(x, weight, bias, *arguments)
        return y if residual is None else y.add_(residual)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *arguments)
    residual = residual.contiguous(memory_format=torch.channels_last)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *arguments)


def conv_then_epilogue(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    geometry: Geometry,
    relu: bool,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
) -> Tensor:
    """cuDNN's convolution as it is, nothing folded, then one Triton pass for all that follows.

    residual_scale, residual_shift: per channel, of a residual that a projection's convolution left as it was.
    """
    from ..kernels import epilogue

    x, weight, _, (stride, padding, dilation, groups) = _operands(x, weight, None, None, geometry)
    y = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    if all(tensor is None for tensor in (bias, residual, scale)) and not relu:
        return y
    # The convolution's output is nobody else's.
    return epilogue.launch(y, scale, bias, residual, residual_scale, residual_shift, relu, overwrite=True)


def _operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor | None, tuple]:
    x = reference.pad_if_asymmetric(x, geometry).contiguous(memory_format=torch.channels_last)
    if scale is not None:
        weight = (weight * scale[:, None, None, None]).to(x.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    return x, weight, bias, (geometry.stride, geometry.conv2d_padding, geometry.dilation, geometry.groups)
