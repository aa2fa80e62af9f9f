"""A plan: the steps of one block, or of several in a row, as launches on a GPU.

A plan is made of steps with their live modules. It fixes which steps share a launch (multi_layer.py), the form of each
convolution (forms.py), the order, and the values that are dead after each launch. It holds for one shape of the input, until
a module or a setting changes. Before the first launch of a call all BNs become scales and shifts, and part of the weights get
their scale, from the live tensors (constants.py). For frozen modules that is done once (frozen_constants.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...graph.recipe import Recipe
from .. import profiler_ranges, run_steps
from ..live_modules import LiveModules
from ..normalize_images import Normalize
from ..parts import CallPart, ConvPart, NormPart, Part, label, scale_shift, settings
from ..run_steps import Values
from ..state import FusedState
from . import forms, multi_layer
from .constants import Constants, LiveConstants
from .frozen_constants import FrozenConstants
from .launches import in_order, kernel_of, run_part
from .multi_layer import Stem


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
        from ...kernels.sm90 import stem_layout

        if self._stem is None or x.dtype not in stem_layout.IMAGE_DTYPES:
            return None
        conv = self._stem.conv
        scale, shift, weight = self.constants.read()[conv.step.out]
        weight = conv.conv.weight.to(self.dtype) if weight is None else weight
        mean, std = (None, None) if normalize is None else (normalize.mean, normalize.std)
        for _ in profiler_ranges.around(self.launches, ""):
            return kernel_of(self._stem).launch(x, weight, scale, shift, mean, std)
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
    return part.conv.weight.shape[0] if isinstance(part, ConvPart) else None
