"""How stem.py lays a stem out: which it takes, strips as data, sizes of the packed image, programs that fill the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from ..geometry import Geometry
from ..launching import View
from .conv_tiles import cdiv


@dataclass(frozen=True)
class StemConfig:
    """One strip. block_w: pooled columns; programs_per_sm: how many are resident at a time.

    descriptor: windows come by TMA, through a descriptor whose strides overlap, which not every driver need take.
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
    # The same by TMA: to be measured, never chosen.
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
    x_shape, x_dtype: torch.dtype, weight_shape, geometry: Geometry, pool: tuple, dtype: torch.dtype
) -> str | None:
    """What keeps a stem from the kernel; None if nothing does.

    Args:
        x_shape: (N, C_in, H, W). x_dtype: the image's own. weight_shape: (C_out, C_in, kernel_h, kernel_w).
        pool: (kernel, stride, padding, dilation, ceil_mode) of the max-pool, each an int or a pair as MaxPool2d has them.
        dtype: that is computed in.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype must be float16 or bfloat16, got {dtype}"
    if x_dtype not in IMAGE_DTYPES:
        return f"x must be float32, float16, bfloat16 or uint8, got {x_dtype}"
    if tuple(weight_shape[1:]) != (3, 7, 7) or x_shape[1] != 3:
        return f"the convolution must be 7x7 on 3 channels, got {tuple(weight_shape)} on {x_shape[1]} channels"
    if weight_shape[0] % 16 or weight_shape[0] > BLOCK_C:
        # Others compile with masks and stores of single channels, and spill.
        return f"C_out must be a multiple of 16 up to {BLOCK_C}, got {weight_shape[0]}"
    if geometry != GEOMETRY:
        return f"the convolution must have stride 2 and padding 3, got {geometry}"
    kernel, stride, padding, dilation, ceil_mode = pool
    normalised = (*map(_pair, (kernel, stride, padding, dilation)), bool(ceil_mode))
    if normalised != POOL:
        named = dict(zip(("kernel", "stride", "padding", "dilation", "ceil_mode"), pool))
        return f"the max-pool must be 3x3, stride 2, padding 1, without ceil_mode, got {named}"
    if 0 in x_shape:
        return f"x must not be empty, got shape {tuple(x_shape)}"
    todo = plan(tuple(x_shape), weight_shape[0], 1)
    image = max(todo.packed_shape[1] * todo.packed_shape[2] * 4, todo.y_shape[2] * todo.y_shape[3] * todo.y_shape[1])
    if image > _MOST_ELEMENTS or max(todo.pack_programs, x_shape[0] * todo.y_shape[2] * 64) > _MOST_ELEMENTS:
        return f"the image or the batch must be smaller, got shape {tuple(x_shape)}"
    return None


@dataclass(frozen=True)
class Plan:
    """A launch without its pointers: what depends on shapes only."""

    config: StemConfig
    packed_shape: tuple[int, int, int, int]  # (n, rows, columns, 4)
    packed_weight_shape: tuple[int, int, int, int]
    y_shape: tuple[int, int, int, int]
    windows: View  # the packed image as a descriptor sees it
    pack_programs: int
    pack_integers: tuple[int, ...]
    programs: int
    integers: dict[str, int]
    # What launches of the kernel find out, see launching.py; those of packing by what else they depend on.
    prepared: dict = field(default_factory=dict, compare=False, repr=False)
    packing: dict[tuple, dict] = field(default_factory=dict, compare=False, repr=False)


@lru_cache(_CACHED)
def plan(x_shape: tuple[int, ...], c_out: int, multiprocessors: int, config: StemConfig | None = None) -> Plan:
    """Lays out a stem that `why_not` lets pass; shared by the launcher and the compile-only tests."""
    batch, _, in_h, in_w = x_shape
    out_h, out_w = GEOMETRY.out_size((in_h, in_w), (7, 7))
    pooled_h, pooled_w, pairs = cdiv(out_h, 2), cdiv(out_w, 2), cdiv(out_w, 2)
    # Up to the last window of the last pair of columns, the convolution's or not.
    packed_h, packed_w = 2 * out_h + 5, 4 * pairs + 6
    config = config or choose_config(batch, pooled_h, pooled_w, multiprocessors)
    tiles_w = max(cdiv(pooled_w - 1, config.block_w - 1), 1)
    strips = batch * tiles_w
    segments, rows = split_rows(strips, pooled_h, multiprocessors * config.programs_per_sm)
    blocks = cdiv(packed_h * packed_w, PACK_BLOCK)
    weight_programs = cdiv(BLOCK_C * 7 * 32, PACK_BLOCK)
    return Plan(
        config,
        (batch, packed_h, packed_w, 4),
        (BLOCK_C, 7, 8, 4),
        (batch, c_out, pooled_h, pooled_w),
        # 28 of 32: outside of its shape a descriptor reads zeros, and the eighth pixel has to be zero.
        View(
            (batch, packed_h, 2, pairs, 28),
            (packed_h * packed_w * 4, packed_w * 4, 8, 16, 1),
            (1, 1, 1, config.block_w, 32),
        ),
        batch * blocks + weight_programs,
        (batch * blocks, blocks, in_h, in_w, packed_h, packed_w),
        strips * segments,
        dict(
            packed_h=packed_h, packed_w=packed_w, out_h=out_h, out_w=out_w, pooled_h=pooled_h, pooled_w=pooled_w,
            pairs=pairs, c_out=c_out, tiles_w=tiles_w, segments=segments, rows=rows,
        ),
    )  # fmt: skip


def choose_config(images: int, pooled_h: int, pooled_w: int, multiprocessors: int) -> StemConfig:
    """Picks a strip: the narrow one for narrow images, and where even single rows of wide ones leave the machine idle."""
    wide, narrow = CONFIGS[:2]
    rows = images * pooled_h * max(cdiv(pooled_w - 1, wide.block_w - 1), 1)
    return narrow if pooled_w <= narrow.block_w or rows < multiprocessors * wide.programs_per_sm else wide


def split_rows(strips: int, pooled_h: int, slots: int) -> tuple[int, int]:
    """(segments, rows of each) of a strip, so that all segments end soonest on `slots` programs at a time.

    A segment computes the row above its first once more: half as much as a pooled row.
    """
    candidates = {cdiv(pooled_h, rows): rows for rows in range(pooled_h, 0, -1)}
    return min(candidates.items(), key=lambda split: (cdiv(strips * split[0], slots) * (split[1] + 0.5), split[0]))


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
