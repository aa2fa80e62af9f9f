"""What a recipe holds besides convolutions, as both executors (executor.py, plan.py) run it in inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..graph.recipe import CallStep
from ..ops import add_relu, backends
from .bn import bn_tensors

CHANNELS_LAST = torch.channels_last


def normalise(bn: nn.Module, x: Tensor, residual: Tensor | None, relu: bool, backend: str) -> Tensor:
    """relu(bn(x) + residual), on the running statistics."""
    fits = residual is None or residual.shape == x.shape
    y = torch.ops.resnet_kernels.batch_norm_act.default(
        x, residual if fits else None, *bn_tensors(bn), False, 0.0, bn.eps, relu and fits, backend
    )[0]
    return y if fits else add_broadcast(y, residual, relu)


def add_broadcast(y: Tensor, residual: Tensor, relu: bool) -> Tensor:
    """relu(y + residual) of two shapes, channels_last."""
    y = torch.add(y, residual).contiguous(memory_format=CHANNELS_LAST)
    return torch.relu_(y) if relu else y


def call(step: CallStep, child: nn.Module | None, inputs: list[Tensor], backend: str) -> Tensor:
    """A child module, an add, a ReLU."""
    if child is not None:
        return child(*inputs)
    if step.what == "add_relu" and inputs[0].shape == inputs[1].shape:
        return add_relu(*inputs, backend=backends.as_requested(backend))
    if step.what == "add_relu":
        return torch.relu_(torch.add(*inputs))  # a sum that broadcasts
    return torch.add(*inputs) if step.what == "add" else torch.relu(*inputs)
