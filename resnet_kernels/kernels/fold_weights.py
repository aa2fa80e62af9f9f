"""Weights with BN's scale folded in, channels_last and in a call's dtype, all layers in one launch.

    weight' = weight * scale        bias' = shift (+ the shift of the projection that the layer adds)

The kernel reads the live weights, and the scales and shifts that bn_scale_shift.py has just written. It computes in fp32 and
rounds once. Each weight is read and written once. A convolution that applies its own bias and ReLU then needs no pass over its
output. Layers without a scale are copied: cast for autocast, or converted to the layout that cuDNN wants. The kernel takes a
table of addresses, which is copied to the device only when it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bn_scale_shift import DTYPES
from .launching import Launcher

# A tile is 2048 elements on 4 warps: two 16-byte loads a thread. A 1x1 with 64 input channels fills a quarter of it.
BLOCK_O = 8
BLOCK_K = 256
NUM_WARPS = 4
# Columns of the table. _row lists them in order.
FIELDS = tl.constexpr(10)


class Layer(NamedTuple):
    """A layer whose weight is copied.

    Attributes:
        weight: (C_out, C_in, kernel_h, kernel_w), contiguous or channels_last.
        scale: index of its first element in all layers' scales; None if the weight is not scaled.
        shift: index of its first element in all layers' shifts; None if the layer has no bias.
        more: index of the first element of another shift that is added to the bias, or None.
    """

    weight: Tensor
    scale: int | None = None
    shift: int | None = None
    more: int | None = None


@triton.jit
def _fold_weights_kernel(
    table_ptr,  # (n_layers, FIELDS) int64
    layers_ptr,  # (n_programs,) int32: the layer of each program
    scale_ptr,  # (all channels,) fp32
    shift_ptr,
    weights_ptr,  # all layers' weights, each (C_out, kernel_h, kernel_w, C_in)
    biases_ptr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_ptr = table_ptr + tl.load(layers_ptr + tl.program_id(0)) * FIELDS
    address, start = tl.load(row_ptr), tl.load(row_ptr + 1)
    c_out, n_k = tl.load(row_ptr + 2).to(tl.int32), tl.load(row_ptr + 3).to(tl.int32)
    source_ptr = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        source_ptr, start, n_k = tl.multiple_of(source_ptr, 16), tl.multiple_of(start, 16), tl.multiple_of(n_k, 16)
    # Programs of a layer: tiles of output channels x tiles of (taps, input channels), in the order of the source's memory.
    tile = tl.program_id(0) - tl.load(row_ptr + 4).to(tl.int32)
    n_tiles = tl.cdiv(n_k, BLOCK_K)
    offs_o = (tile // n_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_k = (tile % n_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_o = offs_o < c_out
    mask = mask_o[:, None] & (offs_k < n_k)[None, :]

    weight = tl.load(source_ptr + (offs_o[:, None] * n_k + offs_k[None, :]), mask=mask)
    scale_start = tl.load(row_ptr + 5)
    # A scale that is None has no elements.
    scale = tl.load(scale_ptr + scale_start + offs_o, mask=offs_o < tl.where(scale_start < 0, 0, c_out), other=1.0)
    folded = (weight.to(tl.float32) * scale[:, None]).to(weights_ptr.dtype.element_ty)
    inner = tl.load(row_ptr + 6).to(tl.int32)
    if inner == n_k:
        tl.store(weights_ptr + start + (offs_o[:, None] * n_k + offs_k[None, :]), folded, mask=mask)
    else:
        # From taps innermost to channels innermost: reads are in order, and L2 collects the scattered writes.
        offs_k = (offs_k % inner) * (n_k // inner) + offs_k // inner
        tl.store(weights_ptr + start + (offs_o[:, None] * n_k + offs_k[None, :]), folded, mask=mask)

    shift_start, more_start = tl.load(row_ptr + 7), tl.load(row_ptr + 8)
    # The first tile of each row of tiles writes the bias.
    c_out = tl.where(shift_start < 0, 0, tl.where(tile % n_tiles == 0, c_out, 0))
    mask_o = offs_o < c_out
    shift = tl.load(shift_ptr + shift_start + offs_o, mask=mask_o, other=0.0)
    shift += tl.load(shift_ptr + more_start + offs_o, mask=offs_o < tl.where(more_start < 0, 0, c_out), other=0.0)
    biases_ptr += tl.load(row_ptr + 9)
    tl.store(biases_ptr + offs_o, shift.to(biases_ptr.dtype.element_ty), mask=mask_o)


class Table:
    """Table of the layers' addresses on the device, and the kernel's launcher. It keeps no weight alive.

    Args:
        layers: their weights are such as `takes` accepts, of one dtype (fp32, fp16, bf16), on one device.
        dtype: the copies' dtype.
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype):
        weights = [layer.weight for layer in layers]
        self.addresses = [weight.data_ptr() for weight in weights]
        self.source, self.dtype, self.device = weights[0].dtype, dtype, weights[0].device
        self._has_bias = [layer.shift is not None for layer in layers]
        self._widths = [weight.shape[0] for weight in weights]
        rows, owners, start = list[tuple[int, ...]](), list[int](), 0
        for i, layer in enumerate(layers):
            rows.append(_row(layer, start, len(owners), sum(self._widths[:i])))
            owners += [i] * _programs(layer.weight)
            start += layer.weight.numel()
        self._numel = start
        # Then loads and stores of 16 bytes fit every address and row.
        aligned = all(row[0] % 16 == 0 and row[3] % 16 == 0 for row in rows)
        fixed = dict(DTYPE=DTYPES[self.source], ALIGNED=aligned, BLOCK_O=BLOCK_O, BLOCK_K=BLOCK_K)
        # Programs: the tiles of all layers.
        self._launcher = Launcher(_fold_weights_kernel, (len(owners),), fixed, NUM_WARPS)
        self._table = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self._owners = torch.tensor(owners, dtype=torch.int32, device=self.device)
        self._nothing = torch.empty(0, dtype=torch.float32, device=self.device)
        # Shapes without memory, from which one call makes views of all copies.
        self._like = [weight.permute(0, 2, 3, 1).detach().to("meta") for weight in weights]

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        """Whether the table holds these weights' addresses."""
        return [weight.data_ptr() for weight in weights] == self.addresses

    def launch(self, scale: Tensor | None, shift: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """Copies all weights.

        Args:
            scale: (all channels,) fp32; None if no layer has a scale.
            shift: (all channels,) fp32; None if no layer has a shift.

        Returns:
            (weight, bias) of each layer, the weight channels_last; bias is None for a layer without a shift.
        """
        scale, shift = (self._nothing if vector is None else vector for vector in (scale, shift))
        weights = torch.empty(self._numel, dtype=self.dtype, device=self.device)
        biases = torch.empty(sum(self._widths), dtype=self.dtype, device=self.device)
        self._launcher(
            self.device, table_ptr=self._table, layers_ptr=self._owners, scale_ptr=scale, shift_ptr=shift,
            weights_ptr=weights, biases_ptr=biases,
        )  # fmt: skip
        copies = torch._C._nn.unflatten_dense_tensors(weights, self._like)
        return [
            (copy.permute(0, 3, 1, 2), bias if has_bias else None)
            for copy, bias, has_bias in zip(copies, biases.split(self._widths), self._has_bias)
        ]


def takes(weight: Tensor) -> bool:
    """Whether the kernel can copy a weight: 4-d, of a dtype that it reads, contiguous or channels_last, not empty."""
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    return weight.dtype in DTYPES and weight.dim() == 4 and dense and 0 < weight.numel() < 2**31


def _row(layer: Layer, start: int, first_program: int, first_bias: int) -> tuple[int, ...]:
    """Returns a layer's row of the table, with -1 for an index that is None.

    Args:
        layer: the layer.
        start: index of its first element in weights_ptr.
        first_program: its first program.
        first_bias: index of its first element in biases_ptr.
    """
    c_out, n_k = layer.weight.shape[0], layer.weight[0].numel()
    in_order = layer.weight.is_contiguous(memory_format=torch.channels_last)
    # Elements that follow each other: a channel's taps, or the whole row if channels are innermost already.
    inner = n_k if in_order else layer.weight[0, 0].numel()
    starts = [-1 if at is None else at for at in (layer.scale, layer.shift, layer.more)]
    return (
        layer.weight.data_ptr(), start, c_out, n_k, first_program, starts[0], inner, starts[1], starts[2], first_bias
    )  # fmt: skip


def _programs(weight: Tensor) -> int:
    return triton.cdiv(weight.shape[0], BLOCK_O) * triton.cdiv(weight[0].numel(), BLOCK_K)
