"""Running steps on a GPU: those of one block, or of several that follow each other, cut into launches.

Steps and live modules go in, and a plan comes out: which steps share a launch (multi_layer.py), in which form each convolution
runs (forms.py), in which order, and what is dead after each. It holds for one shape of the input, and is made anew when the
shape, a module or a setting of one is another. Before the first launch all BNs become scales and shifts, and part of the
weights get their scale, from the live tensors (constants.py); of frozen modules that is done once (frozen_constants.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...graph.recipe import CallStep, ConvStep, NormStep, Recipe
from ...kernels.geometry import Geometry
from ...kernels.operands import ConvOperands
from ...ops import cudnn
from .. import other_steps, profiler_ranges
from ..bn import scale_shift
from ..live_modules import Wiring
from ..normalize_images import Normalize
from ..state import FusedState
from . import forms, multi_layer
from .constants import Constants, LiveConstants
from .forms import Form
from .frozen_constants import FrozenConstants
from .multi_layer import Link, Stem, window_of
from .parts import Part

Values = dict[int, Tensor]
# By the number of the value that a convolution, or a BN in a link, makes.
AllConstants = dict[int, Constants]


@dataclass(frozen=True)
class Launch:
    """A step, or a link of several. run: adds the values that they make. frees: those that nobody needs afterwards."""

    run: Callable[[Any, Values, AllConstants, str], None]
    what: Part | Link | Stem
    frees: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.what,) if isinstance(self.what, Part) else self.what.parts

    @property
    def reads(self) -> set[int]:
        return {value for part in self.parts for value in part.reads} - {part.step.out for part in self.parts}


def convolve(part: Part, values: Values, constants: AllConstants, backend: str) -> None:
    """A convolution with its BN, residual and ReLU: ops.conv_bias_act."""
    step, conv = part.step, part.child
    x, (scale, shift, _) = values[step.x], constants[step.out]
    geometry = _geometry(part, x)
    residual = None if step.residual is None else values[step.residual]
    # A kernel reads a residual of the output's shape; eager's add broadcasts a smaller one.
    fits = residual is None or residual.shape == geometry.out_shape(x.shape, conv.weight.shape)
    y = torch.ops.resnet_kernels.conv_bias_act.default(
        x, _weight(part, x, constants), shift, residual if fits else None, scale, *geometry, step.relu and fits, backend
    )  # fmt: skip
    values[step.out] = y if fits else other_steps.add_broadcast(y, residual, step.relu)


def convolve_as(form: Form, part: Part, values: Values, constants: AllConstants, backend: str) -> None:
    """The same, in a form that was chosen beforehand: a candidate by its name, with no questions left."""
    step, x = part.step, values[part.step.x]
    (scale, shift, _), weight = constants[step.out], _weight(part, x, constants)
    residual = None if step.residual is None or form.broadcasts else values[step.residual]
    if form.bare:
        scale = shift = None
    if form.adds is None or form.folds:
        y = form.run(x, weight, shift, residual, scale)
    else:
        own_scale, own_shift, _ = constants[form.adds]
        operands = ConvOperands(x, weight, shift, residual, scale, form.geometry, step.relu)
        y = cudnn.conv_then_epilogue(operands, own_scale, own_shift)
    values[step.out] = other_steps.add_broadcast(y, values[step.residual], step.relu) if form.broadcasts else y


def normalise(part: Part, values: Values, constants: AllConstants, backend: str) -> None:
    """A BN that comes before its convolution: ops.batch_norm_act."""
    step = part.step
    residual = None if step.residual is None else values[step.residual]
    values[step.out] = other_steps.normalise(part.bn, values[step.x], residual, step.relu, backend)


def call(part: Part, values: Values, constants: AllConstants, backend: str) -> None:
    """A child module, an add or a ReLU."""
    step = part.step
    values[step.out] = other_steps.call(step, part.child, [values[i] for i in step.inputs], backend)


_ALONE = {ConvStep: convolve, NormStep: normalise, CallStep: call}


def merge(link: Link, values: Values, constants: AllConstants, backend: str) -> None:
    """A projection and the convolution that adds it: kernels/sm90/conv.py."""
    from ...kernels.sm90 import conv as kernel

    step, projection = link.conv3.step, link.shortcut.step
    x, x0 = values[step.x], values[projection.x]
    (scale, shift, _), (projection_scale, projection_shift, _) = constants[step.out], constants[projection.out]
    shortcut = kernel.Shortcut(
        x0, _weight(link.shortcut, x, constants), projection_shift, projection_scale, _geometry(link.shortcut, x0)
    )
    weight, geometry = _weight(link.conv3, x, constants), _geometry(link.conv3, x)
    operands = ConvOperands(x, weight, shift, None, scale, geometry, step.relu)
    values[step.out] = kernel.launch(operands, shortcut=shortcut)


def chain(link: Link, values: Values, constants: AllConstants, backend: str) -> None:
    """From a bottleneck's 3x3 into the next one's first 1x1: kernels/sm90/chain.py."""
    from ...kernels.sm90 import chain as kernel

    x = values[link.conv2.step.x]

    def layer(part: Part | None) -> kernel.Layer | None:
        if part is None:
            return None
        return kernel.Layer(_weight(part, x, constants), *constants[part.step.out][:2], part.step.relu)

    if link.shortcut is None:
        residual = values[link.conv3.step.residual]
    else:
        x0 = values[link.shortcut.step.x]
        residual = kernel.Shortcut(x0, layer(link.shortcut), _geometry(link.shortcut, x0))
    norm = None if link.norm is None else constants[link.norm.step.out][:2]
    y, z = kernel.launch(
        x, layer(link.conv2), _geometry(link.conv2, x), layer(link.conv3), residual, norm, layer(link.conv1)
    )
    values[link.conv3.step.out] = y
    if link.conv1 is not None:
        values[link.conv1.step.out] = z


def stem_and_pool(link: Stem, values: Values, constants: AllConstants, backend: str) -> None:
    """A network's first convolution and its max-pool: kernels/sm90/stem.py."""
    from ...kernels.sm90 import stem as kernel

    x = values[link.conv.step.x]
    values[link.pool.step.out] = kernel.launch(x, _weight(link.conv, x, constants), *constants[link.conv.step.out][:2])


def _weight(part: Part, x: Tensor, constants: AllConstants) -> Tensor:
    weight = constants[part.step.out].weight
    return part.child.weight.to(x.dtype) if weight is None else weight


def _geometry(part: Part, x: Tensor) -> Geometry:
    return Geometry.of_module(part.child, x.shape[2:])


def in_order(
    parts: Sequence[Part], chosen: dict[int, Link | Stem], in_form: dict[int, Form] | None = None
) -> list[Launch]:
    """Parts one by one, but for those of the links.

    Args:
        chosen: links, by each value that one of their parts makes.
        in_form: forms, by the value that a convolution makes; those without one run as the backend has it.
    """
    launches = []
    for part in parts:
        link, form = chosen.get(part.step.out), (in_form or {}).get(part.step.out)
        if form is not None:
            launches.append(Launch(partial(convolve_as, form), part))
        elif link is None:
            launches.append(Launch(_ALONE[type(part.step)], part))
        elif part.step.out == link.last.step.out:
            run = stem_and_pool if isinstance(link, Stem) else merge if link.conv2 is None else chain
            launches.append(Launch(run, link))
    return launches


class Plan:
    """Launches in the order in which they can run."""

    def __init__(
        self,
        wirings: Sequence[Wiring],
        recipes: Sequence[Recipe],
        states: Sequence[FusedState],
        x: Tensor,
        backend: str,
    ):
        self.wirings, self.dtype = wirings, x.dtype
        self.parts, self.result = parts_of(wirings, recipes, [state.path for state in states])
        self.settings = [_settings(part) for part in self.parts]
        chosen = multi_layer.choose(self.parts, self.result, x, backend)
        frozen = all(state.frozen for state in states)
        in_form = forms.choose(self.parts, self.result, chosen, x, backend, frozen)
        launches = in_order(self.parts, chosen, in_form)
        last_reader = {value: i for i, launch in enumerate(launches) for value in launch.reads}
        # With the name that profilers show.
        self.launches = [
            (
                " -> ".join(map(str, launch.parts)),
                replace(launch, frees=tuple(v for v in launch.reads if last_reader[v] == i and v != self.result)),
            )
            for i, launch in enumerate(launches)
        ]
        self.constants = LiveConstants(
            [
                part
                for part in self.parts
                if isinstance(part.step, ConvStep) or (isinstance(part.step, NormStep) and part.step.out in chosen)
            ],
            in_form,
            x.dtype,
        )
        if frozen:
            self.constants = FrozenConstants(self.constants, states, wirings, x.device)

    def is_of(self, wirings: Sequence[Wiring]) -> bool:
        """Whether these are the modules, with the settings, that it was made for."""
        return (
            len(wirings) == len(self.wirings)
            and all(a is b for a, b in zip(wirings, self.wirings))
            and [_settings(part) for part in self.parts] == self.settings
        )

    def run(self, x: Tensor, backend: str) -> Tensor:
        """x: channels_last, in the dtype of the convolutions."""
        constants = self.constants.read()
        values = {0: x}
        del x
        for _, launch in profiler_ranges.around(self.launches, ""):
            launch.run(launch.what, values, constants, backend)
            # Dead values go at once: peak memory is eager's.
            for dead in launch.frees:
                del values[dead]
        return values[self.result]

    def run_images(self, x: Tensor, normalize: Normalize | None) -> Tensor | None:
        """The same of images of any layout, still to be normalised, where all of it is a stem's launch; None elsewhere."""
        from ...kernels.sm90 import stem, stem_layout

        what = self.launches[0][1].what
        if len(self.launches) > 1 or not isinstance(what, Stem) or x.dtype not in stem_layout.IMAGE_DTYPES:
            return None
        scale, shift, weight = self.constants.read()[what.conv.step.out]
        weight = what.conv.child.weight.to(self.dtype) if weight is None else weight
        mean, std = (None, None) if normalize is None else (normalize.mean, normalize.std)
        for _ in profiler_ranges.around(self.launches, ""):
            return stem.launch(x, weight, scale, shift, mean, std)


def run_traced(recipe: Recipe, wiring: Wiring, x: Tensor, backend: str) -> Tensor:
    """Runs a recipe step by step, without a plan: what torch.compile can look through."""
    values = {0: x}
    for part in (Part(*entry) for entry in wiring.steps):
        constants = {}
        if isinstance(part.step, ConvStep):
            constants[part.step.out] = Constants(*scale_shift(part.child.bias, part.bn))
        _ALONE[type(part.step)](part, values, constants, backend)
    return values[recipe.result]


def parts_of(wirings: Sequence[Wiring], recipes: Sequence[Recipe], paths: Sequence[str]) -> tuple[list[Part], int]:
    """The steps of blocks that follow each other, with values numbered through, and the number of the last one's output."""
    parts, number, made = [], {}, 0
    result = 0
    for wiring, recipe, path in zip(wirings, recipes, paths):
        number = {0: result}
        for step, child, bn in wiring.steps:
            made += 1
            number[step.out] = made
            if isinstance(step, CallStep):
                step = replace(step, inputs=tuple(number[i] for i in step.inputs), out=made)
            else:
                residual = None if step.residual is None else number[step.residual]
                step = replace(step, x=number[step.x], residual=residual, out=made)
            parts.append(Part(step, child, bn, path))
        result = number[recipe.result]
    return parts, result


def _settings(part: Part) -> tuple:
    """What a plan rests on besides modules and shapes."""
    _, child, bn, _ = part
    own = None
    if isinstance(child, nn.Conv2d):
        own = child.stride, child.padding, child.dilation, child.groups, child.weight.shape
    elif type(child) is nn.MaxPool2d:
        own = *window_of(child), child.return_indices
    return own, None if bn is None else bn.eps


def out_channels(recipe: Recipe, wiring: Wiring) -> int | None:
    """Of a recipe's result, where a convolution makes it; None elsewhere."""
    step, conv, _ = next(entry for entry in wiring.steps if entry[0].out == recipe.result)
    return conv.out_channels if isinstance(step, ConvStep) else None
