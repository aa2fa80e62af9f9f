"""Chains of a container on the CPU: the stem and all stages of a network run as one program (cpu/compiled_program.py).

A container's own forward stays Python. So the first member of a chain runs all of it, and the others return what they get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.recipe import Chain, ContainerPlan, Recipe
from ..ops.dtypes import autocast_dtype
from . import checked_calls, eligibility
from .cpu import compiled_program
from .cpu.compiled_program import Section
from .live_modules import child_at
from .state import FusedState, state_of


def run(container: nn.Module, state: FusedState[ContainerPlan], chain: Chain, x: Any) -> Tensor | None:
    """Runs a chain on x as one program; None if that can't be, and its members have to run one by one.

    Args:
        container: whose forward calls the members.
        state: of the container.
        chain: of its plan.
        x: what the first member gets.
    """
    if torch.is_grad_enabled() or not eligibility.is_ordinary(x) or x.dim() != 4 or x.numel() == 0:
        return None
    if x.device.type != "cpu" or x.dtype != torch.float32 or autocast_dtype(x) not in (None, torch.float32):
        return None
    sections = _sections(container, state, chain)
    if sections is None:
        return None
    copies = state.copies
    program = compiled_program.find(copies.compiled, chain.members[0], x, sections)
    return None if program is None else program(x, checked_calls.memories_of(copies))


def _sections(container: nn.Module, state: FusedState[ContainerPlan], chain: Chain) -> list[Section] | None:
    """A chain's recipes, if all of them are verified and run on packed weights."""
    sections = []
    for path, name in chain.parts:
        owner = child_at(container, path) if path else container
        own = None if owner is None else state_of(owner)
        if own is None or owner is None:
            return None
        recipe = own.plan if name is None else own.plan.runs.get(name)
        verified = checked_calls.verified_recipe(owner, recipe) if isinstance(recipe, Recipe) else None
        if verified is None or not verified.packed:
            return None
        if checked_calls.resolve(own.backend, torch.device("cpu"), torch.float32) != "cpu":
            return None
        sections.append(Section(verified.recipe, verified.live, verified.copies, own.path))
    return sections


def stand_ins(
    container: nn.Module,
    state: FusedState[ContainerPlan],
    calls: dict[str, Callable[..., Any]],
    prepare: Callable[[str, Any], Any],
    finish: Callable[[str, Any], Any],
) -> Iterable[tuple[str, Callable[..., Any]]]:
    """What the members of a container's chains do in one call of it, by path.

    Args:
        container: the container.
        state: its state.
        calls: what stands in for a member that runs by itself, by path; the child itself for all others.
        prepare: gives a member's input, by path, as a program takes it.
        finish: gives a member's output, by path, to the code that reads it.
    """
    for chain in state.plan.chains:
        done: list[bool] = []  # whether it ran, in this call
        for i, member in enumerate(chain.members):
            alone = calls.get(member) or child_at(container, member)
            if alone is None:
                break
            if i == 0:
                yield member, partial(_run_all, container, state, chain, done, alone, prepare, finish)
            else:
                yield member, partial(_pass_on, done, alone)


def _run_all(
    container: nn.Module,
    state: FusedState[ContainerPlan],
    chain: Chain,
    done: list[bool],
    alone: Callable[..., Any],
    prepare: Callable[[str, Any], Any],
    finish: Callable[[str, Any], Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    done.clear()
    if len(args) == 1 and not kwargs:
        y = run(container, state, chain, prepare(chain.members[0], args[0]))
        if y is not None:
            done.append(True)
            return finish(chain.members[-1], y)
    return alone(*args, **kwargs)


def _pass_on(done: list[bool], alone: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return args[0] if done else alone(*args, **kwargs)
