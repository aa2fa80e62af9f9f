"""Which convolutions our CPU kernels take, and how one is cut into tasks for several threads.

A task is a block of pixels (tiles, rows) times some panels of output channels. Threads take tasks from one counter, so small
ones balance well, and large ones read weights and transform x less often: `plan_for` counts both in steps of the micro-kernel.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..geometry import Geometry
from . import library
from .library import Library, Missing

KERNELS = ("winograd", "direct", "grouped", "depthwise")

# Plans kept: a net has some 25 layers that differ, times a few sizes of batch and image.
_CACHED = 4096
# The largest share of a thread over the mean that a plan may have.
_MOST_UNEVEN = 1.25
# Share of a task for which threads wait for the last one, on average.
_WAITING = 0.25
# Fewer channels than this are copied into runs of a kernel's row: a tap alone would be shorter than a loop's overhead.
_FEW_CHANNELS = 16
# Pixels that `depthwise` computes at once.
_PIXELS = 8
# Most taps that are added up in one chain (convolution.h, SUM_BLOCK).
_SUM_BLOCK = 256


class Pool(NamedTuple):
    """A max-pool of square windows behind a convolution.

    Attributes:
        kernel: size of a window.
        stride: of both axes.
        padding: (top, bottom, left, right), in pixels.
    """

    kernel: int
    stride: int
    padding: tuple[int, int, int, int]

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns (h, w) of the pooled image."""
        top, bottom, left, right = self.padding
        return (
            (height + top + bottom - self.kernel) // self.stride + 1,
            (width + left + right - self.kernel) // self.stride + 1,
        )


class Shapes(NamedTuple):
    """A convolution without its tensors.

    Attributes:
        x: (N, C_in, H, W).
        weight: (C_out, C_in / groups, kernel_h, kernel_w).
        geometry: of the convolution.
        copies: whether rows of x are copied before they are read: x is not channels_last, or is activated on the way to
            `direct`, or has few channels, or there are groups.
        pool: behind the convolution.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry
    copies: bool = False
    pool: Pool | None = None

    @property
    def out(self) -> tuple[int, int, int, int]:
        """The shape of the convolution's output, before a pool."""
        return self.geometry.out_shape(self.x, self.weight)


class Plan(NamedTuple):
    """How a convolution is cut into tasks.

    Attributes:
        block: pixels, Winograd's tiles, or rows of a task.
        panels: panels of output channels of a task.
        tasks: their number.
        cost: of the busiest thread, in steps of the micro-kernel: `rows` x `panel` products each.
        unevenness: the largest share of a thread over the mean.
    """

    block: int
    panels: int
    tasks: int
    cost: float
    unevenness: float


def why_not(name: str, shapes: Shapes, dtype: torch.dtype, threads: int) -> str | None:
    """Returns why a kernel can't run a convolution, as the end of a sentence; None if it can.

    Args:
        name: of `KERNELS`.
        shapes: of the convolution.
        dtype: of x.
        threads: that PyTorch's operations would use.
    """
    found = library.find()
    if isinstance(found, Missing):
        return f"needs our compiled CPU kernels: {found.reason}"
    if dtype != torch.float32:
        return f"runs float32, got {dtype}"
    stride, _, dilation, groups = shapes.geometry
    if (name in ("grouped", "depthwise")) != (groups != 1):
        return f"runs convolutions {'without' if groups != 1 else 'with'} groups, got groups={groups}"
    if min(*shapes.x, *shapes.weight, *shapes.out) < 1:
        return f"needs sizes of at least 1, got {shapes.x} and {shapes.weight}"
    if name == "winograd" and (shapes.weight[2:], stride, dilation) != ((3, 3), (1, 1), (1, 1)):
        return "runs 3x3 convolutions of stride and dilation 1"
    if name == "winograd" and (shapes.copies or shapes.pool):
        return "reads channels_last images, and has no pool behind it"
    if name == "grouped" and (reason := _why_not_grouped(shapes, found)) is not None:
        return reason
    if name == "depthwise" and (reason := _why_not_depthwise(shapes)) is not None:
        return reason
    if threads > 1 and found.parallel is None:
        return f"found no OpenMP runtime of PyTorch's to run {threads} threads on"
    plan = plan_for(name, shapes, threads)
    if plan.unevenness > _MOST_UNEVEN and plan.cost > _COSTS_OF.get(found.isa, _COSTS).alone:
        return f"has too few tasks for {threads} threads: the busiest gets {plan.unevenness:.2f} times the mean"
    return None


def _why_not_grouped(shapes: Shapes, found: Library) -> str | None:
    c_out, width, kernel_h, kernel_w = shapes.weight
    vector, groups = found.panel // 2, shapes.geometry.groups
    if shapes.x[1] != width * groups or c_out % groups:
        return f"got {shapes.x} and {shapes.weight} for {groups} groups"
    out = c_out // groups
    is_wide = out % found.panel == 0 and width >= vector
    if not is_wide and (width != out or width == 1 or width > vector or vector % width):
        return (
            f"runs groups of 2, 4, ... {vector} channels, or of {vector} at least to a multiple of {found.panel}, got {width} "
            f"to {out}"
        )
    if width < vector and kernel_h * kernel_w > _SUM_BLOCK:
        return f"adds up at most {_SUM_BLOCK} taps of such narrow groups, got {kernel_h}x{kernel_w}"
    if shapes.pool or not shapes.copies:
        return "copies rows, and has no pool behind it"
    return None


def _why_not_depthwise(shapes: Shapes) -> str | None:
    c_out, width, kernel_h, kernel_w = shapes.weight
    if (width, c_out) != (1, shapes.geometry.groups) or shapes.x[1] != c_out:
        return f"runs groups of one channel, got {shapes.x} and {shapes.weight} in {shapes.geometry.groups} groups"
    if kernel_h * kernel_w > _SUM_BLOCK:
        return f"adds up at most {_SUM_BLOCK} taps, got {kernel_h}x{kernel_w}"
    if shapes.pool or shapes.copies:
        return "reads channels_last images, and has no pool behind it"
    return None


def panels_together(shapes: Shapes, panel: int) -> int:
    """Returns how many panels of output channels read the same channels of a group; 1 without groups."""
    groups = shapes.geometry.groups
    return 1 if groups == 1 else max(1, shapes.weight[0] // groups // panel)


@functools.lru_cache(_CACHED)
def plan_for(name: str, shapes: Shapes, threads: int) -> Plan:
    """Returns the tasks of a convolution: those whose busiest thread has the least to do."""
    found = library.find()
    assert isinstance(found, Library), "why_not has seen the library"
    panels = -(-shapes.weight[0] // found.panel)
    together = panels_together(shapes, found.panel)
    splits = sorted({min(panels, together * 2**i) for i in range(8)} | {panels})
    plans = []
    for block in _blocks(name, shapes, found.rows):
        for each in [panels] if shapes.pool else splits:
            cost, cost_of_all, tasks = _cost(name, shapes, found, block, each)
            share = cost * -(-tasks // threads)
            # Threads that are not equally fast wait for a part of the last task, so smaller ones are worth something.
            waiting = 0.0 if threads == 1 else _WAITING * cost
            # In front of a pool there are few tasks, all alike, so the busiest thread has whole ones.
            busiest = share if shapes.pool else max(cost, cost_of_all / threads)
            plans.append(Plan(block, each, tasks, busiest + waiting, share * threads / cost_of_all))
    return min(plans, key=lambda plan: (plan.unevenness > _MOST_UNEVEN, plan.cost))


def _blocks(name: str, shapes: Shapes, rows: int) -> list[int]:
    """Sizes of a task, in its unit."""
    n, _, out_h, out_w = shapes.out
    if shapes.pool:
        return [*range(1, min(8, shapes.pool.out_size(out_h, out_w)[0]) + 1)]
    if shapes.copies or name == "depthwise":
        return [*range(1, min(16, out_h) + 1)]
    units = n * -(-out_h // 2) * -(-out_w // 2) if name == "winograd" else n * out_h * out_w
    sizes = [rows * i for i in ((1, 2, 4, 8, 16) if name == "winograd" else (1, 2, 4, 8, 16, 32))]
    # Few units are cut evenly: 49 pixels in two blocks are 25 and 24.
    even = [-(-units // parts) for parts in range(1, 9) if units // parts <= sizes[-1]]
    return sorted({min(size, units) for size in (*sizes, *even)})


class _Costs(NamedTuple):
    """What tasks cost on an instruction set, in steps of the micro-kernel.

    Of the cuts that were measured for 36 layers AVX2's choose one that takes 6% longer than the best on average (AMD EPYC,
    two cores, 2026-11).

    Attributes:
        weights: a panel's weights on their way from the L2 cache or beyond, for each k.
        transform_in: of a channel of a tile. transform_out: of a panel of a tile, back.
        pointers: of a pixel's taps, each k.
        copies: a pixel of a panel to the copy for `grouped`. ends: of its sums for a pixel of a panel.
        depthwise: what a pixel of a panel takes there beside its taps, in products of a panel. turns: of pixels that are
            computed at once there, whatever the panels.
        l2: bytes of a thread's tiles and products that stay in the L2 cache.
        bytes: from beyond it in the time of a step.
        whole_steps: whether fewer rows than the micro-kernel has take as long as all; else half of them at least.
        alone: steps that one thread is done with, some 8 us, before another operation would have begun.
    """

    weights: float
    transform_in: float
    transform_out: float
    pointers: float
    copies: float
    ends: float
    depthwise: float
    turns: float
    l2: int
    bytes: int
    whole_steps: bool
    alone: int


_COSTS = _Costs(1.0, 0.8, 10.0, 1 / 16, 0.9, 1.0, 13.0, 8.0, 200_000, 24, True, 4000)
# A step is four times AVX2's on processors that run AVX-512 at half width. Of the cuts that were measured for 14 layers at
# batch 1 and 8 it chooses one that takes 5% longer than the best on average. What lies beyond the L2 cache costs half as much
# since it is in large pages: that, and the cache's size, were chosen by whole networks (AMD EPYC, Zen 4, two cores, 2026-11).
_COSTS_OF = {"avx512": _Costs(0.35, 0.5, 6.0, 1 / 64, 0.4, 0.4, 8.0, 2.0, 420_000, 192, False, 1000)}


def _cost(name: str, shapes: Shapes, found: Library, block: int, panels: int) -> tuple[float, float, int]:
    """Returns the cost of a full task, that of all tasks, and their number."""
    n, c_out, out_h, out_w = shapes.out
    c_in, kernel_h, kernel_w = shapes.weight[1:]
    all_panels = -(-c_out // found.panel)
    across = -(-all_panels // panels)
    costs = _COSTS_OF.get(found.isa, _COSTS)
    planes, units = 1, n * out_h * out_w
    depth = c_in * kernel_h * kernel_w
    if name == "winograd":
        planes, units, depth = 16, n * -(-out_h // 2) * -(-out_w // 2), c_in

    def task(size: int, columns: int) -> float:
        groups = -(-size // found.rows)
        steps = groups if costs.whole_steps else max(size / found.rows, groups / 2)
        cost = planes * depth * columns * (steps + costs.weights)
        if name == "winograd":
            cost += size * c_in * costs.transform_in + size * columns * costs.transform_out
            # Transformed tiles are read for each four panels, their products are written and read.
            tiles, products = 64 * size * c_in, 64 * size * min(columns, 4) * found.panel
            if tiles + products > costs.l2:
                cost += (tiles * (1 + columns / 4) + products * columns / 2) / costs.bytes
            return cost
        return cost + size * depth * costs.pointers

    if shapes.pool:
        height, _ = shapes.pool.out_size(out_h, out_w)
        rows = (block - 1) * shapes.pool.stride + shapes.pool.kernel
        tasks = n * -(-height // block)
        cost = task(min(rows, out_h) * out_w, all_panels)
        return cost, cost * n * height / block, tasks
    if name == "depthwise":
        cost = block * out_w * panels * (kernel_h * kernel_w + costs.depthwise) / found.rows
        cost += block * -(-out_w // _PIXELS) * costs.turns
        return cost, cost * n * out_h / block * all_panels / panels, n * -(-out_h // block) * across
    if shapes.copies:
        cost = task(block * out_w, panels)
        if name == "grouped":
            copied = panels * shapes.x[1] / c_out
            cost += _copied_pixels(shapes, block) * copied * costs.copies + block * out_w * panels * costs.ends
        return cost, cost * n * out_h / block * all_panels / panels, n * -(-out_h // block) * across
    full, rest = divmod(units, block)
    of_all = sum(
        full * task(block, columns) + (task(rest, columns) if rest else 0)
        for columns in [panels] * (all_panels // panels) + ([all_panels % panels] if all_panels % panels else [])
    )
    return task(block, panels), of_all, (full + (rest > 0)) * across


def _copied_pixels(shapes: Shapes, rows: int) -> int:
    """Pixels of x below so many rows of the output."""
    stride, _, dilation, _ = shapes.geometry
    out, kernel = (rows, shapes.out[3]), shapes.weight[2:]
    height, width = ((o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip(out, stride, kernel, dilation))
    return height * width


def copies(x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> bool:
    """Whether rows of a channels_last x are copied.

    `grouped` always does, `direct` where x has few channels and the kernel several taps in a row, `depthwise` never.
    """
    if weight_shape[1] == 1:
        return x_shape[1] == 1 and weight_shape[3] > 1
    return x_shape[1] != weight_shape[1] or (x_shape[1] < _FEW_CHANNELS and weight_shape[3] > 1)
