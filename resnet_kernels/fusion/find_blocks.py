"""The blocks of a model that can be fused, and the reasons why others can't."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..graph import fusible
from ..graph import reader as graph_reader
from ..graph.recipe import CannotRead, ContainerPlan, Recipe
from .report import Row


@dataclass
class Finding:
    """A module, its rows in the report, and the recipe or plan that reading it gave.

    Args:
        module: a block, or a container.
        rows: one row for a block, one for each run of a container.
        plan: a block's recipe or a container's plan; None if the module is not fused.
        residual: whether it is a residual block.
    """

    module: nn.Module
    rows: list[Row]
    plan: Recipe | ContainerPlan | None = None
    residual: bool = False


def find_blocks(model: nn.Module) -> list[Finding]:
    """Returns the findings of a model in the order of its modules, the model itself first; changes nothing."""
    findings = _visit(model, "", set())
    if any(f.plan for f in findings) and not any(f.module is model and f.plan for f in findings):
        # The model becomes the container that converts the layout once, if its forward can be read.
        try:
            findings.insert(0, Finding(model, [], graph_reader.read(model).container_plan(_fused(findings))))
        except CannotRead:
            pass
    return findings


def _visit(module: nn.Module, path: str, seen: set[int]) -> list[Finding]:
    """Returns the findings in a module and below it. A block is taken whole; the children of other modules are visited."""
    if id(module) in seen or not any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()):
        return []
    seen.add(id(module))
    if not module._modules:
        return []
    kind = type(module).__name__
    try:
        reader = graph_reader.read(module)
    except CannotRead as error:
        below = _visit_children(module, path, seen)
        direct = {type(child) for child in module._modules.values()}
        looks_like_block = nn.Conv2d in direct and any("Norm" in cls.__name__ for cls in direct)
        if looks_like_block and not below:
            return [Finding(module, [Row(path, kind, False, reason=str(error))])]
        return below
    reason = None
    if reader.has_own_conv() or reader.has_wrappers():
        try:
            recipe = reader.recipe()
            if recipe.fuses:
                return [Finding(module, [Row(path, kind, True, str(recipe))], recipe, reader.is_residual())]
            return []
        except CannotRead as error:
            # A module of wrappers alone may be anything, a network too, so its children are visited one by one.
            reason = str(error) if reader.has_own_conv() else None
    below = _visit_children(module, path, seen)
    if reader.is_residual() and reason and not any(f.residual for f in below):
        # A residual block that holds something unfusible stays as it is, and so do the modules in it.
        return [Finding(module, [Row(path, kind, False, reason=reason)], residual=True)]
    plan = reader.container_plan(_fused(below))
    stage = fusible.is_plain_sequential(module) and sum(f.residual and f.plan is not None for f in below) > 1
    if plan.runs or stage:
        rows = [Row(path, f"{kind} (part)", True, str(recipe)) for recipe in plan.runs.values()]
        below.insert(0, Finding(module, rows, plan))
    return below


def _fused(findings: list[Finding]) -> list[tuple[nn.Module, Recipe | ContainerPlan]]:
    return [(finding.module, finding.plan) for finding in findings if finding.plan is not None]


def _visit_children(module: nn.Module, path: str, seen: set[int]) -> list[Finding]:
    return [
        finding
        for name, child in module._modules.items()
        if child is not None
        for finding in _visit(child, f"{path}.{name}" if path else name, seen)
    ]
