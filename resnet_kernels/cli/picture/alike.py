"""A report's rows as a picture shows them: stages of blocks, in which blocks that follow each other and are alike are one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ...fusion.report import Row

ARROW, PLUS = " -> ", "+"


@dataclass(frozen=True)
class Group:
    """Blocks that follow each other and are alike: the same kernels, or the same reason for having none.

    Args:
        paths: the blocks' paths, in the report's order.
        rows: the rows of each block. Their steps are relative to its path.
    """

    paths: tuple[str, ...]
    rows: tuple[tuple[Row, ...], ...]


def stages(rows: Iterable[Row]) -> list[tuple[str, list[Group]]]:
    """Returns the stages of a network in the report's order: the first name of their blocks' paths, and the blocks."""
    named = groupby(rows, key=lambda row: row.path.split(".")[0])
    return [(name, [*_groups(stage)]) for name, stage in named]


def _groups(rows: Iterable[Row]) -> Iterator[Group]:
    below = [row for _, block in groupby(rows, key=_path) for row in _below([*block])]
    blocks = [(path, tuple(block)) for path, block in groupby(below, key=_path)]
    for _, alike in groupby(blocks, key=_likeness):
        paths, of_each = zip(*alike)
        yield Group(paths, of_each)


def _path(row: Row) -> str:
    return row.path


def _likeness(block: tuple[str, tuple[Row, ...]]) -> Any:
    path, rows = block
    return path.rpartition(".")[0] if path else None, tuple(replace(row, path="") for row in rows)


def _below(block: list[Row]) -> list[Row]:
    """The rows of one path. Where the steps of each are all in one child of it, the child becomes a part of the path.

    DenseNet's blocks run their layers themselves: "denselayer1.norm1+relu -> denselayer1.conv1" is shown as denselayer1's.
    """
    children = [_only_child(row) for row in block]
    # The model's own runs stay in its frame, under its name.
    if "" in (*children, block[0].path):
        return block
    return [
        replace(row, path=f"{row.path}.{child}", steps=_inside(child, row.steps)) for row, child in zip(block, children)
    ]


def _only_child(row: Row) -> str:
    """The child that all steps of a row are in; "" if there are several, or none."""
    child = row.steps.partition(".")[0]
    # A name without a dot is a child, or an operation behind one, such as relu.
    steps = [step.split(PLUS) for step in row.steps.split(ARROW)]
    inside = all(
        names[0].startswith(f"{child}.") and all(name.startswith(f"{child}.") for name in names if "." in name)
        for names in steps
    )
    return child if inside else ""


def _inside(child: str, steps: str) -> str:
    named = ([name.removeprefix(f"{child}.") for name in step.split(PLUS)] for step in steps.split(ARROW))
    return ARROW.join(map(PLUS.join, named))
