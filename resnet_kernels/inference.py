"""Running a recipe in inference: its steps, one kernel each; values in, values out; dead ones freed.

On the CPU a step is a convolution on packed weights, and a block whose weights are verified one flat list of oneDNN calls
(folding.PackedProgram); the residual is written over where nobody else holds it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import ranges
from .folding import PackedConv, PackedProgram, bn_tensors, scale_shift
from .ops import add_relu, onednn
from .ops.geometry import Geometry
from .ops.library import autocast_dtype
from .recipe import CallStep, ConvStep, NormStep, Recipe
from .running import FusedState, Go, Known

CHANNELS_LAST = torch.channels_last


def run_recipe(recipe: Recipe, state: FusedState, go: Go, x: Tensor, known: Known) -> tuple[Tensor, Known]:
    """Runs a recipe on x, as `decide` has said that it may. The output has the layout that eager would give."""
    backend, wiring, verified, _ = go
    dtype = autocast_dtype(x)
    value = x if dtype is None else x.to(dtype)
    restore = False
    if not value.is_contiguous(memory_format=CHANNELS_LAST):
        value = value.contiguous(memory_format=CHANNELS_LAST)
        # Eager's convolution returns channels_last if its input or its weight is, and it stays so from there on.
        restore = all(conv.weight.is_contiguous() for conv in wiring.convs)
    owned = known.owned or value is not x
    on_cpu = backend == "cpu" and value.shape[0] > 0
    bound = onednn.bound(value, known.bound) if on_cpu else math.inf
    if verified and on_cpu and (program := _program(recipe, state, value)) is not None and program.is_safe(bound):
        return _hand_over(
            program(value, owned, state.path), restore, program.result_bound(bound), (state.backend, backend)
        )
    values: dict[int, Tensor] = {0: value}
    bounds: dict[int, float] = {0: bound}
    del value
    for step, child, bn in ranges.around(wiring.steps, state.path):
        bound = math.inf
        if not isinstance(step, ConvStep):
            if isinstance(step, NormStep):
                residual = None if step.residual is None else values[step.residual]
                y = _normalise(bn, values[step.x], residual, step.relu, backend)
                del residual
            else:
                y = _call(step, child, [values[i] for i in step.inputs], backend)
            if on_cpu:
                bound = onednn.bound(y, None)
        else:
            residual = None if step.residual is None else values[step.residual]
            relu, late = step.relu, None
            if residual is not None:
                x_shape = values[step.x].shape
                shape = Geometry.of_module(child, x_shape[2:]).out_shape(x_shape, child.weight.shape)
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
                    *Geometry.of_module(child, values[step.x].shape[2:]), relu, backend,
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


def _normalise(bn: nn.Module, x: Tensor, residual: Tensor | None, relu: bool, backend: str) -> Tensor:
    broadcasts = residual is not None and residual.shape != x.shape
    y = torch.ops.resnet_kernels.batch_norm_act.default(
        x, None if broadcasts else residual, *bn_tensors(bn), False, 0.0, bn.eps, relu and not broadcasts, backend
    )[0]
    if not broadcasts:
        return y
    y = torch.add(y, residual).contiguous(memory_format=CHANNELS_LAST)
    return torch.relu_(y) if relu else y


def _call(step: CallStep, child: nn.Module | None, inputs: list[Tensor], backend: str) -> Tensor:
    if child is not None:
        return child(*inputs)
    if step.what == "add_relu" and inputs[0].shape == inputs[1].shape:
        return add_relu(*inputs, backend=backend)
    if step.what == "add_relu":
        return torch.relu_(torch.add(*inputs))  # a sum that broadcasts
    return torch.add(*inputs) if step.what == "add" else torch.relu(*inputs)
