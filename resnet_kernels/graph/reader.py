"""Reading a module: which convolutions, BNs, adds and activations its forward runs, in which order, as data.

Nothing is assumed about a block. Its own forward is traced with torch.fx on a shallow copy, so the recipe holds whatever
the author wrote: the stride on the 1x1, biases, a pooled shortcut, other names.

    Recipe          a residual block, or an nn.Sequential of convolutions, whose whole forward consists of our steps:
                        conv1+bn1+relu -> conv2+bn2+relu -> downsample.0+downsample.1 -> conv3+bn3+add+relu
    ContainerPlan   any other module, such as the network itself: only runs of conv+bn+activation among its own children, each
                    called once and read by nobody else (the stem), with the max-pool that may follow. The rest of its
                    forward stays Python. Or, for a block with other operations in it, the whole forward as instructions
                    (mixed_plan.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from torch.fx import Node

from .container_plan import changes_nothing, container_plan
from .fusible import is_wrapper, signature
from .gates import find_gates, is_gate
from .group_steps import Operation, group, schedule
from .mixed_plan import mixed_plan
from .operations import check_mutation, is_of_own_conv, operation_of
from .own_conv import is_own_conv
from .reads import NOT_NARROWED, NOTHING, Reads
from .recipe import CannotRead, ContainerPlan, Recipe
from .tracing import Into, is_add, mutates, trace


class Reader:
    """A module, and its forward as a graph."""

    def __init__(self, module: nn.Module, training: bool = False, into: Into = Into()):
        self.module = module
        self.training = training
        self.graph, self.reads, self.ran_into = trace(module, training, into)
        self.children = dict(module.named_modules())

    def is_residual(self) -> bool:
        """Whether the forward adds two values, as a residual block's does."""
        return any(is_add(node) for node in self.graph.nodes)

    def has_own_conv(self) -> bool:
        """Whether the forward itself calls a convolution."""
        return any(
            is_own_conv(node)
            or (node.op == "call_module" and isinstance(self.children[str(node.target)], nn.modules.conv._ConvNd))
            for node in self.graph.nodes
        )

    def has_wrappers(self) -> bool:
        """Whether a child is a convolution, norm and activation under one name."""
        return any(child is not None and is_wrapper(child) for child in self.module._modules.values())

    def _gates(self) -> frozenset[str]:
        """The paths of the squeeze-and-excitations in the module."""
        return frozenset(path for path, child in self.children.items() if path and is_gate(child))

    def recipe(self) -> Recipe:
        """The module's whole forward as steps.

        Raises:
            CannotRead: if a part of the forward is none of our steps.
        """
        # Only what is seen as a whole is sure to be a block: the network itself keeps its wrappers.
        into = Into(wrappers=self.has_wrappers(), gates=self._gates())
        recipe = _recipe(Reader(self.module, into=into) if into != Into() else self)
        try:
            training = _recipe(Reader(self.module, True, into))
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

    def mixed_plan(self, fused: Sequence[tuple[nn.Module, Recipe | ContainerPlan]] = ()) -> ContainerPlan:
        """The module's whole forward as instructions: runs, and other operations in between.

        Args:
            fused: the fused modules in it, with their plans.

        Raises:
            CannotRead: an operation is not known to do nothing but compute, or nothing can be fused.
        """
        into = Into(wrappers=True, lists=True, gates=self._gates())
        plan = mixed_plan(Reader(self.module, into=into), fused)
        quiet = changes_nothing(plan, self.children, [module for module, _ in fused])
        try:
            training = mixed_plan(Reader(self.module, True, into), fused)
        except CannotRead:
            return replace(plan, trains=False, quiet=quiet)
        assert plan.reads is not None and training.reads is not None
        return replace(plan, trains=training == plan, quiet=quiet, reads=plan.reads + training.reads)


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
    gates = find_gates(reader.graph, reader.children, reader.training)
    reads = reader.reads + gates.reads
    for node in nodes:
        source[node] = node
        if node.op in ("placeholder", "output") or is_of_own_conv(node):
            continue
        operation, seen = operation_of(node, reader.children, source, reader.training, gates)
        reads += seen
        if operation.kind == "identity":
            source[node] = operation.inputs[0]
            continue
        operations[node] = operation
    reads += Reads(check_mutation(nodes, x, source, reader.children), NOTHING)
    sums = [node for node, operation in operations.items() if operation.kind == "add" and x in operation.inputs]
    if not all(mutates(node, reader.children) for node in sums):
        reads = replace(reads, assumes=reads.assumes | {NOT_NARROWED})
    readers = Counter(argument for operation in operations.values() for argument in operation.inputs)
    readers[source[result]] += 1  # the caller
    steps, number = schedule(group(operations, readers), x, source[result])
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    modules = sorted(called | {operation.path for operation in operations.values() if operation.path})
    around = {".".join(path.split(".")[:i]) for path in modules for i in range(1, path.count(".") + 1)}
    return Recipe(steps, number, (*modules, *sorted(around.difference(modules))), signature(reader.module), reads=reads)


def read(module: nn.Module) -> Reader:
    """Traces a module in eval mode.

    Raises:
        CannotRead: with the reason, as the report shows it.
    """
    return Reader(module)
