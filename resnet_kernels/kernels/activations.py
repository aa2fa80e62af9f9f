"""Activations that a fused operation may end in, as data. None in the place of one says that nothing follows.

`KINDS` are, in PyTorch's words, relu, relu6, leaky_relu(negative_slope), silu, gelu, gelu(approximate="tanh") and hardswish.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# convolution.h has the same kinds in the same order.
KINDS = ("relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish")

_Function = Callable[[Tensor, float], Tensor]
_FUNCTIONS: dict[str, _Function] = {
    "relu": lambda x, _: torch.relu(x),
    "relu6": lambda x, _: F.relu6(x),
    "leaky_relu": F.leaky_relu,
    "silu": lambda x, _: F.silu(x),
    "gelu": lambda x, _: F.gelu(x),
    "gelu_tanh": lambda x, _: F.gelu(x, approximate="tanh"),
    "hardswish": lambda x, _: F.hardswish(x),
}
_IN_PLACE: dict[str, _Function] = {
    "relu": lambda x, _: torch.relu_(x),
    "relu6": lambda x, _: F.relu6(x, inplace=True),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope, inplace=True),
    "silu": lambda x, _: F.silu(x, inplace=True),
    "gelu": lambda x, _: torch.ops.aten.gelu_.default(x),
    "gelu_tanh": lambda x, _: torch.ops.aten.gelu_.default(x, approximate="tanh"),
    "hardswish": lambda x, _: F.hardswish(x, inplace=True),
}


class _Fields(NamedTuple):
    kind: str
    slope: float


class Activation(_Fields):
    """Activation function: its kind and, of a Leaky ReLU, the slope of its negative side."""

    __slots__ = ()

    def __new__(cls, kind: str, slope: float | None = None) -> Activation:
        """Returns an activation, with its slope filled in.

        Args:
            kind: "relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh" or "hardswish".
            slope: of "leaky_relu", a finite number; None for PyTorch's default of 0.01. Other kinds have none.

        Raises:
            TypeError: slope is no number.
            ValueError: a kind that is not among these, a slope that is not finite, or that the kind doesn't have.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if slope is None:
            slope = 0.01 if kind == "leaky_relu" else 0.0
        if isinstance(slope, bool) or not isinstance(slope, (int, float)):
            raise TypeError(f"slope must be a number, got {type(slope).__name__}")
        if not math.isfinite(slope):
            raise ValueError(f"slope must be finite, got {slope}")
        if slope != 0 and kind != "leaky_relu":
            raise ValueError(f'slope is of "leaky_relu" alone, got {slope} for {kind!r}')
        return super().__new__(cls, kind, float(slope))

    def __str__(self) -> str:
        """Name in reports and in the keys of tables."""
        return f"leaky_relu({self.slope})" if self.kind == "leaky_relu" else self.kind

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the activation of x, by PyTorch's own function."""
        return _FUNCTIONS[self.kind](x, self.slope)

    def over(self, x: Tensor) -> Tensor:
        """Returns the activation of x, written over x."""
        return _IN_PLACE[self.kind](x, self.slope)

    @property
    def gain(self) -> float:
        """The largest |activation(x)| / |x| of any x."""
        return max(1.0, abs(self.slope))


RELU = Activation("relu")


def apply(activation: Activation | None, x: Tensor) -> Tensor:
    """Returns the activation of x by PyTorch's own function; x itself for None."""
    return x if activation is None else activation(x)


def apply_over(activation: Activation | None, x: Tensor) -> Tensor:
    """Returns the activation of x, written over x; x as it is for None."""
    return x if activation is None else activation.over(x)


def as_arguments(activation: Activation | None) -> tuple[str | None, float]:
    """Returns an activation as an operation's schema has it: `str? activation, float slope`."""
    return (None, 0.0) if activation is None else (activation.kind, activation.slope)


def from_arguments(kind: str | None, slope: float) -> Activation | None:
    """Returns the activation that `as_arguments` took apart."""
    if kind == "relu":
        return RELU
    return None if kind is None else Activation(kind, slope)


def as_constexprs(activation: Activation | None) -> dict[str, str | float | None]:
    """Returns an activation as our kernels have it at compile time (elementwise.activate)."""
    kind, slope = as_arguments(activation)
    return dict(ACT=kind, SLOPE=slope)


def chosen(relu: bool, activation: str | Activation | None) -> Activation | None:
    """Returns what a public function's arguments `relu` and `activation` ask for; `activation`, if given, overrides `relu`.

    Raises:
        TypeError: `activation` is neither a string nor an Activation.
        ValueError: a string that is not among KINDS.
    """
    if activation is None:
        return RELU if relu else None
    if isinstance(activation, Activation):
        return activation
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a str, an Activation or None, got {type(activation).__name__}")
    if activation not in KINDS:
        raise ValueError(f"activation must be one of {', '.join(KINDS)}, or an Activation, got {activation!r}")
    return Activation(activation)
