"""Fused blocks: what `fuse` makes of a user's block; `BasicBlock`, `Bottleneck`, `PreactBottleneck`, `Residual` to build with.

A fused block is the user's own module, with the user's parameters, names and hooks, under a subclass of its own class, made
here: `isinstance` holds, and going back is setting `__class__` back. Its forward runs the recipe that reader.py found:

    FusedBlock.forward -> run_recipe -> ops.conv_bias_act (or oneDNN with packed weights) -> kernel

and the class's own forward whenever that is what eager semantics ask for: training, gradients, hooks on inner modules,
tracing, structure that changed since. `eligibility.decide` holds all of these conditions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..graph.recipe import Recipe
from . import eligibility, inference, training
from .eligibility import say_runs_eager
from .fused_module import Fused
from .state import UNKNOWN, FusedState, Go, Known


class FusedBlock(Fused):
    """A module whose whole forward is a recipe of fused steps."""

    def _rk_forward(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        if len(args) == 1 and not kwargs:
            return self._rk_call(args[0], UNKNOWN)[0]
        return original(self, *args, **kwargs)

    def _rk_call(self, x: Tensor, known: Known) -> tuple[Tensor, Known]:
        """Runs the block on x; returns its output, and what is known about it."""
        state: FusedState | None = self.__dict__.get("_rk_state")
        go, reason = (None, "") if state is None else eligibility.decide(self, state.plan, state, x, known)
        if go is None:
            if reason:
                say_runs_eager(reason)
            return type(self)._rk_original_class.forward(self, x), UNKNOWN
        return run(state.plan, state, go, x, known)


def run(recipe: Recipe, state: FusedState, go: Go, x: Tensor, known: Known) -> tuple[Tensor, Known]:
    """Runs a recipe on x, as inference or as training does; returns its output, and what is known about it."""
    if go.learns:
        return training.run_recipe(recipe, state, go, x), UNKNOWN
    return inference.run_recipe(recipe, state, go, x, known)
