"""Running recipes in inference: values in, values out, in the layout that eager would give.

On the CPU executor.py does the work, a block at a time; elsewhere plan.py, a block or several that follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..graph.recipe import Recipe
from ..ops import tuned_table
from ..ops.dtypes import autocast_dtype
from .cpu import executor
from .gpu import plan as gpu_plan
from .gpu.plan import Plan
from .state import FusedState, Go, Known

CHANNELS_LAST = torch.channels_last
# Plans that a block keeps: detection models see many image sizes.
_MOST_PLANS = 32


def run_recipe(recipe: Recipe, state: FusedState, go: Go, x: Tensor, known: Known) -> tuple[Tensor, Known]:
    """Runs a recipe on x, as `decide` has said that it may."""
    return run_recipes([(recipe, state, go)], x, known)


def run_recipes(blocks: Sequence[tuple[Recipe, FusedState, Go]], x: Tensor, known: Known) -> tuple[Tensor, Known]:
    """Runs blocks of one backend, each on the output of the one before it; on the CPU one at a time."""
    recipe, state, first = blocks[0]
    dtype = autocast_dtype(x)
    value = x if dtype is None else x.to(dtype)
    restore = False
    if not value.is_contiguous(memory_format=CHANNELS_LAST):
        value = value.contiguous(memory_format=CHANNELS_LAST)
        # Eager's convolution returns channels_last if its input or its weight is, and it stays so from there on.
        restore = all(conv.weight.is_contiguous() for _, _, go in blocks for conv in go.wiring.convs)
    if first.backend == "cpu" and value.shape[0] > 0:
        assert len(blocks) == 1, "packed blocks run one at a time"
        y, bound = executor.run(recipe, state, first, value, known.bound, known.owned or value is not x)
    else:
        bound = None
        if torch.compiler.is_compiling():
            y = gpu_plan.run_traced(recipe, first.wiring, value, first.backend)
        else:
            y = _plan(blocks, value).run(value, first.backend)
    # Only a channels_last tensor may go to the next block unasked.
    return (y.contiguous(), Known(True, bound)) if restore else (y, Known(True, bound, (state.backend, first.backend)))


def run_images(recipe: Recipe, state: FusedState, go: Go, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Runs a stem on images of any layout, still to be normalised if `state` says so; None where no kernel does that.

    dtype: that is computed in.
    """
    like = torch.empty((), dtype=dtype, device=x.device).expand(x.shape)
    return _plan([(recipe, state, go)], like).run_images(x, state.normalize)


def _plan(blocks: Sequence[tuple[Recipe, FusedState, Go]], x: Tensor) -> Plan:
    """The plan for x, kept by the first block: made anew when modules, their settings or measured tables are others."""
    recipes, states, gos = zip(*blocks)
    wirings = [go.wiring for go in gos]
    plans = states[0].plans
    key = recipes[0].modules, len(blocks), x.shape, x.dtype, x.device, gos[0].backend, tuned_table.generation()
    plan = plans.get(key)
    if plan is None or not plan.is_of(wirings):
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plan = plans[key] = Plan(wirings, recipes, states, x, gos[0].backend)
    return plan
