"""Layout of chain.py's launches: the shapes that the kernel takes, tiles as data, views of the tensors.

conv_layout.py lays out the 3x3. All later layers are pointwise, over the same boxes of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from ..activations import RELU
from ..geometry import Geometry
from . import conv_layout as conv
from .conv_layout import ConvShape, LaunchPlan
from .conv_tiles import TmaConfig
from .descriptors import View, dense_view


@dataclass(frozen=True)
class ChainConfig:
    """A tile's shape.

    Attributes:
        block_m: pixels.
        block_c: channels of y that are computed at a time.
        block_k: input channels of a step of the 3x3.
        num_warps: warps of a program.
        num_stages: stages of the 3x3's loop.
        tail_stages: stages of the loop over y's channels.
        programs_per_sm: programs that an SM holds at a time.
    """

    block_m: int
    block_c: int
    block_k: int
    num_warps: int
    num_stages: int
    tail_stages: int
    programs_per_sm: int


class Kind(NamedTuple):
    """The numbers of channels that determine the registers, rounded up to the sizes in CONFIGS.

    Attributes:
        width: output channels of the 3x3.
        next_width: z's channels; 0 without a z.
        shortcut_in: input channels of the projection; 0 without one.
    """

    width: int
    next_width: int
    shortcut_in: int


# Blocks of 32 channels: y's sums are then a quarter of h's, and two programs fit on an SM even with z's sums. A program that
# is alone on its SM has more stages, because no other one works while it waits.
_TWO = ChainConfig(128, 32, 64, num_warps=8, num_stages=4, tail_stages=4, programs_per_sm=2)
_TWO_NEXT = ChainConfig(128, 32, 64, num_warps=8, num_stages=4, tail_stages=3, programs_per_sm=2)
_TWO_WIDE = ChainConfig(128, 32, 64, num_warps=8, num_stages=3, tail_stages=3, programs_per_sm=2)
# Half the threads with twice the registers each: 8 warps would take 153 registers a thread, too many for two programs.
_TWO_FIRST = ChainConfig(128, 32, 64, num_warps=4, num_stages=4, tail_stages=3, programs_per_sm=2)
_ONE = ChainConfig(128, 32, 64, num_warps=8, num_stages=4, tail_stages=4, programs_per_sm=1)
_ONE_WIDE = ChainConfig(128, 32, 64, num_warps=8, num_stages=4, tail_stages=3, programs_per_sm=1)

# A projection without a z is left out: the ptxas of Triton 3.6.0 overwrites the projection's input, which the next block of
# channels still needs, with h (wrong by half on an H200; tests/compile_kernels.py looks for this in every chain).
CONFIGS: dict[Kind, ChainConfig] = {
    Kind(64, 0, 0): _TWO,
    Kind(64, 64, 0): _TWO_NEXT,
    Kind(64, 128, 0): _ONE,
    Kind(128, 0, 0): _TWO_WIDE,
    Kind(128, 128, 0): _ONE,
    Kind(128, 256, 0): _ONE_WIDE,
    Kind(64, 64, 64): _TWO_FIRST,
    Kind(64, 128, 64): _ONE,
    Kind(64, 64, 256): _ONE,
    Kind(64, 128, 256): _ONE,
    Kind(128, 128, 64): _ONE,
    Kind(128, 128, 256): _ONE,
}

# The vectors that the loop over y's channels reads, a block at a time.
BLOCK_VECTORS = (
    "scale3_desc", "shift3_desc", "shortcut_scale_desc", "shortcut_shift_desc", "norm_scale_desc", "norm_shift_desc"
)  # fmt: skip

# Plans kept: a net has some ten chains that differ, times a few batch and image sizes.
_CACHED = 256


class ShortcutShape(NamedTuple):
    """Shapes of a residual that the kernel computes.

    Attributes:
        x: (N, C, H, W).
        weight: (C_out, C, 1, 1) of a projection; None if x itself is subsampled.
        geometry: the projection's or the subsampling's.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...] | None
    geometry: Geometry


def why_not(
    x_shape: Sequence[int],
    conv2_shape: Sequence[int],
    geometry: Geometry,
    conv3_shape: Sequence[int],
    dtype: torch.dtype,
    shortcut: ShortcutShape | None = None,
    next_shape: Sequence[int] | None = None,
) -> str | None:
    """Returns why the kernel can't run a chain, or None if it can. Arguments: why_not_shapes."""
    reason = why_not_shapes(x_shape, conv2_shape, geometry, conv3_shape, dtype, shortcut, next_shape)
    if reason is not None:
        return reason
    kind = kind_of(conv2_shape, shortcut, next_shape)
    if kind not in CONFIGS:
        return f"no tile of {kind} has been seen to compile without spilling"
    return None


def why_not_shapes(
    x_shape: Sequence[int],
    conv2_shape: Sequence[int],
    geometry: Geometry,
    conv3_shape: Sequence[int],
    dtype: torch.dtype,
    shortcut: ShortcutShape | None = None,
    next_shape: Sequence[int] | None = None,
) -> str | None:
    """Returns why no chain of Hopper's has these shapes, or None if one may have.

    Args:
        x_shape: (N, C_in, H, W), the 3x3's input.
        conv2_shape: (C_out, C_in, h, w), the 3x3's weight.
        geometry: the 3x3's.
        conv3_shape: (C_out, C_in, 1, 1), the weight of the block's last 1x1.
        dtype: the dtype of x and the weights.
        shortcut: shapes of a residual that the kernel computes; None for a residual of y's shape.
        next_shape: (C_out, C_in, 1, 1), the weight of the next block's first 1x1, or None.
    """
    reason = conv.why_not(x_shape, conv2_shape, geometry, dtype)
    if reason is not None:
        return f"conv2: {reason}"
    c_in, width, c_out = conv2_shape[1], conv2_shape[0], conv3_shape[0]
    if tuple(conv2_shape[2:]) == (1, 1):
        return "conv2 must have taps, got a kernel of 1x1"
    if c_in % 32:
        return f"conv2: C_in must be a multiple of 32, got {c_in}"
    if geometry.stride == (2, 2) and (x_shape[2] % 2 or x_shape[3] % 2):
        return f"conv2: stride 2 needs an even height and width, got {x_shape[2]}x{x_shape[3]}"
    for name, shape, expected in (
        ("conv3", conv3_shape, (c_out, width, 1, 1)),
        ("shortcut", shortcut and shortcut.weight, (c_out, shortcut and shortcut.x[1], 1, 1)),
        ("next conv1", next_shape, (next_shape and next_shape[0], c_out, 1, 1)),
    ):
        if shape is not None and tuple(shape) != expected:
            return f"{name}: weight must have shape {expected}, got {tuple(shape)}"
    if c_out % 32:
        return f"conv3: C_out must be a multiple of 32, got {c_out}"
    if shortcut is not None:
        reason = _why_not_shortcut(shortcut, geometry.out_shape(x_shape, conv2_shape), c_out)
        if reason is not None:
            return f"shortcut: {reason}"
    if next_shape is not None and next_shape[0] % 8:
        return f"next conv1: C_out must be a multiple of 8, got {next_shape[0]}"
    return None


def _why_not_shortcut(shortcut: ShortcutShape, hidden_shape: tuple[int, ...], c_out: int) -> str | None:
    x_shape, weight, geometry = shortcut
    if geometry.padding != (0, 0, 0, 0) or geometry.groups != 1:
        return f"padding must be 0 and groups 1, got {geometry}"
    if x_shape[0] != hidden_shape[0] or geometry.out_size(x_shape[2:], (1, 1)) != tuple(hidden_shape[2:]):
        return f"x of shape {tuple(x_shape)} at stride {geometry.stride} does not give {tuple(hidden_shape)}'s pixels"
    if weight is None and x_shape[1] != c_out:
        return f"without a weight x must have {c_out} channels, got {x_shape[1]}"
    if x_shape[1] % 8:
        return f"C_in must be a multiple of 8, got {x_shape[1]}"
    return None


def kind_of(
    conv2_shape: Sequence[int], shortcut: ShortcutShape | None, next_shape: Sequence[int] | None
) -> Kind:  # fmt: skip
    """Returns a chain's kind, its channels rounded up to the sizes in CONFIGS. Channels beyond the real ones are zeros."""
    width = _rounded(conv2_shape[0], (64, 128))
    return Kind(
        width,
        _rounded(next_shape[0], (width, 2 * width)) if next_shape else 0,
        _rounded(shortcut.x[1], (64, 256)) if shortcut is not None and shortcut.weight is not None else 0,
    )


def _rounded(channels: int, sizes: tuple[int, ...]) -> int:
    return min((size for size in sizes if size >= channels), default=channels)


def choose_config(kind: Kind, c_in: int) -> ChainConfig:
    """Returns the tile of a kind that `why_not` lets pass. c_in: the 3x3's input channels."""
    config = CONFIGS[kind]
    return config if c_in % config.block_k == 0 else replace(config, block_k=32)


@dataclass(frozen=True)
class ChainPlan(LaunchPlan):
    """Launch of chain.py's kernel, with its tile."""

    config: ChainConfig


@lru_cache(_CACHED)
def plan(
    x_shape: tuple[int, ...],
    conv2_shape: tuple[int, ...],
    geometry: Geometry,
    c_out: int,
    shortcut: ShortcutShape | None = None,
    next_shape: tuple[int, ...] | None = None,
    relus: tuple[bool, bool, bool] = (True, True, True),
    keep_sum: bool = True,
    upcast: bool = False,
    config: ChainConfig | None = None,
) -> ChainPlan:
    """Lays out a chain that `why_not` lets pass, for the launcher and the compile-only tests.

    Args:
        x_shape: as in `why_not`.
        conv2_shape: as in `why_not`.
        geometry: as in `why_not`.
        c_out: y's channels.
        shortcut: as in `why_not`.
        next_shape: as in `why_not`.
        relus: whether a ReLU follows conv2, the add, and the next block's first 1x1.
        keep_sum: whether y is the sum itself.
        upcast: whether products need fp32 operands (target.dot_needs_fp32).
        config: the tile; None to choose one.
    """
    kind = kind_of(conv2_shape, shortcut, next_shape)
    config = config or choose_config(kind, conv2_shape[1])
    tile = TmaConfig(
        config.block_m, kind.width, config.block_k, config.num_warps, config.num_stages, 1, config.programs_per_sm
    )  # fmt: skip
    front = conv.plan(ConvShape(x_shape, conv2_shape, geometry), RELU if relus[0] else None, upcast, tile)
    width, (batch, out_h, out_w) = conv2_shape[0], front.views["y_desc"].shape[:3]
    box = front.views["y_desc"].box[:3]

    def pixels(
        channels: int, block: int, in_size: Sequence[int] = (out_h, out_w), stride: tuple[int, int] = (1, 1)
    ) -> View:  # fmt: skip
        row = in_size[1] * channels
        strides = (in_size[0] * row, stride[0] * row, stride[1] * channels, 1)
        return View((batch, out_h, out_w, channels), strides, (*box, block))

    y = pixels(c_out, config.block_c)
    views = dict(
        x_desc=front.views["x_desc"],
        w2_desc=front.views["w_desc"],
        w3_desc=dense_view((c_out, width), (config.block_c, kind.width)),
        residual_desc=y,
        y_desc=y,
    )
    if shortcut is not None:
        c_shortcut, *in_size = shortcut.x[1:]
        block = kind.shortcut_in or config.block_c
        views["residual_desc"] = pixels(c_shortcut, block, in_size, shortcut.geometry.stride)
        if kind.shortcut_in:
            views["ws_desc"] = dense_view((c_out, c_shortcut), (config.block_c, kind.shortcut_in))
    if next_shape is not None:
        views["w1_desc"] = dense_view((next_shape[0], c_out), (kind.next_width, config.block_c))
        views["z_desc"] = pixels(next_shape[0], kind.next_width)
    views |= dict.fromkeys(BLOCK_VECTORS, dense_view((c_out,), (config.block_c,)))
    shared = "KERNEL_H KERNEL_W N_CHUNKS IN_PAIRS SKEW_H SKEW_W UPCAST BOX_N BOX_H BOX_W BLOCK_K".split()
    return ChainPlan(
        views,
        {name: front.integers[name] for name in ("n_tiles", "tiles_h", "tiles_w", "lead_h", "lead_w")},
        {name: front.constants[name] for name in shared}
        | dict(
            WIDTH=width,
            BLOCK_WIDTH=kind.width,
            C_OUT=c_out,
            BLOCK_C=config.block_c,
            NEXT_WIDTH=next_shape[0] if next_shape else 0,
            BLOCK_NEXT=kind.next_width,
            RELU_2=relus[0],
            RELU_3=relus[1],
            RELU_1=relus[2],
            KEEP_SUM=keep_sum,
            TAIL_STAGES=config.tail_stages,
        ),
        config,
    )
