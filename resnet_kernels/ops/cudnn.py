"""cuDNN's convolutions. All that follows one is inside (PyTorch's two fused operations) or in one Triton pass after it.

The fused operations have no scale per channel: it has to be in the weight. A plan (runtime/gpu/constants.py) brings such
weights along, all made in one launch in each call, or once if they are frozen. A scale that comes here is applied after the
convolution. In the weight it might overflow where eager is finite, and to find out the host would have to wait for the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels import activations
from ..kernels.activations import RELU
from ..kernels.geometry import Geometry
from ..kernels.operands import ConvOperands
from . import backends, reference

# Stride, padding, dilation and groups.
_Settings = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


@contextlib.contextmanager
def searching(wanted: bool) -> Iterator[None]:
    """Sets `torch.backends.cudnn.benchmark` meanwhile: True has cuDNN measure all of its algorithms and take the fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def conv_bias_act(operands: ConvOperands) -> Tensor:
    """Returns act(conv(x, weight) * scale + bias + residual), channels_last.

    Args:
        operands: in fp16, bf16 or fp32, on an NVIDIA GPU.
    """
    # cuDNN's fused operations refuse empty batches.
    if operands.x.shape[0] == 0:
        return reference.conv_bias_act(*operands)
    x, weight, bias, residual, scale, geometry, activation = operands
    if scale is not None:
        by_triton = backends.why_not_on("triton", x.device, x.dtype) is None
        return conv_then_epilogue(operands) if by_triton else reference.conv_bias_act(*operands)
    x, weight, settings = _convolution(x, weight, geometry)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if activation != RELU or torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        # The fused operations end in a ReLU, always, and tell cuDNN that any algorithm will do. Nobody else has the
        # convolution's output, so what follows goes over it.
        y = torch.conv2d(x, weight, bias, *settings)
        y = y if residual is None else y.add_(residual)
        return activations.apply_over(activation, y)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *settings)
    residual = residual.contiguous(memory_format=torch.channels_last)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *settings)


def conv_then_epilogue(
    operands: ConvOperands, residual_scale: Tensor | None = None, residual_shift: Tensor | None = None
) -> Tensor:
    """Returns act(conv(x, weight) * scale + bias + residual), by one Triton pass after the convolution.

    Args:
        operands: in fp16, bf16 or fp32. No weight is folded.
        residual_scale: (C_out,), multiplies a residual that is a projection's bare convolution; None for ones.
        residual_shift: (C_out,), is added to it then; None for zeros.
    """
    from ..kernels import epilogue

    x, weight, bias, residual, scale, geometry, activation = operands
    x, weight, settings = _convolution(x, weight, geometry)
    y = torch.conv2d(x, weight, None, *settings)
    if bias is None and residual is None and scale is None and activation is None:
        return y
    # Nobody else has the convolution's output.
    return epilogue.launch(y, scale, bias, residual, residual_scale, residual_shift, activation, overwrite=True)


def _convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, _Settings]:
    """Returns x and weight as cuDNN reads them, and the arguments behind the bias."""
    x = reference.pad_if_asymmetric(x, geometry).contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return x, weight, (geometry.stride, geometry.conv2d_padding, geometry.dilation, geometry.groups)
