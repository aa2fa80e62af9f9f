"""fuse, fuse_, unfuse_, explain, refresh: find the blocks of a model, swap them, say what was done.

First everything is read, then everything is swapped: a model is never left half-fused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..graph.recipe import Recipe
from ..ops import backends, tuned_table
from ..ops.dtypes import autocast_dtype
from ..runtime import eligibility, fused_module
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
        model: any module with residual blocks of Conv2d, BatchNorm2d and ReLU in it: torchvision, timm, d2l, one's own.
        backend: "auto", "triton", "cudnn", "cpu" or "eager" (see ops/backends.py).
        normalize: (mean, std), a number a channel each, of images in 0..1. The fused model then takes uint8 images, 0..255,
            or floating-point ones in 0..1, (N, C, H, W), and gives what the model gives on ((x / 255) - mean) / std.
        freeze: a promise that weights and statistics stay as they are in eval mode. They are folded, cast and laid out once,
            and no call compares them with their copies. train(), load_state_dict and .to(), of this model or of one around
            it, and refresh make the next call do so anew; any other change has to be followed by refresh.

    Raises:
        TypeError: if model is no nn.Module, or freeze no bool.
        ValueError: unknown backend; normalize is no pair of equally long sequences or has a std of 0, does not fit the
            model's channels, or the model's own forward can't take it (explain says why).
    """
    _check(model, backend, freeze)
    fused = copy.deepcopy(model)
    fuse_(fused, backend=backend, normalize=normalize, freeze=freeze)
    return fused


def fuse_(
    model: nn.Module,
    *,
    backend: str = "auto",
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    freeze: bool = False,
) -> FuseReport:
    """Fuses a model in place: same modules, parameters, names, hooks and state_dict keys; returns the report.

    On a model that is fused already it looks for what is new or changed, and keeps its `normalize` unless another is given;
    `freeze` has to be given again. Arguments and errors as `fuse`.
    """
    _check(model, backend, freeze)
    findings = find_blocks(model)
    wanted = _normalize_of(model) if normalize is None else Normalize.of(normalize)
    if wanted is not None:
        _check_normalize(model, findings, wanted)
    swapped: list[tuple[nn.Module, type, dict]] = []
    try:
        for module in list(model.modules()):
            if fused_module.is_fused(module):
                swapped.append((module, type(module), dict(module.__dict__)))
                fused_module.swap_back(module)
        paths = {id(module): path for path, module in model.named_modules()}
        for finding in findings:
            if finding.fusible:
                swapped.append((finding.module, type(finding.module), dict(finding.module.__dict__)))
                own = wanted if finding.module is model else None
                state = FusedState(finding.plan, backend, paths[id(finding.module)], own, freeze)
                fused_module.swap(finding.module, finding.mixin, state)
    except BaseException:
        for module, cls, state in reversed(swapped):
            module.__class__ = cls
            module.__dict__.pop("_rk_state", None)
            module.__dict__.update({k: v for k, v in state.items() if k == "_rk_state"})
        raise
    return FuseReport(_rows_now(findings), backend, wanted, freeze and any(finding.fusible for finding in findings))


def unfuse_(model: nn.Module) -> nn.Module:
    """Undoes `fuse_`: exactly the modules, classes and keys from before. Returns the model.

    Blocks built as `resnet_kernels.Bottleneck` and the like become plain PyTorch, too.
    """
    _check(model, "auto")
    for module in model.modules():
        if fused_module.is_fused(module):
            fused_module.swap_back(module)
    return model


def explain(model: nn.Module, *, backend: str = "auto") -> FuseReport:
    """What `fuse_` would do, a row a block; changes nothing. On a fused model: what is fused, and what runs eager now."""
    _check(model, backend)
    if not any(fused_module.is_fused(module) for module in model.modules()):
        return FuseReport(tuple(row for finding in find_blocks(model) for row in finding.rows), backend)
    states = states_in(model)
    frozen = any(state.frozen for state in states)
    return FuseReport(_rows_now(find_blocks(model), tables=True), states[0].backend, _normalize_of(model), frozen)


def _normalize_of(model: nn.Module) -> Normalize | None:
    state = state_of(model)
    return None if state is None else state.normalize


def _check_normalize(model: nn.Module, findings: list[Finding], normalize: Normalize) -> None:
    plan = next(
        (finding.plan for finding in findings if finding.module is model and finding.mixin is FusedContainer), None
    )
    if plan is None:
        raise ValueError(
            "normalize needs a network with fused blocks in it and a forward that can be read, "
            f"got a {type(model).__name__}: explain(model) tells what was found"
        )
    if plan.entry is not None and model._modules[plan.entry].in_channels != len(normalize.mean):
        raise ValueError(
            f"normalize must have a mean and a std for each of the model's {model._modules[plan.entry].in_channels} "
            f"channels, got {len(normalize.mean)}"
        )


def _rows_now(findings: list[Finding], *, tables: bool = False) -> tuple[Row, ...]:
    """The rows of a fused model, with why a fused block runs eager as things stand; with what tables decide, if asked for."""
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
                reason = eligibility.why_not_now(finding.module, recipe, state.backend)
                hook = not reason and has_hooks(finding.module) and isinstance(state.plan, Recipe)
                by_table = "" if reason or not tables else _decided_by_table(finding.module, recipe, state.backend)
                apart = "a hook on it has to fire" if hook else ""
                rows.append(replace(row, reason=reason or "", apart=apart, table=by_table))
    return tuple(rows)


def _decided_by_table(module: nn.Module, recipe: Recipe, backend: str) -> str:
    """What measured tables decide of a block in the mode that it is in; "" if nothing."""
    live = wire(module, recipe)
    if backends.requested(backend) != "auto" or isinstance(live, str):
        return ""
    parts = [part for part in live.parts if isinstance(part, ConvPart)]
    weight = parts[0].conv.weight
    if live.in_training():
        return "trains on own kernels" if eligibility.trains_on(backend, weight) else ""
    keys = tuned_table.decided(weight.device, autocast_dtype(weight) or weight.dtype)
    # Where the image's size decides the padding, it is in the key: so each size is tried, as a call would.
    sizes = sorted({tuple(map(int, found.groups())) for found in map(_SIZE.match, keys) if found}, reverse=True)
    decided = {
        i: size
        for i, part in enumerate(parts)
        for size in sizes
        if str(multi_layer.conv_problem(part, (1, part.conv.in_channels, *size))) in keys
    }
    if not decided:
        return ""
    convolutions = "convolution" if len(parts) == 1 else "convolutions"
    height, width = decided[min(decided)]
    return f"{len(decided)} of {len(parts)} {convolutions}, from {height}x{width}"


# The height and width in a convolution's key.
_SIZE = re.compile(r"conv \d+x(\d+)x(\d+)->")


def refresh(model: nn.Module) -> nn.Module:
    """Drops all copies of weights (the CPU backend's packed ones, a frozen model's), to be made anew in the next call.

    Needed after a few elements of a weight were written behind PyTorch's back (NumPy, a raw pointer), and after any edit of
    a model that was fused with freeze=True: every other change is noticed. Returns the model.
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


def _recipe_of(state: FusedState, row: Row) -> Recipe:
    """The recipe behind a report's row: the block's own, or one of a container's runs."""
    if isinstance(state.plan, Recipe):
        return state.plan
    return next(recipe for recipe in state.plan.runs.values() if str(recipe) == row.steps)
