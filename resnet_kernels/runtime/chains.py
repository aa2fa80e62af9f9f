"""Chains of a container on the CPU: the stem and all stages of a network run as one program (cpu/compiled_program.py).

A container's own forward stays Python. So the first member of a chain runs all of it, and the others return what they get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..graph import fusible
from ..graph.container_plan import head_is_as_read, norm_head_is_as_read
from ..graph.fusible import BatchNorm
from ..graph.recipe import Chain, ContainerPlan, Head, Recipe
from ..kernels.cpu import library
from ..ops.dtypes import autocast_dtype
from ..ops.layouts import as_contiguous, has_channels_last_strides, is_channels_last
from . import checked_calls, eligibility, subclasses
from .cpu import compiled_program
from .cpu.compiled_program import Section
from .cpu.packed_linear import PackedLinear
from .fused_module import is_fused_as_is
from .live_modules import child_at
from .normalize_images import dtype_of
from .state import FusedState, state_of


def may_run(x: Any) -> bool:
    """Whether chains run on such a tensor: fp32 on the CPU, in inference, with kernels of ours."""
    return (
        not torch.is_grad_enabled()
        and eligibility.is_ordinary(x)
        and x.dim() == 4
        and x.numel() > 0
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and autocast_dtype(x) in (None, torch.float32)
        and library.library_or_none() is not None
    )


class Ran(NamedTuple):
    """What a chain has made.

    y: what each of its members returns, but for `last`. members: those that it stands for. last: what the linear layer of a
    head with a BN returns. The forward computes ReLU and average by itself, here once more, of y: they change it no more.
    """

    y: Tensor
    members: frozenset[str]
    last: Tensor | None = None


def run(
    container: nn.Module, state: FusedState[ContainerPlan], chain: Chain, x: Any, is_read_by_ours: bool = False
) -> Ran | None:
    """Runs a chain on x as one program; None if that can't be, and its members have to run one by one.

    Args:
        container: whose forward calls the members.
        state: of the container.
        chain: of its plan.
        x: what the first member gets.
        is_read_by_ours: whether the output stays channels_last, whatever eager's layout is: instructions ask for that.
    """
    if state.normalize is not None and chain.members[0] == state.plan.entry:
        x = state.normalize(x, dtype_of(container))
    if not may_run(x):
        return None
    # By the container, too: a chain of another one in this call may be equal to this one.
    key = id(container), chain.members
    sections, asked = checked_calls.derived(key, lambda: _sections(container, state, chain))
    if sections is None or any(
        checked_calls.resolve(backend, torch.device("cpu"), torch.float32) != "cpu" for backend in asked
    ):
        return None
    copies, members = state.copies, chain.members
    memories = checked_calls.memories_of(copies)
    if chain.head is not None:
        head = _head(container, state, chain.head)
        program = compiled_program.find(copies.compiled, members[0], x, sections, head) if head else None
        if program is not None:
            y, *last = program(x, memories)
            return Ran(y, frozenset(members), *last)
        members = members[:-2]
    program = compiled_program.find(copies.compiled, f"{members[0]} without its head", x, sections)
    if program is None:
        return None
    (y,) = program(x, memories)
    if members[-1] in state.plan.seen:
        y = checked_calls.as_eager(y)
    # Eager's convolution returns channels_last if its input or its weight is. At the entry the container sees to it.
    if not is_read_by_ours and members[0] != state.plan.entry and not has_channels_last_strides(x):
        weights = (conv.weight for section in sections for conv in section.live.convs)
        y = y if any(map(is_channels_last, weights)) else as_contiguous(y)
    return Ran(y, frozenset(members))


_NOTHING: tuple[None, frozenset[str]] = (None, frozenset())


def _sections(
    container: nn.Module, state: FusedState[ContainerPlan], chain: Chain
) -> tuple[list[Section] | None, frozenset[str]]:
    """A chain's recipes, if all of them are verified and run on packed weights; and the backends that they ask for."""
    for path, names in chain.around:
        around = child_at(container, path)
        if (
            around is None
            or tuple(around._modules) != names
            or not fusible.is_plain_sequential(around)
            or around.__dict__.get("_compiled_call_impl") is not None
        ):
            return _NOTHING
        if type(around).forward is not nn.Sequential.forward and not is_fused_as_is(around):
            return _NOTHING  # a user's class over a fused one
    sections, asked = [], set()
    for path, name in chain.parts:
        owner = child_at(container, path) if path else container
        own = None if owner is None else state_of(owner)
        if own is None or owner is None:
            return _NOTHING
        recipe = own.plan if name is None else own.plan.runs.get(name)
        verified = checked_calls.verified_recipe(owner, recipe) if isinstance(recipe, Recipe) else None
        if verified is None or not verified.packed:
            return _NOTHING
        asked.add(own.backend)
        sections.append(Section(verified.recipe, verified.live, verified.copies, own.path))
    return sections, frozenset(asked)


def _head(container: nn.Module, state: FusedState[ContainerPlan], head: Head) -> PackedLinear | None:
    """The packed linear layer of a head, packed now if it has changed; None if PyTorch has to run it as it is by now."""
    first, linear = child_at(container, head.first), child_at(container, head.linear)
    bn: BatchNorm | None = None
    if head.is_norm:
        if not fusible.is_batch_norm(first) or not norm_head_is_as_read(first, linear):
            return None
        bn = first
    else:
        flatten = None if head.flatten is None else child_at(container, head.flatten)
        if (head.flatten is not None and flatten is None) or not head_is_as_read(first, flatten, linear):
            return None
    if not isinstance(linear, (nn.Linear, nn.Conv2d)) or not isinstance(linear.weight, Tensor):
        return None
    modules = [(head.linear, linear)] if bn is None else [(head.linear, linear), (head.first, bn)]
    if subclasses.why_not_weights(modules) is not None:
        return None
    linears = state.copies.linears
    packed = linears.get(head.linear)
    if packed is None or not (packed.is_of(linear, bn) if state.frozen else packed.is_unchanged(linear, bn)):
        packed = linears[head.linear] = PackedLinear(linear, head.linear, head.first, bn)
    return packed if packed.can_run else None


def stand_ins(
    container: nn.Module, state: FusedState[ContainerPlan], calls: dict[str, Callable[..., Any]]
) -> Iterable[tuple[str, Callable[..., Any]]]:
    """What the members of a container's chains do in one call of it, by path.

    Args:
        container: the container.
        state: its state.
        calls: what stands in for a member that runs by itself, by path; the child itself for all others.
    """
    for chain in state.plan.chains:
        done: list[Ran] = []  # what ran already, in this call
        for member in chain.members:
            alone = calls.get(member) or child_at(container, member)
            if alone is not None:
                yield member, partial(_call, container, state, chain, done, member, alone)


def _call(
    container: nn.Module,
    state: FusedState[ContainerPlan],
    chain: Chain,
    done: list[Ran],
    member: str,
    alone: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if done and member in done[0].members:
        is_last = done[0].last is not None and member == chain.members[-1]
        return done[0].last if is_last else args[0]
    if member == chain.members[0] and len(args) == 1 and not kwargs:
        ran = run(container, state, chain, args[0])
        if ran is not None:
            done[:] = [ran]
            return ran.y
    return alone(*args, **kwargs)
