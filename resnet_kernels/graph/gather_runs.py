"""Which groups of a mixed forward make one run: those that come from one value, up to where other operations read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch.fx import Node

from .group_steps import CallGroup, ConvGroup, Operation, group


class Runs:
    """The groups of a forward, and the run that each belongs to.

    Args:
        operations: those of ours, by node, in order.
        readers: how many operations read each node's value.
        apart: adds that join no convolution.
    """

    def __init__(self, operations: Mapping[Node, Operation], readers: Mapping[Node, int], apart: set[Node]):
        marked = {node: replace(operation, alone=node in apart) for node, operation in operations.items()}
        self.order = {node: i for i, node in enumerate(operations)}
        self.groups = group(marked, readers)
        self._readers = readers

    def find(self) -> tuple[dict[Node, list[Node]], set[Node]]:
        """The runs.

        Returns:
            The nodes of each run's groups in order, by its last one; and the adds that have to stay apart, if any: then the
            groups have to be made anew.
        """
        nodes = sorted(self.groups, key=self.order.__getitem__)
        runs: list[tuple[Node, list[Node]]] = []
        found: dict[Node, list[Node]] = {}
        apart: set[Node] = set()
        todo: list[Sequence[Node]] = [nodes]
        while todo:
            for x, members in self._gathered(todo.pop(), apart):
                parts = self._parted(x, members)
                if len(parts) == 1:
                    runs.append((x, parts[0]))
                else:
                    todo += parts
        for _, members in runs:
            if any(isinstance(self.groups[node], ConvGroup) for node in members):
                found[members[-1]] = members
        return found, apart

    def _gathered(self, nodes: Sequence[Node], apart: set[Node]) -> list[tuple[Node, list[Node]]]:
        """Groups by the one value that they all come from."""
        gathered: list[tuple[Node, list[Node]]] = []
        run_of: dict[Node, int] = {}
        for node in nodes:
            found = self.groups[node]
            main, *others = found.inputs
            at = run_of.get(main)
            if at is None:
                at = next((i for i, (x, _) in enumerate(gathered) if x is main), None)
            if at is None:
                at = len(gathered)
                gathered.append((main, []))
            x, members = gathered[at]
            if any(other is not x and other not in members for other in others):
                if isinstance(found, CallGroup):
                    continue  # an add of its own
                assert found.sum is not None, "only a residual is a second input"
                apart.add(found.sum)
                continue
            members.append(node)
            run_of[node] = at
        return [(x, members) for x, members in gathered if members]

    def _parted(self, x: Node, members: list[Node]) -> list[list[Node]]:
        """The parts of a run such that only the last value of each is read outside of it; itself if that holds."""
        inside = set(members)
        used = [
            node
            for node in members
            if self._readers[node] > sum(node is i for other in members for i in self.groups[other].inputs)
        ]
        if used == members[-1:]:
            return [members]
        islands = self._islands(members)
        if len(islands) > 1:
            return islands
        first = used[0] if used else members[-1]
        before = {first}
        for node in reversed(members):
            if node in before:
                before.update(i for i in self.groups[node].inputs if i in inside)
        head = [node for node in members if node in before]
        tail = [node for node in members if node not in before]
        read = {i for node in tail for i in self.groups[node].inputs if i in before}
        if tail and read <= {first}:
            return [head, tail]
        return [[node] for node in members] if len(members) > 1 else [members]

    def _islands(self, members: list[Node]) -> list[list[Node]]:
        """The parts of a run that share nothing but its input."""
        islands: list[list[Node]] = []
        for node in members:
            touched = [island for island in islands if any(i in island for i in self.groups[node].inputs)]
            joined = [*(n for island in touched for n in island), node]
            islands = [island for island in islands if island not in touched]
            islands.append(sorted(joined, key=self.order.__getitem__))
        return islands
