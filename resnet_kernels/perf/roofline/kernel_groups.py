"""Grouping of a network's operations into kernels: layers with their epilogues, and larger kernels.

Each function takes and returns groups in an order in which they can run. It looks only at the readers of values, so a block
may have any class and any names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .network import ACTIVATIONS, Gemm, Network, Operation


@dataclass(frozen=True)
class Group:
    """Operations in one kernel. conv: the convolution that sets its shape. head: a chain's first convolution."""

    operations: tuple[Operation, ...]
    conv: Operation | None = None
    head: Operation | None = None

    @property
    def name(self) -> str:
        """Name like "conv+bn+relu", with paths where they change, and " -> " between a kernel's layers."""
        name, prefix = "", None
        for operation in self.operations:
            if operation.kind == "pad" and len(self.operations) > 1:
                continue
            if prefix is not None:
                name += " -> " if operation.gemm or operation.kind == "max_pool" else "+"
            if prefix is None or not operation.name.startswith(prefix):
                prefix = operation.name[: operation.name.rfind(".") + 1]
                name += prefix
            name += operation.name.removeprefix(prefix)
        return name

    @property
    def gemm(self) -> Gemm | None:
        """GEMM of the group's convolution, None without one."""
        return self.conv.gemm if self.conv else None

    @property
    def output(self) -> int:
        """Value that the last operation makes."""
        return self.operations[-1].writes

    @property
    def kinds(self) -> set[str]:
        """Kinds of the group's operations."""
        return {operation.kind for operation in self.operations}

    @property
    def residuals(self) -> set[int]:
        """Values that the group adds but does not make."""
        own = {operation.writes for operation in self.operations}
        adds = (operation for operation in self.operations if operation.kind == "add")
        return {value for add in adds for value, _ in add.reads} - own

    @property
    def input(self) -> int:
        """Value that the group's first operation or its convolution reads."""
        first = self.operations[0]
        return (first if first.kind == "pad" or self.conv is None else self.conv).reads[0][0]


def layers(net: Network) -> list[Group]:
    """Groups convolutions with their epilogues: a BN, add or activation joins the kernel that makes its input.

    It joins only if nobody else reads that input. An add joins the deeper of its two branches; the shortcut is its residual.
    """
    groups: dict[int, Group] = {}
    depth: dict[int, int] = {}
    for operation in net.operations:
        values = [value for value, _ in operation.reads]
        depth[operation.writes] = (operation.kind == "conv") + max(depth.get(value, 0) for value in values)
        takers = [v for v in values if v in groups and net.readers[v] == 1 and _takes(groups[v], operation.kind)]
        group = Group((operation,), operation if operation.kind == "conv" else None)
        if takers:
            before = groups.pop(max(takers, key=lambda value: depth[value]))
            group = Group((*before.operations, operation), before.conv or group.conv)
        groups[operation.writes] = group
    return list(groups.values())


def _takes(group: Group, kind: str) -> bool:
    last = group.operations[-1].kind
    if kind == "conv":
        return last == "pad"
    before = {"bn": ("conv",), "add": ("conv", "bn")}
    return last in (("conv", "bn", "add", "matmul") if kind in ACTIVATIONS else before.get(kind, ()))


def _replaced(groups: Sequence[Group], merged: dict[int, Group | None]) -> list[Group]:
    """Replaces each group whose output is a key of `merged`; None leaves the group out."""
    new = (merged.get(group.output, group) for group in groups)
    return [group for group in new if group is not None]


_POINTWISE = ("bn", "add", "pad", *ACTIVATIONS)


def pointwise(net: Network) -> list[Group]:
    """Groups as in torch.compile's default: convolutions, products and pools apart, pointwise operations between them fused.

    It is a model of Inductor, not a record of it: a pointwise operation joins those that make its inputs, unless a
    convolution lies between them.
    """
    groups: dict[int, list[Operation]] = {}
    depth: dict[int, int] = {}
    for operation in net.operations:
        values = [value for value, _ in operation.reads]
        before = max(depth.get(value, 0) for value in values)
        fuses = operation.kind in _POINTWISE
        depth[operation.writes] = before if fuses else before + 1
        own = [operation]
        for value in dict.fromkeys(values if fuses else ()):
            maker = groups.get(value)
            if maker is None or maker[0].kind not in _POINTWISE or maker is own:
                continue
            if depth[value] == before or (len(maker) == 1 and net.readers[value] == 1):
                own = [*maker, *own]
        for member in own:
            groups[member.writes] = own
    # A group stands at its last member's place: by then all its inputs exist.
    return [Group(tuple(own), None) for value, own in groups.items() if own[-1].writes == value]


def merge_shortcuts(groups: Sequence[Group], net: Network) -> list[Group]:
    """Merges a projection into the kernel that adds it: two loops, one accumulator."""
    adders = {value: group for group in groups if group.conv for value in group.residuals if net.readers[value] == 1}
    merged: dict[int, Group | None] = {}
    for group in groups:
        adder = adders.get(group.output)
        if group.conv and adder and not group.kinds & {"add", *ACTIVATIONS}:
            merged[adder.output] = Group((*group.operations, *adder.operations), adder.conv)
            merged[group.output] = None
    return _replaced(groups, merged)


def merge_pools(groups: Sequence[Group], net: Network) -> list[Group]:
    """Merges a max-pool into the kernel of the convolution before it."""
    makers = {group.output: group for group in groups}
    merged: dict[int, Group | None] = {}
    for group in groups:
        before = makers.get(group.input)
        if group.kinds == {"max_pool"} and before and before.conv and net.readers[before.output] == 1:
            merged[group.output] = Group((*before.operations, *group.operations), before.conv)
            merged[before.output] = None
    return _replaced(groups, merged)


def chain(groups: Sequence[Group], net: Network, across_stages: bool, max_width: int | None) -> list[Group]:
    """Merges 3x3 -> 1x1 + add and, if there is one, the next block's first 1x1 into one kernel (see bounds.chained).

    Everything between two 3x3s is pointwise, so a tile of pixels needs no neighbors.
    """
    makers = {group.output: group for group in groups}
    merged: dict[int, Group | None] = {}
    for second in groups:
        first = makers.get(second.input)
        if not (
            _is_pointwise(second)
            and "add" in second.kinds
            and first
            and first.gemm
            and first.gemm.taps > 1
            and net.readers[first.output] == 1
            and first.gemm.n <= (max_width or math.inf)
        ):
            continue
        parts = [first, second]
        for third in groups:
            # A BN that comes before its convolution is one more step of the chain.
            norm = makers.get(third.input)
            norms = [norm] if norm and norm.conv is None and "bn" in norm.kinds else []
            starts_block = _is_pointwise(third) and "relu" in third.kinds and "add" not in third.kinds
            of_stage = starts_block and (across_stages or (third.gemm and third.gemm.n) == first.gemm.n)
            if of_stage and [*norms, third][0].input == second.output:
                parts += [*norms, third]
                break
        for part in parts:
            merged[part.output] = None
        operations = tuple(operation for part in parts for operation in part.operations)
        # The chain stands at the second's place: its residual exists by then, and others may read its sum before the third.
        merged[second.output] = Group(operations, first.conv, first.conv)
    return _replaced(groups, merged)


def _is_pointwise(group: Group) -> bool:
    return group.gemm is not None and group.gemm.is_pointwise
