"""Activations as a forward calls them: PyTorch's modules and functions, and small forwards that compute one.

Their settings (a negative slope, GELU's approximation) become a part of the recipe, so `settings_of` names what has to be
compared in each call.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from ..kernels.activations import KINDS, Activation
from .recipe import CannotRead

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
}
_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU6: ("min_val", "max_val"),
    nn.LeakyReLU: ("negative_slope",),
    nn.GELU: ("approximate",),
}
FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
}
_METHODS = {"relu": "relu", "relu_": "relu"}
# By kind, the arguments behind x that a call may have.
_ARGUMENTS = {"leaky_relu": ("negative_slope", "inplace"), "gelu": ("approximate",)}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def settings_of(module: nn.Module) -> tuple[str, ...]:
    """The attributes of an activation module that say what it computes; none for other modules."""
    return _SETTINGS.get(type(module), ())


def of_module(module: nn.Module | None) -> Activation | None:
    """A module as an activation; None if it is none, or if `why_not` has a reason."""
    return None if module is None or why_not(module) else _of_module(module)


def why_not(module: nn.Module) -> str | None:
    """The reason why an activation module cannot be fused, as the end of a sentence; None if it can, or is none."""
    try:
        _of_module(module)
    except CannotRead as reason:
        return str(reason)
    return None


def _of_module(module: nn.Module) -> Activation | None:
    kind = _MODULES.get(type(module))
    limits: list[Any] = [getattr(module, name) for name in _SETTINGS[nn.ReLU6]] if kind == "relu6" else [0, 6]
    if not all(isinstance(limit, (int, float)) for limit in limits) or limits != [0, 6]:
        raise CannotRead(f"has the limits {limits[0]} and {limits[1]}, only 0 and 6 are fused")
    if kind == "leaky_relu":
        return _leaky_relu(module.negative_slope, "has")
    if kind == "gelu":
        return _gelu(module.approximate, "has")
    return None if kind is None else Activation(kind)


def of_node(node: Node) -> Activation | None:
    """A call of a function or a method as an activation; None if it is another one.

    Raises:
        CannotRead: it is one, with arguments that can't be fused.
    """
    if node.op == "call_function":
        kind = FUNCTIONS.get(node.target)
    else:
        kind = _METHODS.get(str(node.target)) if node.op == "call_method" else None
    if kind is None:
        return None
    names = _ARGUMENTS.get(kind, ("inplace",))
    if not node.args or len(node.args) > 1 + len(names) or not set(names) >= node.kwargs.keys():
        raise CannotRead(f"its {kind} has other arguments than PyTorch's ({node.format_node()})")
    given = dict(zip(names, node.args[1:])) | node.kwargs
    if kind == "leaky_relu":
        return _leaky_relu(given.get("negative_slope", 0.01), "its leaky_relu has")
    return _gelu(given.get("approximate", "none"), "its gelu has") if kind == "gelu" else Activation(kind)


def _leaky_relu(slope: Any, has: str) -> Activation:
    if isinstance(slope, bool) or not isinstance(slope, (int, float)) or not math.isfinite(slope):
        kind = slope if isinstance(slope, (bool, int, float)) else f"a {_name_of(slope)}"
        raise CannotRead(f"{has} {kind} as its negative_slope, only a finite plain number is fused")
    return Activation("leaky_relu", slope)


def _gelu(approximate: Any, has: str) -> Activation:
    if not isinstance(approximate, str) or approximate not in _GELUS:
        raise CannotRead(f"{has} approximate={approximate!r}, only 'none' and 'tanh' are fused")
    return Activation(_GELUS[approximate])


def _name_of(value: Any) -> str:
    return "tensor" if isinstance(value, (Tensor, Node)) else type(value).__name__


# Elementwise operations on floating-point numbers alone, of which users write activations.
_ELEMENTWISE = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, torch.add, torch.sub, torch.mul,
     torch.div, torch.pow, torch.sigmoid, torch.tanh, torch.erf, torch.clamp, F.sigmoid, F.tanh, F.hardsigmoid, F.hardtanh,
     *FUNCTIONS}
)  # fmt: skip
_ELEMENTWISE_METHODS = frozenset({"add", "sub", "mul", "div", "pow", "neg", "sigmoid", "tanh", "erf", "clamp", "relu"})


def computed_by(graph: Graph) -> Activation | None:
    """The activation that a forward's own arithmetic computes, such as `x * torch.sigmoid(x)`; None if it is none."""
    if (computed := _on_numbers(graph)) is None:
        return None
    x, y = computed
    known = [Activation(name) for name in KINDS if name != "leaky_relu"]
    slope = -y[0].item()
    if slope != 0 and math.isfinite(slope):
        known.append(Activation("leaky_relu", slope))
    return next((one for one in known if _is_close(y, one(x))), None)


def sigmoid_by(graph: Graph) -> str | None:
    """Which sigmoid a forward's own arithmetic computes, "sigmoid" or "hardsigmoid"; None if it is none."""
    if (computed := _on_numbers(graph)) is None:
        return None
    x, y = computed
    return next((f.__name__ for f in (torch.sigmoid, F.hardsigmoid) if _is_close(y, f(x))), None)


def _is_close(y: Tensor, other: Tensor) -> bool:
    return torch.allclose(y, other, rtol=1e-9, atol=1e-12)


def _on_numbers(graph: Graph) -> tuple[Tensor, Tensor] | None:
    """Runs a graph that writes over nothing in fp64, on numbers of its own, -1 first, from very small to very large.

    Returns:
        The numbers, and what it made of each; None if it is no function of single numbers.
    """
    kind: Any = {"dtype": torch.float64, "device": "cpu"}
    wide = torch.logspace(-6, 30, 721, **kind)
    x = torch.cat([torch.tensor([-1.0], **kind), torch.linspace(-12, 12, 4801, **kind), wide, -wide])
    try:
        y = _run(graph, x)
    except (RuntimeError, TypeError, ValueError):  # eager refuses it, too
        return None
    return None if y is None or y.shape != x.shape or y.dtype != x.dtype else (x, y)


def _run(graph: Graph, x: Tensor) -> Tensor | None:
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "output":
            return args[0] if isinstance(args[0], Tensor) else None
        elif node.op == "call_function" and node.target in _ELEMENTWISE:
            values[node] = node.target(*args, **kwargs)
        elif node.op == "call_method" and node.target in _ELEMENTWISE_METHODS:
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            return None
    return None
