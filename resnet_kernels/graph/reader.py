"""Reading a module: which convolutions, BNs, adds and activations its forward runs, in which order, as data.

Nothing is assumed about a block. Its own forward is traced with torch.fx on a shallow copy, so the recipe holds whatever
the author wrote: the stride on the 1x1, biases, a pooled shortcut, other names.

    Recipe          a residual block, or an nn.Sequential of convolutions, whose whole forward consists of our steps:
                        conv1+bn1+relu -> conv2+bn2+relu -> downsample.0+downsample.1 -> conv3+bn3+add+relu
    ContainerPlan   any other module, such as the network itself: only runs of conv+bn+activation among its own children, each
                    called once and read by nobody else (the stem), with the max-pool that may follow. The rest of its
                    forward stays Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from torch.fx import Node

from ..kernels.activations import Activation
from . import activations
from .container_plan import changes_nothing, container_plan, reads_of_child
from .fusible import (
    NOT_MATERIALIZED,
    activation_behind,
    is_batch_norm,
    is_called,
    is_known,
    is_not_materialized,
    is_quiet,
    is_wrapper,
    signature,
    why_not_bn,
    why_not_conv,
    why_not_patched,
)
from .group_steps import Operation, group, schedule
from .reads import NOTHING, Read, Reads, described
from .recipe import CannotRead, ContainerPlan, Recipe
from .strangers import role_of
from .tracing import is_add, mutates, trace


class Reader:
    """A module, and its forward as a graph."""

    def __init__(self, module: nn.Module, training: bool = False, into_wrappers: bool = False):
        self.module = module
        self.training = training
        self.graph, self.reads = trace(module, training, into_wrappers)
        self.children = dict(module.named_modules())

    def is_residual(self) -> bool:
        """Whether the forward adds two values, as a residual block's does."""
        return any(is_add(node) for node in self.graph.nodes)

    def has_own_conv(self) -> bool:
        """Whether the forward itself calls a convolution."""
        return any(
            node.op == "call_module" and isinstance(self.children[node.target], nn.modules.conv._ConvNd)
            for node in self.graph.nodes
        )

    def has_wrappers(self) -> bool:
        """Whether a child is a convolution, norm and activation under one name."""
        return any(child is not None and is_wrapper(child) for child in self.module._modules.values())

    def recipe(self) -> Recipe:
        """The module's whole forward as steps.

        Raises:
            CannotRead: if a part of the forward is none of our steps.
        """
        # Only what is seen as a whole is sure to be a block: the network itself keeps its wrappers.
        into_wrappers = self.has_wrappers()
        recipe = _recipe(Reader(self.module, into_wrappers=True) if into_wrappers else self)
        try:
            training = _recipe(Reader(self.module, True, into_wrappers))
        except CannotRead:
            return replace(recipe, trains=False)
        assert recipe.reads is not None and training.reads is not None
        return replace(recipe, trains=training == recipe, reads=recipe.reads + training.reads)

    def container_plan(self, fused: Sequence[tuple[nn.Module, Recipe | ContainerPlan]] = ()) -> ContainerPlan:
        """The runs of conv+bn+activation(+max-pool) among the module's own children.

        Args:
            fused: the fused modules in it, with their plans.
        """
        plan = container_plan(self.module, self.graph, self.children, self.reads, fused)
        if not (plan.runs or fused):
            return plan  # nothing to gain: the rest needn't be known
        quiet = changes_nothing(plan, self.children, [module for module, _ in fused])
        try:
            training = Reader(self.module, True)
        except CannotRead:
            return replace(plan, trains=False, quiet=quiet)
        other = container_plan(self.module, training.graph, self.children, training.reads, fused)
        return replace(plan, trains=other == plan, quiet=quiet, reads=self.reads + training.reads)


def _recipe(reader: Reader) -> Recipe:
    nodes = list(reader.graph.nodes)
    x = next(node for node in nodes if node.op == "placeholder")
    output = next(node for node in nodes if node.op == "output")
    result = output.args[0]
    if not isinstance(result, Node):
        raise CannotRead("its forward returns more than one tensor")
    # Identities vanish: `source` is the node that computed a value.
    source: dict[Node, Node] = {}
    operations: dict[Node, Operation] = {}
    reads = reader.reads
    for node in nodes:
        source[node] = node
        if node.op in ("placeholder", "output"):
            continue
        kind, seen, activation = _kind(node, reader)
        reads += seen
        inputs = _inputs(node, kind, source)
        if kind == "identity":
            source[node] = inputs[0]
            continue
        path = str(node.target) if node.op == "call_module" else ""
        operations[node] = Operation(kind, path, inputs, activation)
    reads += Reads(_check_mutation(nodes, x, source, reader.children), NOTHING)
    readers = Counter(argument for operation in operations.values() for argument in operation.inputs)
    readers[source[result]] += 1  # the caller
    steps, number = schedule(group(operations, readers), x, source[result])
    modules = sorted({str(node.target) for node in nodes if node.op == "call_module"})
    around = sorted({".".join(path.split(".")[:i]) for path in modules for i in range(1, path.count(".") + 1)})
    return Recipe(steps, number, (*modules, *around), signature(reader.module), reads=reads)


def _kind(node: Node, reader: Reader) -> tuple[str, Reads, Activation | None]:
    """The kind of a node's operation, what it rests on, and its activation if it is or ends in one.

    Kinds are "conv", "bn", "activation", "add", "call" and "identity".
    """
    nothing = Reads((), NOTHING)
    if node.op == "call_module":
        return _kind_of_module(node, reader)
    if (activation := activations.of_node(node)) is not None:
        return "activation", nothing, activation
    if is_add(node):
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
            raise CannotRead(f"its add has other arguments than two tensors ({node.format_node()})")
        return "add", nothing, None
    if node.op == "get_attr":
        raise CannotRead(f"its forward reads the attribute {node.target}")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    raise CannotRead(f"its forward calls {name}")


def _kind_of_module(node: Node, reader: Reader) -> tuple[str, Reads, Activation | None]:
    path = str(node.target)
    child = reader.children[path]
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
    if is_known(child):
        activation = activation_behind(child) if is_bn else activations.of_module(child)
        kind = "bn" if is_bn else "activation" if activation else "identity" if is_quiet(child) else None
    else:
        kind, more, activation = role_of(child, reader.training)
        seen += more.below(path)
    if kind is not None:
        return kind, seen, activation
    if is_called(child):
        return "call", seen, None
    if is_not_materialized(child):
        raise CannotRead(f"{path} {NOT_MATERIALIZED}")
    what = "norm" if "norm" in type(child).__name__.lower() else "module"
    raise CannotRead(f"{path} is a {type(child).__name__}, a {what} that is not fused")


def _inputs(node: Node, kind: str, source: dict[Node, Node]) -> tuple[Node, ...]:
    arguments = node.args[: 2 if kind == "add" else 1]
    nodes = tuple(source[argument] for argument in arguments if isinstance(argument, Node))
    if len(nodes) < len(arguments):
        raise CannotRead(f"its forward computes with a constant ({node.format_node()})")
    return nodes


def _check_mutation(
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


def read(module: nn.Module) -> Reader:
    """Traces a module in eval mode.

    Raises:
        CannotRead: with the reason, as the report shows it.
    """
    return Reader(module)
