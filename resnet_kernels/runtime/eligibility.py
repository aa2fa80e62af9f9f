"""Every condition under which eager semantics ask for a module's own forward: `decide`.

A call of a network asks the same questions 70 times (is this convolution still the one that was packed?). Between two
convolutions the caches are cold, and a question takes 20 us instead of 3. So the outermost fused module asks all of them
at once (`checked_calls.verified_below`), and its blocks rely on the answers during this call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..graph import fusible
from ..graph import reader as graph_reader
from ..graph.reads import NOT_EMPTY, NOT_NARROWED, WITHOUT_GRADIENTS, Reads
from ..graph.recipe import CallStep, CannotRead, ContainerPlan, Recipe
from ..ops import backends, tuned_table
from ..ops.dtypes import autocast_dtype
from ..ops.library import is_traced
from . import subclasses
from .checked_calls import resolve, verified_modules
from .live_modules import LiveModules, child_at, has_global_hooks, live_reads, why_changed, wire
from .state import BlockInput, Eager, FusedRun, FusedState, state_of

# Said of train() mode where the forward differs from the one in eval mode.
_OTHER_IN_TRAINING = "its forward is another one in train() mode"


def say_runs_eager(reason: str) -> None:
    """Warns that a call falls back to eager; once a reason and process."""
    backends.say_once(f"{reason}; such calls run the model's own PyTorch code", 6)


def is_ordinary(x: Any) -> bool:
    """Whether x is a Tensor with numbers in memory of its own, and no tracer, transform or dispatch mode is at work."""
    # Eager knows what to do with torch.fx proxies, fake tensors, DTensors and lists. Plain subclasses: subclasses.py.
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        # Sparse and oneDNN's own tensors, and zeros that autograd makes, have no memory to read.
        and x.layout is torch.strided
        and not x._is_zerotensor()
        and not is_traced()
    )


def is_as_assumed(reads: Reads | None, x: Tensor) -> bool:
    """Whether a call is as reading a forward has assumed of all calls; see graph/reads.py."""
    assumes = () if reads is None else reads.assumes
    return not assumes or not (
        (NOT_EMPTY in assumes and not x.numel())
        or (WITHOUT_GRADIENTS in assumes and torch.is_grad_enabled())
        or (NOT_NARROWED in assumes and autocast_dtype(x) not in (None, x.dtype))
    )


def why_not_ordinary(x: Any) -> str:
    """The reason of ours why x runs eager; "" where it does not, or where that goes without saying."""
    return "" if is_traced() else subclasses.why_not(x)


def read_again(module: nn.Module, state: FusedState[Any]) -> None:
    """Reads the forward of a fused module that came from a pickle: the globals that it reads may be others here."""
    state.unread = False
    try:
        reader = graph_reader.read(module)
        below = [(child, state_of(child)) for child in module.modules() if child is not module]
        fused = [(child, own.plan) for child, own in below if own is not None]
        if isinstance(state.plan, Recipe):
            state.plan = reader.recipe()
        else:
            state.plan = reader.mixed_plan(fused) if state.plan.instructions else reader.container_plan(fused)
    except CannotRead as error:
        state.why_not = f"it can't be read any more: {error}"


def why_container_changed(module: nn.Module, state: FusedState[ContainerPlan]) -> str | None:
    """The reason why the forward of a container may do something else than its plan; None if it does not."""
    if state.why_not is not None:
        return state.why_not
    if torch.compiler.is_compiling():
        return None
    # A replica (nn.DataParallel) shares the state, but not the attributes.
    if state.reads is None or not state.reads.is_of(module):
        state.reads = live_reads(module, state.plan.reads)
    return None if state.reads is None or (name := state.reads.changed(module)) is None else why_changed(name)


def why_not_now(module: nn.Module, recipe: Recipe, state: FusedState[Any]) -> str | None:
    """The reason why a fused module runs eager now; None if it runs fused. It needs no input, so that `explain` can ask."""
    backend = state.backend
    if recipe.whole and state.why_not is not None:
        return state.why_not
    if not recipe.whole and (reason := why_container_changed(module, state)):
        return reason
    live = wire(module, recipe)
    if isinstance(live, str):
        return live
    if live.runs_other_code(recipe):
        return _OTHER_IN_TRAINING
    weight = live.convs[0].weight
    if weight is None:
        return f"{live.parts[0].step} has no weight"
    if (reason := _why_not_weights(live)) is not None:
        return reason
    if live.in_training() is None or not trains_on(backend, weight, is_weight=True):
        return live.why_not_now() or backends.why_eager(backend, weight.device, weight.dtype) or None
    return live.why_not_at_all() or live.why_not_trained() or (None if recipe.trains else _OTHER_IN_TRAINING)


def decide(
    module: nn.Module, recipe: Recipe, state: FusedState[Any], x: Any, known: BlockInput, channels: int | None = None
) -> FusedRun | Eager:
    """Decides whether a call runs fused.

    Eager's reason is "" where eager goes without saying: under a tracer, for an input that eager will refuse, and in
    training on a backend that has nothing faster for it.

    Args:
        module: the fused module, or the container that the recipe is a run of.
        recipe: what would run.
        state: of the module.
        x: the input of the call; or of the first of several blocks that are to run as one.
        known: what is known about the input.
        channels: of the module's input, where x is the input of a block before it.
    """
    if torch.compiler.is_compiling():
        return _decide_for_compiler(module, recipe, state, x)
    if state.why_not is not None:
        return Eager(f"in a {type(module).__name__}, {state.why_not}")
    if module.training and not trains_on(state.backend, x) and _has_batch_statistics(module, recipe):
        return Eager()  # PyTorch's BN is all there is
    if known.backend is None and not is_ordinary(x):
        return Eager(why_not_ordinary(x))
    live = verified_modules(module, recipe)
    verified = live is not None
    batch_statistics = False
    if live is None:
        found = _current_modules(module, recipe, state)
        reason = found if isinstance(found, str) else _why_not(module, recipe, found)
        if isinstance(found, str) or reason is not None:
            plain = module.training and not trains_on(state.backend, x)
            return Eager("" if plain else f"in a {type(module).__name__}, {reason}")
        live = found
        batch_statistics = live.in_training() is not None
    if x.dim() != 4 or live.widths - {x.shape[1] if channels is None else channels}:
        return Eager()  # it has its own error
    gradients = torch.is_grad_enabled()
    if verified and known.backend is not None and known.backend[0] == state.backend and not gradients:
        return FusedRun(known.backend[1], live, True)
    dtype = autocast_dtype(x)
    weight = live.convs[0].weight
    if weight is None or x.device != weight.device or (dtype is None and live.is_refused(x.dtype)):
        return Eager()  # its own error, or its own meaning
    backend = resolve(state.backend, x.device, dtype or x.dtype)
    if not is_as_assumed(recipe.reads, x):
        return Eager()
    if backend == "eager":
        return Eager(backends.why_eager(state.backend, x.device, dtype or x.dtype))
    gradients = gradients and (x.requires_grad or live.needs_gradients())
    if not (gradients or batch_statistics):
        return FusedRun(backend, live, verified)
    state.drop_copies()
    if dtype not in (None, x.dtype) and any(
        step.residual == 0 for step in recipe.steps if not isinstance(step, CallStep)
    ):
        return Eager()  # under autocast, what the sum with a wider shortcut is depends on how the add was written
    return _decide_to_learn(module, backend, live, batch_statistics, trains_on(state.backend, x))


def _why_not(module: nn.Module, recipe: Recipe, live: LiveModules) -> str | None:
    if has_global_hooks():
        return "a global module hook is registered"
    if (reason := live.why_not_at_all() or _why_not_weights(live)) is not None:
        return reason
    other = live.runs_other_code(recipe) or (module.training and not recipe.trains)
    return _OTHER_IN_TRAINING if other else None


def _why_not_weights(live: LiveModules) -> str | None:
    return subclasses.why_not_weights(zip(live.names, live.children))


def _has_batch_statistics(module: nn.Module, recipe: Recipe) -> bool:
    """Whether the first BN uses its batch's statistics: the quick answer for ordinary training on the CPU."""
    path = next((step.bn for step in recipe.steps if not isinstance(step, CallStep) and step.bn is not None), None)
    bn = None if path is None else child_at(module, path)
    return fusible.is_batch_norm(bn) and not fusible.is_frozen(bn)


def _decide_to_learn(
    module: nn.Module, backend: str, live: LiveModules, batch_statistics: bool, trains: bool
) -> FusedRun | Eager:
    if trains:
        reason = live.why_not_trained()
        return Eager(f"in a {type(module).__name__}, {reason}") if reason else FusedRun(backend, live, False, True)
    if batch_statistics:
        return Eager()  # PyTorch's BN is all there is
    if live.norms_need_gradients():
        return Eager("gradients are on in eval mode (torch.no_grad() or torch.inference_mode() runs fused)")
    return FusedRun(backend, live, False, learns=True)


def trains_on(backend: str, data: Any, is_weight: bool = False) -> bool:
    """Whether a backend trains `data` on our kernels. `auto` does where a table of its device shows that they win.

    data: a block's input, or in its place a weight. `auto` answers no for anything but a tensor.
    is_weight: whether it is a weight; then the answer is for any size of images.
    """
    backend = backends.requested(backend)
    if backend == "auto" and isinstance(data, Tensor):
        return tuned_table.trains(data.device, autocast_dtype(data) or data.dtype, None if is_weight else data)
    return backend == "triton"


def _current_modules(module: nn.Module, recipe: Recipe, state: FusedState[Any]) -> LiveModules | str:
    """A recipe's modules as they are now, looked up anew if one was replaced; or the reason why it no longer holds."""
    live = state.live.get(recipe.modules)
    # Replicas (nn.DataParallel) share the state of the module that they were made from, but not its children.
    if live is not None and live.is_of(module) and live.is_current(module):
        return live
    found = wire(module, recipe)
    if not isinstance(found, str):
        state.live[recipe.modules] = found
    return found


def _decide_for_compiler(module: nn.Module, recipe: Recipe, state: FusedState[Any], x: Any) -> FusedRun | Eager:
    # On the CPU torch.compile fuses better by itself than around oneDNN's packed weights.
    on_gpu = isinstance(x, Tensor) and x.device.type == "cuda" and state.backend == "auto"
    learns = module.training or torch.is_grad_enabled()
    if not (state.backend == "triton" or (not learns and (on_gpu or state.backend == "cudnn"))):
        return Eager()
    live = wire(module, recipe)
    if isinstance(live, str) or (module.training and not recipe.trains) or _reads_more_than_flags(module, recipe):
        return Eager()
    reason = live.why_not_at_all() or live.why_not_trained() if learns else live.why_not_now()
    return FusedRun(state.backend, live, False, learns) if reason is None else Eager()


def _reads_more_than_flags(module: nn.Module, recipe: Recipe) -> bool:
    """Whether a forward reads what a compiler can't guard, or a flag that is another one now."""
    for read in () if recipe.reads is None else recipe.reads.inside:
        owner = module if not read.path else child_at(module, read.path)
        if len(read.value) != 2 or owner is None:
            return True
        kind, then = read.value
        now = getattr(owner, read.name, None)
        if kind == "_Missing":
            if read.name in owner.__dict__:
                return True
        elif kind != type(now).__name__ or now != then:
            return True
    return False
