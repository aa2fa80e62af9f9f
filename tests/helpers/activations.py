"""Activations in tests: some of each kind, values that are special to them, and the comparison with fp64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers.oracle import assert_within_budget
from resnet_kernels.kernels.activations import KINDS, Activation, PReLU

# Slopes: no power of two, beyond 1, and one that turns the sign.
EACH = (
    *(Activation(kind) for kind in KINDS if kind not in ("relu", "leaky_relu")),
    *(Activation("leaky_relu", slope) for slope in (0.1, 1.75, -0.3)),
)
# What users have as modules, by the name in reports.
MODULES: dict[str, nn.Module] = {
    "relu6": nn.ReLU6(),
    "leaky_relu(0.1)": nn.LeakyReLU(0.1),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish(),
}
INF, NAN = float("inf"), float("nan")
# What is not finite, kinks and their neighbors, where exp underflows, the largest and the smallest.
SPECIAL = (
    NAN, INF, -INF, 0.0, -0.0, 3.0, -3.0, 6.0, 2.9999998, -2.9999998, 5.9999995, 6.0000005, 1e-45, -1e-45, 1.2e-38, -1.2e-38,
    -14.4, -14.6, 14.6, -87.5, -88.8, -103.9, -104.1, -1e4, 1e4, 1e19, -1e19, 5e37, -5e37,
)  # fmt: skip
# Beyond it each activation is a multiple of its input, or constant.
_FAR = 150


def special(*shape: int) -> Tensor:
    """Special values among random ones, scattered."""
    x = 4 * torch.randn(shape)
    places = torch.randperm(x.numel())[: len(SPECIAL)]
    x.view(-1)[places] = torch.tensor(SPECIAL)[: len(places)]
    return x


def assert_activated(y: Tensor, activation: Activation | PReLU, z: Tensor) -> None:
    """y is an activation of z, fp32: NaN and inf where fp64 has them, exact far from zero, within the budget elsewhere."""
    truth, eager = activation(z.double()), activation(z)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(y), kind(truth)), f"{activation}: {kind.__name__} differs from fp64"
    is_far, is_near = truth.isfinite() & (z.abs() > _FAR), truth.isfinite() & (z.abs() <= _FAR)
    # A slope is rounded before the product.
    far = eager if activation.kind in ("leaky_relu", "prelu") else truth.float()
    assert torch.equal(y[is_far], far[is_far]), f"{activation} far from zero"
    assert_within_budget(y[is_near], eager[is_near], truth[is_near], str(activation))
