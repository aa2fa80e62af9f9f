"""Which steps one launch could hold: a projection with the convolution that adds it, and chains across blocks.

All that lies between two 3x3 convolutions of a bottleneck is pointwise, so a tile of pixels goes through without its neighbours:

    merged   shortcut, conv3 + add + ReLU                          two products into one tile
    chain    conv2 -> [shortcut,] conv3 + add + ReLU [-> conv1]    the next block's conv1, its BN in front of it included

This asks who reads a value and what is pointwise, not whether a kernel can do it or gains by it: launches.py does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .recipe import CallStep, ConvStep, NormStep


class Part(NamedTuple):
    """A step with its live modules. child: the convolution, or what a CallStep calls."""

    step: ConvStep | NormStep | CallStep
    child: nn.Module | None
    bn: nn.Module | None

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that it needs."""
        step = self.step
        return step.inputs if isinstance(step, CallStep) else tuple(v for v in (step.x, step.residual) if v is not None)


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
        return tuple(p for p in (self.conv2, self.shortcut, self.conv3, self.norm, self.conv1) if p is not None)


def find(parts: Sequence[Part], result: int) -> Iterator[list[Link]]:
    """For each convolution that adds a residual, the links around it, the longest first.

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
                if (norm or conv1).step.x == conv3.step.out and (norm is None or norm.step.residual is None)
            ]
            links += [Link(conv3, shortcut, conv2, *start) for start in starts[:1]]
            links.append(Link(conv3, shortcut, conv2))
        if shortcut:
            links.append(Link(conv3, shortcut))
        yield links


def _is_pointwise(part: Part) -> bool:
    conv = part.child
    return tuple(conv.kernel_size) == (1, 1) == tuple(conv.stride) and conv.groups == 1 and conv.padding in ((0, 0), 0)
