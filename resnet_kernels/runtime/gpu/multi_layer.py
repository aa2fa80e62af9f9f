"""Links: steps that one launch could hold. They are a projection with the convolution that adds it, chains and stems.

Everything between two 3x3 convolutions of a bottleneck is pointwise, so a tile of pixels needs no neighbors:

    stem     conv1 + ReLU, max-pool
    merged   shortcut, conv3 + add + ReLU                          two products into one tile
    chain    conv2 -> [shortcut,] conv3 + add + ReLU [-> conv1]    the next block's conv1, its BN in front of it included

`find` looks for values with one reader and pointwise convolutions. `why_not` says whether a kernel can do a link: none knows
another activation than ReLU. `choose` also decides whether the link gains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ...graph import fusible
from ...graph.recipe import PReLUAt
from ...kernels import target
from ...kernels.activations import PRELU, RELU
from ...kernels.geometry import Geometry, plain_pair
from ...ops import backends, tuned_table
from ...ops.conv_problem import ConvProblem
from ..parts import CallPart, ConvPart, NormPart, Part, window_of

# A table's name for a link whose layers run one by one, as they do without a table.
APART = "apart"
# What a table's name ends in if the launch is one of kernels/sm90/specialized_*.py.
SPECIALIZED = " specialized"
# The parts of a link, in an order in which they can run.
ROLES = ("conv2", "shortcut", "conv3", "norm", "conv1")


@dataclass(frozen=True)
class Link:
    """Steps for one launch, by their role in a bottleneck.

    conv3: adds the residual. shortcut: makes the residual, if this launch does. conv2: makes conv3's input, if this launch
    does. norm, conv1: the next block's first layers, if they are in this launch. specialized: whether the kernel is the one
    whose warps are specialized.
    """

    conv3: ConvPart
    shortcut: ConvPart | None = None
    conv2: ConvPart | None = None
    norm: NormPart | None = None
    conv1: ConvPart | None = None
    specialized: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, in an order in which they can run."""
        return tuple(part for part in (getattr(self, role) for role in ROLES) if part is not None)

    @property
    def roles(self) -> str:
        """Roles of the link's parts, as in "conv2+conv3+conv1"."""
        return "+".join(role for role in ROLES if getattr(self, role) is not None)

    @property
    def name(self) -> str:
        """Name in a table: the roles, and which kernel."""
        return self.roles + (SPECIALIZED if self.specialized else "")

    @property
    def last(self) -> Part:
        """The part at whose position to launch: all inputs exist by then, and other launches may already read the sum."""
        return self.conv3


@dataclass(frozen=True)
class Stem:
    """Network's first convolution and the max-pool after it. specialized: as in Link."""

    conv: ConvPart
    pool: CallPart
    specialized: bool = False

    @property
    def window(self) -> tuple[Any, ...]:
        """The pool's window; see parts.window_of."""
        assert isinstance(self.pool.child, nn.MaxPool2d)
        return window_of(self.pool.child)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, in an order in which they can run."""
        return self.conv, self.pool

    @property
    def name(self) -> str:
        """Name in a table."""
        return "conv+pool" + (SPECIALIZED if self.specialized else "")

    @property
    def last(self) -> Part:
        """The part at whose position to launch."""
        return self.pool


_P = TypeVar("_P", ConvPart, NormPart)


def find(parts: Sequence[Part], result: int) -> Iterator[Sequence[Link | Stem]]:
    """The links around each convolution that adds a residual, and around each max-pool; the longest first.

    Args:
        parts: steps that follow each other, each value made by one of them.
        result: the number of the caller's value.
    """
    makers = {part.step.out: part for part in parts}
    readers = Counter(value for part in parts for value in part.step.inputs)
    readers[result] += 1

    def only(value: int, kind: type[_P]) -> _P | None:
        """The part that makes a value with one reader."""
        part = makers.get(value)
        return part if isinstance(part, kind) and readers[value] == 1 else None

    for pool in parts:
        if isinstance(pool, CallPart) and type(pool.child) is nn.MaxPool2d and not pool.child.return_indices:
            conv = only(pool.step.inputs[0], ConvPart)
            if conv and conv.step.activation == RELU and conv.step.residual is None:
                yield [Stem(conv, pool)]
    for conv3 in parts:
        if not isinstance(conv3, ConvPart) or conv3.step.residual is None:
            continue
        shortcut, conv2 = only(conv3.step.residual, ConvPart), only(conv3.step.x, ConvPart)
        if shortcut and (shortcut.step.activation is not None or shortcut.step.residual is not None):
            shortcut = None
        links: list[Link] = []
        if conv2 and conv2.step.residual is None and not _is_pointwise(conv2) and _is_pointwise(conv3):
            starts = [
                (norm, conv1)
                for conv1 in parts
                if isinstance(conv1, ConvPart) and conv1.step.residual is None and _is_pointwise(conv1)
                for norm in [only(conv1.step.x, NormPart)]
                if (norm or conv1).step.x == conv3.step.out
                if norm is None or (norm.step.activation == RELU and norm.step.residual is None)
            ]
            links += [Link(conv3, shortcut, conv2, *start) for start in starts[:1]]
            links.append(Link(conv3, shortcut, conv2))
        if shortcut:
            links.append(Link(conv3, shortcut))
        yield links


def choose(parts: list[Part], result: int, x: Tensor, backend: str) -> dict[int, Link | Stem]:
    """The links to launch, by each value that one of their steps makes.

    Args:
        parts: steps that follow each other.
        result: the number of the caller's value.
        x: the input of the first step.
        backend: "triton" takes the longest links that a kernel can do, "tuned" those that a table names, others none.
    """
    if backend not in ("triton", "tuned") or not takes_links(x.device):
        return {}
    shapes = shapes_of(parts, {0: x.shape}, x.dtype)
    chosen: dict[int, Link | Stem] = {}
    for around in find(parts, result):
        able = [link for link in around if all(part.step.out not in chosen for part in link.parts)]
        able = forms_of(able, shapes, x.dtype)
        if able and backend == "tuned":
            # The longest contains all the others. A table says which of them one launch does.
            name = tuned_table.choice(problem(able[0], shapes), x.shape[0], x.dtype, x.device, _is_known)
            able = [form for form in able if form.name == name]
        else:
            able = [form for form in able if not form.specialized]
        if able:
            chosen.update((part.step.out, able[0]) for part in able[0].parts)
    return chosen


def forms_of(links: Sequence[Link | Stem], shapes: dict[int, Sequence[int]], dtype: torch.dtype) -> list[Link | Stem]:
    """The links that a kernel can do, once for each that can: the specialized one comes behind the other."""
    forms: list[Link | Stem] = []
    for link in links:
        if why_not(link, shapes, dtype) is None:
            forms.append(link)
        if _why_not_specialized(link, shapes, dtype) is None:
            forms.append(replace(link, specialized=True))
    return forms


def _is_known(name: str, problem: LinkProblem | StemProblem, *where: object) -> bool:
    """Whether a table's answer names some of a link's layers, or none. `choose` asks what a kernel can do."""
    if isinstance(problem, StemProblem):
        return name == APART or name.removesuffix(SPECIALIZED) == "conv+pool"
    roles = [role for role, layer in zip(ROLES, problem) if layer]
    named = name.removesuffix(SPECIALIZED).split("+")
    return name == APART or ("conv3" in named and set(named) <= set(roles))


def takes_links(device: torch.device) -> bool:
    """Whether a device runs the kernels of links."""
    if backends.why_not_on("triton", device, torch.float16) is not None:
        return False
    return target.is_hopper(device)


class LinkProblem(NamedTuple):
    """The problem of a link. `str` is its key in a table."""

    conv2: ConvProblem | None
    shortcut: ConvProblem | None
    conv3: ConvProblem
    norm: bool
    conv1: ConvProblem | None

    def __str__(self) -> str:
        layers = (f"{role} {str(part).removeprefix('conv ')}" for role, part in zip(ROLES, self) if part)
        return "link " + "; ".join(layers).replace("norm True", "norm")


class StemProblem(NamedTuple):
    """The problem of a stem. `str` is its key in a table."""

    conv: ConvProblem
    window: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{str(self.conv).replace('conv', 'stem', 1)}; max-pool {' '.join(map(str, self.window))}"


def problem(link: Link | Stem, shapes: dict[int, Sequence[int]]) -> LinkProblem | StemProblem:
    """The problem of a link, to look up in a table. shapes: shapes of all values, by number."""

    def conv(part: ConvPart) -> ConvProblem:
        return conv_problem(part, shapes[part.step.x])

    def or_none(part: ConvPart | None) -> ConvProblem | None:
        return None if part is None else conv(part)

    if isinstance(link, Stem):
        return StemProblem(conv(link.conv), link.window)
    has_norm = link.norm is not None
    return LinkProblem(or_none(link.conv2), or_none(link.shortcut), conv(link.conv3), has_norm, or_none(link.conv1))


def conv_problem(part: ConvPart, x_shape: Sequence[int]) -> ConvProblem:
    """The problem of a convolution on an input of that shape."""
    _, c_in, in_h, in_w = x_shape
    c_out, c_in_group, kernel_h, kernel_w = part.conv.weight.shape
    has_bn = part.bn is not None
    return ConvProblem(
        c_in, in_h, in_w, (c_out, c_in_group, kernel_h, kernel_w), Geometry.of_module(part.conv, (in_h, in_w)),
        has_bn, has_bn or part.conv.bias is not None, part.step.residual is not None,
        PRELU if isinstance(part.step.activation, PReLUAt) else part.step.activation,
    )  # fmt: skip


def broadcasts(part: ConvPart, shapes: dict[int, Sequence[int]]) -> bool:
    """Whether a convolution and the residual that it adds, if it adds one, differ in shape."""
    x_shape, weight_shape, geometry = _conv_shape(part, shapes)
    residual = part.step.residual
    return residual is not None and tuple(shapes[residual]) != geometry.out_shape(x_shape, weight_shape)


def _conv_shape(part: ConvPart, shapes: dict[int, Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...], Geometry]:
    x_shape = tuple(shapes[part.step.x])
    return x_shape, tuple(part.conv.weight.shape), Geometry.of_module(part.conv, x_shape[2:])


def why_not(link: Link | Stem, shapes: dict[int, Sequence[int]], dtype: torch.dtype) -> str | None:
    """The reason why no kernel can do a link; None if one can."""
    from ...kernels.sm90 import chain_layout, conv_layout, stem_layout

    if (reason := _why_not_any(link, shapes)) is not None:
        return reason
    if isinstance(link, Stem):
        x_shape, weight_shape, geometry = _conv_shape(link.conv, shapes)
        return stem_layout.why_not(x_shape, dtype, weight_shape, geometry, link.window, dtype)
    projection = None if link.shortcut is None else _conv_shape(link.shortcut, shapes)
    if link.conv2 is None:
        assert projection is not None
        ConvShape = conv_layout.ConvShape
        return conv_layout.why_not_merged(ConvShape(*_conv_shape(link.conv3, shapes)), ConvShape(*projection), dtype)
    return chain_layout.why_not(*_chain_shapes(link, shapes, dtype, projection))


def _why_not_any(link: Link | Stem, shapes: dict[int, Sequence[int]]) -> str | None:
    """What keeps every kernel of links from one."""
    for part in link.parts:
        if part.step.activation not in (None, RELU):
            return f"runs ReLU alone, got {part.step.activation}"
    if isinstance(link, Link) and link.shortcut is None and broadcasts(link.conv3, shapes):
        return "the add broadcasts"
    return None


def _chain_shapes(
    link: Link,
    shapes: dict[int, Sequence[int]],
    dtype: torch.dtype,
    projection: tuple[tuple[int, ...], tuple[int, ...], Geometry] | None,
) -> tuple[Any, ...]:
    """The arguments of chain_layout.why_not for a link with a 3x3."""
    from ...kernels.sm90.chain_layout import ShortcutShape

    assert link.conv2 is not None
    return (
        *_conv_shape(link.conv2, shapes), tuple(link.conv3.conv.weight.shape), dtype,
        None if projection is None else ShortcutShape(*projection),
        None if link.conv1 is None else tuple(link.conv1.conv.weight.shape),
    )  # fmt: skip


def _why_not_specialized(link: Link | Stem, shapes: dict[int, Sequence[int]], dtype: torch.dtype) -> str | None:
    """The reason why no kernel of specialized warps can do a link; None if one can."""
    from ...kernels.sm90 import specialized_layout
    from ...kernels.sm90.conv_layout import ConvShape

    if not target.has_gluon():
        return "Triton has no Gluon"
    if isinstance(link, Stem):
        return why_not(link, shapes, dtype)
    if (reason := _why_not_any(link, shapes)) is not None:
        return reason
    projection = None if link.shortcut is None else _conv_shape(link.shortcut, shapes)
    if link.conv2 is None:
        assert projection is not None
        conv3 = ConvShape(*_conv_shape(link.conv3, shapes))
        return specialized_layout.why_not_merged(conv3, ConvShape(*projection), dtype)
    return specialized_layout.why_not_chain(*_chain_shapes(link, shapes, dtype, projection))


def shapes_of(
    parts: Sequence[Part], inputs: Mapping[int, Sequence[int]], dtype: torch.dtype
) -> dict[int, Sequence[int]]:
    """The shapes of all values by number, computed from the shapes of the inputs.

    Args:
        parts: steps that follow each other.
        inputs: the shapes of the values that no part makes.
        dtype: of the values.
    """
    found = dict(inputs)
    for part in parts:
        step = part.step
        if isinstance(part, ConvPart):
            x_shape, weight_shape, geometry = _conv_shape(part, found)
            found[step.out] = geometry.out_shape(x_shape, weight_shape)
            if part.step.residual is not None:  # which may be the larger of the two
                found[step.out] = tuple(torch.broadcast_shapes(found[step.out], found[part.step.residual]))
        elif isinstance(part, NormPart) or fusible.is_prelu(part.child):
            found[step.out] = found[part.step.inputs[0]]
        elif part.child is not None:
            found[step.out] = part.child(torch.empty(tuple(found[step.inputs[0]]), dtype=dtype, device="meta")).shape
        else:
            found[step.out] = torch.broadcast_shapes(*(found[i] for i in step.inputs))
    return found


def _is_pointwise(part: ConvPart) -> bool:
    conv = part.conv
    if tuple(conv.weight.shape[2:]) != (1, 1) or isinstance(conv.padding, str):
        return False
    return plain_pair(conv.stride) == (1, 1) and conv.groups == 1 and plain_pair(conv.padding) == (0, 0)
