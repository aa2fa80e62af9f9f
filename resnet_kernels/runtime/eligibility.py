"""May this call run fused? `decide` holds every condition under which eager semantics ask for the module's own forward.

A call of a network asks the same questions 70 times (is this convolution still the one that was packed?), and between two
convolutions the caches are cold: 20 us a question instead of 3. So the outermost fused module asks all of them at once,
`verified_below`, and its blocks take that for an answer during this call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..graph import reader
from ..graph.recipe import CallStep, ConvStep, Recipe
from ..ops import backends, onednn, tuned_table
from ..ops.library import autocast_dtype
from .cpu.packed_conv import PackedConv
from .cpu.program import Copies
from .live_modules import Wiring, child_at, has_hooks, wire
from .normalize_images import Normalize

_call_state = threading.local()


class Known(NamedTuple):
    """What the caller of a block knows about its input.

    owned: nobody else holds it, so a step may write over it.
    bound: no value in it is larger in magnitude.
    backend: (asked for, found) of the block that made it; the next block asking for the same will find the same.
    """

    owned: bool = False
    bound: float | None = None
    backend: tuple[str, str] | None = None


UNKNOWN = Known()


class FusedState:
    """What fusing adds to a module's __dict__: its recipe or plan, the backend asked for, the CPU's packed weights.

    path: the module's, in the model that was fused; a label for profilers.
    normalize: in the model's outermost host, what `fuse(model, normalize=...)` asked for.
    frozen: the user has promised that weights stay, so copies are not compared with them; see freezing.py.
    """

    def __init__(
        self, plan: Any, backend: str, path: str = "", normalize: Normalize | None = None, frozen: bool = False
    ):
        self.plan = plan
        self.backend = backend
        self.path = path
        self.normalize = normalize
        self.frozen = frozen
        self.copies = Copies()
        self.wiring: dict[tuple[str, ...], Wiring] = {}
        self.plans: dict[tuple, Any] = {}
        self.survey: Survey | None = None

    def drop_copies(self) -> None:
        self.copies = Copies()
        if self.frozen:
            self.plans = {}  # they may hold copies, too

    def trusts(self, pack: PackedConv, conv: nn.Module, bn: nn.Module | None) -> bool:
        """Whether a pack may stand for these modules in this call."""
        return pack.is_of(conv, bn) if self.frozen else pack.is_unchanged(conv, bn)

    def __getstate__(self) -> dict:
        # Packed weights are opaque, the rest is of this very module: a copy makes its own in its first call.
        kept = dict(
            plan=self.plan, backend=self.backend, path=self.path, normalize=self.normalize, frozen=self.frozen
        )  # fmt: skip
        return kept | dict(copies=Copies(), wiring={}, plans={}, survey=None)


def drop_copies(module: nn.Module) -> None:
    """Forgets the copies of a fused module's weights; the next call makes them anew."""
    state = module.__dict__.get("_rk_state")
    if state is not None:
        state.drop_copies()


def tables_of(model: nn.Module) -> list[Any]:
    """What the kernels of a fused model read besides its own tensors: whoever replays their launches has to keep it."""
    states = (module.__dict__.get("_rk_state") for module in model.modules())
    return [plan.constants.tables for state in states if state is not None for plan in state.plans.values()]


def say_runs_eager(reason: str) -> None:
    """Warns that a call falls back to eager; once a reason and process."""
    backends.say_once(f"{reason}; such calls run the model's own PyTorch code", 6)


def has_global_hooks() -> bool:
    """Whether a hook on all modules is registered."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


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


class Go(NamedTuple):
    """Leave to run fused: on which backend, with which modules, whether their packed weights were checked already.

    learns: with gradients or batch statistics (training.py), and not as inference does (inference.py).
    """

    backend: str
    wiring: Wiring
    verified: bool
    learns: bool = False


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
    wiring = _verified_wiring(module, recipe)
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
    backend = backends.resolve(state.backend, x.device, dtype or x.dtype)
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
    return bn is not None and not reader.is_frozen(bn)


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


class Survey:
    """All fused modules below one, and what tells that they are still all there is."""

    def __init__(self, module: nn.Module, owners: list[tuple[nn.Module, FusedState, list[Recipe]]]):
        self.owners = owners
        inside = {id(child) for owner, _, recipes in owners if recipes[0].whole for child in owner.modules()}
        outside = [m for m in module.modules() if id(m) not in inside]
        self.registries = [(m._modules, [*m._modules.values()]) for m in outside if m._modules]
        # Hooks inside a block are its own wiring's to see.
        self.hookable = [*outside, *(owner for owner, _, recipes in owners if recipes[0].whole)]

    def is_current(self) -> bool:
        return all([*registry.values()] == children for registry, children in self.registries)


@contextlib.contextmanager
def verified_below(survey: Survey | None) -> Iterator[None]:
    """Asks for all fused modules below at once what `decide` and `run_recipe` would ask for each in turn.

    Those that pass are taken as verified until the module's call ends: unless a hook, which could change anything in
    between, is registered on a block or on what is around blocks.
    """
    if survey is None or is_inside_verified() or any(map(has_hooks, survey.hookable)) or has_global_hooks():
        yield
        return
    verified: dict[tuple[int, tuple[str, ...]], Wiring] = {}
    copies: dict[int, Copies] = {}
    for owner, state, recipes in survey.owners:
        if (
            owner.training
            or "forward" in owner.__dict__
            or (not recipes[0].whole and tuple(owner._modules) != state.plan.names)
        ):
            continue
        for recipe in recipes:
            wiring = state.wiring.get(recipe.modules)
            if wiring is None or not _is_verified(owner, state, wiring):
                continue
            verified[id(owner), recipe.modules] = wiring
            if recipe.whole:
                copies[id(owner)] = state.copies
    _call_state.verified, _call_state.copies = verified, copies
    try:
        yield
    finally:
        _call_state.verified = _call_state.copies = None


def _is_verified(owner: nn.Module, state: FusedState, wiring: Wiring) -> bool:
    if not wiring.is_of(owner) or not wiring.is_current() or wiring.why_not_now() is not None:
        return False
    if not _runs_on_packs(state, wiring):
        return True
    packs = state.copies.packs
    return all(
        step.conv in packs and state.trusts(packs[step.conv], conv, bn)
        for step, conv, bn in wiring.steps
        if isinstance(step, ConvStep)
    )


def _runs_on_packs(state: FusedState, wiring: Wiring) -> bool:
    """Whether a call may need packed weights, which only oneDNN does."""
    on_cpu = any(conv.weight.device.type == "cpu" for conv in wiring.convs[:1])
    return on_cpu and backends.requested(state.backend) in ("auto", "cpu")


def verified_program(block: nn.Module, x: Tensor, known: Known) -> tuple[Tensor, Known] | None:
    """Runs a verified block on the output of the block before it, with no further question; None if there are some."""
    copies = getattr(_call_state, "copies", None)
    copies = copies.get(id(block)) if copies else None
    if copies is None or known.backend is None or known.backend[1] != "cpu" or torch.is_grad_enabled():
        return None
    state = block.__dict__["_rk_state"]
    program = copies.program(state.plan, x)
    if program is None or not program.entries:
        return None
    bound = onednn.bound(x, known.bound)
    if not program.is_safe(bound):
        return None
    return program(x, known.owned, state.path), Known(True, program.result_bound(bound), known.backend)


def is_inside_verified() -> bool:
    """Whether an outer module of this very call has verified everything below it."""
    return not torch.compiler.is_compiling() and getattr(_call_state, "verified", None) is not None


def _verified_wiring(module: nn.Module, recipe: Recipe) -> Wiring | None:
    verified = getattr(_call_state, "verified", None)
    return None if verified is None else verified.get((id(module), recipe.modules))


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
