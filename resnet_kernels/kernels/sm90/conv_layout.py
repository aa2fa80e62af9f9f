"""Layout of conv.py's launches: the shapes that the kernel takes, and its tensors as descriptors see them.

The kernel sees the input as one of these:

    R x S, stride 1   (N, H, W, C), as it lies in memory; a tap moves the box.
    1x1, any stride   (N, out_h, out_w, C) with the strides multiplied; at stride 1 (1, 1, N*H*W, C): a plain GEMM.
    R x S, stride 2   even sizes: (N, H/2, 2, W/2, 2C). The row's parity is a coordinate, the column's an offset of C
                      channels, so a tap's pixels are neighbors.
                      Other sizes: four views (N, H/2, W/2, C), one for each parity of rows and columns, with the strides
                      doubled. What lies beyond the edge is then outside of its view. In the view of pairs it would be the
                      next row's first pixel.

A merged shortcut is one more 1x1, on another tensor, into the same sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import Any, NamedTuple

import torch

from ..activations import Activation, as_constexprs
from ..geometry import Geometry
from .conv_tiles import FULL_MACHINE, MOST_SHARES, TmaConfig, cdiv, choose_box, choose_config
from .descriptors import View, dense_view

# Coordinates are int32, up to a box past the last pixel.
_MOST_PIXELS = 2**31 - 1 - 128
# Plans kept: a net has some 25 layers that differ, times a few batch and image sizes.
_CACHED = 512


class ConvShape(NamedTuple):
    """Shapes and geometry of a convolution.

    Attributes:
        x: (N, C_in, H, W).
        weight: (C_out, C_in / groups, kernel_h, kernel_w).
        geometry: stride, padding, dilation, groups.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry

    @property
    def is_pointwise(self) -> bool:
        """Whether the convolution is 1x1 without padding."""
        return tuple(self.weight[2:]) == (1, 1) and self.geometry.padding == (0, 0, 0, 0)


def why_not(
    x_shape: Sequence[int], weight_shape: Sequence[int], geometry: Geometry, dtype: torch.dtype
) -> str | None:  # fmt: skip
    """Returns why the kernel can't run a convolution, or None if it can.

    Args:
        x_shape: (N, C_in, H, W).
        weight_shape: (C_out, C_in / groups, kernel_h, kernel_w).
        geometry: stride, padding, dilation, groups.
        dtype: x's and the weight's dtype.
    """
    batch, c_in, in_h, in_w = x_shape
    c_out, _, *kernel = weight_shape
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype must be float16 or bfloat16, got {dtype}"
    if geometry.groups != 1:
        return f"groups must be 1, got {geometry.groups}"
    if geometry.dilation != (1, 1):
        return f"dilation must be 1, got {geometry.dilation}"
    if prod(x_shape) == 0:
        return f"x must not be empty, got shape {tuple(x_shape)}"
    if c_in % 8 or c_out % 8:
        # A descriptor's strides are multiples of 16 bytes.
        return f"channels must be multiples of 8, got C_in={c_in}, C_out={c_out}"
    if batch * prod(geometry.out_size((in_h, in_w), kernel)) > _MOST_PIXELS:
        return f"the output must have at most {_MOST_PIXELS} pixels"
    if geometry.stride == (1, 1) or ConvShape((*x_shape,), (*weight_shape,), geometry).is_pointwise:
        return None
    if geometry.stride != (2, 2):
        return f"stride must be 1 or 2, got {geometry.stride} with a kernel of {kernel[0]}x{kernel[1]}"
    if min(in_h, in_w) < 2:
        # A descriptor has no empty axis, which the odd rows or columns would be.
        return f"stride 2 needs at least 2x2 pixels, got {in_h}x{in_w}"
    return None


def why_not_merged(conv: ConvShape, shortcut: ConvShape, dtype: torch.dtype) -> str | None:
    """Returns why one kernel can't run a block's last convolution and its projection, or None if it can.

    Args:
        conv: the convolution.
        shortcut: the projection.
        dtype: the dtype of both inputs and both weights.
    """
    for name, shape in (("the convolution", conv), ("the shortcut", shortcut)):
        if (reason := why_not(*shape, dtype)) is not None:
            return f"{name}: {reason}"
    if not shortcut.is_pointwise:
        kernel_h, kernel_w = shortcut.weight[2:]
        return f"the shortcut must be 1x1 without padding, got {kernel_h}x{kernel_w}, {shortcut.geometry.padding}"
    shapes = [shape.geometry.out_shape(shape.x, shape.weight) for shape in (conv, shortcut)]
    if shapes[0] != shapes[1]:
        return f"the shortcut must have the convolution's output shape {shapes[0]}, got {shapes[1]}"
    return None


def why_not_tile(conv: ConvShape, config: TmaConfig) -> str | None:
    """Returns why a tile can't run a convolution that `why_not` lets pass, or None if it can."""
    (batch, _, *in_size), (c_out, _, *kernel), geometry = conv
    if has_four_loops(conv, config.block_k) and not config.fits_four_loops:
        return "stride 2 on such sizes runs as four loops, and their stages don't fit into shared memory"
    if config.split_k == 1 and not config.flatten and not config.early:
        return None
    if has_four_loops(conv, config.block_k) and not (config.early and config.split_k == 1):
        return "stride 2 on such sizes runs as four loops; only a single loop can be split or flattened"
    tiles = cdiv(batch * prod(geometry.out_size(in_size, kernel)), config.block_m) * cdiv(c_out, config.block_n)
    if config.early and tiles > MOST_SHARES:
        return f"{tiles} tiles work so long that the time of a launch doesn't matter"
    if config.flatten:
        return None if tiles > FULL_MACHINE else f"{tiles} tiles are one for each program: there is no next one to load"
    return None if tiles * config.split_k <= MOST_SHARES else f"{tiles} tiles fill a machine without being split"


def has_four_loops(conv: ConvShape, block_k: int) -> bool:
    """Whether each parity of rows and columns needs a loop of its own: stride 2 on odd sizes, or with a ragged last step.

    In the view of pairs a ragged step would read the other column's channels. Their weights are zero, but zero times NaN or
    inf is NaN.
    """
    (_, c_in, in_h, in_w), _, geometry = conv
    return not conv.is_pointwise and geometry.stride != (1, 1) and bool(in_h % 2 or in_w % 2 or c_in % block_k)


@dataclass(frozen=True)
class LaunchPlan:
    """The part of a launch that depends on shapes only, by the names of the kernel's arguments.

    Attributes:
        views: how descriptors see the tensors, those included that may be None.
        integers: run-time numbers.
        constants: compile-time arguments.
        prepared: for launching.launch to fill.
    """

    views: dict[str, View]
    integers: dict[str, int]
    constants: dict[str, object]
    prepared: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    @cached_property
    def fixed(self) -> dict[str, object]:
        """All arguments but tensors."""
        return self.integers | self.constants


@dataclass(frozen=True)
class Plan(LaunchPlan):
    """Launch of conv.py's kernel.

    Attributes:
        config: the tile.
        y_shape: (N, C_out, out_h, out_w).
        max_registers: limit for a thread; None unless the compiler might take so many that fewer programs fit on an SM.
    """

    config: TmaConfig
    y_shape: tuple[int, int, int, int]
    max_registers: int | None


@lru_cache(_CACHED)
def plan(
    conv: ConvShape,
    activation: Activation | None,
    upcast: bool = False,
    config: TmaConfig | None = None,
    shortcut: ConvShape | None = None,
) -> Plan:
    """Lays out a convolution that `why_not` lets pass, for the launcher and the compile-only tests.

    Args:
        conv: the convolution.
        activation: comes last; None for none.
        upcast: whether products need fp32 operands (target.dot_needs_fp32).
        config: the tile; None to choose one.
        shortcut: a projection that `why_not_merged` lets pass, or None.
    """
    (batch, c_in, in_h, in_w), (c_out, _, kernel_h, kernel_w), geometry = conv
    pixels = (batch, *geometry.out_size((in_h, in_w), (kernel_h, kernel_w)))
    pad_h, pad_w = geometry.padding[0], geometry.padding[2]
    taps, stride = kernel_h * kernel_w, 1 if conv.is_pointwise else geometry.stride[0]
    config = config or choose_config(
        prod(pixels), taps, c_in, c_out, may_split=shortcut is None, four_loops=has_four_loops(conv, 64)
    )
    ragged, four_loops = c_in % config.block_k != 0, has_four_loops(conv, config.block_k)
    in_pairs = stride == 2 and not four_loops
    assert config.split_k == 1 or not (shortcut or four_loops), f"{config} would split several loops"
    if all(shape.is_pointwise and shape.geometry.stride == (1, 1) for shape in (conv, shortcut or conv)):
        pixels = (1, 1, prod(pixels))
    box = choose_box(config.block_m, pixels)
    tiles = [cdiv(size, side) for size, side in zip((*pixels, c_out), (*box, config.block_n))]
    assert config.split_k == 1 or prod(tiles) * config.split_k < 2**18, (
        f"{config} on {prod(tiles)} tiles: offsets are int32"
    )
    if conv.is_pointwise:
        views = {"x_desc": _pointwise(conv, pixels, (*box, config.block_k))}
    elif in_pairs:
        views = {
            "x_desc": dense_view((batch, in_h // 2, 2, in_w // 2, 2 * c_in), (*box[:2], 1, box[2], config.block_k))
        }  # fmt: skip
    elif stride == 2:
        views = _parities(conv.x, (*box, config.block_k))
    else:
        views = {"x_desc": dense_view((batch, in_h, in_w, c_in), (*box, config.block_k))}
    # In a ragged last step the weight must not be the next tap's: it is zero there, as x is, so that no inf leaks in.
    views["w_desc"] = (
        dense_view((c_out, taps, c_in), (config.block_n, 1, config.block_k))
        if ragged
        else dense_view((c_out, taps * c_in), (config.block_n, config.block_k))
    )
    views["y_desc"] = views["residual_desc"] = dense_view(
        (*pixels, c_out), (*first_part(box, config.parts), config.block_n)
    )
    if shortcut:
        views["shortcut_desc"] = _pointwise(shortcut, pixels, (*box, config.block_k))
        views["shortcut_w_desc"] = dense_view(shortcut.weight[:2], (config.block_n, config.block_k))
    return Plan(
        views,
        dict(
            n_tiles=prod(tiles),
            tiles_h=tiles[1],
            tiles_w=tiles[2],
            tiles_c=tiles[3],
            c_out=c_out,
            in_h=in_h,
            in_w=in_w,
            lead_h=cdiv(pad_h, stride),
            lead_w=cdiv(pad_w, stride),
        ),
        dict(
            KERNEL_H=kernel_h,
            KERNEL_W=kernel_w,
            N_CHUNKS=cdiv(c_in, config.block_k),
            SHORTCUT_CHUNKS=cdiv(shortcut.weight[1], config.block_k) if shortcut else 0,
            RAGGED=ragged,
            IN_PAIRS=in_pairs,
            SKEW_H=pad_h % stride,
            SKEW_W=pad_w % stride,
            # With a shortcut the kernel would spill.
            SKIP=box[1:] == (1, 1) and taps > 1 and not in_pairs and not shortcut,
            SPLIT_K=config.split_k,
            FLATTEN=config.flatten,
            EARLY=config.early,
            **as_constexprs(activation),
            UPCAST=upcast,
            BOX_N=box[0],
            BOX_H=box[1],
            BOX_W=box[2],
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            PARTS=config.parts,
        ),
        config,
        geometry.out_shape(*conv[:2]),
        # Triton 3.6.0 takes up to 134 for a merged shortcut, and far less than the limit without one.
        128 if shortcut and config.num_warps * config.programs_per_sm == 16 else None,
    )


def _pointwise(conv: ConvShape, pixels: tuple[int, int, int], box: tuple[int, ...]) -> View:
    """Returns x as a 1x1 convolution sees it: every stride-th pixel, or at stride 1 all pixels in the form of `pixels`."""
    _, c_in, in_h, in_w = conv.x
    step_h, step_w = conv.geometry.stride
    if step_h == step_w == 1:
        return dense_view((*pixels, c_in), box)
    return View((*pixels, c_in), (in_h * in_w * c_in, step_h * in_w * c_in, step_w * c_in, 1), box)


def _parities(x_shape: tuple[int, ...], box: tuple[int, ...]) -> dict[str, View]:
    """Returns four views of x: every second row and column, from the first or the second on."""
    batch, c_in, in_h, in_w = x_shape
    strides = (in_h * in_w * c_in, 2 * in_w * c_in, 2 * c_in, 1)
    return {
        name: View((batch, (in_h + 1 - p) // 2, (in_w + 1 - q) // 2, c_in), strides, box, (p * in_w + q) * c_in)
        for name, p, q in (("x_desc", 0, 0), ("x01_desc", 0, 1), ("x10_desc", 1, 0), ("x11_desc", 1, 1))
    }


def first_part(box: tuple[int, int, int], parts: int) -> tuple[int, ...]:
    """Returns the sides of one of `parts` equal pieces of a box, cut in the order of its pixels: images first, then rows."""
    sides = []
    for side in box:
        sides.append(max(side // parts, 1))
        parts = max(parts // side, 1)
    return tuple(sides)
