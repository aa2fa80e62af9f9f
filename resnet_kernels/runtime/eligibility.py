"""May this call run fused? `decide` holds every condition under which eager semantics ask for the module's own forward.

A call of a network asks the same questions 70 times (is this convolution still the one that was packed?), and between two
convolutions the caches are cold: 20 us a question instead of 3. So the outermost fused module asks all of them at once,
`verified_below`, and its blocks take that for an answer during this call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..graph import fusible
from ..graph.recipe import CallStep, Recipe
from ..ops import backends, tuned_table
from ..ops.dtypes import autocast_dtype
from .checked_calls import resolve, verified_wiring
from .live_modules import Wiring, child_at, has_global_hooks, wire
from .state import FusedState, Go, Known


def say_runs_eager(reason: str) -> None:
    """Warns that a call falls back to eager; once a reason and process."""
    backends.say_once(f"{reason}; such calls run the model's own PyTorch code", 6)


def is_ordinary(x: Any) -> bool:
    """Whether x is a tensor with numbers in it, and no tracer, transform or dispatch mode is watching."""
    # torch.fx proxies, fake tensors, DTensors, lists: eager knows what to make of them.
    return (type(x) is Tensor or type(x) is nn.Parameter) and not (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def why_not_now(module: nn.Module, recipe: Recipe, backend: str) -> str | None:
    """Why a fused module runs eager as things stand; None if it runs fused. Needs no input, so that `explain` can ask."""
    wiring = wire(module, recipe)
    if isinstance(wiring, str):
        return wiring
    weight = wiring.convs[0].weight if wiring.convs else None
    if wiring.in_training() is None or not trains_on(backend, weight):
        reason = wiring.why_not_now()
        return reason or (None if weight is None else backends.why_eager(backend, weight.device, weight.dtype) or None)
    return wiring.why_not_at_all() or wiring.why_not_trained() or (None if recipe.trains else _OTHER_IN_TRAINING)


_OTHER_IN_TRAINING = "its forward is another one in train() mode"


def decide(
    module: nn.Module, recipe: Recipe, state: FusedState, x: Any, known: Known, channels: int | None = None
) -> tuple[Go | None, str]:
    """Returns (Go, "") to run this call fused, or (None, reason) to run the module's own forward.

    The reason is "" where eager goes without saying: under a tracer, for an input that eager will refuse, in training on a
    backend that has nothing faster for it. channels: of the module's input, where x is the input of a block before it.
    """
    if torch.compiler.is_compiling():
        return _decide_for_compiler(module, recipe, state, x), ""
    if module.training and not trains_on(state.backend, x) and _has_batch_statistics(module, recipe):
        return None, ""  # PyTorch's BN is all there is
    if known.backend is None and not is_ordinary(x):
        return None, ""
    wiring = verified_wiring(module, recipe)
    verified = wiring is not None
    batch_statistics = False
    if not verified:
        wiring = current_wiring(module, recipe, state)
        reason = wiring
        if not isinstance(wiring, str):
            batch_statistics = wiring.in_training() is not None
            reason = "a global module hook is registered" if has_global_hooks() else wiring.why_not_at_all()
        if reason is None and module.training and not recipe.trains:
            reason = _OTHER_IN_TRAINING
        if reason is not None:
            plain = module.training and not trains_on(state.backend, x)
            return None, "" if plain else f"in a {type(module).__name__}, {reason}"
    if x.dim() != 4 or wiring.widths - {x.shape[1] if channels is None else channels}:
        return None, ""  # eager's own error
    gradients = torch.is_grad_enabled()
    if verified and known.backend is not None and known.backend[0] == state.backend and not gradients:
        return Go(known.backend[1], wiring, True), ""
    dtype = autocast_dtype(x)
    weight = wiring.convs[0].weight
    if x.device != weight.device or (dtype is None and x.dtype != weight.dtype):
        return None, ""  # eager's own error, or its own meaning
    backend = resolve(state.backend, x.device, dtype or x.dtype)
    if backend == "eager":
        return None, backends.why_eager(state.backend, x.device, dtype or x.dtype)
    gradients = gradients and (x.requires_grad or wiring.needs_gradients())
    if not (gradients or batch_statistics):
        return Go(backend, wiring, verified), ""
    state.drop_copies()
    if dtype not in (None, x.dtype) and any(step.residual == 0 for step in recipe.steps if hasattr(step, "residual")):
        return None, ""  # under autocast, what the sum with a wider shortcut is depends on how the add was written
    return _decide_to_learn(module, backend, wiring, batch_statistics, trains_on(state.backend, x))


def _has_batch_statistics(module: nn.Module, recipe: Recipe) -> bool:
    """Whether the first BN is at work in train() mode: the quick answer for ordinary training on the CPU."""
    path = next((step.bn for step in recipe.steps if not isinstance(step, CallStep) and step.bn is not None), None)
    bn = None if path is None else child_at(module, path)
    return bn is not None and not fusible.is_frozen(bn)


def _decide_to_learn(
    module: nn.Module, backend: str, wiring: Wiring, batch_statistics: bool, trains: bool
) -> tuple[Go | None, str]:
    reason = None
    if trains:
        reason = wiring.why_not_trained()
    elif batch_statistics:
        return None, ""  # PyTorch's BN is all there is
    elif wiring.norms_need_gradients():
        return None, "gradients are on in eval mode (torch.no_grad() or torch.inference_mode() runs fused)"
    if reason is not None:
        return None, f"in a {type(module).__name__}, {reason}"
    return Go(backend, wiring, False, learns=True), ""


def trains_on(backend: str, data: Any) -> bool:
    """Whether a backend trains `data` on own kernels; `auto` where a table of its device shows that they win in its dtype.

    data: a block's input, or in its place a weight; of what is no tensor `auto` says no.
    """
    backend = backends.requested(backend)
    if backend == "auto" and isinstance(data, Tensor):
        return tuned_table.trains(data.device, autocast_dtype(data) or data.dtype)
    return backend == "triton"


def current_wiring(module: nn.Module, recipe: Recipe, state: FusedState) -> Wiring | str:
    """A recipe's modules as they are now, looked up anew if one was replaced; or why it no longer holds."""
    wiring = state.wiring.get(recipe.modules)
    # Replicas (nn.DataParallel) share the state of the module that they were made from, but not its children.
    if wiring is None or not wiring.is_of(module) or not wiring.is_current():
        wiring = wire(module, recipe)
        if not isinstance(wiring, str):
            state.wiring[recipe.modules] = wiring
    return wiring


def _decide_for_compiler(module: nn.Module, recipe: Recipe, state: FusedState, x: Any) -> Go | None:
    # On the CPU torch.compile fuses better by itself than around oneDNN's packed weights.
    on_gpu = isinstance(x, Tensor) and x.device.type == "cuda" and state.backend == "auto"
    learns = module.training or torch.is_grad_enabled()
    if not (state.backend == "triton" or (not learns and (on_gpu or state.backend == "cudnn"))):
        return None
    wiring = wire(module, recipe)
    if isinstance(wiring, str) or (module.training and not recipe.trains):
        return None
    reason = wiring.why_not_at_all() or wiring.why_not_trained() if learns else wiring.why_not_now()
    return Go(state.backend, wiring, False, learns) if reason is None else None
