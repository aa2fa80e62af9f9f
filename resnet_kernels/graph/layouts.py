"""Which code in a container's forward sees the layout of a tensor in memory.

Inside a container values are channels_last, where eager's are contiguous. Most code computes the same from either. But
`x.view(...)`, `x.stride()` or a module of the user's may not: such readers get what eager would give them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from .tracing import mutates

# Their output has no layout: it has fewer dimensions, or is no tensor.
_LAST_FUNCTIONS = frozenset({torch.flatten, torch.mean, torch.sum, torch.numel, F.linear})
_LAST_METHODS = frozenset({"flatten", "mean", "sum", "size", "dim", "numel"})
_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim"})
# Their output is laid out as their input is.
_FUNCTIONS = frozenset(
    {operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.truediv, operator.getitem, torch.add,
     torch.mul, torch.cat, torch.relu, torch.relu_, torch.sigmoid, F.relu, F.relu_, F.interpolate, F.max_pool2d,
     F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.silu, F.gelu}
)  # fmt: skip
# They draw a number for each element, in the order in which elements lie in memory.
_DRAWS = (nn.Dropout, nn.AlphaDropout, nn.RReLU)
_METHODS = frozenset({"add", "add_", "mul", "mul_", "sub", "relu", "relu_", "sigmoid"})


class Layouts(NamedTuple):
    """Where the layout of a container's values matters.

    seen: the children whose output is read by code that sees its layout; "" stands for the container's own input.
    apart: the children whose input is not laid out as ours are: it comes from code that sees layouts.
    outputs: for each tensor that forward returns, whether it is laid out as ours are.
    """

    seen: tuple[str, ...]
    apart: tuple[str, ...]
    outputs: tuple[bool, ...]


def layouts(
    graph: Graph, children: Mapping[str, nn.Module], fused: Collection[str], members: Collection[str]
) -> Layouts:
    """Follows the layouts of values through a container's forward.

    Args:
        graph: the container's forward.
        children: its modules by path.
        fused: paths of the fused modules in it.
        members: paths of the children that belong to its runs.
    """
    boundary = boundaries(fused)
    blind: dict[Node, bool] = {}

    def is_fused(node: Node) -> bool:
        return node.op == "call_module" and (boundary(str(node.target)) in fused or node.target in members)

    def passes_on(node: Node) -> bool:
        """Whether a node computes the same from either layout, and gives its output the layout of its input."""
        if node.op == "call_module":
            child = children[str(node.target)]
            last = (nn.Flatten, nn.Linear, *_DRAWS)
            return type(child).__module__.startswith("torch.nn.") and not isinstance(child, last)
        return node.target in (_FUNCTIONS if node.op == "call_function" else _METHODS)

    def is_blind(reader: Node) -> bool:
        if reader.op == "output":
            return True  # the container gives its output eager's layout
        if is_fused(reader):
            return True
        if passes_on(reader):
            if reader not in blind:
                blind[reader] = all(map(is_blind, reader.users))
            return blind[reader]
        if reader.op == "call_module":
            return isinstance(children[str(reader.target)], (nn.Flatten, nn.Linear))
        if reader.op == "call_function" and reader.target is getattr:
            return reader.args[1] in _ATTRIBUTES
        return reader.target in (_LAST_FUNCTIONS if reader.op == "call_function" else _LAST_METHODS)

    seen: list[str] = []
    apart: list[str] = []
    ours: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            # Code may see that a tensor is the caller's own, so only modules may get a converted one.
            if all(r.op == "call_module" and is_blind(r) and not mutates(r, dict(children)) for r in node.users):
                ours.add(node)
            else:
                seen.append("")
        elif is_fused(node):
            path = boundary(str(node.target))
            if not any(value in ours for value in node.all_input_nodes):
                apart.append(path)
                continue
            # A fused container inside this one looks after its own children's readers.
            readers = [r for r in node.users if not (r.op == "call_module" and boundary(str(r.target)) == path)]
            if all(map(is_blind, readers)):
                ours.add(node)
            else:
                seen.append(path)
        elif passes_on(node) and any(value in ours for value in node.all_input_nodes):
            ours.add(node)
    output = next(node for node in graph.nodes if node.op == "output")
    outputs = tuple(leaf in ours for leaf in pytree.tree_leaves(output.args[0]))
    return Layouts(tuple(dict.fromkeys(seen)), tuple(dict.fromkeys(apart)), outputs)


def boundaries(fused: Collection[str]) -> Callable[[str], str]:
    """The function that gives the outermost fused module around a path, or the path itself."""

    def boundary(path: str) -> str:
        parts = path.split(".")
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts)))
        return next((prefix for prefix in prefixes if prefix in fused), path)

    return boundary
