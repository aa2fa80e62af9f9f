"""Fused blocks: what `fuse` makes of a user's block.

A fused block is the user's own module, with the user's parameters, names and hooks, under a subclass of its own class:
`isinstance` holds, and going back is setting `__class__` back. Its forward runs the recipe that reader.py found:

    FusedBlock.forward -> inference.run_recipes -> ops.conv_bias_act (or oneDNN with packed weights) -> kernel

It runs the class's own forward whenever eager semantics ask for that: training, gradients, hooks on inner modules, tracing,
structure that changed since. `eligibility.decide` holds all of these conditions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..graph import fusible
from ..graph.recipe import Recipe
from . import checked_calls, eligibility, inference, subclasses, training
from .fused_module import Fused
from .state import UNKNOWN, BlockInput, Eager, FusedState, state_of


class FusedBlock(Fused):
    """A module whose whole forward is a recipe of fused steps."""

    def _rk_forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) == 1 and not kwargs:
            # Unbound: unfuse_ in another thread may have swapped the class back by now.
            return FusedBlock._rk_call(self, args[0], UNKNOWN)[0]
        return original(self, *args, **kwargs)

    def _rk_call(self, x: Tensor, known: BlockInput) -> tuple[Tensor, BlockInput]:
        """Runs the block on x; returns its output, and what is known about that."""
        state = state_of(self)
        if state is not None and state.unread and not torch.compiler.is_compiling():
            eligibility.read_again(self, state)
        if state is not None and (result := run_if_fused(self, state.plan, state, x, known)) is not None:
            return result
        # Its own code may see the layout that x has.
        forward = fusible.original_class(self).forward
        return checked_calls.call_as_eager(lambda x: forward(self, x), x), UNKNOWN


def run_if_fused(
    module: nn.Module, recipe: Recipe, state: FusedState[Any], x: Tensor, known: BlockInput
) -> tuple[Tensor, BlockInput] | None:
    """Runs a recipe of a module, as inference or as training does.

    Returns:
        The output, and what is known about it; None if eager semantics ask for the module's own forward.
    """
    if subclasses.is_plain_subclass(x):
        return _run_subclass(module, recipe, state, x)
    answer = eligibility.decide(module, recipe, state, x, known)
    if isinstance(answer, Eager):
        if answer.reason:
            eligibility.say_runs_eager(answer.reason)
        return None
    if answer.learns:
        return training.run_recipe(recipe, state, answer, x), UNKNOWN
    return inference.run_recipes([(recipe, state, answer)], x, known)


def _run_subclass(
    module: nn.Module, recipe: Recipe, state: FusedState[Any], x: Tensor
) -> tuple[Tensor, BlockInput] | None:
    """`run_if_fused` for an input of a plain subclass of Tensor, whose own rule says what comes out."""
    # Asked before the rule, which would otherwise see an operation that is not run.
    answer = eligibility.decide(module, recipe, state, subclasses.as_plain(x), UNKNOWN)
    if isinstance(answer, Eager):
        if answer.reason:
            eligibility.say_runs_eager(answer.reason)
        return None

    def compute(x: Tensor) -> Tensor | None:
        # Anew, because a rule may hand on another tensor than it got.
        result = run_if_fused(module, recipe, state, x, UNKNOWN)
        return None if result is None else result[0]

    y = subclasses.by_its_rule(x, compute)
    return None if y is None else (y, UNKNOWN)
