"""Questions that a call of a network asks once: whether its blocks are as they were, and which backend it runs on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..graph.recipe import ConvStep, Recipe
from ..ops import backends, onednn
from .cpu.program import Copies
from .live_modules import Wiring, has_global_hooks, has_hooks
from .state import FusedState, Known

# Set while a call of the outermost fused module runs, in its thread; see `one_call`.
_call_state = threading.local()


# What `backends.resolve` takes: the backend asked for, a device, a dtype.
Question = tuple[str, torch.device, torch.dtype]


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
def one_call(found: dict[Question, str]) -> Iterator[None]:
    """The call of a fused module: `resolve` keeps its answers until the outermost one ends. found: what was asked already.

    So a hook that sets RESNET_KERNELS_BACKEND in mid-call is heeded by the next call.
    """
    if getattr(_call_state, "resolved", None) is not None:
        yield
        return
    _call_state.resolved = found
    try:
        yield
    finally:
        _call_state.resolved = None


def resolve(asked: str, device: torch.device, dtype: torch.dtype) -> str:
    """`backends.resolve`, asked once in a call of the outermost fused module."""
    known = getattr(_call_state, "resolved", None)
    if known is None:
        return backends.resolve(asked, device, dtype)
    key = (asked, device, dtype)
    found = known.get(key)
    if found is None:
        found = known[key] = backends.resolve(asked, device, dtype)
    return found


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


def verified_wiring(module: nn.Module, recipe: Recipe) -> Wiring | None:
    verified = getattr(_call_state, "verified", None)
    return None if verified is None else verified.get((id(module), recipe.modules))
