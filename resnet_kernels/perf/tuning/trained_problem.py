"""What training on the CPU is measured by: its 3x3 convolutions one by one, and then a whole step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...fusion.convert import fuse
from ...kernels.operands import ConvOperands
from ...ops import conv_training, reference, tuned_table
from ...ops.conv_training import TrainedProblem
from ..environment import environment
from ..timing import interleave
from . import autotuner
from .autotuner import Problem
from .random_operands import Draw


def trained_problem(
    asked: TrainedProblem, batch: int, dtype: torch.dtype, device: torch.device, calls: int = 1
) -> Problem:
    """Returns the problem of a convolution in training; (y, dx) are the outputs."""
    conv = asked.conv
    x_shape, weight_shape, geometry = conv.x_shape(batch), conv.weight_shape, conv.geometry
    y_shape = geometry.out_shape(x_shape, weight_shape)
    x_size, y_size, weight_size = (torch.Size(shape).numel() for shape in (x_shape, y_shape, weight_shape))

    def operands() -> tuple[Tensor, ...]:
        draw = Draw(dtype, device)
        weight = draw(weight_shape, (weight_size // weight_shape[0]) ** -0.5).contiguous()
        return torch.relu_(draw(x_shape)), weight, draw(y_shape[1:2]) if conv.bias else torch.zeros(0), draw(y_shape)

    def run(convolve: Any, x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = convolve(x, weight, bias if conv.bias else None, geometry)
            return y.detach(), torch.autograd.grad(y, x, grad_y)[0]

    def eager(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return run(
            lambda x, weight, bias, geometry: reference.conv_bias_act(
                *ConvOperands(x, weight, bias, None, None, geometry, None)
            ),
            *tensors,
        )

    able = conv_training.why_not(asked, batch, dtype) is None
    return Problem(
        key=str(asked),
        batch=batch,
        dtype=dtype,
        device=device,
        default="eager",
        candidates={"eager": eager} | ({"winograd": lambda *t: run(conv_training.by_winograd, *t)} if able else {}),
        operands=operands,
        eager=eager,
        reference=lambda *tensors: eager(*(t.double() for t in tensors)),
        flops=4 * y_size * weight_size // weight_shape[0],
        bytes=dtype.itemsize * 2 * (x_size + weight_size + y_size),
        calls=calls,
        is_cpu=True,
    )  # fmt: skip


def step_records(model: nn.Module, x: Tensor, name: str, seconds: float) -> list[dict[str, Any]]:
    """Returns records for `tuned_table.trains`, by a forward and backward of a copy of a model, with and without our kernels.

    There is one for each shape of an input of a fused module, since a module sees nothing else.

    Args:
        model: what to measure.
        x: a batch of images.
        name: the model's name, with the size of its images.
        seconds: time for all rounds.
    """
    fused = fuse(model).train()
    x = x.detach()

    def step(on: bool) -> None:
        with torch.enable_grad(), tuned_table.training(on):
            outputs = [y for y in pytree.tree_leaves(fused(x)) if isinstance(y, Tensor) and y.requires_grad]
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        fused.zero_grad()

    with torch.no_grad(), tuned_table.noting(packed=True) as noted:
        fused(x)
    shapes = {asked for asked, _ in noted if isinstance(asked, tuned_table.TrainedShape)}
    clock = interleave({"eager": lambda: step(False), "own": lambda: step(True)}, seconds=seconds, device=x.device)
    winner = autotuner.fastest("eager", [clock])
    return [
        {
            "key": f"{asked} in {name}",
            "batch": x.shape[0],
            "dtype": tuned_table.dtype_name(torch.float32, is_cpu=True),
            "winner": winner,
            "default": "eager",
            "seconds": {who: timing.median for who, timing in clock.items()},
            "measured": environment(x.device),
        }
        for asked in sorted(shapes)
    ]
