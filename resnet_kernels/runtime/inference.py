"""Running recipes in inference: values in, values out, in the layout that eager would give.

On the CPU executor.py does the work, one block at a time. Elsewhere plan.py does, for a block or several in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph.recipe import ContainerPlan, Recipe
from ..ops import tuned_table
from ..ops.dtypes import autocast_dtype
from ..ops.layouts import CHANNELS_LAST, as_contiguous, has_channels_last_strides, is_channels_last
from .cpu import executor
from .gpu import plan as gpu_plan
from .gpu.plan import Plan
from .state import BlockInput, FusedRun, FusedState

# Plans that a block keeps. Detection models see many image sizes.
_MOST_PLANS = 32


# A recipe, the state of the module that it is of, and how `decide` lets it run.
Decided = tuple[Recipe, FusedState[Any], FusedRun]


def run_recipes(blocks: Sequence[Decided], x: Tensor, known: BlockInput) -> tuple[Tensor, BlockInput]:
    """Runs blocks on one backend, each on the previous block's output; on the CPU one at a time.

    Args:
        blocks: at least one.
        x: the input of the first, (N, C, H, W).
        known: what is known about x.

    Returns:
        The output in the layout that eager would give, and what is known about it.
    """
    recipe, state, first = blocks[0]
    dtype = autocast_dtype(x)
    value = x if dtype is None else x.to(dtype)
    restore = False
    # What comes from a block of ours is channels_last, and so is what goes to the next one.
    if known.backend is None and not is_channels_last(value):
        # Eager's convolution returns channels_last if its input or its weight is, and it stays so from there on.
        restore = not has_channels_last_strides(value)
        value = value.contiguous(memory_format=CHANNELS_LAST)
        restore = restore and not any(is_channels_last(conv.weight) for _, _, run in blocks for conv in run.live.convs)
    if first.backend == "cpu" and value.shape[0] > 0:
        assert len(blocks) == 1, "packed blocks run one at a time"
        y, bound = executor.run(recipe, state, first, value, known.bound, known.owned or value is not x)
    else:
        bound = None
        if torch.compiler.is_compiling():
            y = gpu_plan.run_traced(recipe, first.live, value, first.backend)
        else:
            y = _plan(blocks, value).run(value, first.backend)
    # Only a channels_last tensor may go to the next block without a check.
    if restore:
        return as_contiguous(y), BlockInput(True, bound)
    return y, BlockInput(True, bound, (state.backend, first.backend))


def run_images(
    recipe: Recipe, state: FusedState[ContainerPlan], run: FusedRun, x: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Runs a stem on images of any layout, and normalizes them if `state` says so; None where no kernel does that.

    Args:
        recipe: of the stem.
        state: of the container.
        run: how `decide` lets it run.
        x: (N, 3, H, W).
        dtype: of the computation.
    """
    like = torch.empty((), dtype=dtype, device=x.device).expand(x.shape)
    return _plan([(recipe, state, run)], like).run_images(x, state.normalize)


def _plan(blocks: Sequence[Decided], x: Tensor) -> Plan:
    """The plan for x. The first block keeps it, until a module, a setting or a measured table changes."""
    recipe, state, run = blocks[0]
    modules = [block[2].live for block in blocks]
    key = recipe.modules, len(blocks), x.shape, x.dtype, x.device, run.backend, tuned_table.generation()
    plan = state.plans.get(key)
    if plan is None or not plan.is_of(modules):
        if len(state.plans) >= _MOST_PLANS:
            state.plans.clear()
        plan = state.plans[key] = Plan(modules, [b[0] for b in blocks], [b[1] for b in blocks], x, run.backend)
    return plan
