"""Convolutions to test: a case's operands, as exact integers or as reals, and its result in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_kernels.kernels.geometry import normalize


@dataclass(frozen=True)
class Case:
    """(n, c_in, h, w) -> c_out channels, kernel (h, w)."""

    name: str
    n: int
    c_in: int
    h: int
    w: int
    c_out: int
    kernel: tuple[int, int] = (3, 3)
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | Sequence[Sequence[int]] = 1
    dilation: int | Sequence[int] = 1
    groups: int = 1

    def __str__(self) -> str:
        return self.name


def integers(shape, low, high, dtype, device):
    return torch.randint(low, high + 1, shape).to(device, dtype)


def operands(case: Case, dtype, device, real=False):
    """Operands of a case; as integers small enough for every partial sum and rounding to be exact in bfloat16."""
    group_in = case.c_in // case.groups
    shapes = (case.n, case.c_in, case.h, case.w), (case.c_out, group_in, *case.kernel)
    geometry = normalize(case.stride, case.padding, case.dilation, case.groups)
    out = (case.n, case.c_out, *geometry.out_size((case.h, case.w), case.kernel))
    if real:
        x, weight, residual = (torch.randn(shape) for shape in (*shapes, out))
        weight = weight / (group_in * case.kernel[0] * case.kernel[1]) ** 0.5
        scale, bias = torch.rand(case.c_out) + 0.5, torch.randn(case.c_out)
        tensors = (x.to(dtype), weight.to(dtype), bias, residual.to(dtype), scale)
        return tuple(t.to(device) for t in tensors)
    x, weight = integers(shapes[0], -1, 1, dtype, device), integers(shapes[1], -1, 1, dtype, device)
    # One weight in 16 is not zero: sums stay below 256, the last integer up to which bfloat16 has them all.
    weight = weight * (torch.rand(shapes[1], device=device) < max(1 / 16, 8 / weight[0].numel()))
    bias, scale = (
        integers((case.c_out,), -4, 4, torch.float32, device),
        integers((case.c_out,), 1, 2, torch.float32, device),
    )
    return x, weight, bias, integers(out, -8, 8, dtype, device), scale


def arguments(case: Case) -> dict[str, Any]:
    """The geometry, as conv_bias_act takes it."""
    return dict(stride=case.stride, padding=case.padding, dilation=case.dilation, groups=case.groups)


def truth(
    case: Case,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    relu: bool,
) -> Tensor:
    """The definition in fp64, by PyTorch on the CPU, with padding done by hand."""
    geometry = normalize(case.stride, case.padding, case.dilation, case.groups)
    top, bottom, left, right = geometry.padding
    y = torch.nn.functional.pad(x.double().cpu(), (left, right, top, bottom))
    y = torch.conv2d(y, weight.double().cpu(), None, geometry.stride, 0, geometry.dilation, geometry.groups)
    y = y if scale is None else y * scale.double().cpu()[:, None, None]
    y = y if bias is None else y + bias.double().cpu()[:, None, None]
    y = y if residual is None else y + residual.double().cpu()
    return torch.relu(y) if relu else y
