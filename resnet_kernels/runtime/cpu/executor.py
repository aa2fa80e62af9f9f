"""Execution of a recipe on the CPU: convolutions use packed weights.

A block whose weights are verified runs as one call of ours (compiled_program.py), or as a flat list of oneDNN's
(program.PackedProgram). Any other block runs step by step. A residual that nobody else holds is overwritten.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...graph import fusible
from ...graph.recipe import Recipe
from ...kernels.activations import Last
from ...kernels.cpu import library
from ...kernels.cpu.convolution import Preactivation
from ...ops import onednn
from .. import checked_calls, run_steps
from ..parts import CallPart, ConvPart, NormPart, Part, last_of, pack_name
from ..run_steps import Values
from ..state import FusedRun, FusedState
from . import compiled_program, neighbors
from .packed_conv import PackedConv
from .program import pack_again


def run(
    recipe: Recipe, state: FusedState[Any], run: FusedRun, x: Tensor, x_bound: float | None, owned: bool
) -> tuple[Tensor, float | None]:
    """Runs a recipe on x.

    Args:
        recipe: the recipe of a block or a run.
        state: the fused module's state.
        run: the decision of `eligibility.decide`.
        x: (N, C, H, W), channels_last, not empty.
        x_bound: a bound on the magnitude of x's values; None if unknown.
        owned: whether nobody else holds x, so that a step may overwrite it.

    Returns:
        The output, and a bound on it; None if unknown.
    """
    # One object for the whole call: if weights change during the call, their old copies go with the old object.
    copies = state.copies
    if not run.verified or not copies.are_of(x.dtype, run.live.packed_parts):
        pack_again(copies, state.holds, run.live.packed_parts, x.dtype)
    if x.dtype == torch.float32 and library.library_or_none() is not None:
        section = compiled_program.Section(recipe, run.live, copies, state.path)
        compiled = compiled_program.find(copies.compiled, recipe.modules, x, [section])
        if compiled is not None:
            return compiled(x, checked_calls.memories_of(copies))[0], None
    program = copies.program(recipe, x) or copies.make_program(recipe, x)
    if program is not None and (result := program.run_if_safe(x, x_bound, owned, state.path)) is not None:
        return result
    bounds: dict[int, float | None] = {0: x_bound}
    parts = run.live.parts
    on_load, pools = neighbors.norms_on_load(parts, recipe.result), neighbors.pools_behind(parts, recipe.result)
    pending: dict[int, tuple[NormPart, Preactivation]] = {}  # BNs by the value that they stand in for
    done: set[int] = set()  # convolutions that pooled, too

    def pack_of(part: ConvPart, x: Tensor) -> PackedConv:
        pack = copies.packs.get(pack_name(part))
        if not isinstance(pack, PackedConv) or not pack.fits(x):
            pack = PackedConv(part.conv, part.bn, x.dtype)
            copies.pack(pack_name(part), pack)
        return pack

    def convolve(part: ConvPart, x: Tensor, residual: Tensor | None) -> Tensor:
        step, pack = part.step, pack_of(part, x)
        bound = math.inf
        own, preactivation = None, None
        if step.x in pending:
            preactivation = pending[step.x][1]
            own = pack.activated(x.shape)
            assert own is not None  # run_part has asked
        elif step.out in pools and (own := neighbors.pooled(pack, pools[step.out], x.shape)) is not None:
            done.add(step.out)
        elif pack.own(x.shape) is None:
            bound = pack.bound(onednn.bound(x, bounds[step.x]))
            if step.residual is not None:
                assert residual is not None
                bound += onednn.bound(residual, bounds[step.residual])
            bounds[step.out] = bound if step.activation is None else step.activation.gain * bound
        overwrite = step.overwrites_residual and (step.residual != 0 or owned)
        if overwrite and any(values.get(value) is residual for value in pending):
            overwrite = False  # its BN has not been read by all

        def convolution(residual: Tensor | None, activation: Last) -> Tensor:
            if own is not None:
                return own(x, residual, activation, overwrite, preactivation)
            return pack(x, residual, activation, bound, overwrite)

        return run_steps.with_residual(
            convolution, lambda: pack.out_shape(x.shape), x.dtype, residual, last_of(part), "cpu"
        )  # fmt: skip

    def run_part(part: Part, values: Values) -> Tensor:
        bounds[part.step.out] = None
        if isinstance(part, NormPart) and fusible.is_frozen(part.bn):
            x = values[part.step.x]
            preactivation = neighbors.preactivation_of(copies.packs.get(pack_name(part)), part, x.shape[1])
            if preactivation is not None and part.step.out in on_load and x.dtype == torch.float32:
                readers = [
                    reader for reader in parts if isinstance(reader, ConvPart) and reader.step.x == part.step.out
                ]
                if all(pack_of(reader, x).activated(x.shape) is not None for reader in readers):
                    pending[part.step.out] = part, preactivation
                    return x
        if isinstance(part, ConvPart) and part.step.x in pending:
            x = values[part.step.x]
            if pack_of(part, x).activated(x.shape) is None:  # a weight was changed since
                norm, _ = pending.pop(part.step.x)
                values[part.step.x] = run_steps.normalize(norm.bn, x, None, last_of(norm), "cpu")
        if isinstance(part, CallPart) and part.step.inputs[0] in done:
            return values[part.step.inputs[0]]
        y = run_steps.run_part(part, values, "cpu", convolve)
        if isinstance(part, CallPart) and type(part.child) is nn.MaxPool2d:
            bounds[part.step.out] = bounds[part.step.inputs[0]]  # a maximum of values keeps their bound
        return y

    values = {0: x}
    del x
    return run_steps.run_steps(parts, values, recipe.result, state.path, run_part), bounds[recipe.result]
