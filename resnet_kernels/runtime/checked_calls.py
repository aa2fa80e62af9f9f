"""Questions that a call of a network asks once: whether its blocks are as they were, and which backend it runs on."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..graph.reads import MISSING, LiveReads
from ..graph.recipe import Recipe
from ..kernels.cpu.program import Memories
from ..ops import backends
from ..ops.layouts import as_contiguous, counted, write_back
from . import subclasses
from .cpu.packed_together import PackedTogether
from .cpu.program import Copies, pack_again
from .fused_module import is_fused_as_is
from .live_modules import LiveModules, has_global_hooks, has_hooks, wire
from .object_watch import ObjectWatch
from .state import BlockInput, FusedState, state_of

# Set while a call of the outermost fused module runs, in its thread; see `one_call`.
_call_state = threading.local()


# The arguments of `backends.resolve`: the backend asked for, a device, a dtype.
Question = tuple[str, torch.device, torch.dtype]


class Verified(NamedTuple):
    """A recipe whose modules are as they were.

    copies: of the module that it is of, before they are checked. packed: whether it runs on the CPU, with packed weights.
    It does not hold the module's state, which may hold it.
    """

    owner: int
    recipe: Recipe
    copies: Copies
    live: LiveModules
    packed: bool


class _Known(NamedTuple):
    """What a call has found out. It holds until somebody writes to what is watched, and while all else here is the same.

    watch: the modules, their dicts, and the states of the fused ones among them.
    packs: as `verified_below` was asked.
    requested: backends that were asked for, and those that were meant.
    outside: what forwards read outside of their modules: how to get it, under which name, and what it was. reads: of those
        whose objects may change inside, and whose forward it is.
    weights: the first one of each recipe. devices: where they were.
    together: packed weights that are compared with their sources; None for none.
    verified: the recipes that may run without a check of their own, by owner and members.
    derived: for others to keep what follows from all this; it must not hold a module's state.
    """

    watch: ObjectWatch
    packs: bool
    requested: dict[str, str]
    outside: list[tuple[Any, str, Any]]
    reads: list[tuple[LiveReads, weakref.ref[nn.Module]]]
    weights: list[Tensor]
    devices: list[torch.device]
    together: PackedTogether | None
    verified: dict[tuple[int, tuple[str, ...]], Verified]
    derived: dict[Any, Any]

    def holds(self, packs: bool) -> bool:
        """Whether a call may rely on it."""
        return (
            packs == self.packs
            and self.watch.are_unchanged()
            and all(backends.requested(asked) == found for asked, found in self.requested.items())
            and all(get(name, MISSING) is then for get, name, then in self.outside)
            and all(
                (owner := to_owner()) is not None and reads.changed_outside(owner) is None
                for reads, to_owner in self.reads
            )
            and [*map(_device, self.weights)] == self.devices
            and (self.together is None or self.together.have_same_values())
        )


_device = Tensor.device.__get__  # type: ignore[attr-defined]  # a property of C


class Survey:
    """All fused modules inside a module, and a snapshot of its children that reveals changes."""

    def __init__(self, module: nn.Module, owners: list[tuple[nn.Module, FusedState[Any], list[Recipe]]]):
        # Weak references, because the module's state holds this survey: a cycle would outlive the model.
        self._module = weakref.ref(module)
        self._owners = [(weakref.ref(owner), weakref.ref(state), recipes) for owner, state, recipes in owners]
        inside = {id(child) for owner, _, recipes in owners if recipes[0].whole for child in owner.modules()}
        outside = [m for m in module.modules() if id(m) not in inside]
        self.registries = [(m._modules, [*m._modules.values()]) for m in outside if m._modules]
        # Hooks inside a block are found with its own modules.
        hookable = [*outside, *(owner for owner, _, recipes in owners if recipes[0].whole)]
        self._hookable = [*map(weakref.ref, hookable)]
        self._together: PackedTogether | None = None
        self._known: _Known | None = None

    @property
    def _live_owners(self) -> list[tuple[nn.Module, FusedState[Any], list[Recipe]]]:
        """The fused modules that are still fused as they were, with their recipes."""
        return [
            (owner, state, recipes)
            for to_owner, to_state, recipes in self._owners
            if (owner := to_owner()) is not None and (state := state_of(owner)) is not None and state is to_state()
        ]

    def _has_hooks(self) -> bool:
        """Whether a hook is registered that could change anything in the middle of a call."""
        return any(has_hooks(module) for reference in self._hookable if (module := reference()) is not None)

    def is_current(self, module: nn.Module) -> bool:
        """Whether it is of this very module, and every child is in its place."""
        # A copy.copy of a module shares its state.
        return self._module() is module and (
            (self._known is not None and self._known.watch.are_unchanged())
            or all([*registry.values()] == children for registry, children in self.registries)
        )

    def known(self, packs: bool) -> _Known | None:
        """What a call may rely on, looked up anew if need be; None if a hook is registered.

        The survey has to be current. packs: whether weights that aren't packed are packed now, for fp32.
        """
        known = self._known  # another thread may put its own there
        if known is None or not known.holds(packs):
            known = self._known = None if self._has_hooks() else self._found(packs)
        return known

    def _found(self, packs: bool) -> _Known:
        watch = self._watch()
        watch.renew()
        others: list[Verified] = []
        packed: list[tuple[Verified, FusedState[Any]]] = []
        requested: dict[str, str] = {}
        reads, weights = [], []
        outside: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        for owner, state, recipes in self._live_owners:
            if (
                owner.training
                or _has_other_code(owner, recipes[0].whole)
                or (not recipes[0].whole and tuple(owner._modules) != state.plan.names)
            ):
                continue
            for recipe in recipes:
                live = state.live.get(recipe.modules)
                if live is None or not live.is_of(owner) or not live.is_current(owner):
                    found = wire(owner, recipe) if packs else ""
                    if isinstance(found, str):
                        continue
                    live = state.live[recipe.modules] = found
                if live.why_not_now() is not None or live.runs_other_code(recipe):
                    continue
                conv = live.convs[0]
                # Half the time of the attribute, in which a pruned convolution has its weight.
                weight: Tensor | None = conv._parameters.get("weight")
                if weight is None:
                    weight = conv.weight
                if weight is None:
                    continue
                if live.reads is not None:
                    # Blocks of one class read the same globals.
                    outside.update(
                        ((id(getattr(get, "__self__", get)), name), (get, name, then))
                        for get, name, then in live.reads.outside
                    )
                    if not live.reads.identity_tells:
                        reads.append((live.reads, weakref.ref(owner)))
                weights.append(weight)
                backend = requested.get(state.backend)
                if backend is None:
                    backend = requested[state.backend] = backends.requested(state.backend)
                # Only oneDNN needs packed weights.
                if weight.device.type == "cpu" and backend in ("auto", "cpu"):
                    packed.append((Verified(id(owner), recipe, state.copies, live, True), state))
                elif subclasses.are_known(live.convs):
                    others.append(Verified(id(owner), recipe, state.copies, live, False))
        unchanged, together = self._unchanged(packed, packs)
        return _Known(
            watch=watch,
            packs=packs,
            requested=requested,
            outside=[*outside.values()],
            reads=reads,
            weights=weights,
            devices=[*map(_device, weights)],
            together=together,
            verified={(v.owner, v.recipe.modules): v for v in (*others, *unchanged)},
            derived={},
        )

    def _watch(self) -> ObjectWatch:
        """A watch of all that `_found` reads, but for values and what lies outside of the modules."""
        module = self._module()
        assert module is not None, "the survey is current"
        modules = [m for m in module.modules() if m is not module]
        states = [state for _, state, _ in self._live_owners]
        tensors = [t for m in (module, *modules) for t in m._parameters.values() if t is not None]
        dicts: list[dict[Any, Any]] = [vars(m) for m in modules]
        for m in (module, *modules):
            dicts += [m._parameters, m._buffers, m._modules]
            dicts += [m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks]
        dicts += [state.copies.packs for state in states]
        own = state_of(module)
        dicts += [vars(state) for state in states if state is not own]
        return ObjectWatch([*modules, *tensors], dicts, [module] if own is None else [module, own])

    def _unchanged(
        self, packed: list[tuple[Verified, FusedState[Any]]], packs: bool
    ) -> tuple[list[Verified], PackedTogether | None]:
        """The recipes whose packed weights stand for their modules as they are now, and what to compare for that again.

        Args:
            packed: all that run on packed weights, with their modules' states.
            packs: whether weights that don't are packed now, for fp32.
        """
        of_recipes = []
        for recipe, _ in packed:
            kept = recipe.copies.packs
            of_recipes.append([(kept.get(path), conv, bn) for path, conv, bn in recipe.live.packed_parts])
        # One check of all tensors of a network takes half the time of one for each convolution.
        values = [part for (_, state), parts in zip(packed, of_recipes) if not state.frozen for part in parts]
        together = self._together  # another thread may put its own there
        if together is None or not together.are_of(values):
            together = self._together = PackedTogether(values)
        unchanged = bool(values) and (not packs or together.dtypes == {torch.float32}) and together.are_unchanged()
        found = []
        for (recipe, state), parts in zip(packed, of_recipes):
            if (unchanged and not state.frozen) or all(
                pack is not None and (not packs or pack.dtype == torch.float32) and state.holds(pack, conv, bn)
                for pack, conv, bn in parts
            ):
                found.append(recipe)
            elif packs and _can_be_packed(recipe.live):
                pack_again(recipe.copies, state.holds, recipe.live.packed_parts, torch.float32)
                found.append(recipe)
        return found, together if values else None


def _can_be_packed(live: LiveModules) -> bool:
    """Whether eager would compute with these weights in fp32, and so may we."""
    known = subclasses.why_not_weights(zip(live.names, live.children)) is None
    return known and not live.is_refused(torch.float32)


@contextlib.contextmanager
def one_call(found: dict[Question, str], contiguous: bool, memories: Memories) -> Iterator[None]:
    """Spans the call of a fused module: until the outermost one ends, `resolve` keeps its answers.

    A hook that sets RESNET_KERNELS_BACKEND in mid-call therefore changes the next call.

    Args:
        found: the answers that the caller has already.
        contiguous: whether the tensors inside the module are contiguous in eager, and channels_last in this call.
        memories: for the programs of the module, and of all inside it.
    """
    if getattr(_call_state, "resolved", None) is not None:
        if _call_state.contiguous is not None:
            yield
            return
        found = _call_state.resolved  # `apart` from the module around
    names = ("resolved", "contiguous", "memories")
    before = [getattr(_call_state, name, None) for name in names]
    _call_state.__dict__.update(zip(names, (found, contiguous, before[2] or memories)))
    try:
        yield
    finally:
        _call_state.__dict__.update(zip(names, before))


def memories_of(copies: Copies) -> Memories:
    """The memory for programs: of the outermost module of this call, or of a module that is called alone."""
    return getattr(_call_state, "memories", None) or copies.memories


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Spans the call of a module in a container on a tensor that has the layout of eager already."""
    before = getattr(_call_state, "contiguous", None)
    _call_state.contiguous = None
    try:
        yield
    finally:
        _call_state.contiguous = before


def is_eagers_contiguous() -> bool:
    """Whether values inside the outermost container would be contiguous in eager, while ours are channels_last."""
    return bool(getattr(_call_state, "contiguous", None))


def as_eager(value: Any) -> Any:
    """A value inside a container with its tensors in the layout that they have in eager, for code that sees it."""
    if not is_eagers_contiguous():
        return value
    # A detection backbone returns a dict of features.
    is_structure = isinstance(value, (dict, list, tuple))
    return pytree.tree_map_only(Tensor, as_contiguous, value) if is_structure else as_contiguous(value)


def call_as_eager(run: Callable[[Any], Any], x: Any) -> Any:
    """run(x) with x as eager has it, for code of the user's that may write over x; see `as_eager`."""
    if not is_eagers_contiguous() or not isinstance(x, Tensor):
        return run(x)
    own, version = counted(as_contiguous, x)
    y = run(own)
    write_back(x, own, version)
    return y


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
def verified_below(survey: Survey | None, packs: bool = False) -> Iterator[None]:
    """Checks all fused modules inside a module at once, instead of each in its turn.

    With `packs` weights are packed here, for fp32, where there is no packed copy, or it is stale.

    The ones that pass count as verified until the module's call ends. Nothing is verified if a hook is registered on a block
    or a container, because a hook could change anything in between.
    """
    known = None if survey is None or is_inside_verified() or has_global_hooks() else survey.known(packs)
    if known is None:
        yield
        return
    _call_state.known = known
    try:
        yield
    finally:
        _call_state.known = None


def _verified() -> dict[tuple[int, tuple[str, ...]], Verified]:
    known: _Known | None = getattr(_call_state, "known", None)
    return {} if known is None else known.verified


def _has_other_code(owner: nn.Module, is_block: bool) -> bool:
    """Whether a call of a fused module runs other code than when it was fused: another class's, or set on the instance."""
    return (
        not is_fused_as_is(owner)
        or "forward" in owner.__dict__
        # A container is in its call already, or is called by itself.
        or (is_block and owner.__dict__.get("_compiled_call_impl") is not None)
    )


def run_verified(block: nn.Module, x: Tensor, known: BlockInput) -> tuple[Tensor, BlockInput] | None:
    """Runs a verified block on the previous block's output without any check; None if something is left to check."""
    verified = _verified()
    state = state_of(block)  # None if another thread has unfused it during this call
    if not verified or state is None or known.backend is None or known.backend[1] != "cpu" or torch.is_grad_enabled():
        return None
    found = verified.get((id(block), state.plan.modules)) if isinstance(state.plan, Recipe) else None
    program = None if found is None else found.copies.program(state.plan, x)
    result = None if program is None else program.run_if_safe(x, known.bound, known.owned, state.path)
    return None if result is None else (result[0], BlockInput(True, result[1], known.backend))


def is_inside_verified() -> bool:
    """Whether an outer module of this very call has verified everything below it."""
    return not torch.compiler.is_compiling() and getattr(_call_state, "known", None) is not None


def runs_packed() -> bool:
    """Whether a recipe that the outermost module of this call has verified runs on the CPU, with packed weights."""
    return any(found.packed for found in _verified().values())


def verified_modules(module: nn.Module, recipe: Recipe) -> LiveModules | None:
    """The modules of a recipe, if the outermost module of this call has verified them."""
    found = verified_recipe(module, recipe)
    return None if found is None else found.live


def verified_recipe(module: nn.Module, recipe: Recipe) -> Verified | None:
    """A module's recipe, if the outermost module of this call has verified it."""
    return _verified().get((id(module), recipe.modules))


def derived(key: Any, make: Callable[[], Any]) -> Any:
    """make(), or what it gave in an earlier call if nothing was written to any module since."""
    known: _Known | None = getattr(_call_state, "known", None)
    if known is None or not known.watch.are_unchanged():
        return make()
    if key not in known.derived:
        known.derived[key] = make()
    return known.derived[key]
