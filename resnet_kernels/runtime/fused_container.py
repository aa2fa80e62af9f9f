"""Fused containers: modules around the blocks, whose own forward stays Python.

A container does three things, each only where reader.py has shown that it is safe:

- its runs conv+bn+relu (the stem, its max-pool included) become one kernel or two: the convolution's stand-in does the
  work, those of BN, ReLU and pool pass on;
- it converts a contiguous input to channels_last once, for all blocks inside, and gives the output eager's layout;
- a Sequential of fused blocks (a stage) hands each block the one before it's output for keeps, so that the residual add
  can be written over it. On two CPU cores that is 12% of ResNet-50 at batch 8: no new pages to be mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..graph import fusible
from ..graph.recipe import Recipe
from ..ops.dtypes import autocast_dtype
from . import checked_calls, eligibility, fused_module, inference
from .checked_calls import Survey
from .container_runs import CHANNELS_LAST, call_run, dtype_of, like_normalized, view_of
from .fused_block import FusedBlock
from .fused_module import Fused
from .gpu import plan
from .live_modules import has_hooks
from .state import UNKNOWN, FusedState, Go, Known


class FusedContainer(Fused):
    """A module that holds fused blocks, or runs that are fused for it."""

    def _rk_forward(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        state: FusedState | None = self.__dict__.get("_rk_state")
        if state is None:
            return original(self, *args, **kwargs)
        like = args[0] if args else None
        if state.normalize is not None:
            like = like_normalized(self, state, args)
        found = _plain_call(self, state, like) if len(args) == 1 and not kwargs else None
        if state.normalize is not None and (found is None or state.plan.entry is None):
            # Elsewhere the run at the entry does it: call_run.
            args = (state.normalize(args[0], dtype_of(self)), *args[1:])
        if found is None:
            return original(self, *args, **kwargs)
        x = args[0]
        if checked_calls.is_inside_verified() and fusible.is_plain_sequential(self):
            return _run_stage(self, state, x, UNKNOWN)
        # A run at the entry converts by itself, or packs the image as it is: call_run.
        value = x if state.plan.entry is not None else x.contiguous(memory_format=CHANNELS_LAST)
        restore = not x.is_contiguous(memory_format=CHANNELS_LAST) and _first_weight_is_contiguous(self)
        survey = None if self.training else _survey(self, state)
        with checked_calls.one_call(found), checked_calls.verified_below(survey):
            if fusible.is_plain_sequential(self):
                y = _run_stage(self, state, value, Known(owned=value is not x))
            else:
                y = original(view_of(self, state) if state.plan.runs else self, value)
        return pytree.tree_map(_to_contiguous, y) if restore else y


def _survey(module: nn.Module, state: FusedState) -> Survey:
    if state.survey is None or not state.survey.is_current():
        owners = []
        for owner in module.modules():
            if fused_module.is_fused(owner):
                below = owner.__dict__["_rk_state"]
                recipes = [below.plan] if isinstance(below.plan, Recipe) else [*below.plan.runs.values()]
                if recipes:
                    owners.append((owner, below, recipes))
        state.survey = Survey(module, owners)
    return state.survey


def _plain_call(module: nn.Module, state: FusedState, x: Any) -> dict[checked_calls.Question, str] | None:
    """The backend of a call on an image batch, by the question that found it; None if the call has to run eager.

    It has to while a tracer watches, in training on a backend without kernels for it, and after submodules changed.
    """
    if torch.compiler.is_compiling() or not eligibility.is_ordinary(x):
        return None
    if module.training and not (state.plan.trains and eligibility.trains_on(state.backend, x)):
        return None
    if x.dim() != 4 or not x.is_floating_point():
        return None
    if tuple(module._modules) != state.plan.names or any(
        module._modules[path] is None for recipe in state.plan.runs.values() for path in recipe.modules
    ):
        eligibility.say_runs_eager(
            f"in a {type(module).__name__}, submodules were added or removed after fusing: call fuse_ again"
        )
        return None
    question = (state.backend, x.device, autocast_dtype(x) or x.dtype)
    backend = checked_calls.resolve(*question)
    return None if backend == "eager" else {question: backend}


def _first_weight_is_contiguous(module: nn.Module) -> bool:
    # 1x1 kernels are both contiguous and channels_last, so they say nothing.
    weights = (m.weight for m in module.modules() if type(m) is nn.Conv2d and max(m.kernel_size) > 1)
    return next(weights, torch.empty(1)).is_contiguous()


def _to_contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) and value.dim() == 4 else value


def _run_stage(module: nn.Module, state: FusedState, x: Tensor, known: Known) -> Any:
    """nn.Sequential's forward, with runs in one call; what is known about a tensor goes along from block to block."""
    children = list(module._modules.items())
    while children:
        name, child = children.pop(0)
        if (result := checked_calls.verified_program(child, x, known)) is not None:
            x, known = result
        elif name in state.plan.runs:
            x, known = call_run(module, name, state, x, known)
        elif name in state.plan.absorbed:
            continue
        elif _is_free_block(child):
            together = _together([child, *(child for _, child in children)], x, known)
            if together:
                del children[: len(together) - 1]
                x, known = inference.run_recipes(together, x, known)
            else:
                x, known = child._rk_call(x, known)
        else:
            x, known = child(x), UNKNOWN
    return x


def _is_free_block(child: nn.Module | None) -> bool:
    return isinstance(child, FusedBlock) and not has_hooks(child) and "forward" not in child.__dict__


def _together(children: list[nn.Module], x: Any, known: Known) -> list[tuple[Recipe, FusedState, Go]]:
    """The first blocks of a list that may run on a GPU as one, so that launches can reach from one into the next.

    Empty where it isn't even one: it runs by itself then, as on the CPU, in training and under torch.compile. A hook keeps
    its own block out, whether it is on the block or in it.
    """
    together: list[tuple[Recipe, FusedState, Go]] = []
    # Blocks in train() mode decide by themselves: asked here, they would only be asked twice.
    if torch.compiler.is_compiling() or children[0].training or not eligibility.is_ordinary(x):
        return together
    backend = children[0].__dict__["_rk_state"].backend
    dtype = autocast_dtype(x) or x.dtype
    if x.device.type == "cpu" and checked_calls.resolve(backend, x.device, dtype) in ("cpu", "eager"):
        return together  # packed weights know one block at a time
    channels = None
    for child in children:
        state = child.__dict__.get("_rk_state") if _is_free_block(child) else None
        if state is None or (together and state.backend != together[0][1].backend):
            break
        go, _ = eligibility.decide(child, state.plan, state, x, known, channels)
        if go is None or go.learns:
            break
        together.append((state.plan, state, go))
        known = Known(backend=(state.backend, go.backend))  # the next one gets what this one makes
        channels = plan.out_channels(state.plan, go.wiring)
        if channels is None:
            break
    return together
