"""Finding the blocks of a model that can be fused, and why others can't."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..graph import fusible
from ..graph import reader as graph_reader
from ..graph.recipe import CannotRead
from ..runtime.fused_block import FusedBlock
from ..runtime.fused_container import FusedContainer
from .report import Row


@dataclass
class Finding:
    """A module and what reading it gave."""

    module: nn.Module
    rows: list[Row]
    mixin: type | None = None
    plan: Any = None
    residual: bool = False

    @property
    def fusible(self) -> bool:
        return self.mixin is not None


def find_blocks(model: nn.Module) -> list[Finding]:
    findings = _visit(model, "", set())
    if any(f.fusible for f in findings) and not any(f.module is model and f.fusible for f in findings):
        # The model itself becomes the container that converts the layout once, if its forward is one we can stand in for.
        try:
            findings.insert(0, Finding(model, [], FusedContainer, graph_reader.read(model).container_plan()))
        except CannotRead:
            pass
    return findings


def _visit(module: nn.Module, path: str, seen: set[int]) -> list[Finding]:
    """Findings in a module and below. A block is taken whole; anything else is looked into."""
    if id(module) in seen or not any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()):
        return []
    seen.add(id(module))
    if not module._modules:
        return []
    kind = type(module).__name__
    try:
        reader = graph_reader.read(module)
    except CannotRead as reason:
        below = _visit_children(module, path, seen)
        direct = {type(child) for child in module._modules.values()}
        looks_like_block = nn.Conv2d in direct and any("Norm" in cls.__name__ for cls in direct)
        if looks_like_block and not below:
            return [Finding(module, [Row(path, kind, False, reason=str(reason))])]
        return below
    reason = None
    if reader.has_own_conv() or reader.has_wrappers():
        try:
            recipe = reader.recipe()
            if recipe.fuses:
                rows = [Row(path, kind, True, str(recipe))]
                return [Finding(module, rows, FusedBlock, recipe, residual=reader.is_residual())]
            return []
        except CannotRead as error:
            # Of wrappers alone it may be anything, a network too: what is below is looked at one by one.
            reason = str(error) if reader.has_own_conv() else None
    below = _visit_children(module, path, seen)
    if reader.is_residual() and reason and not any(f.residual for f in below):
        # A residual block with something in it that is not fused stays as it is, its inner modules included.
        return [Finding(module, [Row(path, kind, False, reason=reason)], residual=True)]
    plan = reader.container_plan()
    stage = fusible.is_plain_sequential(module) and sum(f.residual and f.fusible for f in below) > 1
    if plan.runs or stage:
        rows = [Row(path, f"{kind} (part)", True, str(recipe)) for recipe in plan.runs.values()]
        below.insert(0, Finding(module, rows, FusedContainer, plan))
    return below


def _visit_children(module: nn.Module, path: str, seen: set[int]) -> list[Finding]:
    return [
        finding
        for name, child in module._modules.items()
        if child is not None
        for finding in _visit(child, f"{path}.{name}" if path else name, seen)
    ]
