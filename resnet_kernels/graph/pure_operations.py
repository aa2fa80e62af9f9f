"""PyTorch's functions and methods that do nothing but compute, and what is known about tensors that they write over."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from .fusible import is_known
from .recipe import CannotRead
from .tracing import mutates, trace

# Functions and methods without side effects, by the names under which instructions keep them.
_OPERATORS = "add sub mul truediv floordiv mod neg pow getitem iadd imul isub eq ne lt le gt ge"
_TORCH = (
    "abs add addcmul amax amin cat chunk clamp div einsum exp flatten logsumexp matmul max mean min mul narrow permute pow "
    "relu relu_ reshape rsqrt sigmoid softmax split sqrt squeeze stack std sub sum tanh transpose unbind unsqueeze var"
)
_FUNCTIONAL = (
    "adaptive_avg_pool2d adaptive_max_pool2d avg_pool2d conv2d elu gelu glu group_norm hardsigmoid hardswish hardtanh "
    "interpolate layer_norm leaky_relu linear log_softmax max_pool2d mish normalize pad pixel_shuffle prelu relu relu6 relu_ "
    "selu sigmoid silu softmax softplus tanh unfold"
)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH.split()},
    **{f"F.{name}": getattr(F, name) for name in _FUNCTIONAL.split()},
    "getattr": getattr,
}
METHODS = frozenset(
    "abs add add_ amax amin chunk clamp contiguous dim div div_ exp expand expand_as flatten float max mean min mul mul_ "
    "narrow permute pow relu relu_ repeat reshape sigmoid sigmoid_ size softmax split sqrt squeeze std sub sub_ sum tanh "
    "transpose type_as unbind unflatten unsqueeze var view view_as".split()
)
NAMES = {id(function): name for name, function in FUNCTIONS.items()}
# What makes a tensor of its own, so that another operation may write over it.
_MAKES_NEW = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div, torch.cat,
     torch.stack, torch.mean, torch.relu, torch.sigmoid, torch.softmax, F.relu, F.interpolate, F.max_pool2d, F.avg_pool2d,
     F.silu, F.gelu, F.leaky_relu}
)  # fmt: skip
_METHODS_THAT_MAKE = frozenset({"add", "sub", "mul", "div", "mean", "sum", "relu", "sigmoid", "softmax", "tanh"})
_MAKERS = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, nn.AvgPool2d, nn.MaxPool2d, nn.ReLU, nn.Sigmoid
)  # fmt: skip


def writes_nothing(module: nn.Module) -> bool:
    """Whether a module's forward can be read, and writes over no value but those that it makes."""
    try:
        graph = trace(module, False).graph
    except CannotRead:
        return False
    children = dict(module.named_modules())
    for node in graph.nodes:
        if node.op == "call_module" and not is_known(child := children[str(node.target)]) and not writes_nothing(child):
            return False
        if mutates(node, children) and not (isinstance(node.args[0], Node) and is_new(node.args[0], children)):
            return False
    return True


def is_new(node: Node, children: Mapping[str, nn.Module]) -> bool:
    """Whether a node's value is a tensor that the forward has made, and no view of another one."""
    if mutates(node, children):
        return isinstance(node.args[0], Node) and is_new(node.args[0], children)
    if node.op == "call_module":
        return isinstance(children[str(node.target)], _MAKERS)
    return (node.op == "call_function" and node.target in _MAKES_NEW) or (
        node.op == "call_method" and node.target in _METHODS_THAT_MAKE
    )
