"""Layouts of the specialized_*.py kernels' launches: shapes that they take, tiles as data, views.

conv_layout.py, chain_layout.py and stem_layout.py lay them out; here a tile is not cut into parts. This module imports no
Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch

from ..activations import Activation
from ..geometry import Geometry
from . import chain_layout, conv_layout, stem_layout
from .chain_layout import ChainConfig, ShortcutShape
from .conv_layout import ConvShape, LaunchPlan
from .conv_tiles import TmaConfig, cdiv
from .descriptors import View, dense_view

# Shared memory of a program on Hopper, less what barriers take.
MOST_SHARED = 227 * 1024 - 512
# Plans kept: a net has some 25 layers that differ, times a few batch and image sizes.
_CACHED = 512


@dataclass(frozen=True)
class SpecializedConfig:
    """A tile's shape, and how its program shares the work out.

    Attributes:
        block_m: pixels.
        block_n: output channels.
        consumers: groups of warps that multiply, each a tile of its own. With two, one stores while the other multiplies.
        num_warps: warps of a consumer.
        num_stages: steps that are loading or in use at a time.
        buffers: tiles of results, or of residuals before them, in shared memory; a multiple of `consumers`.
        resident: whether the whole weight stays in shared memory.
        parts: pieces in which the epilogue goes over the tile.
    """

    block_m: int
    block_n: int
    consumers: int
    num_warps: int
    num_stages: int
    buffers: int
    resident: bool = False
    parts: int = 2

    # Input channels of a step: 128 bytes, the widest that TMA's swizzle takes.
    block_k = 64

    def shared_bytes(self, steps: int) -> int:
        """Bytes of shared memory for a convolution whose tiles take that many steps."""
        weights = steps if self.resident else self.num_stages
        stages = self.block_k * (self.num_stages * self.block_m + weights * self.block_n)
        return 2 * (stages + self.buffers * self.block_m * self.block_n)

    def __str__(self) -> str:
        """Name in a measured table, different for each of CONFIGS."""
        resident = " resident" if self.resident else ""
        return f"{self.block_m}x{self.block_n} c{self.consumers} s{self.num_stages} b{self.buffers}{resident}"


CONFIGS: tuple[SpecializedConfig, ...] = (
    # Two consumers in turns: long loops and short ones.
    SpecializedConfig(128, 128, consumers=2, num_warps=4, num_stages=4, buffers=2),
    # Two residuals ahead for each consumer, where the residual is most of what is read.
    SpecializedConfig(128, 128, consumers=2, num_warps=4, num_stages=3, buffers=4),
    # The least traffic from L2, for long loops.
    SpecializedConfig(128, 256, consumers=1, num_warps=8, num_stages=3, buffers=1, parts=4),
    SpecializedConfig(256, 128, consumers=1, num_warps=8, num_stages=3, buffers=1),
    # 64 output channels: the weight stays, or the tile is wide in pixels; 1x1 have more buffers.
    SpecializedConfig(128, 64, consumers=2, num_warps=4, num_stages=6, buffers=2, resident=True),
    SpecializedConfig(256, 64, consumers=2, num_warps=4, num_stages=4, buffers=2),
    SpecializedConfig(128, 64, consumers=2, num_warps=4, num_stages=4, buffers=6),
)
# The tile of a convolution with a merged shortcut: one consumer of eight warps would spill.
MERGED = replace(CONFIGS[0], parts=4)


def why_not(
    x_shape: Sequence[int], weight_shape: Sequence[int], geometry: Geometry, dtype: torch.dtype
) -> str | None:  # fmt: skip
    """Returns why the kernel can't run a convolution, or None if it can. Arguments: conv_layout.why_not."""
    if (reason := conv_layout.why_not(x_shape, weight_shape, geometry, dtype)) is not None:
        return reason
    if x_shape[1] % SpecializedConfig.block_k:
        return f"C_in must be a multiple of {SpecializedConfig.block_k}, got {x_shape[1]}"
    if conv_layout.has_four_loops(ConvShape(tuple(x_shape), tuple(weight_shape), geometry), SpecializedConfig.block_k):
        return f"stride 2 needs even sizes, got {x_shape[2]}x{x_shape[3]}"
    return None


def why_not_merged(conv: ConvShape, shortcut: ConvShape, dtype: torch.dtype) -> str | None:
    """Returns why one kernel can't run a block's last convolution and its projection, or None if it can."""
    for name, shape in (("the convolution", conv), ("the shortcut", shortcut)):
        if (reason := why_not(*shape, dtype)) is not None:
            return f"{name}: {reason}"
    if shortcut.x[1] < 2 * SpecializedConfig.block_k:
        # A loop of one step is unrolled, and with Triton 3.9.0 the kernel spills.
        return f"the shortcut must have at least {2 * SpecializedConfig.block_k} input channels, got {shortcut.x[1]}"
    return conv_layout.why_not_merged(conv, shortcut, dtype)


def why_not_tile(conv: ConvShape, config: SpecializedConfig) -> str | None:
    """Returns why a tile can't run a convolution that `why_not` lets pass, or None if it can."""
    c_out, c_in, *kernel = conv.weight
    if config.block_n >= 2 * max(c_out, 64):
        return f"a tile of {config.block_n} channels would be half empty, C_out={c_out}"
    steps = prod(kernel) * c_in // config.block_k
    if config.resident and (c_out > config.block_n or config.shared_bytes(steps) > MOST_SHARED):
        return f"a weight of {tuple(conv.weight)} can't stay in shared memory"
    return None


@dataclass(frozen=True)
class Plan(LaunchPlan):
    """Launch of specialized_conv.py's kernel.

    Attributes:
        config: the tile.
        y_shape: (N, C_out, out_h, out_w).
    """

    config: SpecializedConfig
    y_shape: tuple[int, int, int, int]


# Of conv.py's constants those that this kernel has, too.
_SHARED_CONSTANTS = (
    "KERNEL_H", "KERNEL_W", "N_CHUNKS", "SHORTCUT_CHUNKS", "IN_PAIRS", "SKEW_H", "SKEW_W", "SKIP", "ACT", "SLOPE",
    "BOX_N", "BOX_H", "BOX_W", "BLOCK_N", "BLOCK_K",
)  # fmt: skip


@lru_cache(_CACHED)
def plan(
    conv: ConvShape, activation: Activation | None, config: SpecializedConfig, shortcut: ConvShape | None = None
) -> Plan:  # fmt: skip
    """Lays out a convolution that `why_not` and `why_not_tile` let pass, for the launcher and the tests.

    Args:
        conv: the convolution.
        activation: comes last; None for none.
        config: the tile.
        shortcut: a projection that `why_not_merged` lets pass, or None.
    """
    tile = TmaConfig(
        config.block_m, config.block_n, config.block_k, config.num_warps, config.num_stages, parts=1, programs_per_sm=1
    )
    base = conv_layout.plan(conv, activation, False, tile, shortcut)
    constants = {name: base.constants[name] for name in _SHARED_CONSTANTS}
    constants |= dict(
        # A resident weight's steps are all there.
        SKIP=constants["SKIP"] and not config.resident,
        STAGES=config.num_stages,
        BUFFERS=config.buffers,
        RESIDENT=config.resident,
        CONSUMERS=config.consumers,
        PARTS=config.parts,
    )
    return Plan(base.views, base.integers, constants, config, base.y_shape)


# The chain's tile: 64 pixels for each of two consumers, 64 channels of y at a time.
_CHAIN_TILE = ChainConfig(64, 64, 64, num_warps=4, num_stages=4, tail_stages=1, programs_per_sm=1)
# Where weights pass through the ring, by the channels of a stage: (stages, buffers of y for each consumer).
_WEIGHT_RINGS = {64: (5, 3), 128: (4, 3)}
# Where they stay: (stages of the 3x3, buffers of y for each consumer); the first that fits beside them is taken.
_CHAIN_RINGS = ((4, 3), (3, 3), (4, 2), (3, 2), (2, 2), (3, 1), (2, 1))


def why_not_chain(
    x_shape: Sequence[int],
    conv2_shape: Sequence[int],
    geometry: Geometry,
    conv3_shape: Sequence[int],
    dtype: torch.dtype,
    shortcut: ShortcutShape | None = None,
    next_shape: Sequence[int] | None = None,
) -> str | None:
    """Returns why specialized_chain.py can't run a chain, or None if it can. Arguments: chain_layout.why_not."""
    reason = chain_layout.why_not_shapes(x_shape, conv2_shape, geometry, conv3_shape, dtype, shortcut, next_shape)
    if reason is not None:
        return reason
    width, c_in, c_out = *conv2_shape[:2], conv3_shape[0]
    kind = chain_layout.kind_of(conv2_shape, shortcut, next_shape)
    if width > max(_WEIGHT_RINGS):
        return f"conv2 must have at most {max(_WEIGHT_RINGS)} output channels, got {width}"
    for name, channels in (("conv2: C_in", c_in), ("conv3: C_out", c_out)):
        if channels % _CHAIN_TILE.block_c:
            return f"{name} must be a multiple of {_CHAIN_TILE.block_c}, got {channels}"
    if kind.shortcut_in and width > _CHAIN_TILE.block_c:
        return f"beside a projection conv2 must have at most {_CHAIN_TILE.block_c} output channels, got {width}"
    if kind.shortcut_in > _CHAIN_TILE.block_c:
        return f"shortcut: C_in must be at most {_CHAIN_TILE.block_c}, got {kind.shortcut_in}"
    if kind.next_width > kind.width and _beside_weights(conv2_shape, c_out, kind) is None:
        need = f"the next conv1 must have at most {kind.width} channels"
        return f"the weights don't fit into shared memory, so {need}, got {next_shape[0] if next_shape else 0}"
    return None


def _beside_weights(conv2_shape: Sequence[int], c_out: int, kind: chain_layout.Kind) -> tuple[int, int] | None:
    """Returns the stages of the 3x3 and the buffers of each consumer that fit beside the weights; None if none do."""
    block, block_m = _CHAIN_TILE.block_c, _CHAIN_TILE.block_m
    if kind.width > block:
        return None
    weights = block * prod(conv2_shape[1:]) + c_out * (block + kind.next_width + kind.shortcut_in)
    inputs = 2 * block_m * (block + kind.shortcut_in)
    for stages, buffers in _CHAIN_RINGS:
        if 2 * (weights + inputs + block_m * block * (stages + 2 * buffers)) <= MOST_SHARED:
            return stages, buffers
    return None


@dataclass(frozen=True)
class SpecializedChainPlan(LaunchPlan):
    """Launch of one of the two kernels.

    Attributes:
        in_ring: whether weights pass through shared memory (specialized_chain_ring.py) instead of staying there.
    """

    in_ring: bool


@lru_cache(_CACHED)
def plan_chain(
    x_shape: tuple[int, ...],
    conv2_shape: tuple[int, ...],
    geometry: Geometry,
    c_out: int,
    shortcut: ShortcutShape | None = None,
    next_shape: tuple[int, ...] | None = None,
    relus: tuple[bool, bool, bool] = (True, True, True),
    keep_sum: bool = True,
) -> SpecializedChainPlan:
    """Lays out a chain that `why_not_chain` lets pass. Arguments: chain_layout.plan."""
    base = chain_layout.plan(
        x_shape, conv2_shape, geometry, c_out, shortcut, next_shape, relus, keep_sum, config=_CHAIN_TILE
    )
    kind = chain_layout.kind_of(conv2_shape, shortcut, next_shape)
    views = {name: view for name, view in base.views.items() if name not in chain_layout.BLOCK_VECTORS}
    if "z_desc" in views:
        z = views["z_desc"]
        views["z_desc"] = z._replace(box=(*z.box[:-1], _CHAIN_TILE.block_c))
    names = (
        "KERNEL_H", "KERNEL_W", "N_CHUNKS", "IN_PAIRS", "SKEW_H", "SKEW_W", "WIDTH", "C_OUT", "NEXT_WIDTH",
        "RELU_2", "RELU_3", "RELU_1", "KEEP_SUM", "BOX_N", "BOX_H", "BOX_W",
    )  # fmt: skip
    constants = {name: base.constants[name] for name in names}
    integers = base.integers | dict(n_blocks=c_out // _CHAIN_TILE.block_c)
    rings = _beside_weights(conv2_shape, c_out, kind)
    if rings is None:
        stages, buffers = _WEIGHT_RINGS[kind.width]
        # In halves, if there are 128 channels: each lies where pixels of one of the two boxes may lie.
        views["w3_desc"] = views["w3_desc"]._replace(box=(_CHAIN_TILE.block_c, _CHAIN_TILE.block_c))
        constants |= dict(BLOCK_WIDTH=kind.width, STAGES=stages, BUFFERS=buffers)
        return SpecializedChainPlan(views, integers, constants, True)
    constants |= dict(BLOCK_NEXT=kind.next_width or _CHAIN_TILE.block_c, STAGES=rings[0], BUFFERS=rings[1])
    return SpecializedChainPlan(views, integers | dict(in_h=x_shape[2], in_w=x_shape[3]), constants, False)


# A strip of a stem: columns of the convolution, elements of a cell (two pixels of four channels), boxes of a row and their
# elements, and rows of the packed image that each of two consumers holds: a window's 7, and the next two.
STEM_COLUMNS, STEM_CELL, STEM_BOXES, STEM_BOX, STEM_ROWS = 128, 8, 4, 256, 9


@dataclass(frozen=True)
class StemPlan(LaunchPlan):
    """Launch of specialized_stem.py's kernel.

    Attributes:
        packing: of the kernel that packs the image.
        y_shape: (N, C_out, pooled_h, pooled_w).
        programs: programs of the kernel.
    """

    packing: stem_layout.Packing
    y_shape: tuple[int, int, int, int]
    programs: int


@lru_cache(_CACHED)
def plan_stem(x_shape: tuple[int, ...], c_out: int, multiprocessors: int) -> StemPlan:
    """Lays out a stem that `stem_layout.why_not` lets pass. Arguments: stem_layout.plan."""
    batch = x_shape[0]
    out_h, out_w, pooled_h, pooled_w = stem_layout.sizes(x_shape)
    # A box begins at any cell, and its 4 x 256 elements may end behind the last row.
    packing = stem_layout.plan_packing(x_shape, tail=2 * STEM_BOX)
    _, packed_h, packed_w, channels = packing.image_shape
    row = packed_w * channels
    rows_desc = View(
        (batch * packed_h, cdiv(row, STEM_BOX), 2 * STEM_BOX), (row, STEM_BOX, 1), (1, STEM_BOXES, STEM_BOX)
    )
    # The first pixel of each cell: a descriptor reads zeros outside of its shape.
    last_desc = View((batch * packed_h, row // STEM_CELL, channels), (row, STEM_CELL, 1), (1, STEM_COLUMNS, STEM_CELL))
    tiles_w = max(cdiv(pooled_w - 1, STEM_COLUMNS // 2 - 1), 1)
    segments, rows = stem_layout.split_rows(batch * tiles_w, pooled_h, 2 * multiprocessors)
    items = batch * tiles_w * segments
    weight = (stem_layout.BLOCK_C, prod(packing.weight_shape[1:]))
    return StemPlan(
        dict(rows_desc=rows_desc, last_desc=last_desc, w_desc=dense_view(weight, (stem_layout.BLOCK_C, weight[1] // 7))),
        dict(
            items=items, tiles_w=tiles_w, segments=segments, per_image=tiles_w * segments, rows=rows, packed_h=packed_h,
            out_h=out_h, out_w=out_w, pooled_h=pooled_h, pooled_w=pooled_w, c_out=c_out,
            y_image=pooled_h * pooled_w * c_out, y_row=pooled_w * c_out,
        ),
        dict(ROWS=STEM_ROWS),
        packing,
        (batch, c_out, pooled_h, pooled_w),
        min(items, multiprocessors),
    )  # fmt: skip
