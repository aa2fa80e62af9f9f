"""Activations that a fused operation may end in, as data. None in the place of one says that nothing follows.

`KINDS` are, in PyTorch's words, relu, relu6, leaky_relu(negative_slope), silu, gelu, gelu(approximate="tanh") and hardswish.
`PReLU` has a tensor in it: its slopes are learned. Where tensors have no place, in keys of tables and of plans, it is `PRELU`.
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


class PReLU:
    """PReLU with its slopes: x where x is above 0, else x * slope. Equal to itself alone.

    Source: He et al. 2015 (arXiv:1502.01852), equation 1.
    """

    __slots__ = ("slopes",)
    kind = "prelu"
    slope = 0.0

    def __init__(self, slopes: Tensor):
        """Wraps slopes, which operations read in each call, and differentiate.

        Args:
            slopes: (C,) for each channel, or (1,) for all of them, in the data's dtype or float32.

        Raises:
            TypeError: no tensor, or not of a floating-point dtype.
            ValueError: it has not one dimension.
        """
        if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
            what = slopes.dtype if isinstance(slopes, Tensor) else type(slopes).__name__
            raise TypeError(f"slopes must be a floating-point tensor, got {what}")
        if slopes.dim() != 1:
            raise ValueError(f"slopes must have shape (C,) or (1,), got {tuple(slopes.shape)}")
        self.slopes = slopes

    def __str__(self) -> str:
        """Name in reports and in the keys of tables."""
        return self.kind

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the activation of x, (N, C, ...), by PyTorch's own function."""
        return F.prelu(x, self.slopes.to(x.dtype))

    def over(self, x: Tensor) -> Tensor:
        """Returns the activation of x, in memory of its own: PyTorch's function has no other form."""
        return self(x)


RELU = Activation("relu")
# Of any PReLU, whatever its slopes.
PRELU = tuple.__new__(Activation, ("prelu", 0.0))
# What a fused operation may end in.
Last = Activation | PReLU | None


def apply(activation: Last, x: Tensor) -> Tensor:
    """Returns the activation of x by PyTorch's own function; x itself for None."""
    return x if activation is None else activation(x)


def apply_over(activation: Last, x: Tensor) -> Tensor:
    """Returns the activation of x, written over x where PyTorch can; x as it is for None."""
    return x if activation is None else activation.over(x)


def without_slopes(activation: Last) -> Activation | None:
    """Returns an activation for keys: `PRELU` for a PReLU."""
    return PRELU if isinstance(activation, PReLU) else activation


def slopes_of(activation: Last) -> Tensor | None:
    """Returns a PReLU's slopes, (C,) or (1,); None for another activation."""
    return activation.slopes if isinstance(activation, PReLU) else None


def slopes_by_channel(activation: Last, channels: int) -> Tensor | None:
    """Returns a PReLU's slopes as our kernels read them, (channels,) and contiguous; None for another activation."""
    slopes = slopes_of(activation)
    if slopes is None or (slopes.shape[0] == channels and slopes.is_contiguous() and not slopes.is_neg()):
        return slopes  # at once, because each call asks
    return slopes.detach().expand(channels).resolve_neg().contiguous()


def as_arguments(activation: Last) -> tuple[str | None, float]:
    """Returns an activation but for its slopes as an operation's schema has it: `str? activation, float slope`."""
    return (None, 0.0) if activation is None else (activation.kind, activation.slope)


def from_arguments(kind: str | None, slope: float, slopes: Tensor | None = None) -> Last:
    """Returns the activation that `as_arguments` and `slopes_of` took apart."""
    if kind == "relu":
        return RELU
    if slopes is not None:
        return PReLU(slopes)
    return None if kind is None else Activation(kind, slope)


def as_constexprs(activation: Last) -> dict[str, str | float | None]:
    """Returns an activation as our kernels have it at compile time (elementwise.activate)."""
    kind, slope = as_arguments(activation)
    return dict(ACT=kind, SLOPE=slope)


def chosen(relu: bool, activation: str | Last) -> Last:
    """Returns what a public function's arguments `relu` and `activation` ask for; `activation`, if given, overrides `relu`.

    Raises:
        TypeError: `activation` is neither a string nor an Activation nor a PReLU.
        ValueError: a string that is not among KINDS.
    """
    if activation is None:
        return RELU if relu else None
    if isinstance(activation, (Activation, PReLU)):
        return activation
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a str, an Activation, a PReLU or None, got {type(activation).__name__}")
    if activation not in KINDS:
        raise ValueError(f"activation must be one of {', '.join(KINDS)}, an Activation or a PReLU, got {activation!r}")
    return Activation(activation)


def check_slopes(activation: Last, x: Tensor, channels: int) -> None:
    """Checks that a PReLU's slopes fit an operation on x.

    Raises:
        ValueError: their number is neither 1 nor `channels`; they are on another device, or in another dtype than x's or fp32.
    """
    slopes = slopes_of(activation)
    if slopes is None:
        return
    if slopes.shape[0] not in (1, channels):
        raise ValueError(f"PReLU's slopes must have shape ({channels},) or (1,), got {tuple(slopes.shape)}")
    if slopes.device != x.device:
        raise ValueError(f"PReLU's slopes must be on x's device {x.device}, got {slopes.device}")
    if slopes.dtype not in (x.dtype, torch.float32):
        accepted = " or ".join(str(dtype) for dtype in dict.fromkeys((x.dtype, torch.float32)))
        raise ValueError(f"PReLU's slopes must be of dtype {accepted}, got {slopes.dtype}")
