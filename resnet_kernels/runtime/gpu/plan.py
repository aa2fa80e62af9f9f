"""A plan: the steps of one block, or of several in a row, as launches on a GPU.

A plan is made of steps with their live modules. It fixes which steps share a launch (multi_layer.py), the form of each
convolution (forms.py), the order, and the values that are dead after each launch. It holds for one shape of the input, until
a module or a setting changes. Before the first launch of a call all BNs become scales and shifts, and part of the weights get
their scale, from the live tensors (constants.py). For frozen modules that is done once (frozen_constants.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ...graph.recipe import Recipe
from ...kernels.geometry import Geometry
from ...kernels.operands import ConvOperands
from ...ops import cudnn
from .. import profiler_ranges, run_steps
from ..live_modules import LiveModules
from ..normalize_images import Normalize
from ..parts import CallPart, ConvPart, NormPart, Part, label, scale_shift, settings
from ..run_steps import Values
from ..state import FusedState
from . import forms, multi_layer
from .constants import Constants, LiveConstants
from .forms import Form
from .frozen_constants import FrozenConstants
from .multi_layer import Link, Stem

# Keys are the numbers of the values that a convolution, or a BN in a link, makes.
AllConstants = dict[int, Constants]


@dataclass(frozen=True)
class Launch:
    """Launch of a step, or of a link of several.

    parts: the step's part or the link's. run: computes their values and stores them. frees: values that are dead afterwards.
    """

    parts: tuple[Part, ...]
    run: Callable[[Values, AllConstants, str], None]
    frees: tuple[int, ...] = ()

    @property
    def reads(self) -> set[int]:
        """The values that the launch reads."""
        return {value for part in self.parts for value in part.step.inputs} - {part.step.out for part in self.parts}


def run_part(part: Part, values: Values, constants: AllConstants, backend: str) -> Tensor:
    """Runs one part with the op for its kind."""
    if isinstance(part, CallPart):
        return run_steps.call(part, values, backend)
    x, residual = values[part.step.x], run_steps.residual_of(part, values)
    if isinstance(part, NormPart):
        return run_steps.normalize(part.bn, x, residual, part.step.relu, backend)
    scale, shift, _ = constants[part.step.out]
    return run_steps.convolve(
        part.conv, x, _weight(part, x, constants), scale, shift, residual, part.step.relu, backend
    )  # fmt: skip


def _run_alone(part: Part, values: Values, constants: AllConstants, backend: str) -> None:
    values[part.step.out] = run_part(part, values, constants, backend)


def convolve_as(part: ConvPart, form: Form, values: Values, constants: AllConstants, backend: str) -> None:
    """Runs a convolution in the form that was chosen for it."""
    step, x = part.step, values[part.step.x]
    (scale, shift, _), weight = constants[step.out], _weight(part, x, constants)
    residual = run_steps.residual_of(part, values)
    inside = None if form.broadcasts else residual
    if form.bare:
        scale = shift = None
    if form.adds is None or form.folds:
        y = form.run(x, weight, shift, inside, scale)
    else:
        own_scale, own_shift, _ = constants[form.adds]
        operands = ConvOperands(x, weight, shift, inside, scale, form.geometry, step.relu)
        y = cudnn.conv_then_epilogue(operands, own_scale, own_shift)
    if form.broadcasts and residual is not None:
        y = run_steps.add(y, residual, step.relu, backend)
    values[step.out] = y


def merge(link: Link, values: Values, constants: AllConstants, backend: str) -> None:
    """Runs a projection and the convolution that adds it: kernels/sm90/conv.py."""
    from ...kernels.sm90 import conv as kernel

    assert link.shortcut is not None
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
    """Runs a bottleneck's 3x3 up to the next block's first 1x1: kernels/sm90/chain.py."""
    from ...kernels.sm90 import chain as kernel

    assert link.conv2 is not None and link.conv3.step.residual is not None
    x = values[link.conv2.step.x]

    def layer(part: ConvPart) -> kernel.Layer:
        return kernel.Layer(_weight(part, x, constants), *constants[part.step.out][:2], part.step.relu)

    residual: Tensor | kernel.Shortcut
    if link.shortcut is None:
        residual = values[link.conv3.step.residual]
    else:
        x0 = values[link.shortcut.step.x]
        residual = kernel.Shortcut(x0, layer(link.shortcut), _geometry(link.shortcut, x0))
    norm = None
    if link.norm is not None:
        norm_scale, norm_shift, _ = constants[link.norm.step.out]
        assert norm_scale is not None and norm_shift is not None
        norm = norm_scale, norm_shift
    conv1 = None if link.conv1 is None else layer(link.conv1)
    y, z = kernel.launch(x, layer(link.conv2), _geometry(link.conv2, x), layer(link.conv3), residual, norm, conv1)
    values[link.conv3.step.out] = y
    if link.conv1 is not None and z is not None:
        values[link.conv1.step.out] = z


def stem_and_pool(link: Stem, values: Values, constants: AllConstants, backend: str) -> None:
    """Runs a network's first convolution and its max-pool: kernels/sm90/stem.py."""
    from ...kernels.sm90 import stem as kernel

    x = values[link.conv.step.x]
    values[link.pool.step.out] = kernel.launch(x, _weight(link.conv, x, constants), *constants[link.conv.step.out][:2])


def _weight(part: ConvPart, x: Tensor, constants: AllConstants) -> Tensor:
    weight = constants[part.step.out].weight
    return part.conv.weight.to(x.dtype) if weight is None else weight


def _geometry(part: ConvPart, x: Tensor) -> Geometry:
    return Geometry.of_module(part.conv, x.shape[2:])


def in_order(
    parts: Sequence[Part], chosen: dict[int, Link | Stem], in_form: dict[int, Form] | None = None
) -> list[Launch]:
    """Returns a launch for each part, and one for each link's parts together.

    Args:
        parts: steps that follow each other.
        chosen: links, by each value that one of their parts makes.
        in_form: forms, by the value that a convolution makes. A convolution without one is left to the backend.
    """
    launches = []
    for part in parts:
        link, form = chosen.get(part.step.out), (in_form or {}).get(part.step.out)
        if form is not None and isinstance(part, ConvPart):
            launches.append(Launch((part,), partial(convolve_as, part, form)))
        elif link is None:
            launches.append(Launch((part,), partial(_run_alone, part)))
        elif part.step.out == link.last.step.out:
            launches.append(Launch(link.parts, _of_link(link)))
    return launches


def _of_link(link: Link | Stem) -> Callable[[Values, AllConstants, str], None]:
    if isinstance(link, Stem):
        return partial(stem_and_pool, link)
    return partial(merge if link.conv2 is None else chain, link)


class Plan:
    """Launches in the order in which they can run.

    Args:
        modules: modules of each block.
        recipes: recipe of each block.
        states: state of each block.
        x: the input of the first block, in the dtype of the convolutions.
        backend: the resolved backend.
    """

    def __init__(
        self,
        modules: Sequence[LiveModules],
        recipes: Sequence[Recipe],
        states: Sequence[FusedState[Any]],
        x: Tensor,
        backend: str,
    ):
        self._modules, self.dtype = modules, x.dtype
        self.parts, self.result = parts_of(modules, recipes, [state.path for state in states])
        self._settings = self._current_settings()
        chosen = multi_layer.choose(self.parts, self.result, x, backend)
        frozen = all(state.frozen for state in states)
        in_form = forms.choose(self.parts, self.result, chosen, x, backend, frozen)
        launches = in_order(self.parts, chosen, in_form)
        last_reader = {value: i for i, launch in enumerate(launches) for value in launch.reads}
        # Each with the name that profilers show.
        self.launches = [
            (
                " -> ".join(map(label, launch.parts)),
                replace(launch, frees=tuple(v for v in launch.reads if last_reader[v] == i and v != self.result)),
            )
            for i, launch in enumerate(launches)
        ]
        only = next(iter(chosen.values()), None) if len(launches) == 1 else None
        self._stem = only if isinstance(only, Stem) else None
        live = LiveConstants(
            [
                part
                for part in self.parts
                if isinstance(part, ConvPart) or (isinstance(part, NormPart) and part.step.out in chosen)
            ],
            in_form,
            x.dtype,
        )
        self.constants = FrozenConstants(live, states, modules, x.device) if frozen else live

    def is_of(self, modules: Sequence[LiveModules]) -> bool:
        """Whether the plan was made for these modules with their present settings."""
        return (
            len(modules) == len(self._modules)
            and all(a is b for a, b in zip(modules, self._modules))
            and self._current_settings() == self._settings
        )

    def _current_settings(self) -> list[tuple[Any, ...]]:
        return [
            (part.conv.weight.shape, *settings(part.conv, part.bn))
            if isinstance(part, ConvPart)
            else settings(part[1], part.bn if isinstance(part, NormPart) else None)
            for part in self.parts
        ]

    def run(self, x: Tensor, backend: str) -> Tensor:
        """Runs all launches on x, (N, C, H, W), channels_last, in the dtype of the convolutions."""
        constants = self.constants.read()
        values = {0: x}
        del x
        for _, launch in profiler_ranges.around(self.launches, ""):
            launch.run(values, constants, backend)
            # Dead values are freed at once, so that peak memory is eager's.
            for dead in launch.frees:
                del values[dead]
        return values[self.result]

    def run_images(self, x: Tensor, normalize: Normalize | None) -> Tensor | None:
        """Runs a stem on images of any layout, and normalizes them if asked to; None unless the plan is one stem's launch."""
        from ...kernels.sm90 import stem, stem_layout

        if self._stem is None or x.dtype not in stem_layout.IMAGE_DTYPES:
            return None
        conv = self._stem.conv
        scale, shift, weight = self.constants.read()[conv.step.out]
        weight = conv.conv.weight.to(self.dtype) if weight is None else weight
        mean, std = (None, None) if normalize is None else (normalize.mean, normalize.std)
        for _ in profiler_ranges.around(self.launches, ""):
            return stem.launch(x, weight, scale, shift, mean, std)
        return None


def run_traced(recipe: Recipe, modules: LiveModules, x: Tensor, backend: str) -> Tensor:
    """Runs a recipe step by step, without a plan, so that torch.compile can trace it."""

    def run(part: Part, values: Values) -> Tensor:
        constants = {}
        if isinstance(part, ConvPart):
            constants[part.step.out] = Constants(*scale_shift(part.conv.bias, part.bn))
        return run_part(part, values, constants, backend)

    return run_steps.run_steps(modules.parts, {0: x}, recipe.result, "", run)


def parts_of(modules: Sequence[LiveModules], recipes: Sequence[Recipe], paths: Sequence[str]) -> tuple[list[Part], int]:
    """The parts of blocks that follow each other, with values numbered through.

    Args:
        modules: modules of each block.
        recipes: recipe of each block.
        paths: path of each block, for profilers.

    Returns:
        The parts, and the number of the last block's output.
    """
    parts: list[Part] = []
    result = made = 0
    for live, recipe, path in zip(modules, recipes, paths):
        number = {0: result}
        for part in live.parts:
            made += 1
            number[part.step.out] = made
            if isinstance(part, CallPart):
                inputs = tuple(number[i] for i in part.step.inputs)
                parts.append(part._replace(step=replace(part.step, inputs=inputs, out=made), path=path))
                continue
            residual = None if part.step.residual is None else number[part.step.residual]
            step = replace(part.step, x=number[part.step.x], residual=residual, out=made)
            parts.append(part._replace(step=step, path=path))  # type: ignore[arg-type]  # replace keeps the step's class
        result = number[recipe.result]
    return parts, result


def out_channels(recipe: Recipe, modules: LiveModules) -> int | None:
    """Channels of a recipe's output; None unless a convolution made it."""
    part = next(part for part in modules.parts if part.step.out == recipe.result)
    return part.conv.out_channels if isinstance(part, ConvPart) else None
