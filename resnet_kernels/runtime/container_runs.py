"""Runs of layers in a module around blocks, such as the stem: stand-ins for conv1, bn1, relu, maxpool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..graph import fusible
from ..graph.recipe import Recipe
from ..ops.dtypes import autocast_dtype
from . import checked_calls, eligibility, fused_block, inference
from .state import UNKNOWN, FusedState, Known

CHANNELS_LAST = torch.channels_last


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a model: of its first floating-point parameter."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def like_normalized(module: nn.Module, state: FusedState, args: tuple) -> Tensor:
    """What the images will be once they are normalised, but for their values: enough to decide how they are run."""
    if not args:
        raise TypeError("a model that was fused with normalize takes its images as the first positional argument")
    state.normalize.check(args[0])
    # Of a tensor subclass, or under a tracer, nothing is to be foreseen.
    x = args[0]
    return torch.empty((), dtype=dtype_of(module), device=x.device).expand(x.shape) if eligibility.is_ordinary(x) else x


def call_run(
    container: nn.Module, name: str, state: FusedState, x: Tensor, known: Known = UNKNOWN
) -> tuple[Tensor, Known]:
    """Runs one of a container's runs, by its convolution's name."""
    recipe: Recipe = state.plan.runs[name]
    if name == state.plan.entry:
        if (result := _run_stem(container, recipe, state, x, known)) is not None:
            return result
        if state.normalize is not None:
            x = state.normalize(x, dtype_of(container))
        x = x.contiguous(memory_format=CHANNELS_LAST)
    go, reason = eligibility.decide(container, recipe, state, x, known)
    if go is not None:
        return fused_block.run(recipe, state, go, x, known)
    if reason:
        eligibility.say_runs_eager(reason)
    # One by one, as eager does: hooks fire, training BNs count.
    for path in recipe.modules:
        x = container._modules[path](x)
    return x, UNKNOWN


def _run_stem(
    container: nn.Module, recipe: Recipe, state: FusedState, x: Tensor, known: Known
) -> tuple[Tensor, Known] | None:
    """The run at the entry by the stem kernel, which takes images as they came and normalizes them; None where it cannot."""
    if len(recipe.steps) != 2 or torch.compiler.is_compiling():
        return None
    if state.normalize is not None and x.requires_grad and torch.is_grad_enabled():
        return None
    like = x if state.normalize is None else like_normalized(container, state, (x,))
    dtype = autocast_dtype(like) or like.dtype
    if checked_calls.resolve(state.backend, like.device, dtype) not in ("triton", "tuned"):
        return None
    go, _ = eligibility.decide(container, recipe, state, like, known)
    if go is None or go.learns:
        return None
    y = inference.run_images(recipe, state, go, x, dtype)
    return None if y is None else (y, Known(owned=True, backend=(state.backend, go.backend)))


class _StandIn:
    """A run in the place of its convolution, in a container's forward: a call makes the run, attributes are the module's."""

    def __init__(self, container: nn.Module, name: str, state: FusedState):
        self._container, self._name, self._state = container, name, state

    def __call__(self, x: Tensor) -> Tensor:
        return call_run(self._container, self._name, self._state, x)[0]

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._container._modules[self._name], attribute)


class _PassOn:
    """What a container's forward sees in the place of a BN, ReLU or pool that the run has done."""

    def __init__(self, module: nn.Module):
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._module, attribute)


def view_of(module: nn.Module, state: FusedState) -> nn.Module:
    """The container as its own forward is to see it: the same object but for the children that a run stands for."""
    cls = fusible.original_class(module)
    view = cls.__new__(cls)
    children = dict(module._modules)
    children.update({name: _StandIn(module, name, state) for name in state.plan.runs})
    children.update({name: _PassOn(children[name]) for name in state.plan.absorbed})
    view.__dict__.update(module.__dict__, _modules=children)
    return view
