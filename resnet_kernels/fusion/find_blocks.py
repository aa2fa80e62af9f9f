"""The blocks of a model that can be fused, and the reasons why others can't."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.fx import Node

from ..graph import fusible
from ..graph import reader as graph_reader
from ..graph.gates import is_gate
from ..graph.operations import small_convolutions
from ..graph.recipe import CannotRead, ContainerPlan, ConvStep, Recipe
from ..graph.tracing import remembering
from .report import Row
from .unfused import Unfused, unfused


@dataclass
class Finding:
    """A module, its rows in the report, and the recipe or plan that reading it gave.

    Args:
        module: a block, or a container.
        path: its path.
        rows: one row for a block, one for each run of a container.
        plan: a block's recipe or a container's plan; None if the module is not fused.
        residual: whether it is a residual block.
    """

    module: nn.Module
    path: str
    rows: list[Row]
    plan: Recipe | ContainerPlan | None = None
    residual: bool = False

    @property
    def convolutions(self) -> list[str]:
        """The paths of the convolutions that it fuses."""
        recipes = [self.plan] if isinstance(self.plan, Recipe) else [*self.plan.runs.values()] if self.plan else []
        steps = [step for recipe in recipes for step in recipe.steps if isinstance(step, ConvStep)]
        return [_join(self.path, step.conv) for step in steps]


class Findings(NamedTuple):
    """What was found in a model. unfused: its convolutions that are in no fused kernel, by reason."""

    findings: list[Finding]
    unfused: tuple[Unfused, ...]


def find_blocks(model: nn.Module) -> Findings:
    """Returns what was found in a model, in the order of its modules, the model itself first; changes nothing."""
    with remembering():
        return _find_blocks(model)


def _find_blocks(model: nn.Module) -> Findings:
    search = _Search()
    findings = search.visit(model, "")
    if any(f.plan for f in findings) and not any(f.module is model and f.plan for f in findings):
        # The model becomes the container that converts the layout once, if its forward can be read.
        try:
            findings.insert(0, Finding(model, "", [], graph_reader.read(model).container_plan(_fused(findings))))
        except CannotRead as error:
            reason = f"{error}; so the layout is converted for each block, and what lies between blocks is not fused"
            findings.insert(0, Finding(model, "", [Row("", type(model).__name__, False, reason=reason)]))
    # A block's reason says more than that of the module around it.
    reasons = search.reasons | {row.path: row.reason for f in findings for row in f.rows if not row.fused}
    left = unfused(model, {path for f in findings for path in f.convolutions}, reasons, search.small)
    return Findings(findings, left)


class _Search:
    """A walk through a model's modules.

    seen: ids of the modules visited. reasons: why forwards can't be read, by path. small: the paths of convolutions on
    averages of whole images.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.reasons: dict[str, str] = {}
        self.small: set[str] = set()

    def visit(self, module: nn.Module, path: str) -> list[Finding]:
        """Returns the findings in a module and below it. A block is taken whole; the children of others are visited."""
        if id(module) in self.seen or not any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()):
            return []
        self.seen.add(id(module))
        if not module._modules:
            return []
        kind = type(module).__name__
        try:
            reader = graph_reader.read(module)
        except CannotRead as error:
            # A list of modules has no forward.
            if type(module).forward is not nn.Module.forward:
                self.reasons[path] = str(error)
            below = self._visit_children(module, path)
            direct = {type(child) for child in module._modules.values()}
            looks_like_block = nn.Conv2d in direct and any("Norm" in cls.__name__ for cls in direct)
            if looks_like_block and not below:
                return [Finding(module, path, [Row(path, kind, False, reason=str(error))])]
            return below
        self.small.update(_join(path, name) for name in small_convolutions(reader.graph, reader.children))
        reason = None
        if reader.has_own_conv() or reader.has_wrappers():
            try:
                recipe = reader.recipe()
                if recipe.fuses and not is_gate(module):
                    return [Finding(module, path, [Row(path, kind, True, str(recipe))], recipe, reader.is_residual())]
                return []
            except CannotRead as error:
                # A module of wrappers alone may be anything, a network too, so its children are visited one by one.
                reason = str(error) if reader.has_own_conv() else None
        below = _as_called(reader, path, self._visit_children(module, path))
        plan = reader.container_plan(_fused(below))
        if (mixed := _mixed(reader, path, below, plan)) is not None:
            rows = [Row(path, f"{kind} (part)", True, str(recipe)) for recipe in mixed.plan.runs.values()]
            # An operation in between is not worth a line; a module may be.
            called = set(mixed.plan.called) - {f.path.removeprefix(f"{path}.") for f in mixed.below}
            if reason is not None and reason.split()[0] in called:
                rows.append(Row(path, f"{kind} (rest)", False, reason=reason))
            return [Finding(module, path, rows, mixed.plan, reader.is_residual()), *mixed.below]
        if reason is not None and path:
            self.reasons[path] = reason
        if reader.is_residual() and reason and not (below or plan.runs):
            return [Finding(module, path, [Row(path, kind, False, reason=reason)], residual=True)]
        stage = fusible.is_plain_sequential(module) and sum(f.residual and f.plan is not None for f in below) > 1
        if plan.runs or stage:
            rows = [Row(path, f"{kind} (part)", True, str(recipe)) for recipe in plan.runs.values()]
            below.insert(0, Finding(module, path, rows, plan))
        return below

    def _visit_children(self, module: nn.Module, path: str) -> list[Finding]:
        return [
            finding
            for name, child in module._modules.items()
            if child is not None
            for finding in self.visit(child, _join(path, name))
        ]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")


def _as_called(reader: graph_reader.Reader, path: str, below: list[Finding]) -> list[Finding]:
    """The findings in a module, without what its forward passes by: they would run eager, or not at all.

    It may call a block with more than one tensor, or the children of a container in the place of the container.
    """
    calls: dict[str, list[bool]] = {}
    for node in reader.graph.nodes:
        if node.op == "call_module":
            takes_one = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], Node)
            calls.setdefault(_join(path, str(node.target)), []).append(takes_one)
    inlined = {_join(path, name) for name in reader.ran_into}
    found = []
    for finding in below:
        children = any(called.startswith(f"{finding.path}.") for called in calls)
        is_passed_by = children and finding.path not in inlined and finding.path not in calls
        if isinstance(finding.plan, ContainerPlan) and is_passed_by:
            continue
        takes_one = isinstance(finding.plan, Recipe) or bool(finding.plan is not None and finding.plan.instructions)
        if takes_one and not any(calls.get(finding.path, [True])):
            kind, reason = type(finding.module).__name__, "is called with more than one argument"
            finding = Finding(finding.module, finding.path, [Row(finding.path, kind, False, reason=reason)])
        found.append(finding)
    return found


class _Mixed(NamedTuple):
    """A module as instructions. below: the findings in the modules that its instructions call."""

    plan: ContainerPlan
    below: list[Finding]


def _mixed(reader: graph_reader.Reader, path: str, below: list[Finding], plan: ContainerPlan) -> _Mixed | None:
    """The module as instructions, if more of it can be fused that way, or as much of a residual block; else None.

    Args:
        reader: of the module.
        path: of the module.
        below: what was found in it.
        plan: its runs, if its forward stays Python.
    """
    try:
        mixed = reader.mixed_plan(_fused(below))
    except CannotRead:
        return None
    called = [_join(path, name) for name in mixed.called]
    kept = [f for f in below if any(f.path == name or f.path.startswith(f"{name}.") for name in called)]
    gain = mixed.convolutions + _convolutions(kept) - plan.convolutions - _convolutions(below)
    # A forward that mostly calls others keeps its Python: there a chain may reach over several of them.
    is_block = mixed.convolutions >= _convolutions(kept) and (reader.is_residual() or _is_better_than_python(mixed))
    return _Mixed(mixed, kept) if gain > 0 or (gain == 0 and is_block) else None


def _is_better_than_python(plan: ContainerPlan) -> bool:
    """Whether instructions do something faster than Python's code: sums of groups of channels (mixed_forward.py)."""
    return any(i.kind != "module" and i.target in ("sum", "torch.sum") for i in plan.instructions)


def _convolutions(findings: list[Finding]) -> int:
    return sum(finding.plan.convolutions for finding in findings if finding.plan is not None)


def _fused(findings: list[Finding]) -> list[tuple[nn.Module, Recipe | ContainerPlan]]:
    return [(finding.module, finding.plan) for finding in findings if finding.plan is not None]
