"""Problem to tune of a BN, residual add and activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...kernels import activations
from ...ops import backends
from ...ops.batch_norm_act import NormProblem
from ...ops.batch_norm_act import untuned as untuned_norm
from .autotuner import Problem
from .random_operands import Draw, with_slopes


def norm_problem(asked: NormProblem, batch: int, dtype: torch.dtype, device: torch.device, calls: int = 1) -> Problem:
    """Returns the problem of a BN, residual add and activation.

    In training (y, dx, dresidual, dweight, dbias) are the outputs.
    """
    shape = (batch, asked.channels, asked.height, asked.width)
    activation = with_slopes(asked.activation, asked.channels, device)

    def operands() -> tuple:
        draw, vector = Draw(dtype, device), (asked.channels,)
        mean, var = draw(vector, 0.1, dtype=torch.float32), 1 + draw(vector, 0.1, dtype=torch.float32).abs()
        weight, bias = (1 + draw(vector, 0.1, dtype=torch.float32), draw(vector, 0.1, dtype=torch.float32))
        dy = draw(shape) if asked.training else None
        return draw(shape), draw(shape) if asked.residual else None, weight, bias, mean, var, dy

    def truth(*tensors):
        return eager(*(None if t is None else t.double() for t in tensors))

    def eager(x, residual, weight, bias, mean, var, dy):
        return run(_by_pytorch, x, residual, weight, bias, mean, var, dy)

    def ours(backend: str):
        op = torch.ops.resnet_kernels.batch_norm_act.default
        last = (*activations.as_arguments(activation), backend, activations.slopes_of(activation))
        return lambda *tensors: run(lambda *arguments: op(*arguments[:-1], *last)[0], *tensors)

    def run(run_norm, x, residual, weight, bias, mean, var, dy):
        settings = (asked.training, 0.1, 1e-5, activation)
        if not asked.training:
            return run_norm(x, residual, weight, bias, mean, var, *settings)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias) if t is not None]
            given = iter(leaves)
            x, residual, weight, bias = (None if t is None else next(given) for t in (x, residual, weight, bias))
            # Cloned, because each call updates the running statistics.
            y = run_norm(x, residual, weight, bias, mean.clone(), var.clone(), *settings)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

    names = ["eager"]
    if backends.why_not_on("triton", device, dtype) is None:
        names.append("triton")
    # Passes over activations: x (and the residual) in, y out. Training reads x once more for its statistics; without a
    # residual its backward reads dy and x twice, and writes dx.
    passes = (2 + asked.residual) if not asked.training else (11 if asked.residual else 8)
    return Problem(
        key=str(asked),
        batch=batch,
        dtype=dtype,
        device=device,
        default=untuned_norm(asked, dtype, device),
        candidates={name: ours(name) for name in names},
        operands=operands,
        eager=eager,
        reference=truth,
        flops=0,
        bytes=passes * dtype.itemsize * torch.Size(shape).numel(),
        calls=calls,
    )


def _by_pytorch(x, residual, weight, bias, mean, var, training, momentum, eps, activation):
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return activations.apply(activation, y)
