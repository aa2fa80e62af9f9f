"""Convolutions that a projection is merged into, their operands, and launches of Hopper's kernel with them."""

from dataclasses import dataclass

import pytest
import torch

from helpers.convolutions import Case, operands, truth
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.geometry import normalize
from resnet_kernels.kernels.operands import ConvOperands

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_kernels.kernels.sm90 import conv as sm90_conv
from resnet_kernels.kernels.sm90.conv_layout import ConvShape, why_not_merged


@dataclass(frozen=True)
class Merged:
    """A block's last convolution and its projection, from c_in channels."""

    conv: Case
    c_in: int
    stride: int = 1
    size: tuple[int, int] = (0, 0)  # (h, w) of the projection's input

    @property
    def shortcut(self) -> Case:
        return Case("", self.conv.n, self.c_in, *self.size, self.conv.c_out, (1, 1), self.stride, 0)


MERGED = (
    Merged(Case("Bottleneck", 2, 64, 7, 7, 256, (1, 1), padding=0), 128, 2, (14, 14)),
    Merged(Case("first stage", 2, 64, 6, 6, 72, (1, 1), padding=0), 64, 1, (6, 6)),
    Merged(Case("BasicBlock", 1, 64, 8, 6, 64), 32, 2, (16, 12)),
    Merged(Case("odd sizes, ragged channels", 3, 40, 5, 7, 24), 24, 2, (9, 13)),
    Merged(Case("stride on the convolution too", 2, 24, 7, 7, 16, stride=2), 8, 2, (7, 7)),
)


def merged_operands(merged: Merged, device, real=False):
    """Both convolutions' operands; scales are powers of two, so that their ratio is exact."""
    conv, shortcut = (operands(case, torch.float16, device, real) for case in (merged.conv, merged.shortcut))
    if not real:
        sign = torch.tensor([1.0, -1.0], device=device).repeat(len(conv[4]) // 2)
        conv, shortcut = (*conv[:4], conv[4] * sign), (*shortcut[:4], shortcut[4] * 0.5)
    return conv, shortcut


def merge(
    merged: Merged,
    conv,
    shortcut,
    use=(True,) * 4,
    relu=True,
    residual=False,
    config=None,
    kernel=sm90_conv,
    why_not=why_not_merged,
):
    """(y, the definition in fp64); use: which of scale, bias, shortcut's scale, shortcut's bias there are."""
    (x, weight, bias, added, scale), (x0, weight0, bias0, _, scale0) = conv, shortcut
    scale, bias, scale0, bias0 = (v if used else None for v, used in zip((scale, bias, scale0, bias0), use))
    added = added if residual else None
    geometries = [normalize(case.stride, case.padding, 1, 1) for case in (merged.conv, merged.shortcut)]
    shape, shape0 = ConvShape(x.shape, weight.shape, geometries[0]), ConvShape(x0.shape, weight0.shape, geometries[1])
    assert why_not(shape, shape0, x.dtype) is None
    y = kernel.launch(
        ConvOperands(x, weight, bias, added, scale, geometries[0], RELU if relu else None), config,
        sm90_conv.Shortcut(x0, weight0, bias0, scale0, geometries[1]),
    )  # fmt: skip
    expected = truth(merged.conv, x, weight, bias, added, scale, False)
    expected = expected + truth(merged.shortcut, x0, weight0, bias0, None, scale0, False)
    return y, expected.clamp_min(0) if relu else expected


def name_of(config) -> str:
    return f"{config.block_m}x{config.block_n}x{config.block_k}, {config.split_k}"
