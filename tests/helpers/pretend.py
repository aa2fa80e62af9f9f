"""A GPU that is not here: `auto` decides as on NVIDIA's, Triton is its interpreter, and cuDNN is PyTorch on the CPU."""

from __future__ import annotations

import torch

from resnet_kernels.ops import backends

_conv2d = torch.conv2d


def fused_convolution(x, weight, bias, stride, padding, dilation, groups):
    """torch.cudnn_convolution_relu, with a sum that is rounded once."""
    return cudnn_add_relu(x, weight, None, 1.0, bias, stride, padding, dilation, groups)


def cudnn_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
    """torch.cudnn_convolution_add_relu; as strict about its operands as the fused op."""
    assert weight.dtype == x.dtype and weight.is_contiguous(memory_format=torch.channels_last)
    assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
    wide = _conv2d(x.float(), weight.float(), bias if bias is None else bias.float(), stride, padding, dilation, groups)
    assert z is None or z.shape == wide.shape
    return torch.relu(wide if z is None else wide + alpha * z.float()).to(x.dtype)


def nvidia(monkeypatch) -> list[str]:
    """Makes CPU tensors look like an NVIDIA GPU's to `auto`; returns the names of the convolutions as they are called."""
    called: list[str] = []

    def noted(name, function):
        return lambda *arguments: (called.append(name), function(*arguments))[1]

    monkeypatch.setattr(
        backends, "untuned", lambda device, dtype: "cudnn" if dtype in backends._TRITON_DTYPES else "eager"
    )
    monkeypatch.setattr(torch, "cudnn_convolution_relu", noted("fused", fused_convolution))
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", noted("fused add", cudnn_add_relu))
    monkeypatch.setattr(torch, "conv2d", noted("conv2d", _conv2d))
    return called
