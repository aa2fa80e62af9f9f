"""Which code in a container's forward sees the layout of a tensor in memory.

Inside a container values are channels_last, where eager's are contiguous. Most code computes the same from either. But
`x.view(...)`, `x.stride()` or a module of the user's may not: such readers get what eager would give them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from . import activations
from .gates import averages_images
from .reads import NOTHING, Reads
from .recipe import CannotRead, ContainerPlan, Recipe
from .tracing import mutates, trace

# Their output has no layout: it has fewer dimensions, or is no tensor.
_LAST_FUNCTIONS = frozenset({torch.flatten, torch.mean, torch.numel, F.linear})
_LAST_METHODS = frozenset({"flatten", "mean", "size", "dim", "numel"})
ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim"})
# Their output is laid out as their input is, or may be: giving it eager's layout once more changes nothing.
_FUNCTIONS = frozenset(
    {operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.truediv, operator.getitem, torch.add,
     torch.mul, torch.cat, torch.split, torch.chunk, torch.narrow, torch.stack, torch.sum, torch.reshape, torch.sigmoid,
     F.interpolate, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, *activations.FUNCTIONS}
)  # fmt: skip
# They draw a number for each element, in the order in which elements lie in memory.
_DRAWS = (nn.Dropout, nn.AlphaDropout, nn.RReLU)
_METHODS = frozenset(
    "add add_ mul mul_ sub relu relu_ sigmoid split chunk narrow sum reshape expand_as".split()
)  # fmt: skip


def is_made_contiguous(node: Node) -> bool:
    """Whether a node is `x.contiguous()`, which changes nothing but the layout."""
    return (node.op, node.target) == ("call_method", "contiguous") and len(node.args) == 1 and not node.kwargs


def is_number(value: Any) -> bool:
    """Whether a value is no tensor, but a constant, a shape or what is computed from one."""
    if not isinstance(value, Node):
        return True
    if value.op == "call_method":
        return value.target in ("size", "dim", "numel")
    if value.op != "call_function":
        return False
    if value.target is getattr:
        return value.args[1] in ATTRIBUTES
    return bool(value.all_input_nodes) and all(map(is_number, value.all_input_nodes))


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
    readers = LayoutView(children, fused, members)
    seen: list[str] = []
    apart: list[str] = []
    ours: set[Node] = set()
    for node in graph.nodes:
        is_ours = any(value in ours for value in node.all_input_nodes)
        if node.op == "placeholder":
            # Code may see that a tensor is the caller's own, so only modules may get a converted one.
            if all(r.op == "call_module" and readers.reads_blind(r) and not mutates(r, children) for r in node.users):
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
            elif all(map(readers.reads_blind, outside)):
                ours.add(node)
            else:
                seen.append(path)
        elif is_ours and readers.passes_on(node):
            ours.add(node)
    output = next(node for node in graph.nodes if node.op == "output")
    outputs = tuple(leaf in ours for leaf in pytree.tree_leaves(output.args[0]))
    return Layouts(tuple(dict.fromkeys(seen)), tuple(dict.fromkeys(apart)), outputs)


class LayoutView:
    """What the nodes of a forward see of the layout of their inputs.

    Args:
        children: the module's children by path.
        fused: the plans of the fused modules in it, by path.
        members: paths of the children that belong to its runs.
        into: whether to look into users' modules, too. `looked_into` then has the paths of those that see no layouts, and
            `reads` what their forwards read.
    """

    def __init__(
        self,
        children: Mapping[str, nn.Module],
        fused: Mapping[str, Recipe | ContainerPlan],
        members: Collection[str] = (),
        into: bool = False,
    ):
        self._children, self._fused, self._members, self._into = children, fused, members, into
        self._reads_blind: dict[Node, bool] = {}
        self._single: dict[Node, bool] = {}
        self._modules: dict[str, tuple[bool, bool]] = {}
        self.boundary = boundaries(fused)
        self.looked_into: set[str] = set()
        self.reads = Reads((), NOTHING)

    def is_fused(self, node: Node) -> bool:
        """Whether a node calls a fused module, or a child of a run."""
        path = str(node.target)
        return node.op == "call_module" and (self.boundary(path) in self._fused or path in self._members)

    def passes_on(self, node: Node) -> bool:
        """Whether a node computes the same from either layout, and gives its output the layout of its input."""
        if node.op != "call_module":
            return node.target in (_FUNCTIONS if node.op == "call_function" else _METHODS) or is_made_contiguous(node)
        child = self._children[str(node.target)]
        if type(child).__module__.startswith("torch.nn."):
            return not isinstance(child, (nn.Flatten, nn.Linear, *_DRAWS))
        return self._seen_by(str(node.target))[1]

    def is_blind(self, node: Node) -> bool:
        """Whether a node computes the same from either layout."""
        if node.op == "output":
            return True  # the container gives its output eager's layout
        if self.is_fused(node):
            plan = self._fused.get(self.boundary(str(node.target)))
            return not (isinstance(plan, ContainerPlan) and "" in plan.seen)
        if self.passes_on(node) or self._is_of_single_pixels(node) or is_number(node):
            return True
        if node.op == "call_module":
            child = self._children[str(node.target)]
            return isinstance(child, (nn.Flatten, nn.Linear)) or self._seen_by(str(node.target))[0]
        if node.op == "call_function" and node.target is getattr:
            return node.args[1] in ATTRIBUTES
        return node.target in (_LAST_FUNCTIONS if node.op == "call_function" else _LAST_METHODS)

    def _is_of_single_pixels(self, node: Node) -> bool:
        """Whether all that an operation reads are averages of images, or made of them: these lie alike in both layouts."""
        if node not in self._single:
            inputs = node.all_input_nodes
            reads = [i for i in inputs if not is_number(i)]
            is_operation = node.op in ("call_function", "call_method", "call_module")
            self._single[node] = (
                is_operation
                and bool(reads)
                and all(averages_images(i, False) or self._is_of_single_pixels(i) for i in reads)
            )
        return self._single[node]

    def reads_blind(self, node: Node) -> bool:
        """Whether a node, and all that read what it passes on, compute the same from either layout."""
        if self.is_fused(node) or not self.passes_on(node):
            return self.is_blind(node)
        if node not in self._reads_blind:
            self._reads_blind[node] = all(map(self.reads_blind, node.users))
        return self._reads_blind[node]

    def _seen_by(self, path: str) -> tuple[bool, bool]:
        """Whether a user's module computes the same from either layout, and whether its output has that of its input."""
        if path not in self._modules:
            self._modules[path] = self._look_into(path) if self._into else (False, False)
        return self._modules[path]

    def _look_into(self, path: str) -> tuple[bool, bool]:
        module = self._children[path]
        try:
            graph, reads, _ = trace(module, False)
        except CannotRead:
            return False, False
        view = LayoutView(dict(module.named_modules()), {}, into=True)
        passed: set[Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder":
                passed.add(node)
            elif node.op not in ("output", "get_attr"):
                if not view.is_blind(node):
                    return False, False
                if view.passes_on(node) and not passed.isdisjoint(node.all_input_nodes):
                    passed.add(node)
        self.looked_into.add(path)
        self.reads += (reads + view.reads).below(path)
        result = next(reversed(graph.nodes)).args[0]
        return True, isinstance(result, Node) and result in passed


def boundaries(fused: Collection[str]) -> Callable[[str], str]:
    """The function that gives the outermost fused module around a path, or the path itself."""

    def boundary(path: str) -> str:
        return next((prefix for prefix in prefixes(path) if prefix in fused), path)

    return boundary


def prefixes(path: str) -> list[str]:
    """The paths of all modules around a module, the outermost first, and its own."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
