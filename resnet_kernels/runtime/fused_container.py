"""Fused containers: modules around the blocks, whose own forward stays Python.

A container does three things, each only where reader.py has shown that it is safe:

- Its runs of conv+bn+relu (the stem, with its max-pool) become one kernel or two. The convolution's stand-in does the work,
  and those of BN, ReLU and pool return their input.
- It converts a contiguous input to channels_last once, for all blocks inside, and gives the output eager's layout.
- A Sequential of fused blocks (a stage) gives each block the previous block's output, which the block may overwrite with the
  residual sum. On two CPU cores that saves 12% of ResNet-50 at batch 8: no new pages have to be mapped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..graph import fusible
from ..graph.recipe import ContainerPlan, Recipe
from ..ops.dtypes import autocast_dtype
from . import checked_calls, eligibility, inference, subclasses
from .checked_calls import Survey
from .container_runs import CHANNELS_LAST, call_run, dtype_of, like_normalized, view_of
from .fused_block import FusedBlock
from .fused_module import Fused
from .gpu import plan
from .live_modules import has_hooks
from .state import UNKNOWN, BlockInput, Eager, FusedRun, FusedState, state_of

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class FusedContainer(Fused):
    """A module that holds fused blocks, or runs that are fused for it."""

    def _rk_forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state: FusedState[ContainerPlan] | None = state_of(self)
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
        # What a subclass is converted to depends on its rule: the container's own forward gets x itself.
        converts = state.plan.entry is None and not subclasses.is_plain_subclass(x)
        value = x.contiguous(memory_format=CHANNELS_LAST) if converts else x
        is_channels_last = subclasses.as_plain(x).is_contiguous(memory_format=CHANNELS_LAST)
        restore = not is_channels_last and _first_weight_is_contiguous(self)
        survey = None if self.training else _survey(self, state)
        with checked_calls.one_call(found), checked_calls.verified_below(survey):
            if fusible.is_plain_sequential(self):
                y = _run_stage(self, state, value, BlockInput(owned=value is not x))
            else:
                y = original(view_of(self, state) if state.plan.runs else self, value)
        return pytree.tree_map(_to_contiguous, y) if restore else y


def _survey(module: nn.Module, state: FusedState[ContainerPlan]) -> Survey:
    if state.survey is None or not state.survey.is_current():
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
    return all(weight.is_contiguous() for weight in itertools.islice(weights, 1))


def _to_contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) and value.dim() == 4 else value


def _run_stage(module: nn.Module, state: FusedState[ContainerPlan], x: Tensor, known: BlockInput) -> Any:
    """nn.Sequential's forward, with one call for each run, and with what each block knows of its input."""
    children = list(module._modules.items())
    while children:
        name, child = children.pop(0)
        if child is None:
            raise TypeError("'NoneType' object is not callable")  # nn.Sequential's own
        if (result := checked_calls.run_verified(child, x, known)) is not None:
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


def _is_free_block(child: nn.Module | None) -> TypeIs[FusedBlock]:
    return isinstance(child, FusedBlock) and not has_hooks(child) and "forward" not in child.__dict__


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
