"""Launches: how a step, or a link of several, is run on a GPU.

Each function reads its operands from the values and the constants of a plan, calls an op or one of Hopper's kernels, and
adds the values that it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

from torch import Tensor

from ...kernels.activations import RELU
from ...kernels.geometry import Geometry
from ...kernels.operands import ConvOperands
from ...ops import cudnn
from .. import run_steps
from ..parts import ConvPart, Part, last_of
from ..run_steps import Values
from .constants import Constants
from .forms import Form
from .multi_layer import Link, Stem

# By the number of the value that a convolution, or a BN in a link, makes.
AllConstants = dict[int, Constants]


@dataclass(frozen=True)
class Launch:
    """A step, or a link of several.

    parts: the step or the link's. run: computes their values and adds them. frees: the values that nobody needs afterwards.
    """

    parts: tuple[Part, ...]
    run: Callable[[Values, AllConstants, str], None]
    frees: tuple[int, ...] = ()

    @property
    def reads(self) -> set[int]:
        """The values that the launch reads."""
        return {value for part in self.parts for value in part.step.inputs} - {part.step.out for part in self.parts}


def run_part(part: Part, values: Values, constants: AllConstants, backend: str) -> Tensor:
    """One part on the op for its kind."""

    def convolve(part: ConvPart, x: Tensor, residual: Tensor | None) -> Tensor:
        scale, shift, _ = constants[part.step.out]
        weight = _weight(part, x, constants)
        return run_steps.convolve(part.conv, x, weight, scale, shift, residual, last_of(part), backend)

    return run_steps.run_part(part, values, backend, convolve)


def _run_alone(part: Part, values: Values, constants: AllConstants, backend: str) -> None:
    values[part.step.out] = run_part(part, values, constants, backend)


def convolve_as(part: ConvPart, form: Form, values: Values, constants: AllConstants, backend: str) -> None:
    """A convolution in a form that was chosen beforehand."""
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
        operands = ConvOperands(x, weight, shift, inside, scale, form.geometry, last_of(part))
        y = cudnn.conv_then_epilogue(operands, own_scale, own_shift)
    if form.broadcasts and residual is not None:
        y = run_steps.add(y, residual, last_of(part), backend)
    values[step.out] = y


def merge(link: Link, values: Values, constants: AllConstants, backend: str) -> None:
    """A projection and the convolution that adds it: kernels/sm90/conv.py, or specialized_conv.py."""
    from ...kernels.sm90 import conv as kernel

    assert link.shortcut is not None
    launch: Callable[..., Tensor] = kernel.launch
    if link.specialized:
        from ...kernels.sm90 import specialized_conv

        launch = specialized_conv.launch
    step, projection = link.conv3.step, link.shortcut.step
    x, x0 = values[step.x], values[projection.x]
    (scale, shift, _), (projection_scale, projection_shift, _) = constants[step.out], constants[projection.out]
    shortcut = kernel.Shortcut(
        x0, _weight(link.shortcut, x, constants), projection_shift, projection_scale, _geometry(link.shortcut, x0)
    )
    weight, geometry = _weight(link.conv3, x, constants), _geometry(link.conv3, x)
    operands = ConvOperands(x, weight, shift, None, scale, geometry, last_of(link.conv3))
    values[step.out] = launch(operands, shortcut=shortcut)


def chain(link: Link, values: Values, constants: AllConstants, backend: str) -> None:
    """From a bottleneck's 3x3 into the next one's first 1x1: kernels/sm90/chain.py, or specialized_chain.py."""
    from ...kernels.sm90 import chain as kernel

    assert link.conv2 is not None and link.conv3.step.residual is not None
    x = values[link.conv2.step.x]

    def layer(part: ConvPart) -> kernel.Layer:
        return kernel.Layer(_weight(part, x, constants), *constants[part.step.out][:2], part.step.activation == RELU)

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
    launch: Callable[..., tuple[Tensor, Tensor | None]] = kernel.launch
    if link.specialized:
        from ...kernels.sm90 import specialized_chain

        launch = specialized_chain.launch
    y, z = launch(x, layer(link.conv2), _geometry(link.conv2, x), layer(link.conv3), residual, norm, conv1)
    values[link.conv3.step.out] = y
    if link.conv1 is not None and z is not None:
        values[link.conv1.step.out] = z


def stem_and_pool(link: Stem, values: Values, constants: AllConstants, backend: str) -> None:
    """A network's first convolution and its max-pool: kernels/sm90/stem.py, or specialized_stem.py."""
    x = values[link.conv.step.x]
    launch = kernel_of(link).launch
    values[link.pool.step.out] = launch(x, _weight(link.conv, x, constants), *constants[link.conv.step.out][:2])


def kernel_of(link: Stem) -> ModuleType:
    """The module whose `launch` does a stem."""
    if link.specialized:
        from ...kernels.sm90 import specialized_stem

        return specialized_stem
    from ...kernels.sm90 import stem

    return stem


def _weight(part: ConvPart, x: Tensor, constants: AllConstants) -> Tensor:
    weight = constants[part.step.out].weight
    return part.conv.weight.to(x.dtype) if weight is None else weight


def _geometry(part: ConvPart, x: Tensor) -> Geometry:
    return Geometry.of_module(part.conv, x.shape[2:])


def in_order(
    parts: Sequence[Part], chosen: dict[int, Link | Stem], in_form: dict[int, Form] | None = None
) -> list[Launch]:
    """Parts one by one, but for those of the links.

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
