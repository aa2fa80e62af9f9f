"""Running steps on a GPU: those of one block, or of several that follow each other, cut into launches.

Steps and live modules go in, and a plan comes out: which steps share a launch, in which order, and what is dead after each. It
holds for one shape of the input, and is made anew when the shape, a module or a setting of one is another. Before the first
launch all BNs become scales and shifts, in one launch, from the live tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import plain
from .folding import bn_tensors, scale_shift
from .links import Part
from .ops import dispatch
from .ops.geometry import Geometry
from .recipe import CallStep, ConvStep, NormStep, Recipe
from .wiring import Wiring

Values = dict[int, Tensor]
# Scale and shift by the number of the value that a convolution makes; (None, bias) without a BN.
ScaleShifts = dict[int, tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Launch:
    """Parts in one launch. run: adds the values that they make. frees: those that nobody needs afterwards."""

    run: Callable[[Sequence[Part], Values, ScaleShifts, str], None]
    parts: tuple[Part, ...]
    frees: tuple[int, ...] = ()

    @property
    def reads(self) -> set[int]:
        return {value for part in self.parts for value in part.reads} - {part.step.out for part in self.parts}


def convolve(parts: Sequence[Part], values: Values, vectors: ScaleShifts, backend: str) -> None:
    """A convolution with its BN, residual and ReLU: ops.conv_bias_act."""
    ((step, conv, _),) = parts
    x, (scale, shift) = values[step.x], vectors[step.out]
    geometry = Geometry.of_module(conv, x.shape[2:])
    residual = None if step.residual is None else values[step.residual]
    # A kernel reads a residual of the output's shape; eager's add broadcasts a smaller one.
    fits = residual is None or residual.shape == geometry.out_shape(x.shape, conv.weight.shape)
    y = torch.ops.resnet_kernels.conv_bias_act.default(
        x, conv.weight.to(x.dtype), shift, residual if fits else None, scale, *geometry, step.relu and fits, backend
    )  # fmt: skip
    values[step.out] = y if fits else plain.add_broadcast(y, residual, step.relu)


def normalise(parts: Sequence[Part], values: Values, vectors: ScaleShifts, backend: str) -> None:
    """A BN that comes before its convolution: ops.batch_norm_act."""
    ((step, _, bn),) = parts
    residual = None if step.residual is None else values[step.residual]
    values[step.out] = plain.normalise(bn, values[step.x], residual, step.relu, backend)


def call(parts: Sequence[Part], values: Values, vectors: ScaleShifts, backend: str) -> None:
    """A child module, an add or a ReLU."""
    ((step, child, _),) = parts
    values[step.out] = plain.call(step, child, [values[i] for i in step.inputs], backend)


_ALONE = {ConvStep: convolve, NormStep: normalise, CallStep: call}


class Plan:
    """Launches in the order in which they can run."""

    def __init__(self, wirings: Sequence[Wiring], recipes: Sequence[Recipe], x: Tensor, backend: str):
        self.wirings = wirings
        self.parts, self.result = parts_of(wirings, recipes)
        self.settings = [_settings(part) for part in self.parts]
        launches = [Launch(_ALONE[type(part.step)], (part,)) for part in self.parts]
        last_reader = {value: i for i, launch in enumerate(launches) for value in launch.reads}
        self.launches = [
            replace(launch, frees=tuple(v for v in launch.reads if last_reader[v] == i and v != self.result))
            for i, launch in enumerate(launches)
        ]
        self.scale_shifts = BatchNorms([part for part in self.parts if isinstance(part.step, ConvStep)])

    def is_of(self, wirings: Sequence[Wiring]) -> bool:
        """Whether these are the modules, with the settings, that it was made for."""
        return (
            len(wirings) == len(self.wirings)
            and all(a is b for a, b in zip(wirings, self.wirings))
            and [_settings(part) for part in self.parts] == self.settings
        )

    def run(self, x: Tensor, backend: str) -> Tensor:
        """x: channels_last, in the dtype of the convolutions."""
        vectors = self.scale_shifts.read(backend)
        values = {0: x}
        del x
        for launch in self.launches:
            launch.run(launch.parts, values, vectors, backend)
            # Dead values go at once: peak memory is eager's.
            for dead in launch.frees:
                del values[dead]
        return values[self.result]


def run_traced(recipe: Recipe, wiring: Wiring, x: Tensor, backend: str) -> Tensor:
    """Runs a recipe step by step, without a plan: what torch.compile can look through."""
    values = {0: x}
    for part in map(Part._make, wiring.steps):
        vectors = {}
        if isinstance(part.step, ConvStep):
            vectors[part.step.out] = scale_shift(part.child, part.bn)
        _ALONE[type(part.step)]((part,), values, vectors, backend)
    return values[recipe.result]


def parts_of(wirings: Sequence[Wiring], recipes: Sequence[Recipe]) -> tuple[list[Part], int]:
    """The steps of blocks that follow each other, with values numbered through, and the number of the last one's output."""
    parts, number, made = [], {}, 0
    result = 0
    for wiring, recipe in zip(wirings, recipes):
        number = {0: result}
        for step, child, bn in wiring.steps:
            made += 1
            number[step.out] = made
            if isinstance(step, CallStep):
                step = replace(step, inputs=tuple(number[i] for i in step.inputs), out=made)
            else:
                residual = None if step.residual is None else number[step.residual]
                step = replace(step, x=number[step.x], residual=residual, out=made)
            parts.append(Part(step, child, bn))
        result = number[recipe.result]
    return parts, result


class BatchNorms:
    """The BNs behind convolutions as scales and shifts, read from the live tensors in each call."""

    def __init__(self, parts: list[Part]):
        self._bare = [part for part in parts if part.bn is None]
        self._parts = [part for part in parts if part.bn is not None]
        self._layers = None

    def read(self, backend: str) -> ScaleShifts:
        found = {part.step.out: (None, part.child.bias) for part in self._bare}
        if self._parts:
            found.update(zip((part.step.out for part in self._parts), self._read(backend)))
        return found

    def _read(self, backend: str) -> list[tuple[Tensor, Tensor]]:
        vectors = [(*bn_tensors(part.bn), part.child.bias) for part in self._parts]
        eps = tuple(part.bn.eps for part in self._parts)
        # cuDNN's backend uses the kernel, too, where Triton is there: PyTorch takes six launches a layer.
        if dispatch.why_not("triton", vectors[0][2].device.type, torch.float32) is not None:
            return [scale_shift(part.child, part.bn) for part in self._parts]
        from .kernels import bn_scale_shift

        if self._layers is None or not self._layers.are(vectors, eps):
            self._layers = bn_scale_shift.Layers(vectors, eps) if bn_scale_shift.takes(vectors) else None
        return (
            [scale_shift(part.child, part.bn) for part in self._parts]
            if self._layers is None
            else self._layers.launch()
        )


def _settings(part: Part) -> tuple:
    """What a plan rests on besides modules and shapes."""
    conv = part.child if isinstance(part.step, ConvStep) else None
    geometry = None if conv is None else (conv.stride, conv.padding, conv.dilation, conv.groups, conv.weight.shape)
    return geometry, None if part.bn is None else part.bn.eps


def out_channels(recipe: Recipe, wiring: Wiring) -> int | None:
    """Of a recipe's result, where a convolution makes it; None elsewhere."""
    step, conv, _ = next(entry for entry in wiring.steps if entry[0].out == recipe.result)
    return conv.out_channels if isinstance(step, ConvStep) else None
