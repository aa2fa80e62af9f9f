"""A step of a recipe together with its live modules."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ...graph.recipe import CallStep, ConvStep, NormStep


class Part(NamedTuple):
    """A step with its live modules. child: the convolution, or what a CallStep calls. path: of the step's block."""

    step: ConvStep | NormStep | CallStep
    child: nn.Module | None
    bn: nn.Module | None
    path: str = ""

    def __str__(self) -> str:
        return f"{self.path}.{self.step}".lstrip(".")

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that it needs."""
        step = self.step
        return step.inputs if isinstance(step, CallStep) else tuple(v for v in (step.x, step.residual) if v is not None)
