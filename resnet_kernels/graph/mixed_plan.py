"""Forwards that are neither a block nor a container of blocks: runs of our steps, with other operations in between.

A block with squeeze-and-excitation, a dense block, or a network as a torch.fx.GraphModule has operations that can be fused
and others that cannot. Its forward becomes a list of instructions: runs, each a recipe with one input and one output, and all
other operations, which PyTorch runs as in eager. Python's code does not run.

A run is as long as possible. It ends where another operation reads a value in it. An add of two values that no one run has
stays an operation of its own, and an activation behind it is a part of that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from .fusible import is_known, is_plain_sequential, original_class, shared_children, signature
from .gates import find_gates
from .gather_runs import Runs
from .group_steps import CallGroup, Group, Operation, schedule
from .layouts import LayoutView, boundaries, is_number
from .operations import check_mutation, is_of_own_conv, operation_of, small_convolutions
from .pure_operations import METHODS, NAMES, is_new, writes_nothing
from .reads import NOTHING, Reads
from .recipe import CannotRead, Chain, ChainPart, ContainerPlan, ConvStep, Instruction, Recipe, Slot, Watched
from .tracing import mutates

if TYPE_CHECKING:
    from .reader import Reader


def mixed_plan(reader: Reader, fused: Sequence[tuple[nn.Module, Recipe | ContainerPlan]]) -> ContainerPlan:
    """The plan of a module whose forward runs as instructions.

    Args:
        reader: of the module.
        fused: the fused modules in it, with their plans.

    Raises:
        CannotRead: an operation is not known to do nothing but compute, or nothing can be fused.
    """
    return _Planner(reader, fused).plan()


class _Planner:
    def __init__(self, reader: Reader, fused: Sequence[tuple[nn.Module, Recipe | ContainerPlan]]):
        self.module, self.graph, self.children = reader.module, reader.graph, reader.children
        self.reads, self.ran_into, self.training = reader.reads, reader.ran_into, reader.training
        self.nodes = list(reader.graph.nodes)
        self.numbers = {node: i for i, node in enumerate(self.nodes)}
        self.x = self.nodes[0]
        self.gates = find_gates(reader.graph, reader.children, reader.training)
        self.reads += self.gates.reads
        self.shared = shared_children(self.module)
        self.source: dict[Node, Node] = {}
        self.operations: dict[Node, Operation] = {}
        plans = {id(module): plan for module, plan in fused}
        self.fused = {path: plans[id(m)] for path, m in self.module.named_modules() if path and id(m) in plans}
        self.layouts = LayoutView(self.children, self.fused, into=True)

    def plan(self) -> ContainerPlan:
        """The plan; see `mixed_plan`."""
        for node in self.nodes:
            self.source[node] = node
            if node.op not in ("placeholder", "output") and not is_of_own_conv(node):
                self._read(node)
        # Runs are known by their convolutions: none may be in two.
        convs = Counter(operation.path for operation in self.operations.values() if operation.kind == "conv")
        for node, operation in [*self.operations.items()]:
            if operation.kind == "conv" and (convs[operation.path] > 1 or operation.path in self.shared):
                self._check_other(node)
                del self.operations[node]
        self.reads += Reads(check_mutation(self.nodes, self.x, self.source, self.children), NOTHING)
        groups, members = self._runs()
        return self._made(groups, members)

    def _read(self, node: Node) -> None:
        """Takes a node for one of our operations, or checks that it may run as it is."""
        try:
            operation, seen = operation_of(node, self.children, self.source, self.training, self.gates)
            is_left = operation.kind == "call" and _is_in_no_program(self.children[operation.path])
            known = node in self.gates.inside or not is_left
        except CannotRead:
            known = False
        if not known:
            self._check_other(node)
            return
        self.reads += seen
        if operation.kind == "identity":
            self.source[node] = operation.inputs[0]
        else:
            self.operations[node] = operation

    def _check_other(self, node: Node) -> None:
        """Refuses an operation that is not known to do nothing but compute."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if node.op == "get_attr" and node.target == "a tensor of its own":
            raise CannotRead("its forward uses a tensor that is no parameter and no buffer")
        if node.op == "call_method" and node.target not in METHODS:
            raise CannotRead(f"its forward calls {name}")
        if node.op == "call_function" and id(node.target) not in NAMES:
            raise CannotRead(f"its forward calls {name}")

    def _runs(self) -> tuple[dict[Node, Group], dict[Node, list[Node]]]:
        readers = Counter(self.source[i] for node in self.nodes if self.source[node] is node for i in _inputs_of(node))
        apart: set[Node] = set()
        while True:
            runs = Runs(self.operations, readers, apart)
            members, more = runs.find()
            if more <= apart:
                return runs.groups, members
            apart |= more

    def _made(self, groups: Mapping[Node, Group], members: Mapping[Node, list[Node]]) -> ContainerPlan:
        """The plan of groups, and of the groups of each run by its last one."""
        joined = _operations_of(groups, self.operations)
        recipes: dict[Node, Recipe] = {}
        small = set(small_convolutions(self.graph, self.children))
        taken: dict[Node, Node] = {}  # operations of runs, by the run's last group
        for last, nodes in sorted(members.items(), key=lambda item: self.numbers[item[0]]):
            recipe = self._recipe(nodes, groups, joined)
            if recipe.fuses and not small.issuperset(_convolutions(recipe)):
                recipes[last] = recipe
                taken.update((operation, last) for node in nodes for operation in joined[node])
        if not recipes:
            raise CannotRead("nothing in it can be fused")
        sums = {
            node: found for node, found in groups.items()
            if node not in taken and isinstance(found, CallGroup) and not found.is_module and found.what.startswith("add")
        }  # fmt: skip
        taken.update((operation, node) for node in sums for operation in joined[node])
        self._check_written(taken)
        ours = {self.x} if self._may_convert_input(taken) else set()
        made: list[Instruction] = []
        for node in self.nodes:
            at = taken.get(node, node)
            if node.op in ("placeholder", "output") or self.source[node] is not node or at is not node:
                continue
            if node.op == "get_attr" and all(user in taken for user in node.users):
                continue
            if node in recipes:
                x = groups[members[node][0]].inputs[0]
                made.append(self._run(node, recipes[node], x, taken))
            elif node in sums:
                made.append(self._sum(node, sums[node]))
            else:
                made.append(self._plain(node))
            inputs = groups[node].inputs if node in sums else [self.source[i] for i in node.all_input_nodes]
            passes = node in sums or self.layouts.passes_on(node)
            if node in recipes or (passes and any(i in ours for i in inputs)):
                ours.add(node)
        # Neither do the activations run that are a part of an add.
        behind = {self.operations[operation].path for node in sums for operation in joined[node]}
        # A dropout, say, that passes its input on in eval mode.
        passed_on = {str(n.target) for n in self.nodes if n.op == "call_module" and self.source[n] is not n}
        inlined = (self.ran_into | behind | self._written_over(taken) | passed_on) - {""}
        output = self.nodes[-1]
        result = self._slots(output.args[0])
        instructions = _with_frees(made, result)
        boundary = boundaries(self.fused)
        others = [str(n.target) for n in self.nodes if n.op == "call_module" and n not in taken and self.source[n] is n]
        return ContainerPlan(
            {_name(recipe): recipe for recipe in recipes.values()},
            (),
            tuple(self.module._modules),
            called=tuple(dict.fromkeys(map(boundary, others))),
            seen=() if self.x in ours else ("",),
            outputs=tuple(is_number(leaf) or self.source[leaf] in ours for leaf in pytree.tree_leaves(output.args[0])),
            reads=self.reads + self.layouts.reads,
            chains=self._chains(instructions),
            instructions=instructions,
            result=result,
            watched=(
                *self._watched(inlined, True, self.ran_into | passed_on),
                *self._watched(self.layouts.looked_into, False, ()),
            ),
        )

    def _chains(self, instructions: Sequence[Instruction]) -> tuple[Chain, ...]:
        """The instructions that follow one another, each on what only the one before it has made; one alone, too."""
        chains: list[Chain] = []
        last: Instruction | None = None  # of the chain that may go on
        for instruction in instructions:
            part = self._chain_part(instruction)
            if part is not None:
                goes_on = last is not None and _follows(last, instruction)
                before = chains.pop() if goes_on else Chain((), ())
                chains.append(Chain((*before.members, instruction.target), (*before.parts, part)))
            last = None if part is None else instruction
        return tuple(chains)

    def _chain_part(self, instruction: Instruction) -> ChainPart | None:
        """The recipe that an instruction stands for; None if it is something else."""
        path = instruction.target
        if instruction.kind == "run":
            return ChainPart("", path)
        is_block = instruction.kind == "module" and isinstance(self.fused.get(path), Recipe)
        return ChainPart(path, None) if is_block and _takes_one(instruction) else None

    def _watched(self, paths: Collection[str], inlined: bool, with_mode: Collection[str]) -> Iterator[Watched]:
        for path in sorted(paths):
            child = self.children[path]
            has_no_mode = is_plain_sequential(child) or type(child) is nn.Identity
            has_mode = path in with_mode and not has_no_mode
            yield Watched(path, original_class(child), signature(child), inlined, has_mode)

    def _written_over(self, taken: Collection[Node]) -> set[str]:
        """The modules whose output eager writes over, where a run or an add makes a new value: a hook could tell."""
        targets = [self.source[node.args[0]] for node in taken if mutates(node, self.children)]  # type: ignore[index]  # a node
        return {str(node.target) for node in targets if node.op == "call_module" and node not in taken}

    def _recipe(
        self, nodes: Sequence[Node], groups: Mapping[Node, Group], joined: Mapping[Node, Sequence[Node]]
    ) -> Recipe:
        """A run as a recipe."""
        own = {node: groups[node] for node in nodes}
        steps, number = schedule(own, groups[nodes[0]].inputs[0], nodes[-1])
        paths = dict.fromkeys(self.operations[operation].path for node in nodes for operation in joined[node])
        paths.pop("", None)
        classes = tuple((path, original_class(self.children[path])) for path in paths)
        return Recipe(steps, number, tuple(paths), classes, whole=False, reads=Reads((), NOTHING))

    def _check_written(self, taken: Collection[Node]) -> None:
        """Refuses to write over a value that may be a view of another one, or that a run reads later than eager does."""
        for node in self.nodes:
            if node in taken or node.op in ("placeholder", "output"):
                continue
            targets = [self.source[i] for i in node.all_input_nodes]
            if node.op == "call_module" and not is_known(self.children[str(node.target)]):
                if not writes_nothing(self.children[str(node.target)]):
                    self._check_own(node, targets)
            elif mutates(node, self.children):
                self._check_own(node, targets[:1])

    def _check_own(self, node: Node, targets: Sequence[Node]) -> None:
        for target in targets:
            if not is_new(target, self.children) or len(set(self._users_of(target))) > 1:
                raise CannotRead(f"{node.target} may write over a value that is used elsewhere")

    def _may_convert_input(self, taken: Collection[Node]) -> bool:
        """Whether only runs, and what computes the same from either layout, read the input."""
        return all(
            user in taken or (self.layouts.is_blind(user) and not mutates(user, self.children))
            for user in self._users_of(self.x)
        )

    def _users_of(self, node: Node) -> Iterator[Node]:
        """The operations that read a value, by whatever name."""
        for user in node.users:
            if self.source[user] is user:
                yield user
            else:
                yield from self._users_of(user)

    def _run(self, last: Node, recipe: Recipe, x: Node, taken: Mapping[Node, Node]) -> Instruction:
        """A run as an instruction."""
        # A weight that a convolution's own code reads is a value, too.
        own = [
            n
            for n in self.nodes
            if taken.get(n) is last or any(taken.get(user) is last for user in n.users if is_of_own_conv(n))
        ]
        apart = tuple(self._plain(n) for n in own)
        return Instruction("run", _name(recipe), (Slot(self.numbers[x]),), (), self.numbers[last], apart=apart)

    def _sum(self, node: Node, found: CallGroup) -> Instruction:
        """An add, with what follows it, as an instruction."""
        args = tuple(Slot(self.numbers[i]) for i in found.inputs)
        kwargs = () if found.activation is None else (("activation", found.activation),)
        return Instruction("add", found.what, args, kwargs, self.numbers[node])

    def _plain(self, node: Node) -> Instruction:
        """A node as an instruction that PyTorch runs."""
        kinds = {"call_module": "module", "call_function": "function", "call_method": "method", "get_attr": "attribute"}
        target = NAMES[id(node.target)] if node.op == "call_function" else str(node.target)
        kwargs = tuple((name, self._slots(value)) for name, value in node.kwargs.items())
        sees = node.op != "get_attr" and not self.layouts.is_blind(node)
        return Instruction(kinds[node.op], target, self._slots(node.args), kwargs, self.numbers[node], sees)

    def _slots(self, value: Any) -> Any:
        """A node's argument with a Slot for each node in it."""
        if isinstance(value, Node):
            return Slot(self.numbers[self.source[value]])
        if isinstance(value, slice):
            return slice(*(self._slots(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, (list, tuple)):
            made = [self._slots(v) for v in value]
            return made if isinstance(value, list) else tuple(made)
        if isinstance(value, dict):
            return {key: self._slots(v) for key, v in value.items()}
        return value


def _is_in_no_program(module: nn.Module) -> bool:
    """Whether a run with this module in it would run step by step on the CPU."""
    return isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d))


def _inputs_of(node: Node) -> Iterable[Node]:
    """The nodes that a node reads, with each as often as it is read."""
    found: list[Node] = []
    torch.fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]  # adds it
    return found


def _takes_one(instruction: Instruction) -> bool:
    """Whether an instruction's only argument is a value."""
    return len(instruction.args) == 1 and type(instruction.args[0]) is Slot and not instruction.kwargs


def _follows(first: Instruction, second: Instruction) -> bool:
    """Whether an instruction takes what the one before it made, and is the last to read it."""
    return _takes_one(second) and second.args == (Slot(first.out),) and first.out in second.frees


def _name(recipe: Recipe) -> str:
    """The name of a run: the path of its first convolution."""
    return _convolutions(recipe)[0]


def _convolutions(recipe: Recipe) -> list[str]:
    return [step.conv for step in recipe.steps if isinstance(step, ConvStep)]


def _operations_of(groups: Mapping[Node, Group], operations: Mapping[Node, Operation]) -> dict[Node, list[Node]]:
    """The operations of each group, in order."""
    of: dict[Node, list[Node]] = {}
    for node, found in groups.items():
        ends = set(found.inputs)
        whole, todo = {node}, [node]
        while todo:
            for i in operations[todo.pop()].inputs:
                if i not in ends and i not in whole and i in operations:
                    whole.add(i)
                    todo.append(i)
        of[node] = [n for n in operations if n in whole]
    return of


def _with_frees(instructions: Sequence[Instruction], result: Any) -> tuple[Instruction, ...]:
    """The instructions, with the values after each that nothing reads any more."""
    alive = set(slots_in(result))
    made: list[Instruction] = []
    for instruction in reversed(instructions):
        read = set(slots_in(instruction.args)) | set(slots_in(tuple(value for _, value in instruction.kwargs)))
        made.append(instruction._replace(frees=tuple(sorted((read | {instruction.out}) - alive - {0}))))
        alive |= read
    return tuple(reversed(made))


def slots_in(value: Any) -> Iterator[int]:
    """The numbers of the values in an instruction's arguments."""
    if isinstance(value, Slot):
        yield value.value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from slots_in(v)
    elif isinstance(value, dict):
        yield from slots_in([*value.values()])
    elif isinstance(value, slice):
        yield from slots_in((value.start, value.stop, value.step))
