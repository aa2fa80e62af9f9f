"""Running a recipe on the CPU: convolutions on oneDNN's packed weights.

A block whose weights are verified is one flat list of oneDNN calls (program.PackedProgram), any other goes step by step; the
residual is written over where nobody else holds it.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...graph.recipe import ConvStep, NormStep, Recipe
from ...kernels.geometry import Geometry
from ...ops import onednn
from .. import other_steps, profiler_ranges
from ..state import FusedState, Go
from .packed_conv import PackedConv


def run(
    recipe: Recipe, state: FusedState, go: Go, x: Tensor, x_bound: float | None, owned: bool
) -> tuple[Tensor, float]:
    """Runs a recipe on x, channels_last, not empty; returns its output and a bound on that.

    Args:
        x_bound: no value in x is larger in magnitude; None if that isn't known.
        owned: nobody else holds x, so a step may write over it.
    """
    bound = onednn.bound(x, x_bound)
    # One for the whole call: what is made from weights of now must not outlive their change during the call.
    copies = state.copies
    if go.verified:
        program = copies.program(recipe, x) or copies.make_program(recipe, x)
        if program is not None and program.entries and program.is_safe(bound):
            return program(x, owned, state.path), program.result_bound(bound)
    values: dict[int, Tensor] = {0: x}
    bounds: dict[int, float] = {0: bound}
    del x
    for step, child, bn in profiler_ranges.around(go.wiring.steps, state.path):
        if isinstance(step, ConvStep):
            residual = None if step.residual is None else values[step.residual]
            relu, late = step.relu, None
            if residual is not None:
                x_shape = values[step.x].shape
                shape = Geometry.of_module(child, x_shape[2:]).out_shape(x_shape, child.weight.shape)
                if residual.shape != shape:
                    # Eager's add broadcasts; a kernel reads a residual of the output's shape, and beyond a smaller one.
                    residual, relu, late = None, False, residual
            pack = copies.packs.get(step.conv)
            if pack is None or not (go.verified or state.trusts(pack, child, bn)) or not pack.fits(values[step.x]):
                pack = PackedConv(child, bn, values[step.x])
                copies.pack(step.conv, pack)
            bound = pack.bound(bounds[step.x]) + (0.0 if residual is None else bounds[step.residual])
            overwrite = step.overwrites_residual and (step.residual != 0 or owned)
            y = pack(values[step.x], residual, relu, bound, overwrite)
            if late is not None:
                y = other_steps.add_broadcast(y, late, step.relu)
                bound += bounds[step.residual]
            del residual, late
        else:
            if isinstance(step, NormStep):
                residual = None if step.residual is None else values[step.residual]
                y = other_steps.normalise(bn, values[step.x], residual, step.relu, "cpu")
                del residual
            else:
                y = other_steps.call(step, child, [values[i] for i in step.inputs], "cpu")
            # A maximum of values is no larger than they are.
            bound = onednn.bound(y, bounds[step.inputs[0]] if type(child) is nn.MaxPool2d else None)
        values[step.out], bounds[step.out] = y, bound
        del y
        # Dead values go at once: peak memory is eager's.
        for dead in step.frees:
            del values[dead]
    return values[recipe.result], bounds[recipe.result]
