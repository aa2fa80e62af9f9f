"""fuse, fuse_, unfuse_, explain, refresh: find the blocks of a model, swap them, report what was done.

Everything is read before anything is swapped, so a model is never left half-fused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..graph.recipe import ContainerPlan, Recipe
from ..ops import backends, tuned_table
from ..ops.dtypes import autocast_dtype
from ..runtime import eligibility, fused_module, mixed_forward
from ..runtime.fused_block import FusedBlock
from ..runtime.fused_container import FusedContainer
from ..runtime.gpu import multi_layer
from ..runtime.live_modules import has_hooks, wire
from ..runtime.normalize_images import Normalize
from ..runtime.parts import ConvPart
from ..runtime.state import FusedState, state_of, states_in
from .find_blocks import Finding, find_blocks
from .report import FuseReport, Row


def fuse(
    model: nn.Module,
    *,
    backend: str = "auto",
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    freeze: bool = False,
) -> nn.Module:
    """Returns a fused copy of a model; the original is untouched.

    Args:
        model: a module with residual blocks of Conv2d, BatchNorm2d and ReLU in it, such as a network of torchvision, timm or
            d2l, or the user's own. It takes (N, C, H, W), in any floating dtype.
        backend: "auto", "triton", "cudnn", "cpu" or "eager" (see ops/backends.py).
        normalize: (mean, std) of images in 0..1, one number per channel each. The fused model then takes (N, C, H, W) images,
            uint8 in 0..255 or floating point in 0..1. Its result is the model's on ((x / 255) - mean) / std.
        freeze: a promise that weights and statistics stay as they are in eval mode. They are folded, cast and laid out once,
            and no call compares them with their copies. The copies are made anew after train(), load_state_dict or .to(),
            of this model or of one around it, and after refresh. Any other change has to be followed by refresh.

    Returns:
        A model of the same class with the same modules, parameters, hooks and state_dict keys.

    Raises:
        TypeError: if model is no nn.Module, or freeze no bool.
        ValueError: if backend is unknown. Also if normalize is no pair of equally long sequences, has a std of 0, doesn't fit
            the model's channels, or the model's forward can't be read (explain tells why).
    """
    _check(model, backend, freeze)
    fused = _copied(model)
    fuse_(fused, backend=backend, normalize=normalize, freeze=freeze)
    return fused


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy in the same mode: torch.fx forgets the mode of a GraphModule, and those of the modules in it."""
    copied = copy.deepcopy(model)
    if copied.training != model.training:
        copied.train(model.training)
    for path, module in copied.named_modules():
        training = model.get_submodule(path).training
        if module.training != training:
            module.training = training
    return copied


def fuse_(
    model: nn.Module,
    *,
    backend: str = "auto",
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    freeze: bool = False,
) -> FuseReport:
    """Fuses a model in place; its modules, parameters, names, hooks and state_dict keys stay.

    On a model that is fused already, it looks for what is new or changed. `normalize` is then kept unless another is given;
    `freeze` has to be given again. If anything fails, the model is left as it was.

    Args:
        model: see `fuse`.
        backend: see `fuse`.
        normalize: see `fuse`.
        freeze: see `fuse`.

    Returns:
        The report, with one row per block: fused, or the reason why not.

    Raises:
        TypeError: see `fuse`.
        ValueError: see `fuse`.
    """
    _check(model, backend, freeze)
    findings, left = find_blocks(model)
    wanted = _normalize_of(model) if normalize is None else Normalize.of(normalize)
    if wanted is not None:
        _check_normalize(model, findings, wanted)
    swapped: list[tuple[nn.Module, type, FusedState[Any] | None]] = []
    try:
        for module in list(model.modules()):
            if fused_module.is_fused(module):
                swapped.append((module, type(module), state_of(module)))
                fused_module.swap_back(module)
        paths = {id(module): path for path, module in model.named_modules()}
        for finding in findings:
            if finding.plan is not None:
                swapped.append((finding.module, type(finding.module), None))
                own = wanted if finding.module is model else None
                state = FusedState(finding.plan, backend, paths[id(finding.module)], own, freeze)
                mixin = FusedBlock if isinstance(finding.plan, Recipe) else FusedContainer
                fused_module.swap(finding.module, mixin, state)
    except BaseException:
        for module, cls, before in reversed(swapped):
            module.__class__ = cls
            module.__dict__.pop("_rk_state", None)
            if before is not None:
                module.__dict__["_rk_state"] = before
        raise
    frozen = freeze and any(finding.plan for finding in findings)
    return FuseReport(_rows_now(findings), backend, wanted, frozen, _count(model), left)


def unfuse_(model: nn.Module) -> nn.Module:
    """Undoes `fuse_` in place: exactly the modules, classes and state_dict keys from before.

    Blocks built as `resnet_kernels.Bottleneck` and the like become plain PyTorch, too.

    Args:
        model: a fused model, or any other, which stays as it is.

    Returns:
        The model.

    Raises:
        TypeError: if model is no nn.Module.
    """
    _check(model, "auto")
    for module in model.modules():
        if fused_module.is_fused(module):
            fused_module.swap_back(module)
    return model


def explain(model: nn.Module, *, backend: str = "auto") -> FuseReport:
    """Returns the report that `fuse_` would return, and changes nothing.

    On a fused model the report shows what is fused, what runs eager now, and what measured tables decide.

    Args:
        model: see `fuse`; it may be fused already.
        backend: the backend to report for. A fused model's own backend counts instead.

    Returns:
        The report, with one row per block: fused, or the reason why not.

    Raises:
        TypeError: if model is no nn.Module.
        ValueError: if backend is unknown.
    """
    _check(model, backend)
    states = states_in(model)
    if not states:
        findings, left = find_blocks(model)
        rows = tuple(row for finding in findings for row in finding.rows)
        return FuseReport(rows, backend, convolutions=_count(model), unfused=left)
    frozen = any(state.frozen for state in states)
    findings, left = find_blocks(model)
    rows = _rows_now(findings, tables=True) + _rows_of_lost_blocks(model, findings)
    return FuseReport(rows, states[0].backend, _normalize_of(model), frozen, _count(model), left)


def _count(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())


def _normalize_of(model: nn.Module) -> Normalize | None:
    state = state_of(model)
    return None if state is None else state.normalize


def _check_normalize(model: nn.Module, findings: list[Finding], normalize: Normalize) -> None:
    plan = next((f.plan for f in findings if f.module is model and isinstance(f.plan, ContainerPlan)), None)
    if plan is None:
        raise ValueError(
            "normalize needs a network with fused blocks in it and a forward that can be read, "
            f"got a {type(model).__name__}: explain(model) tells what was found"
        )
    channels = None if plan.entry is None else model.get_submodule(plan.entry).in_channels
    if channels not in (None, len(normalize.mean)):
        raise ValueError(
            f"normalize must have a mean and a std for each of the model's {channels} channels, got {len(normalize.mean)}"
        )


def _rows_now(findings: list[Finding], *, tables: bool = False) -> tuple[Row, ...]:
    """Returns the rows of a fused model as things stand: with reasons to run eager and, if asked for, what tables decide."""
    rows = []
    for finding in findings:
        state = state_of(finding.module)
        for row in finding.rows:
            if not row.fused:
                rows.append(row)
            elif state is None:
                rows.append(
                    Row(row.path, row.kind, False, reason="was added after the model was fused: call fuse_ again")
                )
            else:
                recipe = _recipe_of(state, row)
                if recipe is None:
                    rows.append(replace(row, fused=False, reason="is another one than was fused: call fuse_ again"))
                    continue
                reason = eligibility.why_not_now(finding.module, recipe, state)
                if not reason and isinstance(state.plan, ContainerPlan) and state.plan.instructions:
                    reason = mixed_forward.why_not(finding.module, state.plan)
                hook = not reason and has_hooks(finding.module) and isinstance(state.plan, Recipe)
                by_table = "" if reason or not tables else _decided_by_table(finding.module, recipe, state.backend)
                apart = "a hook on it has to fire" if hook else ""
                rows.append(replace(row, reason=reason or "", apart=apart, table=by_table))
    return tuple(rows)


def _rows_of_lost_blocks(model: nn.Module, findings: list[Finding]) -> tuple[Row, ...]:
    """Returns a row for each fused module in which nothing is found any more, because its forward is another one now."""
    found = {id(finding.module) for finding in findings}
    rows = []
    for path, module in model.named_modules():
        if (state := state_of(module)) is None or id(module) in found:
            continue
        for recipe in [state.plan] if isinstance(state.plan, Recipe) else state.plan.runs.values():
            reason = eligibility.why_not_now(module, recipe, state)
            rows.append(Row(path, type(module).__name__, False, reason=reason or "can't be read any more"))
    return tuple(rows)


def _decided_by_table(module: nn.Module, recipe: Recipe, backend: str) -> str:
    """Returns what measured tables decide for a block in its present mode; "" if nothing."""
    live = wire(module, recipe)
    if backends.requested(backend) != "auto" or isinstance(live, str):
        return ""
    convs = [part for part in live.parts if isinstance(part, ConvPart)]
    weight = convs[0].conv.weight
    if live.in_training():
        return "trains on own kernels" if eligibility.trains_on(backend, weight, is_weight=True) else ""
    keys = tuned_table.decided(weight.device, autocast_dtype(weight) or weight.dtype)
    # A key holds the image's size, which may decide the padding, so each size that a table has is tried, as a call would.
    sizes = sorted({tuple(map(int, found.groups())) for found in map(_SIZE.match, keys) if found}, reverse=True)
    decided = {
        i: size
        for i, part in enumerate(convs)
        for size in sizes
        if str(multi_layer.conv_problem(part, (1, part.conv.in_channels, *size))) in keys
    }
    if not decided:
        return ""
    convolutions = "convolution" if len(convs) == 1 else "convolutions"
    height, width = decided[min(decided)]
    return f"{len(decided)} of {len(convs)} {convolutions}, from {height}x{width}"


# The height and width in a convolution's key.
_SIZE = re.compile(r"conv \d+x(\d+)x(\d+)->")


def refresh(model: nn.Module) -> nn.Module:
    """Drops all copies of weights (the CPU backend's packed ones, a frozen model's); the next call makes them anew.

    It is needed after a few elements of a weight were written behind PyTorch's back (NumPy, a raw pointer), and after any
    edit of a model that was fused with freeze=True. Every other change is noticed.

    Args:
        model: a fused model, or one with fused modules in it.

    Returns:
        The model.

    Raises:
        TypeError: if model is no nn.Module.
    """
    _check(model, "auto")
    for module in model.modules():
        fused_module.drop_copies(module)
    return model


def _check(model: object, backend: str, freeze: object = False) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(freeze, bool):
        raise TypeError(f"freeze must be True or False, got {freeze!r}")
    backends.check_name(backend)


def _recipe_of(state: FusedState[Any], row: Row) -> Recipe | None:
    """Returns the recipe behind a report's row: the block's own, or that of a container's run; None if there is none now."""
    plan: Recipe | ContainerPlan = state.plan
    if isinstance(plan, Recipe):
        return plan
    return next((recipe for recipe in plan.runs.values() if str(recipe) == row.steps), None)
