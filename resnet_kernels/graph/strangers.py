"""Modules of classes that nobody knows, read by what their own forward does: an identity, an activation or a frozen BN.

Users copy small modules from repository to repository, under the names of well-known ones or under others: DropPath,
FrozenBatchNorm2d, a Dropout2d that drops in eval mode, too. So a name says nothing, and their forward is traced.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from ..kernels.activations import Activation
from . import activations, fusible
from .reads import Reads
from .recipe import CannotRead
from .tracing import mutates, trace

_BUFFERS = ("weight", "bias", "running_mean", "running_var")
_FUNCTIONS = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg, operator.getitem, getattr,
     torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.rsqrt, torch.sqrt, torch.reshape, F.batch_norm}
)  # fmt: skip
_METHODS = frozenset(
    {"reshape", "view", "unsqueeze", "expand", "rsqrt", "sqrt", "pow", "add", "sub", "mul", "div", "neg", "to", "type_as"}
)  # fmt: skip


class Role(NamedTuple):
    """What a stranger does. kind: "identity", "activation" or "bn"; None for anything else. activation: which one."""

    kind: str | None
    reads: Reads
    activation: Activation | None = None


def role_of(module: nn.Module, training: bool) -> Role:
    """Reads a stranger's forward, in eval or train() mode. A frozen BN's class is noted in fusible.py."""
    try:
        graph, reads, _ = trace(module, training)
    except CannotRead:
        return Role(None, Reads())
    nodes = list(graph.nodes)
    x, output = nodes[0], nodes[-1]
    result = output.args[0]
    if result is x:
        return Role("identity", reads)
    if not any(mutates(node, {}) for node in nodes if node.op != "call_module"):
        if (activation := activations.computed_by(graph)) is not None:
            return Role("activation", reads, activation)
    if (eps := _frozen_bn_eps(module, graph)) is not None:
        by_attribute = "eps" in reads.names and getattr(module, "eps", None) == eps
        fusible.note_frozen_bn(type(module), None if by_attribute else eps)
        # Calls take the eps that there is then.
        return Role("bn", replace(reads, inside=tuple(read for read in reads.inside if read.name != "eps")))
    return Role(None, reads)


def sigmoid_of(module: nn.Module, training: bool) -> tuple[str | None, Reads]:
    """Which sigmoid a stranger's forward computes, "sigmoid" or "hardsigmoid", and what it reads; None if it is none."""
    try:
        graph, reads, _ = trace(module, training)
    except CannotRead:
        return None, Reads()
    if any(mutates(node, {}) for node in graph.nodes if node.op != "call_module"):
        return None, reads
    return activations.sigmoid_by(graph), reads


def _frozen_bn_eps(module: nn.Module, graph: Graph) -> float | None:
    """The eps of a forward that is ((x - mean) / sqrt(var + eps)) * weight + bias; None if it is another one.

    The graph is run in fp64 on numbers of its own, with each constant in it as a candidate.
    """
    buffers = [module._buffers.get(name) for name in _BUFFERS]
    shapes = {None if buffer is None else tuple(buffer.shape) for buffer in buffers}
    if (
        len(shapes) != 1
        or None in shapes
        or len(next(iter(shapes)) or ()) != 1
        or module._parameters
        or module._modules
    ):
        return None
    channels = buffers[0].numel() if buffers[0] is not None else 0
    kind: Any = {"dtype": torch.float64, "device": "cpu"}
    numbers = torch.linspace(0.3, 1.7, channels, **kind)
    # A variance near eps shows which eps it is.
    values = dict(zip(_BUFFERS, (numbers, numbers.flip(0) - 1.1, numbers - 0.8, numbers * 1e-5)))
    x = torch.linspace(-2, 3, 12 * channels, **kind).sin().reshape(2, channels, 2, 3)
    y = _run(graph, x, values)
    if y is None or y.shape != x.shape:
        return None
    weight, bias, mean, var = (value.reshape(1, -1, 1, 1) for value in values.values())
    for eps in _constants(graph):
        if torch.allclose(y, (x - mean) / (var + eps).sqrt() * weight + bias, rtol=1e-9, atol=1e-9):
            return eps
    return None


def _constants(graph: Graph) -> list[float]:
    found: list[float] = []
    for node in graph.nodes:
        found += [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, float) and 0 < a < 1]
    return found


def _run(graph: Graph, x: Tensor, buffers: dict[str, Tensor]) -> Tensor | None:
    """The output of a graph of elementwise arithmetic; None if it holds anything else."""
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "get_attr" and node.target in buffers:
            values[node] = buffers[node.target].clone()
        elif node.op == "call_function" and node.target in _FUNCTIONS:
            values[node] = node.target(*args, **kwargs)
        elif node.op == "call_method" and node.target in _METHODS:
            values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
        elif node.op == "output":
            return args[0] if isinstance(args[0], Tensor) else None
        else:
            return None
    return None
