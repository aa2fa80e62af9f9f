"""The form of each convolution in a plan: its kernel, and, on cuDNN, which operations run inside or in a pass of their own.

A table's answer comes first. Without one bytes decide, layer by layer. cuDNN's fused operation needs BN's scale in the weight:
a read and a write of the weight in each call. A pass of its own reads and writes the output. At batch 256 the outputs are
larger; at batch 1 the weights of the late stages are. Frozen weights are folded once, which costs a call nothing.

A projection is never finished by itself: the convolution that adds it takes over its scale and shift. If both are folded,
their biases are added up. If neither is, one pass applies both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...graph.recipe import PReLUAt
from ...kernels.geometry import Geometry
from ...ops import backends, conv_candidates
from ..parts import ConvPart, Part
from . import multi_layer
from .multi_layer import Link, Stem


@dataclass(frozen=True)
class Form:
    """Form in which one convolution runs.

    name: of a candidate (ops/conv_candidates.py). geometry: of the convolution, at the plan's image size. run: the candidate.
    folds: the weight and the bias come from the launch that folds all weights of a plan.
    adds: the number of the projection whose shift, and scale unless it is folded, this convolution applies.
    bare: the convolution is such a projection, so nothing follows it. broadcasts: the residual has another shape than the
    output, so eager's own add and activation follow.
    """

    name: str
    geometry: Geometry
    run: conv_candidates.Run = field(compare=False, repr=False)
    folds: bool = False
    adds: int | None = None
    bare: bool = False
    broadcasts: bool = False

    @property
    def on_cudnn(self) -> bool:
        """Whether cuDNN reads the weight."""
        return self.name.startswith("cudnn")


def choose(
    parts: Sequence[Part], result: int, chosen: dict[int, Link | Stem], x: Tensor, backend: str, frozen: bool = False
) -> dict[int, Form]:
    """The forms of the convolutions that are in no link, by the value that each makes.

    Args:
        parts: steps that follow each other.
        result: the number of the caller's value.
        chosen: the links, by each value that one of their parts makes.
        x: the plan's input.
        backend: "tuned" decides by a table or by bytes, "cudnn" folds whatever has a BN; for any other it is the form's name.
        frozen: whether folded weights are kept.
    """
    shapes = multi_layer.shapes_of(parts, {0: x.shape}, x.dtype)
    found: dict[int, Form] = {}
    untuned: list[ConvPart] = []
    for part in parts:
        step = part.step
        if not isinstance(part, ConvPart) or step.out in chosen:
            continue
        if isinstance(part.step.activation, PReLUAt):
            continue  # a form has no place for slopes: the op chooses in each call
        asked = multi_layer.conv_problem(part, shapes[part.step.x])
        broadcasts = multi_layer.broadcasts(part, shapes)
        if broadcasts:
            asked = asked._replace(residual=False, activation=None)
        name = backend
        if backend == "tuned":
            by_table = conv_candidates.choice(asked, x.shape[0], x.dtype, x.device)
            if by_table is None:
                untuned.append(part)
            name = by_table or _by_bytes(part, asked, shapes, x, frozen)
        folds = name in conv_candidates.FOLDING and part.bn is not None
        found[step.out] = _form(name, asked, x, folds=folds, broadcasts=broadcasts)
    if backends.untuned(x.device, x.dtype) == "cudnn":
        for adding, projection in _projections(untuned, parts, result):
            if not found[adding.step.out].broadcasts:
                found.update(_together(adding, projection, shapes, x, frozen))
    return found


def _form(name: str, asked: conv_candidates.ConvProblem, x: Tensor, **more: Any) -> Form:
    return Form(name, asked.geometry, conv_candidates.bind(name, asked, x.shape[0], x.dtype, x.device), **more)


def _by_bytes(
    part: ConvPart, asked: conv_candidates.ConvProblem, shapes: dict[int, Sequence[int]], x: Tensor, frozen: bool
) -> str:
    """Name of an untuned convolution's form, without regard to a projection."""
    folded = asked._replace(scale=False)
    fused = conv_candidates.untuned(folded, x.dtype, x.device)
    if not asked.scale or fused not in conv_candidates.FOLDING:
        return fused
    if conv_candidates.folds(x.dtype) and _folding_bytes(part, x, frozen) < _pass_bytes(part, shapes, x):
        return fused
    return conv_candidates.untuned(asked, x.dtype, x.device)


def _projections(untuned: list[ConvPart], parts: Sequence[Part], result: int) -> list[tuple[ConvPart, ConvPart]]:
    """Pairs of untuned convolutions: one that adds, and the projection that makes what it adds."""
    makers = {part.step.out: part for part in untuned}
    readers = [value for part in parts for value in part.step.inputs] + [result]
    pairs = [(part, makers.get(part.step.residual)) for part in untuned if part.step.residual is not None]
    return [
        (adding, projection)
        for adding, projection in pairs
        if projection is not None
        and projection.step.activation is None
        and projection.step.residual is None
        and readers.count(projection.step.out) == 1
    ]


def _together(
    adding: ConvPart, projection: ConvPart, shapes: dict[int, Sequence[int]], x: Tensor, frozen: bool
) -> dict[int, Form]:
    asked, bare = (multi_layer.conv_problem(part, shapes[part.step.x]) for part in (adding, projection))
    fused = conv_candidates.untuned(asked._replace(scale=False), x.dtype, x.device)
    # The adding convolution folds even without a BN, because the launch that folds weights also adds two biases.
    folded = (adding,) if projection.bn is None else (adding, projection)
    folding = sum(_folding_bytes(part, x, frozen) for part in folded)
    folds = (
        fused in conv_candidates.FOLDING and conv_candidates.folds(x.dtype) and folding < _pass_bytes(adding, shapes, x)
    )
    name = fused if folds else "cudnn+epilogue"
    return {
        adding.step.out: _form(name, asked, x, folds=folds, adds=projection.step.out),
        projection.step.out: _form("cudnn+epilogue", bare, x, folds=folds and projection.bn is not None, bare=True),
    }


def _folding_bytes(part: ConvPart, x: Tensor, frozen: bool) -> int:
    """The bytes that folding adds to a call: none where the weight is kept, or has to be copied anyway."""
    weight = part.conv.weight
    if frozen or needs_copy(weight, x.dtype):
        return 0
    return weight.numel() * (weight.element_size() + x.element_size())


def needs_copy(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight has to be copied before cuDNN can read it in `dtype` and channels_last."""
    return weight.dtype != dtype or not weight.is_contiguous(memory_format=torch.channels_last)


def _pass_bytes(part: Part, shapes: dict[int, Sequence[int]], x: Tensor) -> int:
    """The bytes that a pass over the output adds to a call."""
    return 2 * math.prod(shapes[part.step.out]) * x.element_size()
