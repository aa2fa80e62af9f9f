"""Problem of a convolution on the CPU whose weight was packed beforehand: our kernels against oneDNN's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.activations import RELU
from ...kernels.cpu import convolution
from ...ops import cpu_candidates, onednn, reference
from ...ops.conv_problem import PackedProblem
from .autotuner import Problem
from .random_operands import Draw


def packed_problem(
    asked: PackedProblem, batch: int, dtype: torch.dtype, device: torch.device, calls: int = 1
) -> Problem:
    """Returns the problem of a packed weight; each candidate packs in its first call."""
    conv = asked.conv
    x_shape, weight_shape, geometry = conv.x_shape(batch), conv.weight_shape, conv.geometry
    y_shape = geometry.out_shape(x_shape, weight_shape)
    x_size, y_size, weight_size = (torch.Size(shape).numel() for shape in (x_shape, y_shape, weight_shape))

    def operands() -> tuple[Tensor, ...]:
        draw = Draw(dtype, device)
        # Half of what comes out of a ReLU is zero.
        x = torch.relu_(draw(x_shape))
        return x, draw(weight_shape, (weight_size // weight_shape[0]) ** -0.5), draw(y_shape[1:2])

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.conv_bias_act(x, weight, bias, None, None, geometry, RELU)

    def truth(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return eager(x.double(), weight.double(), bias.double())

    names = cpu_candidates.packed_candidates(asked, batch, dtype)
    return Problem(
        key=str(asked),
        batch=batch,
        dtype=dtype,
        device=device,
        default=names[0],
        candidates={name: _runner(name, asked) for name in names},
        operands=operands,
        eager=eager,
        reference=truth,
        flops=2 * y_size * weight_size // weight_shape[0],
        bytes=dtype.itemsize * (x_size + weight_size + y_size),
        calls=calls,
        is_cpu=True,
    )


def _runner(name: str, asked: PackedProblem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    prepared: list[Callable[[Tensor], Tensor]] = []

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not prepared:
            prepared.append(_prepare(name, asked, x, weight, bias))
        return prepared[0](x)

    return run


def _prepare(name: str, asked: PackedProblem, x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    geometry = asked.conv.geometry
    if name != "onednn":
        packed = convolution.pack(name, weight, is_kept=True)
        if packed is None:
            raise RuntimeError(f"{name} can't take this weight")
        shapes = cpu_candidates.own_shapes(tuple(x.shape), asked.conv.weight_shape, geometry)
        return convolution.Bound(name, shapes, packed, None, bias, torch.get_num_threads())
    if onednn.is_for_aten(x.shape, x.dtype, weight.shape, geometry.stride):
        return lambda x: reference.conv_bias_act(x, weight, bias, None, None, geometry, RELU)
    packed, arguments = onednn.pack_weight(weight, geometry, x.shape), onednn.arguments(geometry)
    # A bound of 0: its own ReLU may run, as it does in a model whose values are in bounds.
    return lambda x: onednn.run(
        reference.pad_if_asymmetric(x, geometry), packed, bias, None, arguments, activation=RELU, bound=0.0
    )
