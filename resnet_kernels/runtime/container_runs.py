"""The runs of a container, such as the stem: one call in the place of conv1, bn1, relu and maxpool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..graph import fusible
from ..graph.recipe import ContainerPlan, Recipe
from ..ops.dtypes import autocast_dtype
from . import checked_calls, eligibility, fused_block, inference
from .state import UNKNOWN, BlockInput, Eager, FusedState

CHANNELS_LAST = torch.channels_last


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point parameter."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def like_normalized(module: nn.Module, state: FusedState[ContainerPlan], args: tuple[Any, ...]) -> Any:
    """A stand-in for the normalized images, without their values: enough to decide how they are run."""
    if not args:
        raise TypeError("a model that was fused with normalize takes its images as the first positional argument")
    assert state.normalize is not None
    state.normalize.check(args[0])
    # What becomes of a tensor subclass, or of x under a tracer, cannot be foreseen.
    x = args[0]
    return torch.empty((), dtype=dtype_of(module), device=x.device).expand(x.shape) if eligibility.is_ordinary(x) else x


def call_run(
    container: nn.Module, name: str, state: FusedState[ContainerPlan], x: Tensor, known: BlockInput = UNKNOWN
) -> tuple[Tensor, BlockInput]:
    """Runs one of a container's runs, by its convolution's name."""
    recipe: Recipe = state.plan.runs[name]
    if name == state.plan.entry:
        if (result := _run_stem(container, recipe, state, x, known)) is not None:
            return result
        if state.normalize is not None:
            x = state.normalize(x, dtype_of(container))
        x = x.contiguous(memory_format=CHANNELS_LAST)
    if (result := fused_block.run_if_fused(container, recipe, state, x, known)) is not None:
        return result
    # One by one, as eager does: hooks fire, training BNs count.
    for path in recipe.modules:
        x = container.get_submodule(path)(x)
    return x, UNKNOWN


def _run_stem(
    container: nn.Module, recipe: Recipe, state: FusedState[ContainerPlan], x: Tensor, known: BlockInput
) -> tuple[Tensor, BlockInput] | None:
    """The run at the entry by the stem kernel, which takes images as they came and normalizes them; None where it cannot."""
    if len(recipe.steps) != 2 or torch.compiler.is_compiling():
        return None
    if state.normalize is not None and x.requires_grad and torch.is_grad_enabled():
        return None
    like = x if state.normalize is None else like_normalized(container, state, (x,))
    dtype = autocast_dtype(like) or like.dtype
    if checked_calls.resolve(state.backend, like.device, dtype) not in ("triton", "tuned"):
        return None
    answer = eligibility.decide(container, recipe, state, like, known)
    if isinstance(answer, Eager) or answer.learns:
        return None
    y = inference.run_images(recipe, state, answer, x, dtype)
    return None if y is None else (y, BlockInput(owned=True, backend=(state.backend, answer.backend)))


class _StandIn:
    """A run in the place of its convolution, in a container's forward: a call makes the run, attributes are the module's."""

    def __init__(self, container: nn.Module, name: str, state: FusedState[ContainerPlan]):
        self._container, self._name, self._state = container, name, state

    def __call__(self, x: Tensor) -> Tensor:
        return call_run(self._container, self._name, self._state, x)[0]

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._container.get_submodule(self._name), attribute)


class _PassOn:
    """An identity in the place of a BN, ReLU or pool that a run has done; attributes are the module's."""

    def __init__(self, module: nn.Module | None):
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._module, attribute)


def view_of(module: nn.Module, state: FusedState[ContainerPlan]) -> nn.Module:
    """A shallow copy of a container for its own forward, with stand-ins for the children that belong to a run."""
    cls = fusible.original_class(module)
    view = object.__new__(cls)  # a class's own __new__ may run its constructor, as FSDP's does
    children: dict[str, Any] = dict(module._modules)
    children.update({name: _StandIn(module, name, state) for name in state.plan.runs})
    children.update({name: _PassOn(children[name]) for name in state.plan.absorbed})
    view.__dict__.update(module.__dict__, _modules=children)
    return view
