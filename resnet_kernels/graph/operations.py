"""The operations of a forward: which of a graph's nodes are convolutions, BNs, activations, adds and pools of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from ..kernels.activations import Activation
from . import activations
from .fusible import (
    NOT_MATERIALIZED,
    activation_behind,
    has_act,
    is_batch_norm,
    is_called,
    is_known,
    is_not_materialized,
    is_plain_max_pool,
    is_prelu,
    is_quiet,
    why_not_bn,
    why_not_conv,
    why_not_patched,
)
from .gates import Gates
from .group_steps import Operation
from .own_conv import is_own_conv, own_conv_path
from .reads import NOTHING, Read, Reads, described
from .recipe import CannotRead, PReLUAt
from .strangers import role_of
from .tracing import is_add, is_identity, mutates


def reads_of_child(path: str, child: nn.Module) -> tuple[Read, ...]:
    """The settings of a convolution, an activation or a pool without which it could not be fused as it was."""
    names = (
        ("padding_mode",) if isinstance(child, nn.Conv2d) else ("return_indices",) if is_plain_max_pool(child) else ()
    )
    found = [(path, child, name) for name in (*names, *activations.settings_of(child))]
    if has_act(child) and (act := child._modules["act"]) is not None:
        found += [(f"{path}.act", act, name) for name in activations.settings_of(act)]
    return tuple(Read(where, name, described(getattr(owner, name), frozenset())) for where, owner, name in found)


def is_of_own_conv(node: Node) -> bool:
    """Whether a node is a weight or a bias that only convolutions read."""
    return node.op == "get_attr" and all(map(is_own_conv, node.users))


def operation_of(
    node: Node, children: Mapping[str, nn.Module], source: Mapping[Node, Node], training: bool, gates: Gates
) -> tuple[Operation, Reads]:
    """The operation of a node, of kind "identity" if it passes its input on, and what it rests on.

    Args:
        node: a call, of a module or a function.
        children: the module's children by path.
        source: the node that computed a value, by the nodes that pass it on.
        training: whether the forward is the one in train() mode.
        gates: the squeeze-and-excitations of the forward.

    Raises:
        CannotRead: it is none of ours.
    """
    seen, path = Reads((), NOTHING), ""
    activation: Activation | PReLUAt | None = None
    if (found := gates.kinds.get(node)) is not None:
        inputs = _inputs(node, found, source)
        if found == "mul" and source[gates.factors[node]] is inputs[0]:
            inputs = inputs[::-1]
        return Operation(found, str(node.target) if node.op == "call_module" else "", inputs), seen
    if node.op == "call_module":
        path = str(node.target)
        kind, seen, activation = _kind_of_module(node, children, training)
    elif is_own_conv(node):
        kind = "conv"
        path, seen = _own_conv(node, children)
    elif (activation := activations.of_node(node)) is not None:
        kind = "activation"
    else:
        kind = _kind_of_function(node)
    return Operation(kind, path, _inputs(node, kind, source), activation), seen


def _own_conv(node: Node, children: Mapping[str, nn.Module]) -> tuple[str, Reads]:
    """The Conv2d whose own code calls torch.conv2d, by path, and what that rests on."""
    path = own_conv_path(node, children)
    if path is None:
        raise CannotRead("its forward calls conv2d on other tensors than a Conv2d's, or with other settings")
    return path, Reads(reads_of_child(path, children[path]), NOTHING)


def _kind_of_function(node: Node) -> str:
    if is_identity(node):
        return "identity"
    if is_add(node):
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
            raise CannotRead(f"its add has other arguments than two tensors ({node.format_node()})")
        return "add"
    if node.op == "get_attr":
        raise CannotRead(f"its forward reads the attribute {node.target}")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    raise CannotRead(f"its forward calls {name}")


def _kind_of_module(
    node: Node, children: Mapping[str, nn.Module], training: bool
) -> tuple[str, Reads, Activation | PReLUAt | None]:
    """The kind of a called module, what it rests on, and its activation if it is or ends in one."""
    path = str(node.target)
    child = children[path]
    if len(node.args) != 1 or node.kwargs:
        raise CannotRead(f"{path} is called with more than one argument")
    is_conv = isinstance(child, nn.modules.conv._ConvNd)
    is_bn = not is_conv and is_batch_norm(child)
    reason = why_not_conv(child) if is_conv else why_not_bn(child) if is_bn else activations.why_not(child)
    reason = reason or why_not_patched(child)
    if reason:
        raise CannotRead(f"{path} {reason}")
    seen = Reads(reads_of_child(path, child), NOTHING)
    if is_conv:
        return "conv", seen, None
    kind: str | None
    activation: Activation | PReLUAt | None
    if is_prelu(child):
        kind, activation = "activation", PReLUAt(path)
    elif is_known(child):
        activation = activation_behind(child) if is_bn else activations.of_module(child)
        kind = "bn" if is_bn else "activation" if activation else "identity" if is_quiet(child) else None
    else:
        kind, more, activation = role_of(child, training)
        seen += more.below(path)
    if kind is not None:
        return kind, seen, activation
    if is_called(child):
        return "call", seen, None
    if is_not_materialized(child):
        raise CannotRead(f"{path} {NOT_MATERIALIZED}")
    what = "norm" if "norm" in type(child).__name__.lower() else "module"
    raise CannotRead(f"{path} is a {type(child).__name__}, a {what} that is not fused")


def _inputs(node: Node, kind: str, source: Mapping[Node, Node]) -> tuple[Node, ...]:
    arguments = node.args[: 2 if kind in ("add", "mul") else 1]
    nodes = tuple(source[argument] for argument in arguments if isinstance(argument, Node))
    if len(nodes) < len(arguments):
        raise CannotRead(f"its forward computes with a constant ({node.format_node()})")
    return nodes


def check_mutation(
    nodes: list[Node], x: Node, source: dict[Node, Node], children: dict[str, nn.Module]
) -> tuple[Read, ...]:
    """Refuses in-place operations on values that something else reads: a recipe has no aliasing.

    Returns:
        The `inplace` of the modules that could do so, if they were switched.
    """
    readers = Counter(source[i] for node in nodes if source[node] is node for i in node.all_input_nodes)
    switches = []
    for node in nodes:
        if node.op not in ("call_module", "call_function", "call_method") or not node.args:
            continue
        target = node.args[0]
        if isinstance(target, Node) and (source[target] is x or readers[source[target]] > 1):
            if mutates(node, children):
                raise CannotRead(f"{node.target} writes over a value that is used elsewhere")
            if node.op == "call_module" and hasattr(children[str(node.target)], "inplace"):
                inplace = children[str(node.target)].inplace
                switches.append(Read(str(node.target), "inplace", described(inplace, frozenset())))
    return tuple(switches)


def is_average(node: Node, children: Mapping[str, nn.Module]) -> bool:
    """Whether a node averages whole images, down to one pixel."""
    if node.op == "call_module":
        child = children[str(node.target)]
        return isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size in (1, (1, 1))
    if node.target is F.adaptive_avg_pool2d:
        return node.args[1:] in ((1,), ((1, 1),))
    return node.op in ("call_function", "call_method") and node.target in (torch.mean, "mean")


def small_convolutions(graph: Graph, children: Mapping[str, nn.Module]) -> list[str]:
    """The paths of the convolutions whose input is made of averages of whole images: there is nothing to gain in them."""
    small: set[Node] = set()
    found = []
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if is_average(node, children) or (inputs and all(i in small for i in inputs)):
            small.add(node)
            if node.op == "call_module" and isinstance(children[str(node.target)], nn.modules.conv._ConvNd):
                found.append(str(node.target))
    return found
