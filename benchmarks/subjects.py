"""Plain eager module of each subject. An op's module runs the fused op instead if it is given a backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_kernels as rk
from resnet_kernels.kernels.geometry import normalize
from resnet_kernels.models import d2l, resnet_v1, resnet_v2
from resnet_kernels.ops.reference import pad_if_asymmetric

from . import cases
from .cases import AddRelu, Block, Conv, Model, Stage


class ConvBiasAct(nn.Module):
    """relu(conv(x) + bias + residual), with the in-place add and ReLU that models use, or its fused op."""

    backend: str | None

    def __init__(self, conv: Conv, backend: str | None = None):
        super().__init__()
        self.backend, self.relu = backend, conv.relu
        self.stride, self.padding = conv.stride, conv.kernel // 2 if conv.padding is None else conv.padding
        self.geometry = normalize(stride=self.stride, padding=self.padding, dilation=1, groups=1)
        # He's initialization: the outputs are as large as the inputs, and half of them negative.
        fan_in = conv.c_in * conv.kernel**2
        self.weight = nn.Parameter(torch.randn(conv.c_out, conv.c_in, conv.kernel, conv.kernel) * (2 / fan_in) ** 0.5)
        self.bias = nn.Parameter(torch.randn(conv.c_out))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.backend:
            return rk.ops.conv_bias_act(
                *(x, self.weight, self.bias, residual),
                stride=self.stride,
                padding=self.padding,
                relu=self.relu,
                backend=self.backend,
            )
        x = pad_if_asymmetric(x, self.geometry)
        y = F.conv2d(x, self.weight, self.bias, self.geometry.stride, self.geometry.conv2d_padding)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if self.relu else y


class AddAndRelu(nn.Module):
    """relu(x + residual) with an in-place ReLU, or its fused op."""

    def __init__(self, backend: str | None = None):
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return rk.ops.add_relu(x, residual, backend=self.backend) if self.backend else torch.add(x, residual).relu_()


class BatchNormAct(nn.Module):
    """relu(BN(x) + residual) with batch statistics and the in-place add and ReLU that models use, or its fused op."""

    def __init__(self, channels: int, backend: str | None = None):
        super().__init__()
        self.bn, self.backend = nn.BatchNorm2d(channels), backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        bn = self.bn
        if self.backend:
            vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
            return rk.ops.batch_norm_act(
                *(x, residual, *vectors), training=True, momentum=0.1, eps=bn.eps, backend=self.backend
            )
        y = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, True, 0.1, bn.eps)
        return (y if residual is None else y.add_(residual)).relu_()


def build(subject: cases.Subject) -> nn.Module:
    """Returns a new module for a subject, in fp32 on the CPU."""
    if isinstance(subject, Conv):
        return ConvBiasAct(subject)
    if isinstance(subject, AddRelu):
        return AddAndRelu()
    if isinstance(subject, cases.BatchNormAct):
        return BatchNormAct(subject.c_in)
    if isinstance(subject, Block):
        return _block(subject)
    if isinstance(subject, Stage):
        return rk.models.BY_NAME[subject.model]().get_submodule(subject.path)
    assert isinstance(subject, Model)
    build_model = rk.models.BY_NAME[subject.name]
    return build_model(in_channels=1) if subject.c_in == 1 else build_model()


def has_residual(subject: cases.Subject) -> bool:
    """Whether a subject reads a second tensor, the residual."""
    return isinstance(subject, AddRelu) or getattr(subject, "residual", False)


def _block(subject: Block) -> nn.Module:
    changes_shape = subject.stride != 1 or subject.c_in != subject.c_out
    if subject.kind == "PreactBottleneck":
        return resnet_v2.PreactBottleneck(subject.c_in, subject.c_out, subject.c_out // 4, subject.stride)
    if subject.kind == "Residual":
        keras = subject.system == cases.D2L_KERAS
        return d2l.Residual(subject.c_in, subject.c_out, changes_shape, subject.stride, tf_padding=keras)
    cls = getattr(resnet_v1, subject.kind)
    shortcut = None
    if changes_shape:
        conv = resnet_v1.conv1x1(subject.c_in, subject.c_out, subject.stride)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(subject.c_out))
    return cls(subject.c_in, subject.c_out // cls.expansion, subject.stride, shortcut)
