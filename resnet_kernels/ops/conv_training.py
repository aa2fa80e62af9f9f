"""A 3x3 convolution in training on the CPU, by Winograd where a table says that it wins.

    forward          y = conv(x, weight) + bias, by Winograd
    backward         x's gradient is a convolution of y's with the rotated weight, by Winograd; the weight's and the bias's are
                     PyTorch's

The weight changes in each step, so each pass packs it. Gradients of gradients are PyTorch's. On channels_last images x's
gradient errs half as much as PyTorch's. On contiguous ones PyTorch's errs two to three times less than ours, so those are left
to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.cpu import convolution, library, plans
from ..kernels.cpu.plans import Shapes
from ..kernels.geometry import Geometry
from ..kernels.operands import ConvOperands
from . import cpu_candidates, tuned_table
from .conv_problem import ConvProblem
from .dtypes import autocast_dtype


class TrainedProblem(NamedTuple):
    """A convolution in training, forward and x's gradient, on channels_last images. `str` is the key in a table.

    Attributes:
        conv: with or without a bias, without scale, residual and activation.
    """

    conv: ConvProblem

    def __str__(self) -> str:
        return f"trained {self.conv}"

    @property
    def training(self) -> bool:
        """Whether it is a training step's problem."""
        return True


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor | None:
    """Returns conv(x, weight) + bias, differentiable; None where PyTorch's own is the choice.

    Args:
        x: (N, C_in, H, W), on the CPU.
        weight: (C_out, C_in / groups, kernel_h, kernel_w).
        bias: (C_out,) or None.
        geometry: of the convolution.
    """
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or autocast_dtype(x) is not None:
        return None
    if tuple(weight.shape[2:]) != (3, 3) or geometry.stride != (1, 1):
        return None
    operands = ConvOperands(x, weight, bias, None, None, geometry, None)
    problem = TrainedProblem(ConvProblem.of(operands))
    if tuned_table.choice(problem, x.shape[0], x.dtype, x.device, _can_run) != "winograd":
        return None
    return by_winograd(x, weight, bias, geometry)


def by_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Returns conv(x, weight) + bias for operands that `why_not` lets pass."""
    return _Convolution.apply(x, weight, bias, geometry)


def why_not(problem: TrainedProblem, batch: int, dtype: torch.dtype) -> str | None:
    """Returns why Winograd can't run both passes of a problem, as the end of a sentence; None if it can."""
    conv, threads = problem.conv, torch.get_num_threads()
    if not conv.geometry.symmetric or max(conv.geometry.padding) > 2:
        return f"runs the same padding on both sides, of at most 2, got {conv.geometry.padding}"
    if isinstance(found := library.find(), library.Missing):
        return f"needs our compiled CPU kernels: {found.reason}"
    shapes = Shapes(conv.x_shape(batch), conv.weight_shape, conv.geometry)
    return plans.why_not("winograd", shapes, dtype, threads) or plans.why_not(
        "winograd", _of_gradient(shapes), dtype, threads
    )


def _can_run(name: str, problem: TrainedProblem, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    return name == "eager" or (name == "winograd" and why_not(problem, batch, dtype) is None)


def _of_gradient(shapes: Shapes) -> Shapes:
    """Returns the convolution that computes x's gradient from y's."""
    c_out, c_in, *kernel = shapes.weight
    top, bottom, left, right = (2 - side for side in shapes.geometry.padding)
    return Shapes(shapes.out, (c_in, c_out, *kernel), Geometry((1, 1), (top, bottom, left, right)))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.bias_sizes = geometry, None if bias is None else bias.shape
        return cpu_candidates.run(ConvOperands(x, weight, bias, None, None, geometry, None), ["winograd"])

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = None
        # With create_graph=True all has to be differentiable once more.
        if needs_x and not torch.is_grad_enabled():
            grad_x = _gradient(grad_y, weight, Shapes(tuple(x.shape), tuple(weight.shape), ctx.geometry))
        padding = ctx.geometry.conv2d_padding
        needs = [needs_x and grad_x is None, needs_weight, needs_bias]
        others: tuple[Tensor | None, ...] = (None, None, None)
        if any(needs):
            others = torch.ops.aten.convolution_backward(
                grad_y, x, weight, ctx.bias_sizes, [1, 1], padding, [1, 1], False, [0, 0], 1, needs
            )
        return others[0] if grad_x is None else grad_x, others[1], others[2], None


def _gradient(grad_y: Tensor, weight: Tensor, shapes: Shapes) -> Tensor | None:
    """Returns x's gradient by Winograd; None if its kernel can't take the weight's values."""
    packed = convolution.pack("winograd", weight, for_gradient=True)
    if packed is None:
        return None
    bound = convolution.Bound("winograd", _of_gradient(shapes), packed, None, None, torch.get_num_threads())
    return bound(grad_y.contiguous(memory_format=torch.channels_last), None, activation=None)
