"""Fused containers: modules around the blocks, whose own forward stays Python.

A container does three things, each only where reader.py has shown that it is safe:

- Its runs of conv+bn+relu (the stem, with its max-pool) become one kernel or two. The convolution's stand-in does the work,
  and those of BN, ReLU and pool return their input.
- It converts a contiguous input to channels_last once, for all blocks inside, and gives the output eager's layout.
- A Sequential of fused blocks (a stage) gives each block the previous block's output, which the block may overwrite with the
  residual sum. On two CPU cores that saves 12% of ResNet-50 at batch 8: no new pages have to be mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..graph import fusible
from ..graph.recipe import ContainerPlan, Recipe
from ..ops.dtypes import autocast_dtype
from ..ops.layouts import as_contiguous, counted, has_channels_last_strides, is_channels_last, write_back
from . import chains, checked_calls, eligibility, inference, mixed_forward, subclasses
from .checked_calls import Survey
from .container_runs import CHANNELS_LAST, call_run, like_normalized, view_of
from .fused_block import FusedBlock
from .fused_module import Fused
from .gpu import plan
from .live_modules import child_at, has_global_hooks, has_hooks
from .normalize_images import dtype_of
from .state import UNKNOWN, BlockInput, Eager, FusedRun, FusedState, state_of

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class FusedContainer(Fused):
    """A module that holds fused blocks, or runs that are fused for it."""

    def _rk_forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state: FusedState[ContainerPlan] | None = state_of(self)
        if state is None:
            return original(self, *args, **kwargs)
        if state.unread and not torch.compiler.is_compiling():
            eligibility.read_again(self, state)
        like = args[0] if args else None
        if len(args) == 1 and not kwargs and _runs_at_once(self, state, args[0]):
            return mixed_forward.run(self, state, args[0])
        if state.normalize is not None:
            like = like_normalized(self, state, args)
        found = _plain_call(self, state, like) if len(args) == 1 and not kwargs else None
        if state.normalize is not None and (found is None or state.plan.entry is None):
            # Elsewhere the run at the entry does it: call_run.
            args = (state.normalize(args[0], dtype_of(self)), *args[1:])
        if found is None:
            # Inside another container: code that may see a layout sees eager's.
            if len(args) == 1 and not kwargs:
                return checked_calls.call_as_eager(lambda x: original(self, x), args[0])
            return original(self, *map(checked_calls.as_eager, args), **kwargs)
        x = args[0]
        if checked_calls.is_inside_verified() and _is_stage(self, state):
            return _run_stage(self, state, x, UNKNOWN)
        # A run at the entry converts by itself, or packs the image as it is: call_run.
        # What a subclass is converted to depends on its rule: the container's own forward gets x itself.
        as_it_is = state.plan.entry is not None or "" in state.plan.seen or subclasses.is_plain_subclass(x)
        # A module that came after fusing, or whose `inplace` was set since, may write over its input.
        value, version = (x, None) if as_it_is else counted(_converted, x)
        restore = not (has_channels_last_strides(subclasses.as_plain(x)) or _has_channels_last_weights(self))
        survey = _survey(self, state) if state.plan.quiet and not self.training else None
        packs = chains.may_run(like)
        with checked_calls.one_call(found, restore, state.copies.memories), checked_calls.verified_below(survey, packs):
            y = _forward(self, state, original, value)
        write_back(x, value, version)
        if value is not x:
            # Returned by a module that came later, as it is.
            y = x if y is value else y if isinstance(y, Tensor) else _replaced(y, value, x)
        return _restored(y, state.plan.outputs) if restore else y


def _runs_at_once(module: nn.Module, state: FusedState[ContainerPlan], x: Any) -> bool:
    """Whether a module inside another one runs its instructions on x without a check: that one's call found it as it was."""
    if not (state.plan.instructions and state.normalize is None and checked_calls.is_inside_verified()):
        return False
    if torch.is_grad_enabled() or not eligibility.is_ordinary(x) or x.dim() != 4 or not is_channels_last(x):
        return False
    if not eligibility.is_as_assumed(state.plan.reads, x):
        return False
    key = id(module), "at once", x.dtype, x.device, autocast_dtype(x)
    found = checked_calls.derived(
        key, lambda: _plain_call(module, state, x) and mixed_forward.why_not(module, state.plan) is None
    )
    return bool(found) and (state.reads is None or state.reads.changed_outside(module) is None)


def _forward(self: nn.Module, state: FusedState[ContainerPlan], original: Callable[..., Any], x: Tensor) -> Any:
    if state.plan.instructions:
        if (reason := mixed_forward.why_not(self, state.plan)) is None:
            return mixed_forward.run(self, state, x)
        eligibility.say_runs_eager(f"in a {type(self).__name__}, {reason}")
        return checked_calls.call_as_eager(lambda x: original(self, x), x)
    return _run_stage(self, state, x, UNKNOWN) if _is_stage(self, state) else original(view_of(self, state), x)


def _converted(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=CHANNELS_LAST)


def _replaced(outputs: Any, old: Tensor, new: Tensor) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: new if tensor is old else tensor, outputs)


def _restored(outputs: Any, ours: Sequence[bool]) -> Any:
    """A container's outputs in eager's layout. ours: which of them have ours."""
    if len(ours) == 1 and isinstance(outputs, Tensor):
        return as_contiguous(outputs) if ours[0] else outputs
    leaves, structure = pytree.tree_flatten(outputs)
    if len(leaves) != len(ours):  # a module that was not looked into returns several tensors
        ours = (all(ours),) * len(leaves)
    return pytree.tree_unflatten([as_contiguous(v) if own else v for v, own in zip(leaves, ours)], structure)


def _survey(module: nn.Module, state: FusedState[ContainerPlan]) -> Survey:
    if state.survey is None or not state.survey.is_current(module):
        owners = []
        for owner in module.modules():
            if (below := state_of(owner)) is not None:
                recipes = [below.plan] if isinstance(below.plan, Recipe) else [*below.plan.runs.values()]
                if recipes:
                    owners.append((owner, below, recipes))
        state.survey = Survey(module, owners)
    return state.survey


def _plain_call(
    module: nn.Module, state: FusedState[ContainerPlan], x: Any
) -> dict[checked_calls.Question, str] | None:
    """The backend of a call on an image batch, by the question that found it; None if the call has to run eager.

    It has to under a tracer, in training on a backend without kernels for it, and after submodules changed.
    """
    if torch.compiler.is_compiling():
        return None
    x = subclasses.as_plain(x)
    if not eligibility.is_ordinary(x):
        if reason := eligibility.why_not_ordinary(x):
            eligibility.say_runs_eager(f"in a {type(module).__name__}, {reason}")
        return None
    if module.training and not (state.plan.trains and eligibility.trains_on(state.backend, x)):
        return None
    if x.dim() != 4 or not x.is_floating_point() or not eligibility.is_as_assumed(state.plan.reads, x):
        return None
    if tuple(module._modules) != state.plan.names:
        eligibility.say_runs_eager(
            f"in a {type(module).__name__}, submodules were added or removed after fusing: call fuse_ again"
        )
        return None
    # A forward may ask for the classes of its modules, and see what a run does at once.
    if any(
        (child := child_at(module, name)) is None or fusible.original_class(child) is not cls
        for recipe in state.plan.runs.values()
        for name, cls in recipe.signature
    ):
        eligibility.say_runs_eager(
            f"in a {type(module).__name__}, its submodules changed after it was fused: call fuse_ again"
        )
        return None
    if (changed := eligibility.why_container_changed(module, state)) is not None:
        eligibility.say_runs_eager(f"in a {type(module).__name__}, {changed}")
        return None
    question = (state.backend, x.device, autocast_dtype(x) or x.dtype)
    backend = checked_calls.resolve(*question)
    return None if backend == "eager" else {question: backend}


def _has_channels_last_weights(module: nn.Module) -> bool:
    # The first one whose strides tell stands for all. Asking a parametrized module for its weight would compute one.
    convs = (m for m in module.modules() if isinstance(m, nn.Conv2d))
    weights = (m._parameters.get("weight", m.__dict__.get("weight")) for m in convs)
    known = (weight for weight in weights if weight is not None and not nn.parameter.is_lazy(weight))
    weight = next((weight for weight in known if weight.shape[1:].numel() > 1), None)
    return weight is not None and is_channels_last(weight)


def _is_stage(module: nn.Module, state: FusedState[ContainerPlan]) -> bool:
    nested = any("." in path for path in state.plan.called)
    return fusible.is_plain_sequential(module) and not nested and not state.plan.instructions


def _run_stage(module: nn.Module, state: FusedState[ContainerPlan], x: Tensor, known: BlockInput) -> Any:
    """nn.Sequential's forward, with one call for each run, and with what each block knows of its input."""
    children = list(module._modules.items())
    done: frozenset[str] = frozenset()  # the members of a chain that ran
    chained = {chain.members[0]: chain for chain in state.plan.chains} if checked_calls.is_inside_verified() else {}
    while children:
        name, child = children.pop(0)
        if child is None:
            raise TypeError("'NoneType' object is not callable")  # nn.Sequential's own
        if name in done:
            continue
        ran = chains.run(module, state, chained[name], x) if name in chained else None
        if ran is not None:
            x, done = ran.y, ran.members
            # Only a channels_last tensor may go to the next block without a check.
            ours = isinstance(x, Tensor) and is_channels_last(x)
            known = BlockInput(owned=True, backend=(state.backend, "cpu") if ours else None)
        elif (result := checked_calls.run_verified(child, x, known)) is not None:
            x, known = result
        elif name in state.plan.runs:
            x, known = call_run(module, name, state, x, known)
            if name in state.plan.seen:
                x = checked_calls.as_eager(x)
        elif name in state.plan.absorbed:
            continue
        elif _is_free_block(child) and name not in state.plan.seen:
            together = _together([child, *(child for _, child in children)], x, known)
            if together:
                del children[: len(together) - 1]
                x, known = inference.run_recipes(together, x, known)
            else:
                x, known = FusedBlock._rk_call(child, x, known)
        else:
            if name in state.plan.apart:
                with checked_calls.apart():
                    x, known = child(x), UNKNOWN
                continue
            if has_hooks(child) or has_global_hooks():
                x = checked_calls.as_eager(x)
            x, known = child(x), UNKNOWN
            if name in state.plan.seen:
                x = checked_calls.as_eager(x)
    return x


def _is_free_block(child: nn.Module | None) -> TypeIs[FusedBlock]:
    return (
        isinstance(child, FusedBlock)
        and not (has_hooks(child) or has_global_hooks())
        and "forward" not in child.__dict__
        and child.__dict__.get("_compiled_call_impl") is None
    )


def _together(
    children: Sequence[nn.Module | None], x: Any, known: BlockInput
) -> list[tuple[Recipe, FusedState[Recipe], FusedRun]]:
    """The first blocks of a list that may run on a GPU as one, so that launches can reach from one into the next.

    The list is empty where the first block runs by itself: on the CPU, in training, and under torch.compile. A hook on a
    block or in it keeps that block out.
    """
    together: list[tuple[Recipe, FusedState[Recipe], FusedRun]] = []
    # A block in train() mode decides by itself; asked here, it would only be asked twice.
    if torch.compiler.is_compiling() or not eligibility.is_ordinary(x):
        return together
    channels = None
    for child in children:
        state = state_of(child) if _is_free_block(child) else None
        if child is None or state is None or child.training:
            break
        if not together:
            dtype = autocast_dtype(x) or x.dtype
            if x.device.type == "cpu" and checked_calls.resolve(state.backend, x.device, dtype) in ("cpu", "eager"):
                break  # packed weights know one block at a time
        elif state.backend != together[0][1].backend:
            break
        answer = eligibility.decide(child, state.plan, state, x, known, channels)
        if isinstance(answer, Eager) or answer.learns:
            break
        together.append((state.plan, state, answer))
        known = BlockInput(backend=(state.backend, answer.backend))  # the next block gets what this one makes
        channels = plan.out_channels(state.plan, answer.live)
        if channels is None:
            break
    return together
