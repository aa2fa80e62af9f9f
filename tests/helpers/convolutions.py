"""Convolutions to test: a case's operands, as exact integers or as reals, and its result in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resnet_kernels.kernels.geometry import normalise


@dataclass(frozen=True)
class Case:
    """(n, c_in, h, w) -> c_out channels, kernel (h, w)."""

    name: str
    n: int
    c_in: int
    h: int
    w: int
    c_out: int
    kernel: tuple = (3, 3)
    stride: object = 1
    padding: object = 1
    dilation: object = 1
    groups: int = 1

    def __str__(self):
        return self.name


def integers(shape, low, high, dtype, device):
    return torch.randint(low, high + 1, shape).to(device, dtype)


def operands(case: Case, dtype, device, real=False):
    """Operands of a case; as integers small enough for every partial sum and rounding to be exact in bfloat16."""
    group_in = case.c_in // case.groups
    shapes = (case.n, case.c_in, case.h, case.w), (case.c_out, group_in, *case.kernel)
    geometry = normalise(case.stride, case.padding, case.dilation, case.groups)
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


def arguments(case: Case) -> dict:
    return dict(stride=case.stride, padding=case.padding, dilation=case.dilation, groups=case.groups)


def truth(case: Case, x, weight, bias, residual, scale, relu):
    """The definition in fp64, by PyTorch on the CPU, with padding done by hand."""
    geometry = normalise(case.stride, case.padding, case.dilation, case.groups)
    top, bottom, left, right = geometry.padding
    wide = [None if t is None else t.double().cpu() for t in (x, weight, bias, residual, scale)]
    y = torch.nn.functional.pad(wide[0], (left, right, top, bottom))
    y = torch.conv2d(y, wide[1], None, geometry.stride, 0, geometry.dilation, geometry.groups)
    y = y if wide[4] is None else y * wide[4][:, None, None]
    y = y if wide[2] is None else y + wide[2][:, None, None]
    y = y if wide[3] is None else y + wide[3]
    return torch.relu(y) if relu else y
