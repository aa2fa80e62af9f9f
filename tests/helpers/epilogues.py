"""Calls of the epilogue kernel on integers, and their results by the definition in fp64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from resnet_kernels.kernels.activations import RELU

CHANNELS_LAST = torch.channels_last


# Which of scale, shift, residual, residual_scale, residual_shift are there.
GIVEN = (
    (1, 1, 1, 1, 1),
    (1, 1, 1, 0, 0),
    (1, 1, 0, 0, 0),
    (0, 1, 1, 0, 1),
    (0, 0, 1, 0, 0),
    (1, 0, 1, 1, 0),
    (0, 0, 0, 0, 0),
)


def integers(shape, dtype, device, most=4):
    return torch.randint(-most, most + 1, shape).to(device, dtype)


def operands(shape, given, dtype, device, vectors=torch.float32):
    """x, scale, shift, residual, residual_scale, residual_shift: integers, whose sums bf16 holds exactly."""
    x, residual = (integers(shape, dtype, device).contiguous(memory_format=CHANNELS_LAST) for _ in range(2))
    scale, shift, own_scale, own_shift = (integers(shape[1:2], vectors, device) for _ in range(4))
    return [x] + [v if there else None for v, there in zip((scale, shift, residual, own_scale, own_shift), given)]


def truth(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    own_scale: Tensor | None,
    own_shift: Tensor | None,
    relu: bool,
) -> Tensor:
    """The definition, in fp64."""

    def affine(value, scale, shift):
        value = value.double()
        value = value if scale is None else value * scale.double()[:, None, None]
        return value if shift is None else value + shift.double()[:, None, None]

    y = affine(x, scale, shift)
    y = y if residual is None else y + affine(residual, own_scale, own_shift)
    return torch.relu(y) if relu else y


def is_exact(kernel, device) -> bool:
    """Whether all calls give the definition's integers; on good source they do, and with a planted bug they must not."""
    calls = itertools.product(((1, 17, 7, 7), (2, 64, 7, 5), (1, 144, 3, 3)), GIVEN[:4], (True, False))
    return all(
        torch.equal(kernel.launch(*tensors, RELU if relu else None).double(), truth(*[*tensors, relu]))
        for shape, given, relu in calls
        for tensors in [operands(shape, given, torch.float32, device)]
    )
