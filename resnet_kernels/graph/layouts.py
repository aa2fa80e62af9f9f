"""Which code in a container's forward sees the layout of a tensor in memory.

Inside a container values are channels_last, where eager's are contiguous. Most code computes the same from either. But
`x.view(...)`, `x.stride()` or a module of the user's may not: such readers get what eager would give them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping

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


def seen_outputs(
    graph: Graph, children: Mapping[str, nn.Module], fused: Collection[str], members: Collection[str]
) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """The children whose output is read by code that sees its layout, and which outputs of the container are channels_last.

    Args:
        graph: the container's forward.
        children: its modules by path.
        fused: paths of the fused modules in it.
        members: paths of the children that belong to its runs.

    Returns:
        Paths, with "" for the container's own input; and for each tensor that forward returns, whether it has to be
        converted to eager's layout.
    """
    boundary = boundaries(fused)
    blind: dict[Node, bool] = {}

    def all_blind(node: Node) -> bool:
        """Whether no reader of a node sees its layout."""
        if node not in blind:
            blind[node] = True  # a loop can't be: graphs are in order
            blind[node] = all(is_blind(reader, node) for reader in node.users)
        return blind[node]

    def is_blind(reader: Node, node: Node) -> bool:
        if node.op == "placeholder" and (reader.op == "output" or mutates(reader, dict(children))):
            return False  # it has to be the caller's own tensor
        if reader.op == "output":
            return True  # the container gives its output eager's layout
        if reader.op == "call_module":
            path = str(reader.target)
            if boundary(path) in fused or path in members:
                return True
            child = children[path]
            if not type(child).__module__.startswith("torch.nn.") or isinstance(child, _DRAWS):
                return False
            return isinstance(child, (nn.Flatten, nn.Linear)) or all_blind(reader)
        if reader.op == "call_function":
            if reader.target is getattr:
                return reader.args[1] in _ATTRIBUTES
            return reader.target in _LAST_FUNCTIONS or (reader.target in _FUNCTIONS and all_blind(reader))
        return reader.target in _LAST_METHODS or (reader.target in _METHODS and all_blind(reader))

    seen = []
    for node in graph.nodes:
        if node.op == "placeholder":
            path = ""
        elif node.op == "call_module" and (boundary(str(node.target)) in fused or node.target in members):
            path = boundary(str(node.target))
        else:
            continue
        # A fused container inside this one looks after its own children's readers.
        readers = [r for r in node.users if not (path and r.op == "call_module" and boundary(str(r.target)) == path)]
        if not all(is_blind(reader, node) for reader in readers):
            seen.append(path)

    def is_internal(node: object) -> bool:
        """Whether a value is laid out as ours are."""
        if not isinstance(node, Node):
            return False
        if node.op == "call_module":
            path = str(node.target)
            if boundary(path) in fused or path in members:
                return boundary(path) not in seen
            if not type(children[path]).__module__.startswith("torch.nn."):
                return False
        elif node.op == "placeholder":
            return "" not in seen
        elif node.target not in _FUNCTIONS and node.target not in _METHODS:
            return False
        return any(map(is_internal, node.all_input_nodes))

    output = next(node for node in graph.nodes if node.op == "output")
    outputs = tuple(is_internal(leaf) for leaf in pytree.tree_leaves(output.args[0]))
    return tuple(dict.fromkeys(seen)), outputs


def boundaries(fused: Collection[str]) -> Callable[[str], str]:
    """The function that gives the outermost fused module around a path, or the path itself."""

    def boundary(path: str) -> str:
        parts = path.split(".")
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts)))
        return next((prefix for prefix in prefixes if prefix in fused), path)

    return boundary
