"""Execution of a recipe on the CPU: convolutions use packed weights.

A block whose weights are verified runs as one flat list of calls (program.PackedProgram). Any other block runs step by step. A
residual that nobody else holds is overwritten.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ...graph.recipe import Recipe
from ...ops import onednn
from .. import run_steps
from ..parts import CallPart, ConvPart, Part
from ..run_steps import Values
from ..state import FusedRun, FusedState
from .packed_conv import PackedConv


def run(
    recipe: Recipe, state: FusedState[Any], run: FusedRun, x: Tensor, x_bound: float | None, owned: bool
) -> tuple[Tensor, float | None]:
    """Runs a recipe on x.

    Args:
        recipe: the recipe of a block or a run.
        state: the fused module's state.
        run: the decision of `eligibility.decide`.
        x: (N, C, H, W), channels_last, not empty.
        x_bound: a bound on the magnitude of x's values; None if unknown.
        owned: whether nobody else holds x, so that a step may overwrite it.

    Returns:
        The output, and a bound on it; None if unknown.
    """
    # One object for the whole call: if weights change during the call, their old copies go with the old object.
    copies = state.copies
    if run.verified:
        program = copies.program(recipe, x) or copies.make_program(recipe, x)
        if program is not None and (result := program.run_if_safe(x, x_bound, owned, state.path)) is not None:
            return result
    bounds: dict[int, float | None] = {0: x_bound}

    def convolve(part: ConvPart, x: Tensor, residual: Tensor | None) -> Tensor:
        step = part.step
        pack = copies.packs.get(step.conv)
        if pack is None or not (run.verified or state.holds(pack, part.conv, part.bn)) or not pack.fits(x):
            pack = PackedConv(part.conv, part.bn, x)
            copies.pack(step.conv, pack)
        bound = math.inf
        bounds[step.out] = None
        if not pack.runs_ours(x.shape):
            bound = pack.bound(onednn.bound(x, bounds[step.x]))
            if step.residual is not None:
                assert residual is not None
                bound += onednn.bound(residual, bounds[step.residual])
            bounds[step.out] = bound
        overwrite = step.overwrites_residual and (step.residual != 0 or owned)
        return run_steps.with_residual(
            lambda residual, relu: pack(x, residual, relu, bound, overwrite),
            lambda: pack.out_shape(x.shape), x.dtype, residual, step.relu, "cpu",
        )  # fmt: skip

    def run_part(part: Part, values: Values) -> Tensor:
        y = run_steps.run_part(part, values, "cpu", convolve)
        if not isinstance(part, ConvPart):
            # A maximum of values keeps their bound.
            is_maximum = isinstance(part, CallPart) and type(part.child) is nn.MaxPool2d
            bounds[part.step.out] = bounds[part.step.inputs[0]] if is_maximum else None
        return y

    values = {0: x}
    del x
    return run_steps.run_steps(run.live.parts, values, recipe.result, state.path, run_part), bounds[recipe.result]
