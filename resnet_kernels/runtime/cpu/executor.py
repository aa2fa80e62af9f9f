"""Execution of a recipe on the CPU: convolutions use oneDNN's packed weights.

A block whose weights are verified runs as one flat list of oneDNN calls (program.PackedProgram). Any other block runs step by
step. A residual that nobody else holds is overwritten.
"""

from __future__ import annotations

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
) -> tuple[Tensor, float]:
    """Runs a recipe on x.

    Args:
        recipe: the recipe of a block or a run.
        state: the fused module's state.
        run: the decision of `eligibility.decide`.
        x: (N, C, H, W), channels_last, not empty.
        x_bound: a bound on the magnitude of x's values; None if unknown.
        owned: whether nobody else holds x, so that a step may overwrite it.

    Returns:
        The output, and a bound on it.
    """
    bound = onednn.bound(x, x_bound)
    # One object for the whole call: if weights change during the call, their old copies go with the old object.
    copies = state.copies
    if run.verified:
        program = copies.program(recipe, x) or copies.make_program(recipe, x)
        if program is not None and program.entries and program.is_safe(bound):
            return program(x, owned, state.path), program.result_bound(bound)
    bounds: dict[int, float] = {0: bound}

    def convolve(part: ConvPart, x: Tensor, residual: Tensor | None) -> Tensor:
        step = part.step
        pack = copies.packs.get(step.conv)
        if pack is None or not (run.verified or state.holds(pack, part.conv, part.bn)) or not pack.fits(x):
            pack = PackedConv(part.conv, part.bn, x)
            copies.pack(step.conv, pack)
        bound = pack.bound(bounds[step.x]) + (0.0 if step.residual is None else bounds[step.residual])
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
            bounds[part.step.out] = onednn.bound(y, bounds[part.step.inputs[0]] if is_maximum else None)
        return y

    values = {0: x}
    del x
    return run_steps.run_steps(run.live.parts, values, recipe.result, state.path, run_part), bounds[recipe.result]
