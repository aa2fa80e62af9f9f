"""Running a recipe: may this call run fused, and then its steps, one kernel each.

    decide       every condition under which eager semantics ask for the module's own forward
    run_recipe   values in, values out; dead ones freed; the residual written over where nobody else holds it

A call of a network asks the same questions 70 times (is this convolution still the one that was packed?), and between two
convolutions the caches are cold: 20 us a question instead of 3. So the outermost fused module asks all of them at once,
`verified_below`, and its blocks take that for an answer during this call.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import reading
from .folding import PackedConv, PackedProgram, scale_shift
from .ops import add_relu, dispatch, onednn
from .ops.geometry import Geometry
from .ops.library import autocast_dtype
from .recipe import CallStep, ConvStep, Recipe

CHANNELS_LAST = torch.channels_last
_said: set[str] = set()
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
    """What fusing adds to a module's __dict__: its recipe or plan, the backend asked for, the CPU's packed weights."""

    def __init__(self, plan: Any, backend: str):
        self.plan = plan
        self.backend = backend
        self.packs: dict[str, PackedConv]
        self.programs: dict[tuple[str, ...], PackedProgram]
        self.drop_packs()
        self.wiring: dict[tuple[str, ...], Wiring] = {}
        self.survey: Survey | None = None

    def drop_packs(self) -> None:
        self.packs, self.programs = {}, {}

    def __getstate__(self) -> dict:
        # Packed weights are opaque and the wiring is of this very module: a copy makes its own in its first call.
        return {"plan": self.plan, "backend": self.backend, "packs": {}, "wiring": {}, "programs": {}, "survey": None}


def drop_packs(module: nn.Module) -> None:
    """Forgets a fused module's packed weights; the next call makes them anew."""
    state = module.__dict__.get("_rk_state")
    if state is not None:
        state.drop_packs()


def say_once(reason: str) -> None:
    """Warns that a call falls back to eager; once a reason and process."""
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"resnet_kernels: {reason}; such calls run the model's own PyTorch code", RuntimeWarning, 5)


def child_at(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, None if it is gone."""
    for name in path.split("."):
        module = module._modules.get(name) if module is not None else None
    return module


_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether eager's call of this module would run a hook."""
    return any(module.__dict__[kind] for kind in _HOOK_DICTS)


def _global_hooks() -> bool:
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


class Wiring:
    """The live modules behind a recipe's paths: looked up once, checked by identity in each call, list against list."""

    __slots__ = ("children", "classes", "dicts", "first", "names", "registries", "steps", "with_modes")

    def __init__(self, module: nn.Module, recipe: Recipe):
        members = _members(module, recipe)
        registries = {id(registry): registry for registry, _, _ in members}.values()
        self.registries = [(registry, [*registry.values()]) for registry in registries]
        self.names = [name for _, name, _ in members]
        self.children = [child for _, _, child in members]
        self.classes = [*map(type, self.children)]
        self.dicts = [child.__dict__ for child in self.children]
        self.with_modes = [c for c in self.children if reading.is_batch_norm(c) or reading.is_quiet(c)]
        self.steps = [
            (step, child_at(module, step.conv), None if step.bn is None else child_at(module, step.bn))
            if isinstance(step, ConvStep)
            else (step, child_at(module, step.what) if step.is_module else None, None)
            for step in recipe.steps
        ]
        self.first = next((step, conv) for step, conv, _ in self.steps if isinstance(step, ConvStep))

    def is_of(self, module: nn.Module) -> bool:
        return self.registries[0][0] is module._modules

    def is_current(self) -> bool:
        # Comparing lists of modules compares identities: nn.Module has no __eq__.
        return [*map(type, self.children)] == self.classes and all(
            [*registry.values()] == children for registry, children in self.registries
        )

    def why_not_now(self) -> str | None:
        """What keeps these modules from being fused at this moment: a hook, a forward of their own, train()."""
        for i, d in enumerate(self.dicts):
            if d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]:
                return f"a hook on {self.names[i]} has to fire"
            if "forward" in d:
                return f"{self.names[i]} got a forward of its own"
        for child in self.with_modes:
            if child.training:
                return f"{self.names[self.children.index(child)]} is in train() mode"
        return None


def _members(module: nn.Module, recipe: Recipe) -> list[tuple[dict, str, nn.Module]]:
    """(registry, name, child) of everything a recipe depends on: all of a block, but only its own members for a run."""
    if not recipe.whole:
        return [(module._modules, name, module._modules[name]) for name in recipe.modules]
    members = []
    for name, child in module._modules.items():
        if child is not None:
            members.append((module._modules, name, child))
            if isinstance(child, nn.Sequential):
                members.extend(_members(child, recipe))
    return members


def wire(module: nn.Module, recipe: Recipe) -> Wiring | str:
    """Looks a recipe's modules up; the reason, if they no longer are what the recipe was read from."""
    if recipe.whole:
        same = reading.signature(module) == recipe.signature
    else:
        children = ((name, module._modules.get(name)) for name in recipe.modules)
        same = tuple((name, reading.original_class(child)) for name, child in children) == recipe.signature
    return Wiring(module, recipe) if same else "its submodules changed after it was fused: call fuse_ again"


def why_not_now(module: nn.Module, recipe: Recipe) -> str | None:
    """Why a fused module runs eager as things stand; None if it runs fused. Needs no input, so that `explain` can ask."""
    wiring = wire(module, recipe)
    return wiring if isinstance(wiring, str) else wiring.why_not_now()


class Go(NamedTuple):
    """Leave to run fused: on which backend, with which modules, and whether their packed weights were checked already."""

    backend: str
    wiring: Wiring
    verified: bool


def decide(module: nn.Module, recipe: Recipe, state: FusedState, x: Any, known: Known) -> tuple[Go | None, str]:
    """Returns (Go, "") to run this call fused, or (None, reason) to run the module's own forward.

    The reason is "" where eager goes without saying: in training, under a tracer, for an input that eager will refuse.
    """
    if torch.compiler.is_compiling():
        backend = _backend_for_compiler(module, recipe, state, x)
        return (None if backend is None else Go(backend, Wiring(module, recipe), False)), ""
    if known.backend is None and not is_ordinary(x):
        return None, ""
    wiring = _verified_wiring(module, recipe)
    verified = wiring is not None
    if wiring is None:
        if module.training:
            return None, ""
        if _global_hooks():
            return None, "a global module hook is registered"
        wiring = current_wiring(module, recipe, state)
        reason = wiring if isinstance(wiring, str) else wiring.why_not_now()
        if reason is not None:
            return None, "" if reason.endswith("train() mode") else f"in a {type(module).__name__}, {reason}"
    step, conv = wiring.first
    if step.x == 0 and x.dim() == 4 and x.shape[1] != conv.in_channels:
        return None, ""  # eager's own error
    if verified and known.backend is not None and known.backend[0] == state.backend and not torch.is_grad_enabled():
        return Go(known.backend[1], wiring, True), ""
    dtype = autocast_dtype(x)
    weight = conv.weight
    if x.dim() != 4 or x.device != weight.device or (dtype is None and x.dtype != weight.dtype):
        return None, ""  # eager's own error, or its own meaning
    if torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for child in wiring.children for p in child.parameters())
    ):
        state.drop_packs()
        return None, "gradients are on in eval mode (torch.no_grad() or torch.inference_mode() runs fused)"
    backend = dispatch.resolve(state.backend, x.device, dtype or x.dtype)
    return (None if backend == "eager" else Go(backend, wiring, verified)), ""


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
def verified_below(survey: Survey) -> Iterator[None]:
    """Asks for all fused modules below at once what `decide` and `run_recipe` would ask for each in turn.

    Those that pass are taken as verified until the module's call ends: unless a hook, which could change anything in
    between, is registered on a block or on what is around blocks.
    """
    if is_inside_verified() or any(map(has_hooks, survey.hookable)) or _global_hooks():
        yield
        return
    verified: dict[tuple[int, tuple[str, ...]], Wiring] = {}
    programs: dict[int, PackedProgram] = {}
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
            program = state.programs.get(recipe.modules)
            if recipe.whole and program is not None and program.entries and program.has(state.packs):
                programs[id(owner)] = program
    _call_state.verified, _call_state.programs = verified, programs
    try:
        yield
    finally:
        _call_state.verified = _call_state.programs = None


def _is_verified(owner: nn.Module, state: FusedState, wiring: Wiring) -> bool:
    if not wiring.is_of(owner) or not wiring.is_current() or wiring.why_not_now() is not None:
        return False
    packs = state.packs
    return all(
        step.conv in packs and packs[step.conv].is_unchanged(conv, bn)
        for step, conv, bn in wiring.steps
        if isinstance(step, ConvStep)
    )


def verified_program(block: nn.Module, x: Tensor, known: Known) -> tuple[Tensor, Known] | None:
    """Runs a verified block on the output of the block before it, with no further question; None if there are some."""
    programs = getattr(_call_state, "programs", None)
    program = programs.get(id(block)) if programs else None
    if program is None or known.backend is None or known.backend[1] != "cpu" or torch.is_grad_enabled():
        return None
    bound = onednn.bound(x, known.bound)
    if not program.takes(x) or not program.is_safe(bound):
        return None
    return program(x, known.owned), Known(True, program.result_bound(bound), known.backend)


def is_inside_verified() -> bool:
    """Whether an outer module of this very call has verified everything below it."""
    return not torch.compiler.is_compiling() and getattr(_call_state, "verified", None) is not None


def _verified_wiring(module: nn.Module, recipe: Recipe) -> Wiring | None:
    verified = getattr(_call_state, "verified", None)
    return None if verified is None else verified.get((id(module), recipe.modules))


def _backend_for_compiler(module: nn.Module, recipe: Recipe, state: FusedState, x: Any) -> str | None:
    # On the CPU torch.compile fuses better by itself than around oneDNN's packed weights.
    on_gpu = isinstance(x, Tensor) and x.device.type == "cuda" and state.backend == "auto"
    if module.training or torch.is_grad_enabled() or not (on_gpu or state.backend in ("triton", "cudnn")):
        return None
    return state.backend if why_not_now(module, recipe) is None else None


def run_recipe(recipe: Recipe, state: FusedState, go: Go, x: Tensor, known: Known) -> tuple[Tensor, Known]:
    """Runs a recipe on x, as `decide` has said that it may. The output has the layout that eager would give."""
    backend, wiring, verified = go
    dtype = autocast_dtype(x)
    value = x if dtype is None else x.to(dtype)
    restore = False
    if not value.is_contiguous(memory_format=CHANNELS_LAST):
        value = value.contiguous(memory_format=CHANNELS_LAST)
        # Eager's convolution returns channels_last if its input or its weight is, and it stays so from there on.
        restore = all(conv.weight.is_contiguous() for step, conv, _ in wiring.steps if isinstance(step, ConvStep))
    owned = known.owned or value is not x
    on_cpu = backend == "cpu" and value.shape[0] > 0
    bound = onednn.bound(value, known.bound) if on_cpu else math.inf
    if verified and on_cpu and (program := _program(recipe, state, value)) is not None and program.is_safe(bound):
        return _hand_over(program(value, owned), restore, program.result_bound(bound), (state.backend, backend))
    values: dict[int, Tensor] = {0: value}
    bounds: dict[int, float] = {0: bound}
    del value
    for step, child, bn in wiring.steps:
        bound = math.inf
        if not isinstance(step, ConvStep):
            y = _call(step, child, [values[i] for i in step.inputs], backend)
            if on_cpu:
                bound = onednn.bound(y, None)
        else:
            residual = None if step.residual is None else values[step.residual]
            relu, late = step.relu, None
            if residual is not None:
                shape = Geometry.of_module(child).out_shape(values[step.x].shape, child.weight.shape)
                if residual.shape != shape:
                    # Eager's add broadcasts; a kernel reads a residual of the output's shape, and beyond a smaller one.
                    residual, relu, late = None, False, residual
            if on_cpu:
                pack = state.packs.get(step.conv)
                if pack is None or not pack.fits(values[step.x]) or not (verified or pack.is_unchanged(child, bn)):
                    pack = state.packs[step.conv] = PackedConv(child, bn, values[step.x])
                bound = pack.bound(bounds[step.x]) + (0.0 if residual is None else bounds[step.residual])
                overwrite = step.overwrites_residual and (step.residual != 0 or owned)
                y = pack(values[step.x], residual, relu, bound, overwrite)
            else:
                scale, shift = scale_shift(child, bn, backend)
                y = torch.ops.resnet_kernels.conv_bias_act.default(
                    values[step.x], child.weight.to(values[step.x].dtype), shift, residual, scale,
                    *Geometry.of_module(child), relu, backend,
                )  # fmt: skip
            if late is not None:
                y = torch.add(y, late).contiguous(memory_format=CHANNELS_LAST)
                y = torch.relu_(y) if step.relu else y
                bound += bounds[step.residual]
            del residual, late
        values[step.out], bounds[step.out] = y, bound
        del y
        # Dead values go at once: peak memory is eager's.
        for dead in step.frees:
            del values[dead]
    return _hand_over(values[recipe.result], restore, bounds[recipe.result], (state.backend, backend))


def _hand_over(y: Tensor, restore: bool, bound: float, backend: tuple[str, str]) -> tuple[Tensor, Known]:
    # Only a channels_last tensor may go to the next block unasked.
    return (y.contiguous(), Known(True, bound)) if restore else (y, Known(True, bound, backend))


def _program(recipe: Recipe, state: FusedState, x: Tensor) -> PackedProgram | None:
    """The recipe's steps with everything looked up, made anew when a weight was packed anew or x has another shape."""
    program, packs = state.programs.get(recipe.modules), state.packs
    if program is None or not (program.takes(x) and program.has(packs)):
        if any(step.conv not in packs for step in recipe.steps if isinstance(step, ConvStep)):
            return None  # another thread has just dropped them
        program = PackedProgram(recipe, packs, x)
        state.programs[recipe.modules] = program
    return program if program.entries else None


def _call(step: CallStep, child: nn.Module | None, inputs: list[Tensor], backend: str) -> Tensor:
    if child is not None:
        return child(*inputs)
    if step.what == "add_relu" and inputs[0].shape == inputs[1].shape:
        return add_relu(*inputs, backend=backend)
    if step.what == "add_relu":
        return torch.relu_(torch.add(*inputs))  # a sum that broadcasts
    return torch.add(*inputs) if step.what == "add" else torch.relu(*inputs)
