"""The runs of a container, such as the stem: one call in the place of conv1, bn1, relu and maxpool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..graph import fusible
from ..graph.layouts import prefixes
from ..graph.recipe import ContainerPlan, Recipe
from ..ops.dtypes import autocast_dtype
from . import chains, checked_calls, eligibility, fused_block, inference, subclasses
from .live_modules import child_at, has_global_hooks, has_hooks
from .normalize_images import dtype_of
from .state import UNKNOWN, BlockInput, Eager, FusedState

CHANNELS_LAST = torch.channels_last


def like_normalized(module: nn.Module, state: FusedState[ContainerPlan], args: tuple[Any, ...]) -> Any:
    """A stand-in for the normalized images, without their values: enough to decide how they are run."""
    if not args:
        raise TypeError("a model that was fused with normalize takes its images as the first positional argument")
    assert state.normalize is not None
    state.normalize.check(args[0])
    # What becomes of x under a tracer cannot be foreseen.
    x = subclasses.as_plain(args[0])
    return torch.empty((), dtype=dtype_of(module), device=x.device).expand(x.shape) if eligibility.is_ordinary(x) else x


def call_run(
    container: nn.Module, name: str, state: FusedState[ContainerPlan], x: Tensor, known: BlockInput = UNKNOWN
) -> tuple[Tensor, BlockInput]:
    """Runs one of a container's runs, by its convolution's name."""
    recipe: Recipe = state.plan.runs[name]
    given = x
    if name == state.plan.entry:
        if (
            not subclasses.is_plain_subclass(x)
            and (result := _run_stem(container, recipe, state, x, known)) is not None
        ):
            return result
        if state.normalize is not None:
            given = x = state.normalize(x, dtype_of(container))
        if not subclasses.is_plain_subclass(x):  # those are converted within their rule
            x = x.contiguous(memory_format=CHANNELS_LAST)
    if (result := fused_block.run_if_fused(container, recipe, state, x, known)) is not None:
        return result

    # One by one, as eager does: hooks fire, training BNs count, and the layout is eager's.
    def one_by_one(x: Any) -> Any:
        for path in recipe.modules:
            x = container.get_submodule(path)(x)
        return x

    return checked_calls.call_as_eager(one_by_one, given), UNKNOWN


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


def view_of(module: nn.Module, state: FusedState[ContainerPlan]) -> nn.Module:
    """A copy of a container for its own forward, in which some children are stand-ins; the container itself if none are.

    A stand-in is a copy of the child, of the same class and with the same attributes, whose call does something else:
    it runs a run, passes on what a run has done already, or gives code that sees a tensor's layout the one of eager.
    """
    calls: dict[str, Callable[..., Any]] = {name: partial(_call_run, module, name, state) for name in state.plan.runs}
    calls.update((name, _pass_on) for name in state.plan.absorbed)
    every = has_global_hooks()
    # Hooks of a module around fused ones see eager's layout, and so does all in it: a fused module returns what it gets.
    for path in {prefix for called in state.plan.called if "." in called for prefix in prefixes(called)[:-1]}:
        around = child_at(module, path)
        if around is not None and (every or has_hooks(around)):
            calls[path] = partial(_call_as_eager, around, True)
    for path in state.plan.called:
        child = child_at(module, path)
        if child is not None and path not in calls:
            hooked = every or has_hooks(child)
            if path in state.plan.apart:
                calls[path] = partial(_call_apart, child)
            elif hooked or path in state.plan.seen:
                calls[path] = partial(_call_as_eager, child, hooked)
    if checked_calls.is_inside_verified() and checked_calls.runs_packed():
        calls.update(chains.stand_ins(module, state, dict(calls)))
    return _with_calls(module, calls) if calls else module


def _call_run(module: nn.Module, name: str, state: FusedState[ContainerPlan], x: Tensor) -> Tensor:
    y = call_run(module, name, state, x)[0]
    return checked_calls.as_eager(y) if name in state.plan.seen else y


def _pass_on(x: Tensor) -> Tensor:
    return x


def _call_as_eager(child: nn.Module, hooked: bool, *args: Any, **kwargs: Any) -> Any:
    if hooked:  # hooks see what goes in, too
        args = tuple(checked_calls.as_eager(value) for value in args)
    return checked_calls.as_eager(child(*args, **kwargs))


def _call_apart(child: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with checked_calls.apart():
        return child(*args, **kwargs)


def _with_calls(module: nn.Module, calls: Mapping[str, Callable[..., Any]]) -> nn.Module:
    """A copy of a module and of those on the way to some paths in it; a call of what is there is another one."""
    view = _copy(module)
    below: dict[str, dict[str, Callable[..., Any]]] = {}
    for path, call in calls.items():
        name, _, rest = path.partition(".")
        below.setdefault(name, {})[rest] = call
    children = dict(module._modules)
    for name, inner in below.items():
        if (child := children[name]) is None:
            continue
        if "" in inner:
            children[name] = _copy(child)
            # nn.Module.__call__ asks this attribute first; hooks of the child are its own call's to run.
            children[name].__dict__["_compiled_call_impl"] = inner[""]
            # Some call a child's forward by its name.
            children[name].__dict__["forward"] = inner[""]
        else:
            children[name] = _with_calls(child, inner)
    view.__dict__["_modules"] = children
    return view


def _copy(module: nn.Module) -> nn.Module:
    # No constructor and no __new__ runs: both are the user's.
    copy: nn.Module = object.__new__(fusible.original_class(module))
    copy.__dict__.update(module.__dict__)
    return copy
