"""Steps to time, as callables without arguments: a forward pass, and a forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..models.loss import loss_function


def forward(net: nn.Module, x: Tensor) -> Callable[[], object]:
    """Returns a step in eval mode and without gradients."""
    net.eval()

    def step():
        with torch.inference_mode():
            return net(x)

    return step


def forward_backward(model: nn.Module, x: Tensor) -> Callable[[nn.Module, Tensor], Callable[[], object]]:
    """Returns a function that makes a step for a network like `model` in train mode: gradients of a loss.

    All steps use the same labels.

    Raises:
        ValueError: `model` doesn't give one row of logits or probabilities for each image.
    """
    with torch.inference_mode():
        y = model(x[:1])
    if not isinstance(y, Tensor) or y.ndim != 2:
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"--model must give (N, classes) to be trained on labels, got {shape}")
    labels = torch.randint(y.shape[1], (len(x),), device=x.device)
    loss = loss_function(model)

    def make(net: nn.Module, x: Tensor) -> Callable[[], object]:
        parameters = list(net.train().parameters())

        def step():
            return torch.autograd.grad(loss(net(x), labels), parameters, allow_unused=True)

        return step

    return make
