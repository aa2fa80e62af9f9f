"""batch_norm_act beside eager and fp64: the values, all gradients and the running statistics of one call."""

from __future__ import annotations

import torch

from helpers.oracle import assert_within_budget
from resnet_kernels.kernels.activations import RELU, PReLU
from resnet_kernels.ops import batch_norm_act, reference

SETTINGS = dict(momentum=0.1, eps=1e-5)


def vectors(channels, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    draw = lambda low, high: torch.empty(channels).uniform_(low, high, generator=generator).to(device, dtype)  # noqa: E731
    return dict(weight=draw(-1, 1), bias=draw(-1, 1), running_mean=draw(-1, 1), running_var=draw(0.5, 2))


def results(x, residual, given, upstream, dtype, function, **settings):
    """y, the gradients of x, residual, weight, bias and PReLU's slopes, and the running statistics, computed in dtype."""
    x, residual, upstream = (None if t is None else t.to(dtype) for t in (x, residual, upstream))
    # In a half dtype the vectors stay in fp32, as autocast has them.
    vector_dtype = torch.float64 if dtype == torch.float64 else None
    given = {name: None if v is None else v.to(vector_dtype or v.dtype).clone() for name, v in given.items()}
    named = {"x": x, "residual": residual, "weight": given["weight"], "bias": given["bias"]}
    named |= {"slopes": given["slopes"]} if "slopes" in given else {}
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    arguments = [leaves.get(name) for name in ("x", "residual", "weight", "bias")]
    if "slopes" in leaves:
        settings["activation"] = PReLU(leaves["slopes"])
    y = function(*arguments, given["running_mean"], given["running_var"], **settings)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    found = {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients)}
    return found | {name: given[name] for name in ("running_mean", "running_var") if given[name] is not None}


def nothing_but(activation, z, backend="triton"):
    """batch_norm_act whose BN does nothing: the activation of z, (N, C, H, W), differentiable as the op is."""
    one, zero = (torch.full(z.shape[1:2], value).to(z) for value in (1, 0))
    settings = dict(training=False, momentum=0.1, eps=0.0, activation=activation, backend=backend)
    return batch_norm_act(z, None, one, zero, zero, one, **settings)


def on_triton(*arguments, **settings):
    return batch_norm_act(*arguments, **settings, backend="triton")


def compare(x, residual, given, dtype, slopes=None, **settings):
    """The op against fp64 and eager, all results of one call.

    settings: the op's; activation is an Activation or None. slopes: of a PReLU in its place.
    """
    given = given if slopes is None else given | {"slopes": slopes}
    upstream = torch.randn(x.shape, device=x.device)
    settings = SETTINGS | settings
    relu = RELU if settings.pop("relu", True) else None
    settings.setdefault("activation", relu)
    rounded = (x.to(dtype), None if residual is None else residual.to(dtype), given, upstream.to(dtype))

    ours = results(*rounded, dtype, on_triton, **settings, relu=False)
    eager = results(*rounded, dtype, reference.batch_norm_act, **settings)
    oracle = results(*rounded, torch.float64, reference.batch_norm_act, **settings)
    for name, truth in oracle.items():
        assert_within_budget(ours[name], eager[name], truth, name)
    return ours
