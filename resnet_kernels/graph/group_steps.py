"""Which operations of a forward make one step, and in which order steps run.

Grouping follows one rule: a BN, an add or an activation joins the group that made its input, if nothing else reads that
input and the group's step has a place for it. An activation, say, that follows an add which follows a convolution ends up in
the convolution's step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from ..kernels.activations import Activation
from .recipe import CallStep, CannotRead, ConvStep, NormStep, PReLUAt, Step


@dataclass(frozen=True)
class ConvGroup:
    """The operations of a ConvStep, with nodes in the place of numbered values. sum: the node that adds the residual."""

    conv: str
    x: Node
    bn: str | None = None
    activation: Activation | PReLUAt | None = None
    residual: Node | None = None
    sum: Node | None = None

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes that make the step's inputs."""
        return (self.x,) if self.residual is None else (self.x, self.residual)


@dataclass(frozen=True)
class NormGroup:
    """The operations of a NormStep. sum: the node that adds the residual."""

    bn: str
    x: Node
    activation: Activation | PReLUAt | None
    residual: Node | None = None
    sum: Node | None = None

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes that make the step's inputs."""
        return (self.x,) if self.residual is None else (self.x, self.residual)


@dataclass(frozen=True)
class CallGroup:
    """The operations of a CallStep."""

    what: str
    is_module: bool
    inputs: tuple[Node, ...]
    activation: Activation | None = None


Group = ConvGroup | NormGroup | CallGroup


@dataclass(frozen=True)
class Operation:
    """A node that computes something.

    kind: "conv", "bn", "activation", "add" or "call"; of squeeze-and-excitation, "mean", "sigmoid", "hardsigmoid" or "mul".
    path: the module's, "" for a function. activation: which one it is; of a BN, the one that it ends in by itself (timm's
    BatchNormAct2d). alone: an add that joins no convolution and no BN.
    """

    kind: str
    path: str
    inputs: tuple[Node, ...]
    activation: Activation | PReLUAt | None = None
    alone: bool = False


def group(operations: Mapping[Node, Operation], readers: Mapping[Node, int]) -> dict[Node, Group]:
    """Groups operations, given in the order in which they run. The key of a group is the node of its last operation.

    Args:
        operations: by node.
        readers: how many operations read the output of each node; the caller of the forward counts as one.
    """
    order = {node: i for i, node in enumerate(operations)}
    groups: dict[Node, Group] = {}
    for node, operation in operations.items():
        groups[node] = _join(node, operation, groups, readers, order) or _alone(operation)
    return groups


def _alone(operation: Operation) -> Group:
    if operation.kind == "conv":
        return ConvGroup(operation.path, operation.inputs[0])
    if operation.kind == "bn":
        return NormGroup(operation.path, operation.inputs[0], operation.activation)
    if operation.kind == "call" or isinstance(operation.activation, PReLUAt):
        return CallGroup(operation.path, True, operation.inputs)
    what = str(operation.activation or operation.kind)
    return CallGroup(what, False, operation.inputs, operation.activation)


def _join(
    node: Node, operation: Operation, groups: dict[Node, Group], readers: Mapping[Node, int], order: Mapping[Node, int]
) -> Group | None:
    """Takes the group that an operation joins out of `groups`, and returns it with the operation in it."""
    sources = operation.inputs
    if operation.kind == "mul":
        x, gate = sources
        made_by = groups.get(gate)
        if not isinstance(made_by, CallGroup) or made_by.what not in ("sigmoid", "hardsigmoid"):
            return None
        del groups[gate]
        return CallGroup(f"{made_by.what}_mul", False, (x, *made_by.inputs))
    if operation.kind == "add" and (operation.alone or sources[0] is sources[1]):
        return None
    able = [s for s in sources if s in groups and readers[s] == 1 and _accepts(groups[s], operation)]
    if not able:
        return None
    # Both sides of an add may end in a convolution. The deeper branch takes the add; the shortcut is its residual.
    source = max(able, key=lambda s: (_depth(s, groups), order[s]))
    joined = groups.pop(source)
    if isinstance(joined, CallGroup):
        assert not isinstance(operation.activation, PReLUAt)
        return replace(joined, what=f"add_{operation.activation}", activation=operation.activation)
    if operation.kind == "add":
        return replace(joined, residual=next(s for s in sources if s is not source), sum=node)
    if operation.kind == "activation":
        return replace(joined, activation=operation.activation)
    assert isinstance(joined, ConvGroup)
    return replace(joined, bn=operation.path, activation=operation.activation)


def _accepts(group: Group, operation: Operation) -> bool:
    """Whether a group's step has a place for one more operation."""
    kind = operation.kind
    if isinstance(group, CallGroup):
        is_constant = kind == "activation" and not isinstance(operation.activation, PReLUAt)
        return is_constant and group.what == "add" and not group.is_module
    if kind == "bn":
        return isinstance(group, ConvGroup) and not (group.bn or group.activation or group.residual)
    if kind == "add":
        return not (group.activation or group.residual)
    return kind == "activation" and not group.activation


def _depth(node: Node, groups: Mapping[Node, Group]) -> int:
    """The largest number of convolutions on a path to a node."""
    if (group := groups.get(node)) is None:
        return 0
    return isinstance(group, ConvGroup) + max(_depth(i, groups) for i in group.inputs)


def schedule(groups: Mapping[Node, Group], x: Node, result: Node) -> tuple[tuple[Step, ...], int]:
    """Orders groups by need, numbers their values, and notes after which step each value is dead.

    Args:
        groups: by the node that each makes.
        x: the input, which gets number 0.
        result: the output.

    Returns:
        The steps, and the number of the output.

    Raises:
        CannotRead: if no step is a convolution.
    """
    numbers = {x: 0}
    ordered: list[Group] = []

    def visit(node: Node) -> None:
        if node in numbers:
            return
        # The main path goes first, as in eager. A residual is made just before it is needed.
        for source in groups[node].inputs:
            visit(source)
        numbers[node] = len(numbers)
        ordered.append(groups[node])

    visit(result)
    if not any(isinstance(group, ConvGroup) for group in ordered):
        raise CannotRead("it runs no convolution of its own")
    last_use = {numbers[source]: i for i, group in enumerate(ordered) for source in group.inputs}
    last_use[numbers[result]] = len(ordered)
    # values[0] is the caller's own; a container may give it away (fused_container.py).
    may_overwrite = {0, *(out for out, group in enumerate(ordered, start=1) if isinstance(group, ConvGroup))}
    steps: list[Step] = []
    for i, group in enumerate(ordered):
        out, inputs = i + 1, tuple(numbers[source] for source in group.inputs)
        frees = tuple(sorted({value for value in inputs if last_use[value] == i}))
        if isinstance(group, CallGroup):
            steps.append(CallStep(group.what, group.is_module, inputs, out, frees, group.activation))
            continue
        residual = None if group.residual is None else inputs[1]
        if isinstance(group, NormGroup):
            steps.append(NormStep(group.bn, group.activation, inputs[0], out, residual, frees))
            continue
        overwrites = residual in frees and residual != inputs[0] and residual in may_overwrite
        steps.append(ConvStep(group.conv, group.bn, group.activation, inputs[0], out, residual, overwrites, frees))
    return tuple(steps), numbers[result]
