"""Chains of a bottleneck's convolutions to test: their operands, as exact integers or as reals, and their results in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from resnet_kernels.kernels.geometry import Geometry

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_kernels.kernels.sm90.chain import Layer, Shortcut

FP16 = torch.float16
IDENTITY, SUBSAMPLED = "identity", "subsampled"


@dataclass(frozen=True)
class Case:
    """(n, c_in, h, w); the 3x3 gives `width` channels, the block `c_out`, the next conv1 `next_width` (0: no z).

    shortcut: IDENTITY, SUBSAMPLED, or the projection's input channels.
    """

    name: str
    n: int
    c_in: int
    h: int
    w: int
    width: int
    c_out: int
    next_width: int
    shortcut: str | int = IDENTITY
    stride: int = 1
    padding: tuple = (1, 1, 1, 1)
    preact: bool = False
    keep_sum: bool = True

    def __str__(self):
        return self.name

    @property
    def geometry(self):
        return Geometry((self.stride, self.stride), self.padding)


# The chains of ResNet-50 made small, then of other nets, then what is awkward.
CASES = (
    Case("stage 1", 2, 64, 6, 6, 64, 256, 64),
    Case("stage 1, last block", 2, 64, 6, 6, 64, 256, 0),
    Case("stage 1 to 2", 2, 64, 6, 6, 64, 256, 128),
    Case("stage 1, first block", 2, 64, 6, 6, 64, 256, 64, shortcut=64),
    Case("stage 2", 1, 128, 7, 7, 128, 512, 128),
    Case("stage 2 to 3", 1, 128, 7, 7, 128, 512, 256),
    Case("stage 2, first block", 1, 128, 8, 8, 128, 512, 128, shortcut=256, stride=2),
    Case("stage 1, strided", 1, 64, 8, 8, 64, 256, 64, shortcut=64, stride=2),
    Case("v2", 2, 64, 6, 6, 64, 256, 64, preact=True),
    Case("v2, first unit", 2, 64, 6, 6, 64, 256, 64, shortcut=64, preact=True),
    Case("v2, last unit", 2, 64, 8, 6, 64, 256, 128, shortcut=SUBSAMPLED, stride=2, preact=True, keep_sum=False),
    Case("v2, end of the net", 2, 64, 5, 6, 64, 256, 0, preact=True, keep_sum=False),
    Case("CIFAR, 32 wide", 3, 32, 8, 8, 32, 128, 32, shortcut=64, stride=2),
    Case("c_out = 2 width", 1, 128, 5, 5, 128, 256, 128, shortcut=64),
    Case("96 wide to 40", 1, 96, 5, 7, 96, 160, 40, shortcut=72),
    Case("TF SAME", 1, 64, 8, 6, 64, 128, 72, shortcut=SUBSAMPLED, stride=2, padding=(0, 1, 0, 1)),
    Case("one row", 1, 32, 1, 33, 32, 64, 8),
    Case("1x1 image", 5, 64, 1, 1, 64, 64, 64),
)


def chain(case: Case, device, dtype=FP16, real=False, norm=True) -> dict:
    """Arguments of launch. Integers so small that all sums are exact, scales of 0 and below among them."""

    def tensor(*shape, most=1):
        return (torch.randn(shape) if real else torch.randint(-most, most + 1, shape)).to(device, dtype)

    def vectors(channels, least=-2):
        if real:
            return (torch.rand(channels) + 0.5).to(device), torch.randn(channels).to(device)
        pair = torch.randint(least, 3, (channels,)), torch.randint(-3, 4, (channels,))
        return tuple(vector.to(device, torch.float32) for vector in pair)

    def layer(c_out, c_in, kernel, relu):
        terms = c_in * kernel * kernel
        weight = tensor(c_out, c_in, kernel, kernel)
        weight = weight / terms**0.5 if real else weight * (torch.rand(weight.shape, device=device) < 5 / terms)
        return Layer(weight, *(vectors(c_out) if norm else (None, None)), relu)

    g, post = case.geometry, not case.preact
    out_size = g.out_size((case.h, case.w), (3, 3))
    # All layers of a v1 block have a ReLU behind; v2's last one is bare.
    conv2, conv3 = layer(case.width, case.c_in, 3, True), layer(case.c_out, case.width, 1, post)
    if case.shortcut == IDENTITY:
        residual = tensor(case.n, case.c_out, *out_size, most=8)
    else:
        channels = case.c_out if case.shortcut == SUBSAMPLED else case.shortcut
        projection = None if case.shortcut == SUBSAMPLED else layer(case.c_out, channels, 1, False)
        size = (out_size[0] * case.stride, out_size[1] * case.stride)
        residual = Shortcut(tensor(case.n, channels, *size, most=2), projection, Geometry(g.stride))
    return dict(
        x=tensor(case.n, case.c_in, case.h, case.w),
        conv2=conv2,
        geometry=g,
        conv3=conv3,
        residual=residual,
        next_norm=vectors(case.c_out) if case.preact else None,
        next_conv1=layer(case.next_width, case.c_out, 1, True) if case.next_width else None,
        keep_sum=case.keep_sum,
    )


def reference(call: dict, number=lambda t: t.double().cpu()) -> tuple:
    """The definition by PyTorch, in fp64 unless `number` says otherwise; nothing is rounded between the layers."""

    def affine(y, scale, shift):
        y = y if scale is None else y * number(scale)[:, None, None]
        return y if shift is None else y + number(shift)[:, None, None]

    def conv(x, layer, geometry=Geometry()):
        top, bottom, left, right = geometry.padding
        y = torch.conv2d(
            torch.nn.functional.pad(x, (left, right, top, bottom)), number(layer.weight), None, geometry.stride
        )
        y = affine(y, layer.scale, layer.shift)
        return torch.relu(y) if layer.relu else y

    residual = call["residual"]
    if isinstance(residual, Shortcut):
        x0, (step_h, step_w) = number(residual.x), residual.geometry.stride
        added = conv(x0, residual.layer, residual.geometry) if residual.layer else x0[:, :, ::step_h, ::step_w]
    else:
        added = number(residual)
    hidden = conv(number(call["x"]), call["conv2"], call["geometry"])
    y = conv(hidden, call["conv3"]._replace(relu=False)) + added
    y = torch.relu(y) if call["conv3"].relu else y
    p = torch.relu(affine(y, *call["next_norm"])) if call["next_norm"] else y
    return y if call["keep_sum"] else p, conv(p, call["next_conv1"]) if call["next_conv1"] else None


def shapes(call: dict) -> tuple:
    """What `why_not` is asked."""
    residual, following = call["residual"], call["next_conv1"]
    return (
        call["x"].shape, call["conv2"].weight.shape, call["geometry"], call["conv3"].weight.shape, call["x"].dtype,
        residual.shape if isinstance(residual, Shortcut) else None, following.weight.shape if following else None,
    )  # fmt: skip
