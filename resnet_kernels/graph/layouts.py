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

from . import activations
from .recipe import ContainerPlan, Recipe
from .tracing import mutates

# Their output has no layout: it has fewer dimensions, or is no tensor.
_LAST_FUNCTIONS = frozenset({torch.flatten, torch.mean, torch.sum, torch.numel, F.linear})
_LAST_METHODS = frozenset({"flatten", "mean", "sum", "size", "dim", "numel"})
_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim"})
# Their output is laid out as their input is.
_FUNCTIONS = frozenset(
    {operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.truediv, operator.getitem, torch.add,
     torch.mul, torch.cat, torch.sigmoid, F.interpolate, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
     F.adaptive_max_pool2d, *activations.FUNCTIONS}
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
    graph: Graph,
    children: Mapping[str, nn.Module],
    fused: Mapping[str, Recipe | ContainerPlan],
    members: Collection[str],
) -> Layouts:
    """Follows the layouts of values through a container's forward.

    Args:
        graph: the container's forward.
        children: its modules by path.
        fused: the plans of the fused modules in it, by path.
        members: paths of the children that belong to its runs.
    """
    readers = _Readers(children, fused, members)
    seen: list[str] = []
    apart: list[str] = []
    ours: set[Node] = set()
    for node in graph.nodes:
        is_ours = any(value in ours for value in node.all_input_nodes)
        if node.op == "placeholder":
            # Code may see that a tensor is the caller's own, so only modules may get a converted one.
            if all(r.op == "call_module" and readers.is_blind(r) and not mutates(r, children) for r in node.users):
                ours.add(node)
            else:
                seen.append("")
        elif readers.is_fused(node):
            path = readers.boundary(str(node.target))
            # A fused container inside this one looks after its own children's readers.
            outside = [r for r in node.users if not (r.op == "call_module" and readers.boundary(str(r.target)) == path)]
            plan = fused.get(path)
            if not is_ours:
                apart.append(path)
            elif isinstance(plan, ContainerPlan) and not all(plan.outputs):
                pass  # its own code has made the output
            elif all(map(readers.is_blind, outside)):
                ours.add(node)
            else:
                seen.append(path)
        elif is_ours and readers.passes_on(node):
            ours.add(node)
    output = next(node for node in graph.nodes if node.op == "output")
    outputs = tuple(leaf in ours for leaf in pytree.tree_leaves(output.args[0]))
    return Layouts(tuple(dict.fromkeys(seen)), tuple(dict.fromkeys(apart)), outputs)


class _Readers:
    """What the nodes of a forward see of the layout of their inputs."""

    def __init__(
        self,
        children: Mapping[str, nn.Module],
        fused: Mapping[str, Recipe | ContainerPlan],
        members: Collection[str],
    ):
        self._children, self._fused, self._members = children, fused, members
        self._blind: dict[Node, bool] = {}
        self.boundary = boundaries(fused)

    def is_fused(self, node: Node) -> bool:
        """Whether a node calls a fused module, or a child of a run."""
        path = str(node.target)
        return node.op == "call_module" and (self.boundary(path) in self._fused or path in self._members)

    def passes_on(self, node: Node) -> bool:
        """Whether a node computes the same from either layout, and gives its output the layout of its input."""
        if node.op == "call_module":
            child = self._children[str(node.target)]
            last = (nn.Flatten, nn.Linear, *_DRAWS)
            return type(child).__module__.startswith("torch.nn.") and not isinstance(child, last)
        return node.target in (_FUNCTIONS if node.op == "call_function" else _METHODS)

    def is_blind(self, node: Node) -> bool:
        """Whether a node computes the same from either layout, and so do all that read its output."""
        if node.op == "output":
            return True  # the container gives its output eager's layout
        if self.is_fused(node):
            plan = self._fused.get(self.boundary(str(node.target)))
            return not (isinstance(plan, ContainerPlan) and "" in plan.seen)
        if self.passes_on(node):
            if node not in self._blind:
                self._blind[node] = all(map(self.is_blind, node.users))
            return self._blind[node]
        if node.op == "call_module":
            return isinstance(self._children[str(node.target)], (nn.Flatten, nn.Linear))
        if node.op == "call_function" and node.target is getattr:
            return node.args[1] in _ATTRIBUTES
        return node.target in (_LAST_FUNCTIONS if node.op == "call_function" else _LAST_METHODS)


def boundaries(fused: Collection[str]) -> Callable[[str], str]:
    """The function that gives the outermost fused module around a path, or the path itself."""

    def boundary(path: str) -> str:
        return next((prefix for prefix in prefixes(path) if prefix in fused), path)

    return boundary


def prefixes(path: str) -> list[str]:
    """The paths of all modules around a module, the outermost first, and its own."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
