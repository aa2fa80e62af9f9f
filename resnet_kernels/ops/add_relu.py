"""relu(x + residual) in one pass, where no convolution comes before the add. The kernel is in kernels/add_relu.py."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .library import LIBRARY, is_dense

LIBRARY.define("add_relu(Tensor x, Tensor residual, str backend) -> Tensor")


def _add_relu(x, residual, backend):
    backend = backends.resolve(backend, x.device, x.dtype)
    if backend == "triton" or backends.passes_on_triton(backend, x.device, x.dtype):
        from ..kernels import add_relu as kernel

        return kernel.launch(x, residual)
    # Nobody else has the sum, so the ReLU overwrites it.
    return torch.relu_(torch.add(x, residual))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output)


def _backward(ctx, grad_y):
    (y,) = ctx.saved_tensors
    grad = torch.ops.aten.threshold_backward(grad_y, y, 0)
    return grad, grad, None


LIBRARY.impl("add_relu", _add_relu, "CompositeExplicitAutograd")
torch.library.register_fake("resnet_kernels::add_relu", lambda x, residual, backend: torch.empty_like(x), lib=LIBRARY)
torch.library.register_autograd("resnet_kernels::add_relu", _backward, setup_context=_setup_context, lib=LIBRARY)


def add_relu(x: Tensor, residual: Tensor, *, backend: str = "auto") -> Tensor:
    """Returns relu(x + residual), differentiable in both.

    Args:
        x: any shape, any floating dtype, dense in memory (contiguous or channels_last).
        residual: shape, dtype and device of `x`, no broadcasting. Another layout than x's is converted.
        backend: "auto", "triton", "cudnn", "cpu" or "eager". cuDNN and oneDNN have no such operation: under their names
            PyTorch's own add and ReLU run. The environment's RESNET_KERNELS_BACKEND overrides the argument.

    Returns:
        x's shape, dtype and layout.

    Raises:
        TypeError: an argument is no tensor, or x not floating point.
        ValueError: shape, dtype or device differ, or x is not dense, or the backend's name is unknown.
        RuntimeError: an explicit backend can't run here.

    Source: He et al. 2016 (arXiv:1512.03385), figure 2.
    """
    backends.check_name(backend)
    for name, value in (("x", x), ("residual", residual)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    for attribute in ("shape", "dtype", "device"):
        came, accepted = getattr(residual, attribute), getattr(x, attribute)
        if came != accepted:
            came, accepted = (tuple(v) if attribute == "shape" else v for v in (came, accepted))
            raise ValueError(f"residual must have x's {attribute} {accepted}, got {came}")
    if not is_dense(x):
        raise ValueError(f"x must be dense in memory, got shape {tuple(x.shape)} with strides {x.stride()}")
    if x.stride() != residual.stride():
        residual = torch.empty_like(x).copy_(residual)
    return torch.ops.resnet_kernels.add_relu.default(x, residual, backend)
