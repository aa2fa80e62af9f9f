"""Layout of stem.py's launches: the stems that the kernel takes, strips as data, the packed image's sizes, the programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from ..geometry import Geometry
from .conv_tiles import cdiv
from .descriptors import View


@dataclass(frozen=True)
class StemConfig:
    """A strip's shape.

    Attributes:
        block_w: pooled columns.
        num_warps: warps of a program.
        num_stages: rows of windows that are loading or in use at a time.
        programs_per_sm: programs that an SM holds at a time.
        descriptor: whether TMA loads the windows, through a descriptor whose windows overlap. A driver may reject it.
    """

    block_w: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    descriptor: bool = False


CONFIGS: tuple[StemConfig, ...] = (
    # 224x224: 56 pooled columns.
    StemConfig(64, num_warps=4, num_stages=4, programs_per_sm=2),
    # Small images and small batches.
    StemConfig(32, num_warps=4, num_stages=4, programs_per_sm=3),
    # The same by TMA, for measurements: choose_config never picks them.
    StemConfig(64, num_warps=4, num_stages=4, programs_per_sm=2, descriptor=True),
    StemConfig(32, num_warps=4, num_stages=4, programs_per_sm=3, descriptor=True),
)

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
BLOCK_C = 64
PACK_BLOCK, PACK_WARPS = 1024, 4
GEOMETRY = Geometry(stride=(2, 2), padding=(3, 3, 3, 3))
POOL = ((3, 3), (2, 2), (1, 1), (1, 1), False)
# Offsets within an image are int32.
_MOST_ELEMENTS = 2**31 - 1
# Plans kept: a few batch and image sizes.
_CACHED = 64


def why_not(
    x_shape: Sequence[int],
    x_dtype: torch.dtype,
    weight_shape: Sequence[int],
    geometry: Geometry,
    pool: tuple[Any, ...],
    dtype: torch.dtype,
) -> str | None:
    """Returns why the kernel can't run a stem, or None if it can.

    Args:
        x_shape: (N, C_in, H, W).
        x_dtype: the image's dtype.
        weight_shape: (C_out, C_in, kernel_h, kernel_w).
        geometry: the convolution's.
        pool: (kernel, stride, padding, dilation, ceil_mode) of the max-pool, each an int or a pair as in MaxPool2d.
        dtype: the dtype that is computed in.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype must be float16 or bfloat16, got {dtype}"
    if x_dtype not in IMAGE_DTYPES:
        return f"x must be float32, float16, bfloat16 or uint8, got {x_dtype}"
    if tuple(weight_shape[1:]) != (3, 7, 7) or x_shape[1] != 3:
        return f"the convolution must be 7x7 on 3 channels, got {tuple(weight_shape)} on {x_shape[1]} channels"
    if weight_shape[0] % 16 or weight_shape[0] > BLOCK_C:
        # Other widths need masks and stores of single channels, and spill.
        return f"C_out must be a multiple of 16 up to {BLOCK_C}, got {weight_shape[0]}"
    if geometry != GEOMETRY:
        return f"the convolution must have stride 2 and padding 3, got {geometry}"
    kernel, stride, padding, dilation, ceil_mode = pool
    if (*map(_pair, (kernel, stride, padding, dilation)), bool(ceil_mode)) != POOL:
        named = dict(zip(("kernel", "stride", "padding", "dilation", "ceil_mode"), pool))
        return f"the max-pool must be 3x3, stride 2, padding 1, without ceil_mode, got {named}"
    if 0 in x_shape:
        return f"x must not be empty, got shape {tuple(x_shape)}"
    todo = plan(tuple(x_shape), weight_shape[0], 1)
    _, packed_h, packed_w, _ = todo.packing.image_shape
    image = max(packed_h * packed_w * 4, todo.y_shape[2] * todo.y_shape[3] * todo.y_shape[1])
    if image > _MOST_ELEMENTS or max(todo.packing.programs, x_shape[0] * todo.y_shape[2] * 64) > _MOST_ELEMENTS:
        return f"the image or the batch must be smaller, got shape {tuple(x_shape)}"
    return None


@dataclass(frozen=True)
class Packing:
    """The part of the packing kernel's launch that depends on shapes only.

    Attributes:
        image_shape: (n, rows, columns, 4).
        weight_shape: (BLOCK_C, 7, 8, 4).
        tail: elements to allocate behind the packed image.
        programs: programs of the kernel.
        integers: its first run-time numbers.
        prepared: for launching.launch to fill, by the arguments that do not follow from shapes.
    """

    image_shape: tuple[int, int, int, int]
    weight_shape: tuple[int, int, int, int]
    tail: int
    programs: int
    integers: tuple[int, ...]
    prepared: dict[tuple[Any, ...], dict[tuple[Any, ...], Any]] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Plan:
    """The part of both launches that depends on shapes only.

    Attributes:
        packing: of the packing kernel.
        config: the strip.
        y_shape: (n, c_out, pooled_h, pooled_w).
        windows: the packed image as a descriptor sees it.
        programs: programs of the stem kernel.
        integers: its run-time numbers by name.
        prepared: for launching.launch to fill, for the stem kernel.
    """

    packing: Packing
    config: StemConfig
    y_shape: tuple[int, int, int, int]
    windows: View
    programs: int
    integers: dict[str, int]
    prepared: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False, repr=False)


def sizes(x_shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(rows, columns) of the convolution, and of the pool behind it."""
    out_h, out_w = GEOMETRY.out_size(tuple(x_shape[2:]), (7, 7))
    return out_h, out_w, cdiv(out_h, 2), cdiv(out_w, 2)


def plan_packing(x_shape: Sequence[int], tail: int = 0) -> Packing:
    """Lays out the packing of a stem that `why_not` lets pass."""
    batch, _, in_h, in_w = x_shape
    out_h, _, _, pairs = sizes(x_shape)  # of an even and an odd column
    # Up to the last window of the last pair of columns, whose odd one may lie outside of the convolution.
    packed_h, packed_w = 2 * out_h + 5, 4 * pairs + 6
    blocks = cdiv(packed_h * packed_w, PACK_BLOCK)
    weight_programs = cdiv(BLOCK_C * 7 * 32, PACK_BLOCK)
    return Packing(
        (batch, packed_h, packed_w, 4),
        (BLOCK_C, 7, 8, 4),
        tail,
        batch * blocks + weight_programs,
        (batch * blocks, blocks, in_h, in_w, packed_h, packed_w),
    )


@lru_cache(_CACHED)
def plan(x_shape: tuple[int, ...], c_out: int, multiprocessors: int, config: StemConfig | None = None) -> Plan:
    """Lays out a stem that `why_not` lets pass, for the launcher and the compile-only tests.

    Args:
        x_shape: (N, 3, H, W).
        c_out: output channels.
        multiprocessors: the device's.
        config: the strip; None to choose one.
    """
    batch = x_shape[0]
    out_h, out_w, pooled_h, pooled_w = sizes(x_shape)
    packing = plan_packing(x_shape)
    _, packed_h, packed_w, _ = packing.image_shape
    config = config or choose_config(batch, pooled_h, pooled_w, multiprocessors)
    tiles_w = max(cdiv(pooled_w - 1, config.block_w - 1), 1)
    strips = batch * tiles_w
    segments, rows = split_rows(strips, pooled_h, multiprocessors * config.programs_per_sm)
    return Plan(
        packing,
        config,
        (batch, c_out, pooled_h, pooled_w),
        # 28 of 32: a descriptor reads zeros outside of its shape, and the eighth pixel has to be zero.
        View(
            (batch, packed_h, 2, pooled_w, 28),
            (packed_h * packed_w * 4, packed_w * 4, 8, 16, 1),
            (1, 1, 1, config.block_w, 32),
        ),
        strips * segments,
        dict(
            packed_h=packed_h, packed_w=packed_w, out_h=out_h, out_w=out_w, pooled_h=pooled_h, pooled_w=pooled_w,
            pairs=pooled_w, c_out=c_out, tiles_w=tiles_w, segments=segments, rows=rows,
        ),
    )  # fmt: skip


def choose_config(images: int, pooled_h: int, pooled_w: int, multiprocessors: int) -> StemConfig:
    """Picks a strip: the narrow one for narrow images, or if wide strips cut into single rows would not fill the machine."""
    wide, narrow = CONFIGS[:2]
    rows = images * pooled_h * max(cdiv(pooled_w - 1, wide.block_w - 1), 1)
    return narrow if pooled_w <= narrow.block_w or rows < multiprocessors * wide.programs_per_sm else wide


def split_rows(strips: int, pooled_h: int, slots: int) -> tuple[int, int]:
    """Returns (segments, rows of each) of a strip, such that `slots` programs at a time finish all segments soonest.

    A segment computes the row above its first one again, which costs half as much as a pooled row.
    """
    candidates = {cdiv(pooled_h, rows): rows for rows in range(pooled_h, 0, -1)}
    return min(candidates.items(), key=lambda split: (cdiv(strips * split[0], slots) * (split[1] + 0.5), split[0]))


def _pair(value: Any) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)
