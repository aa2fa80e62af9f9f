"""A container's forward as instructions: runs on our kernels, and PyTorch's operations in between (graph/mixed_plan.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..graph import fusible
from ..graph.pure_operations import FUNCTIONS
from ..graph.recipe import ContainerPlan, Instruction, Slot
from . import chains, checked_calls, fused_block, run_steps
from .fused_module import is_fused_as_is
from .live_modules import child_at, has_global_hooks, has_hooks
from .state import UNKNOWN, BlockInput, FusedState

Values = dict[int, Any]


def why_not(module: nn.Module, plan: ContainerPlan) -> str | None:
    """The reason why the instructions don't stand for the forward now; None if they do.

    They do while the modules that were looked into are as they were, in the mode of the container, without hooks.
    """
    if has_global_hooks():
        return "a global module hook is registered"
    return checked_calls.derived((id(module), "watched"), lambda: _why_changed(module, plan))


def _why_changed(module: nn.Module, plan: ContainerPlan) -> str | None:
    for path, cls, signature, inlined, has_mode in plan.watched:
        child = child_at(module, path)
        if child is None or fusible.original_class(child) is not cls or fusible.signature(child) != signature:
            return f"{path} is another module now: call fuse_ again"
        own = child.__dict__
        # A user's class over a fused one has other code.
        if "forward" in own or not (type(child) is cls or is_fused_as_is(child)):
            return f"{path} has another forward now"
        if not inlined:
            continue
        if own.get("_compiled_call_impl") is not None:
            return f"{path} is compiled by itself"
        if has_hooks(child):
            return f"a hook on {path} has to fire"
        if has_mode and child.training != module.training:
            return f"{path} is in another mode than the module around it"
    return None


def run(module: nn.Module, state: FusedState[ContainerPlan], x: Tensor) -> Any:
    """Runs the instructions of a container's plan on x; returns what the forward returns."""
    values: Values = {0: x}
    # What is known about the outputs of runs.
    known: dict[int, BlockInput] = {}
    chained = {chain.members[0]: chain for chain in state.plan.chains} if checked_calls.is_inside_verified() else {}
    done: frozenset[str] = frozenset()  # the members of a chain that ran
    for instruction in state.plan.instructions:
        out, member = instruction.out, instruction.target if instruction.kind in ("run", "module") else ""
        ran = None
        if (chain := chained.get(member)) is not None:
            ran = chains.run(module, state, chain, values[instruction.args[0].value], is_read_by_ours=True)
        if ran is not None:
            values[out], known[out], done = ran.y, BlockInput(True, None, (state.backend, "cpu")), ran.members
        elif member in done:
            # What the chain has made goes through the hands of its members.
            (slot,) = instruction.args
            values[out], known[out] = values[slot.value], known[slot.value]
        elif instruction.kind == "run":
            values[out], known[out] = _run(module, state, instruction, values, known)
        else:
            values[out] = _call(module, instruction, values)
        for dead in instruction.frees:
            del values[dead]
    return _resolved(state.plan.result, values)


def _run(
    module: nn.Module,
    state: FusedState[ContainerPlan],
    instruction: Instruction,
    values: Values,
    known: dict[int, BlockInput],
) -> tuple[Tensor, BlockInput]:
    recipe = state.plan.runs[instruction.target]
    (slot,) = instruction.args
    x = values[slot.value]
    # Others may read it, so that it is not the run's to write over.
    about = known.get(slot.value, UNKNOWN)._replace(owned=False)
    if (result := fused_block.run_if_fused(module, recipe, state, x, about)) is not None:
        return result
    # One by one, as eager does: hooks fire, training BNs count, and the layout is eager's.
    own = {slot.value: checked_calls.as_eager(x)}
    for operation in instruction.apart:
        own[operation.out] = _call(module, operation, own)
    return own[instruction.out], UNKNOWN


def _call(module: nn.Module, instruction: Instruction, values: Values) -> Any:
    """Runs one of PyTorch's operations."""
    kind, target = instruction.kind, instruction.target
    if kind == "attribute":
        path, _, name = target.rpartition(".")
        owner = child_at(module, path)
        assert owner is not None, "the instructions are current"
        return getattr(owner, name)
    args = _resolved(instruction.args, values)
    kwargs = {name: _resolved(value, values) for name, value in instruction.kwargs}
    if kind == "add":
        x, residual = args
        return run_steps.add_as_it_lies(x, residual, kwargs.get("activation"), "auto")
    if instruction.sees_layout:
        args, kwargs = checked_calls.as_eager(args), checked_calls.as_eager(kwargs)
    if kind != "module" and target in ("sum", "torch.sum"):
        return _sum(*args, **kwargs)
    if kind == "function":
        return FUNCTIONS[target](*args, **kwargs)
    if kind == "method":
        if target == "contiguous" and not instruction.sees_layout and _stands_for_contiguous(args[0]):
            return args[0]
        return getattr(args[0], target)(*args[1:], **kwargs)
    child = child_at(module, target)
    assert child is not None, "the instructions are current"
    return child(*args, **kwargs)


def _stands_for_contiguous(x: Any) -> bool:
    """Whether a value stays channels_last where eager's is made contiguous: an operation that sees its layout gets that."""
    return checked_calls.is_eagers_contiguous() and isinstance(x, Tensor) and x.dim() == 4


# Most slices of a sum that are added one by one.
_MOST_SLICES = 4


def _sum(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """torch.sum. A few groups of channels of channels_last images, as split attention has them, are added one by one.

    PyTorch's kernel for such strides takes 30 times as long, and gives a contiguous result (0.76 ms instead of 22 us for two
    groups of 64 channels of 56x56 pixels on two AVX-512 cores; torch 2.13).
    """
    dim = (*args, *kwargs.values())
    is_over_groups = (
        dim in ((1,), ((1,),), ([1],)) and [*kwargs] in ([], ["dim"]) and type(x) is Tensor and x.dim() == 5
    )
    if not is_over_groups or x.stride(2) != 1 or not 2 <= x.shape[1] <= _MOST_SLICES:
        return torch.sum(x, *args, **kwargs)
    first, *others = x.unbind(1)
    for other in others:
        first = first + other
    return first


def _resolved(value: Any, values: Values) -> Any:
    """An argument with the values in the places of slots."""
    kind = type(value)
    if kind is Slot:
        return values[value.value]
    if kind is tuple or kind is list:
        return kind([_resolved(v, values) for v in value])
    if kind is dict:
        return {key: _resolved(v, values) for key, v in value.items()}
    if kind is slice:
        return slice(*_resolved([value.start, value.stop, value.step], values))
    return value
