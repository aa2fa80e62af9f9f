"""Squeeze-and-excitation: an image times a number a channel, which a few small convolutions make of its average.

Source: Hu et al., Squeeze-and-Excitation Networks (2018), section 3. Where convolutions make it, as in torchvision and timm,
averages and products are steps of a recipe. Elsewhere (linear layers, a convolution over channels) they stay operations of a
mixed forward.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from . import activations
from .fusible import is_batch_norm, is_global_average, is_known, is_quiet, why_not_bn, why_not_conv, why_not_patched
from .reads import NOTHING, Reads
from .recipe import CannotRead
from .strangers import role_of, sigmoid_of
from .tracing import is_identity, trace

_MODULES: dict[type[nn.Module], str] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"}
_FUNCTIONS: dict[Any, str] = {torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.hardsigmoid: "hardsigmoid"}
# More modules than a squeeze-and-excitation has.
_MOST_MODULES = 12


class Gates(NamedTuple):
    """The squeeze-and-excitations of a forward.

    kinds: "mean", "sigmoid", "hardsigmoid" or "mul" of each of their nodes that is nothing else's. inside: all of their nodes.
    factors: of each product, the node that multiplies the image. reads: what their sigmoids rest on.
    """

    kinds: dict[Node, str]
    inside: set[Node]
    factors: dict[Node, Node]
    reads: Reads


def find_gates(graph: Graph, children: Mapping[str, nn.Module], training: bool) -> Gates:
    """Finds the squeeze-and-excitations of a forward."""
    found = Gates({}, set(), {}, Reads((), NOTHING))
    for node in graph.nodes:
        if _is_product(node):
            for factor in node.args[::-1]:
                if (own := _gate(factor, node, children, training)) is not None:
                    found.kinds.update(own.kinds)
                    found.inside.update(own.inside)
                    found.factors.update(own.factors)
                    found = found._replace(reads=found.reads + own.reads)
                    break
    return found


def is_gate(module: nn.Module) -> bool:
    """Whether a module's forward multiplies its input by what convolutions make of the input's average."""
    if is_known(module) or len(list(module.modules())) > _MOST_MODULES:
        return False
    if not any(isinstance(child, nn.Conv2d) for child in module.modules()):
        return False
    try:
        graph = trace(module, False).graph
    except CannotRead:
        return False
    x = next(node for node in graph.nodes if node.op == "placeholder")
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    factors = find_gates(graph, dict(module.named_modules()), False).factors
    return isinstance(result, Node) and result in factors and x in result.args


def averages_images(node: Node, keeps: bool = True) -> bool:
    """Whether a function or a method averages x over an image's pixels. keeps: only if it keeps both dimensions."""
    if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        return node.args[1:] in ((1,), ((1, 1),)) and not node.kwargs
    is_mean = (node.op, node.target) == ("call_method", "mean") or (
        node.op == "call_function" and node.target is torch.mean
    )
    if not is_mean:
        return False
    given = dict(zip(("x", "dim", "keepdim"), node.args)) | node.kwargs
    dims = given.pop("dim", None)
    axes = sorted(d % 4 for d in dims) if isinstance(dims, (tuple, list)) and all(type(d) is int for d in dims) else []
    if not keeps:
        given["keepdim"] = True
    return axes == [2, 3] and given == {"x": node.args[0], "keepdim": True}


def _is_product(node: Node) -> bool:
    is_mul = (node.op == "call_function" and node.target in (operator.mul, torch.mul)) or (
        (node.op, node.target) == ("call_method", "mul")
    )
    return is_mul and len(node.args) == 2 and not node.kwargs and all(isinstance(a, Node) for a in node.args)


def _gate(factor: Any, product: Node, children: Mapping[str, nn.Module], training: bool) -> Gates | None:
    """The nodes that make a product's factor of averages; None if something else makes it, or others read what they make."""
    found, todo, averages = Gates({product: "mul"}, set(), {product: factor}, Reads((), NOTHING)), [factor], 0
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node.op not in ("call_module", "call_function", "call_method"):
            return None
        if node in found.inside:
            continue
        found.inside.add(node)
        if averages_images(node) or _is_average_module(node, children):
            averages += 1
            if node.op != "call_module":
                found.kinds[node] = "mean"
            continue
        kind, reads = _sigmoid(node, children, training)
        if kind is not None and node is factor:
            found.kinds[node] = kind
            found = found._replace(reads=found.reads + reads)
        elif not _is_small_step(node, children, training):
            return None
        todo += node.args[:1]  # type: ignore[arg-type]  # asked above
    are_read = any(user is not product and user not in found.inside for node in found.inside for user in node.users)
    return found if averages and not are_read else None


def _is_average_module(node: Node, children: Mapping[str, nn.Module]) -> bool:
    if node.op != "call_module":
        return False
    child = children[str(node.target)]
    return is_global_average(child) and why_not_patched(child) is None


def _sigmoid(node: Node, children: Mapping[str, nn.Module], training: bool) -> tuple[str | None, Reads]:
    """Which sigmoid a node is, if any, and what that rests on."""
    nothing = Reads((), NOTHING)
    if len(node.all_input_nodes) != 1:
        return None, nothing
    if node.op == "call_module":
        path = str(node.target)
        child = children[path]
        if type(child) in _MODULES:
            return (None if why_not_patched(child) else _MODULES[type(child)]), nothing
        if is_known(child) or len(node.args) != 1 or node.kwargs:
            return None, nothing
        kind, reads = sigmoid_of(child, training)
        return kind, reads.below(path)
    if node.op == "call_method":
        return ("sigmoid" if node.target in ("sigmoid", "sigmoid_") else None), nothing
    return _FUNCTIONS.get(node.target), nothing


def _is_small_step(node: Node, children: Mapping[str, nn.Module], training: bool) -> bool:
    """Whether a node is a convolution, a BN, an activation, or passes its input on."""
    if len(node.all_input_nodes) != 1:
        return False
    if node.op != "call_module":
        try:
            return is_identity(node) or activations.of_node(node) is not None
        except CannotRead:
            return False
    child = children[str(node.target)]
    if isinstance(child, nn.modules.conv._ConvNd):
        return why_not_conv(child) is None
    if is_batch_norm(child):
        return why_not_bn(child) is None
    if is_known(child):
        return is_quiet(child) or activations.of_module(child) is not None
    return role_of(child, training).kind in ("identity", "activation")
