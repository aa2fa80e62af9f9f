"""Which steps one launch could hold: a projection with the convolution that adds it, and chains across blocks.

All that lies between two 3x3 convolutions of a bottleneck is pointwise, so a tile of pixels needs no neighbours:

    stem     conv1 + ReLU, max-pool
    merged   shortcut, conv3 + add + ReLU                          two products into one tile
    chain    conv2 -> [shortcut,] conv3 + add + ReLU [-> conv1]    the next block's conv1, its BN in front of it included

`find` asks who reads a value and what is pointwise, `why_not` whether a kernel can do it, `choose` also whether it gains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...graph.recipe import ConvStep, NormStep
from ...kernels import target
from ...kernels.geometry import Geometry
from ...ops import backends, tuned_table
from ...ops.conv_candidates import ConvProblem
from .parts import Part

# A link's layers run one by one: what happens without a table.
APART = "apart"
# In an order in which they can run.
ROLES = ("conv2", "shortcut", "conv3", "norm", "conv1")


@dataclass(frozen=True)
class Link:
    """Steps for one launch, by what they are in a bottleneck.

    conv3: adds the residual. shortcut: the convolution that makes it, if this launch does. conv2: what conv3 reads, if this
    launch makes that. norm, conv1: the next block's first, if they are in it.
    """

    conv3: Part
    shortcut: Part | None = None
    conv2: Part | None = None
    norm: Part | None = None
    conv1: Part | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """In an order in which they can run."""
        return tuple(part for part in (getattr(self, role) for role in ROLES) if part is not None)

    @property
    def roles(self) -> str:
        """Which it has, as in "conv2+conv3+conv1"."""
        return "+".join(role for role in ROLES if getattr(self, role) is not None)

    @property
    def last(self) -> Part:
        """In whose place it is launched: what it reads is there, and the sum may be read before norm's and conv1's turn."""
        return self.conv3


@dataclass(frozen=True)
class Stem:
    """A network's first convolution and the max-pool behind it."""

    conv: Part
    pool: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.conv, self.pool

    @property
    def roles(self) -> str:
        return "conv+pool"

    @property
    def last(self) -> Part:
        return self.pool


def window_of(pool: nn.MaxPool2d) -> tuple:
    """Kernel size, stride, padding, dilation and ceil_mode, each an int or a pair."""
    return pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode


def find(parts: Sequence[Part], result: int) -> Iterator[list[Link | Stem]]:
    """The links around each convolution that adds a residual, and around each max-pool; the longest first.

    Args:
        parts: steps that follow each other, each value made by one of them.
        result: the value that the caller gets.
    """
    makers = {part.step.out: part for part in parts}
    readers = Counter(value for part in parts for value in part.reads)
    readers[result] += 1

    def only(value: int, kind: type) -> Part | None:
        """What makes a value that nobody else reads."""
        part = makers.get(value)
        return part if part is not None and isinstance(part.step, kind) and readers[value] == 1 else None

    for pool in parts:
        if type(pool.child) is nn.MaxPool2d and not pool.child.return_indices:
            conv = only(pool.step.inputs[0], ConvStep)
            if conv and conv.step.relu and conv.step.residual is None:
                yield [Stem(conv, pool)]
    for conv3 in parts:
        if not isinstance(conv3.step, ConvStep) or conv3.step.residual is None:
            continue
        shortcut, conv2 = only(conv3.step.residual, ConvStep), only(conv3.step.x, ConvStep)
        if shortcut and (shortcut.step.relu or shortcut.step.residual is not None):
            shortcut = None
        links = []
        if conv2 and conv2.step.residual is None and not _is_pointwise(conv2) and _is_pointwise(conv3):
            starts = [
                (norm, conv1)
                for conv1 in parts
                if isinstance(conv1.step, ConvStep) and conv1.step.residual is None and _is_pointwise(conv1)
                for norm in [only(conv1.step.x, NormStep)]
                if (norm or conv1).step.x == conv3.step.out
                if norm is None or (norm.step.relu and norm.step.residual is None)
            ]
            links += [Link(conv3, shortcut, conv2, *start) for start in starts[:1]]
            links.append(Link(conv3, shortcut, conv2))
        if shortcut:
            links.append(Link(conv3, shortcut))
        yield links


def choose(parts: list[Part], result: int, x: Tensor, backend: str) -> dict[int, Link | Stem]:
    """The links to launch, by each value that one of their steps makes.

    backend: "triton" takes the longest that a kernel can do, "tuned" what a table says, the others none.
    """
    if backend not in ("triton", "tuned") or not takes_links(x.device):
        return {}
    shapes = shapes_of(parts, {0: x.shape}, x.dtype)
    chosen: dict[int, Link | Stem] = {}
    for around in find(parts, result):
        able = [link for link in around if all(part.step.out not in chosen for part in link.parts)]
        able = [link for link in able if why_not(link, shapes, x.dtype) is None]
        if able and backend == "tuned":
            # The longest of them holds all the others: how much of it is to be one launch?
            name = tuned_table.choice(problem(able[0], shapes), x.shape[0], x.dtype, x.device, _is_known)
            able = [link for link in able if link.roles == name]
        if able:
            chosen.update((part.step.out, able[0]) for part in able[0].parts)
    return chosen


def _is_known(name: str, problem: LinkProblem | StemProblem, *where: object) -> bool:
    """Whether a table's answer is a name for some of a link's layers, or for none. `choose` asks what a kernel can do."""
    if isinstance(problem, StemProblem):
        return name in (APART, "conv+pool")
    roles = [role for role, layer in zip(ROLES, problem) if layer]
    return name == APART or ("conv3" in name.split("+") and set(name.split("+")) <= set(roles))


def takes_links(device: torch.device) -> bool:
    """Whether a device runs the kernels of links."""
    if backends.why_not_on("triton", device, torch.float16) is not None:
        return False
    return target.is_hopper(device)


class LinkProblem(NamedTuple):
    """What a table knows a link by. `str` is the key."""

    conv2: ConvProblem | None
    shortcut: ConvProblem | None
    conv3: ConvProblem
    norm: bool
    conv1: ConvProblem | None

    def __str__(self) -> str:
        layers = (f"{role} {str(part).removeprefix('conv ')}" for role, part in zip(ROLES, self) if part)
        return "link " + "; ".join(layers).replace("norm True", "norm")


class StemProblem(NamedTuple):
    """What a table knows a stem by. `str` is the key."""

    conv: ConvProblem
    window: tuple

    def __str__(self) -> str:
        return f"{str(self.conv).replace('conv', 'stem', 1)}; max-pool {' '.join(map(str, self.window))}"


def problem(link: Link | Stem, shapes: dict[int, Sequence[int]]) -> LinkProblem | StemProblem:
    """The question to a table."""

    def conv(part: Part | None) -> ConvProblem | None:
        return None if part is None else conv_problem(part, shapes[part.step.x])

    if isinstance(link, Stem):
        return StemProblem(conv(link.conv), window_of(link.pool.child))
    return LinkProblem(conv(link.conv2), conv(link.shortcut), conv(link.conv3), link.norm is not None, conv(link.conv1))


def conv_problem(part: Part, x_shape: Sequence[int]) -> ConvProblem:
    """What a table knows a convolution by, on an input of that shape."""
    geometry = Geometry.of_module(part.child, tuple(x_shape[2:]))
    has_residual, has_bn = part.step.residual is not None, part.bn is not None
    has_bias = has_bn or part.child.bias is not None
    return ConvProblem(
        *x_shape[1:], tuple(part.child.weight.shape), geometry, has_bn, has_bias, has_residual, part.step.relu
    )


def broadcasts(part: Part, shapes: dict[int, Sequence[int]]) -> bool:
    """Whether a convolution and the residual that it adds, if it adds one, differ in shape."""
    x_shape, weight_shape, geometry = _conv_shape(part, shapes)
    residual = part.step.residual
    return residual is not None and tuple(shapes[residual]) != geometry.out_shape(x_shape, weight_shape)


def _conv_shape(part: Part, shapes: dict[int, Sequence[int]]) -> tuple[tuple, tuple, Geometry]:
    x_shape = tuple(shapes[part.step.x])
    return x_shape, tuple(part.child.weight.shape), Geometry.of_module(part.child, x_shape[2:])


def why_not(link: Link | Stem, shapes: dict[int, Sequence[int]], dtype: torch.dtype) -> str | None:
    """What keeps a link from its kernel."""
    from ...kernels.sm90 import chain_layout, conv_layout, stem_layout

    if isinstance(link, Stem):
        x_shape, weight_shape, geometry = _conv_shape(link.conv, shapes)
        return stem_layout.why_not(x_shape, dtype, weight_shape, geometry, window_of(link.pool.child), dtype)
    if link.shortcut is None and broadcasts(link.conv3, shapes):
        return "the add broadcasts"

    def conv_shape(part: Part) -> tuple:
        return _conv_shape(part, shapes)

    if link.conv2 is None:
        ConvShape = conv_layout.ConvShape
        return conv_layout.why_not_merged(
            ConvShape(*conv_shape(link.conv3)), ConvShape(*conv_shape(link.shortcut)), dtype
        )
    conv2, shortcut = conv_shape(link.conv2), None
    if link.shortcut is not None:
        shortcut = chain_layout.ShortcutShape(*conv_shape(link.shortcut))
    return chain_layout.why_not(
        *conv2, tuple(link.conv3.child.weight.shape), dtype, shortcut,
        None if link.conv1 is None else tuple(link.conv1.child.weight.shape),
    )  # fmt: skip


def shapes_of(parts: Sequence[Part], inputs: dict[int, Sequence[int]], dtype: torch.dtype) -> dict[int, Sequence[int]]:
    """Of each value by its number, from those that no part makes."""
    found = dict(inputs)
    for step, child, *_ in parts:
        if isinstance(step, ConvStep):
            geometry = Geometry.of_module(child, found[step.x][2:])
            found[step.out] = geometry.out_shape(found[step.x], child.weight.shape)
            if step.residual is not None:  # which may be the larger of the two
                found[step.out] = tuple(torch.broadcast_shapes(found[step.out], found[step.residual]))
        elif isinstance(step, NormStep):
            found[step.out] = found[step.x]
        elif step.is_module:
            found[step.out] = child(torch.empty(found[step.inputs[0]], dtype=dtype, device="meta")).shape
        else:
            found[step.out] = torch.broadcast_shapes(*(found[i] for i in step.inputs))
    return found


def _is_pointwise(part: Part) -> bool:
    conv = part.child
    return tuple(conv.kernel_size) == (1, 1) == tuple(conv.stride) and conv.groups == 1 and conv.padding in ((0, 0), 0)
