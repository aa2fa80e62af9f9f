"""Packed weights for our own CPU kernels and for oneDNN.

On a GPU only a frozen model keeps folded weights: plan.py reads the live tensors in each call. On the CPU both kinds of kernel
read weights in an order of their own, so there is a packed copy of each, with BN's scale folded in: oneDNN has no per-channel
scale. `PackedConv.is_unchanged` has to notice every change of a copy's sources: watched_tensors.py. Only edits of single
weights that don't change the version can go unnoticed; call `resnet_kernels.refresh` after those.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...graph.fusible import BatchNorm
from ...kernels.activations import RELU, Last
from ...kernels.cpu import convolution, plans
from ...kernels.geometry import Geometry
from ...ops import cpu_candidates, onednn, reference, tuned_table
from ..parts import scale_shift, settings
from .watched_tensors import WatchedTensors

# Each layout is a copy of the weight. With oneDNN, ResNets at sizes from 64 to 512 need three on AVX2, and the plain one for
# small images; our kernels need one or two.
_MOST_LAYOUTS = 5
_MOST_SIZES = 256


def _setting() -> tuple[int, int]:
    """What a choice of a kernel rests on beside sizes: the number of threads, and the tables as they are."""
    return torch.get_num_threads(), tuned_table.generation()


class SizedConv(NamedTuple):
    """Packed convolution for inputs of one size.

    weight: None if folding overflowed. for_aten: whether PyTorch's own operation runs it. own: a kernel of ours that runs it.
    """

    geometry: Geometry
    arguments: tuple[Any, ...]
    weight: Tensor | None
    for_aten: bool
    own: convolution.Bound | None = None

    @property
    def is_one_call(self) -> bool:
        """Whether a call is a single kernel or operation."""
        return self.own is not None or (self.weight is not None and not self.for_aten and self.geometry.symmetric)


class PackedConv:
    """Convolution's weight and bias with BN folded in, packed in each layout that the sizes seen so far ask for.

    oneDNN's layout of a weight depends on the input's size. A weight in another layout is reordered in each call, at up to 14
    times eager's time (ResNet-18 on two AVX2 cores). Sizes with the same layout share a copy of the weight. Where folding
    overflows (a huge gamma over tiny weights), the layer runs unfolded.
    """

    __slots__ = (
        "_bn",
        "_conv",
        "_first",
        "_gain",
        "_offset",
        "_settings",
        "_sizes",
        "_unfolded",
        "_variants",
        "_watched",
        "_weights",
        "bias",
        "dtype",
    )

    def __init__(self, conv: nn.Conv2d, bn: BatchNorm | None, dtype: torch.dtype):
        self._conv, self._bn = conv, bn
        self._settings = settings(conv, bn)
        self.dtype = dtype
        # Before they are read: what another thread changes meanwhile is noticed.
        self._watched = WatchedTensors([conv] if bn is None else [conv, bn])
        scale, shift = scale_shift(conv.bias, bn)
        weight = self._folded(scale)
        bias = onednn.as_bias(shift, dtype)
        # Not the user's own memory: our kernels keep an address.
        self.bias = bias.clone() if bias is not None and bn is None else bias
        self._gain = weight.float().abs().sum((1, 2, 3)).max().item()
        self._offset = 0.0 if self.bias is None else self.bias.float().abs().max().item()
        self._unfolded = None
        if not (math.isfinite(self._gain) and math.isfinite(self._offset)):
            self._unfolded = conv.weight.detach().to(dtype), shift, scale
        # By layout: a kernel's name, oneDNN's descriptor, or None for channels_last, for ATen.
        self._weights: dict[bytes | str | None, Tensor] = {}
        # The folded weight until the first size comes.
        self._first: Tensor | None = weight
        self._sizes: dict[tuple, SizedConv] = {}
        self._variants: dict[tuple, convolution.Bound | None] = {}

    def _folded(self, scale: Tensor | None) -> Tensor:
        weight = self._conv.weight.detach()
        return (weight if scale is None else weight * scale.detach()[:, None, None, None]).to(self.dtype)

    def _folded_as_packed(self) -> Tensor:
        """Folded weight that all copies hold; a frozen model's live weight may differ by now."""
        if (first := self._first) is not None:
            return first
        if self.is_unchanged(self._conv, self._bn):
            return self._folded(scale_shift(self._conv.bias, self._bn)[0])
        # Winograd's copy comes last: its weights come back with another rounding.
        layout, weight = min(self._weights.items(), key=lambda item: item[0] == "winograd")
        if isinstance(layout, str):
            return convolution.unpack(layout, weight, self._conv.weight.shape)
        return weight.to_dense() if weight.is_mkldnn else weight

    def fits(self, x: Tensor) -> bool:
        """Whether it takes an x of this dtype and size; False if that needs one layout more than are kept."""
        return x.dtype == self.dtype and self.at(x.shape) is not None

    def at(self, shape: torch.Size) -> SizedConv | None:
        """Convolution for inputs of this shape, packed now if the size is new; None if there are too many layouts."""
        sized = self._sizes.get((shape, *_setting()))
        return self._add(shape) if sized is None else sized

    @property
    def channels(self) -> int:
        """Channels of its input."""
        return self._conv.weight.shape[1] * self._conv.groups

    def own(self, shape: torch.Size) -> convolution.Bound | None:
        """The kernel of ours that runs inputs of this shape, which it `fits`; None where oneDNN does."""
        return self._at(shape).own

    def _at(self, shape: torch.Size) -> SizedConv:
        sized = self.at(shape)
        assert sized is not None  # `fits` has said so
        return sized

    def _add(self, shape: torch.Size, folded: Tensor | None = None) -> SizedConv | None:
        geometry = Geometry.of_module(self._conv, shape[2:])
        if min(geometry.out_size(shape[2:], self._conv.weight.shape[2:])) < 1:
            # To ATen, whose error helps; oneDNN would only say that it could not construct a descriptor.
            return SizedConv(geometry, (), self._conv.weight.detach().to(self.dtype), True)
        if self._unfolded is None and (own := self._new_own(shape, geometry, folded)) is not None:
            return self._keep(shape, SizedConv(geometry, (), own.packed, False, own))
        for_aten = onednn.is_for_aten(shape, self.dtype, self._conv.weight.shape, geometry.stride)
        weight = None
        if self._unfolded is None:
            layout, weight = self._weight_for(shape, geometry, for_aten, folded)
            if layout not in self._weights and len(self._weights) >= _MOST_LAYOUTS:
                return None
            weight = self._weights.setdefault(layout, weight)
        return self._keep(shape, SizedConv(geometry, onednn.arguments(geometry), weight, for_aten))

    def _keep(self, shape: torch.Size, sized: SizedConv) -> SizedConv:
        if len(self._sizes) >= _MOST_SIZES:
            self._sizes.clear()
        self._sizes.update({(shape, *_setting()): sized})
        self._first = None
        return sized

    def activated(self, shape: torch.Size) -> convolution.Bound | None:
        """The kernel of ours that activates inputs of this shape, which it `fits`, on the way in; None if none does."""
        return self._variant(shape, None)

    def pooled(self, shape: torch.Size, pool: plans.Pool) -> convolution.Bound | None:
        """The kernel of ours with a max-pool behind it, for inputs of this shape, which it `fits`; None if none has."""
        return self._variant(shape, pool)

    def _variant(self, shape: torch.Size, pool: plans.Pool | None) -> convolution.Bound | None:
        key = shape, *_setting(), pool
        if key not in self._variants:
            if len(self._variants) >= _MOST_SIZES:
                self._variants.clear()
            self._variants[key] = self._new_variant(shape, pool)
        return self._variants[key]

    def _new_variant(self, shape: torch.Size, pool: plans.Pool | None) -> convolution.Bound | None:
        own = self._at(shape).own
        if own is None:
            return None
        if pool is None and own.name in ("winograd", "grouped"):
            return own
        shapes = own.shapes._replace(copies=True, pool=pool)
        threads = torch.get_num_threads()
        if plans.why_not("direct", shapes, self.dtype, threads) is not None:
            return None
        weight = self._weights.get("direct")
        if weight is None:
            weight = convolution.pack("direct", self._folded_as_packed(), is_kept=True)
        if weight is None:
            return None
        self._weights["direct"] = weight
        return convolution.Bound("direct", shapes, weight, None, self.bias, threads)

    def _new_own(self, shape: torch.Size, geometry: Geometry, folded: Tensor | None) -> convolution.Bound | None:
        """A kernel of ours for inputs of this shape; None where oneDNN or ATen is the choice."""
        weight_shape = tuple(self._conv.weight.shape)
        for name in cpu_candidates.for_packed(weight_shape, geometry, tuple(shape), self.dtype):
            weight = self._weights.get(name)
            if weight is None:
                if len(self._weights) >= _MOST_LAYOUTS:
                    return None
                folded = self._folded_as_packed() if folded is None else folded
                weight = convolution.pack(name, folded, is_kept=True)
            if weight is not None:
                self._weights[name] = weight
                shapes = cpu_candidates.own_shapes(tuple(shape), weight_shape, geometry)
                return convolution.Bound(name, shapes, weight, None, self.bias, torch.get_num_threads())
        return None

    def _weight_for(
        self, shape: torch.Size, geometry: Geometry, for_aten: bool, folded: Tensor | None
    ) -> tuple[bytes | None, Tensor]:
        """Returns oneDNN's layout for inputs of this shape, and the weight in it."""
        problem = onednn.problem(self._conv.weight.shape, self.dtype, geometry, shape)
        layout = None if for_aten else onednn.known_layout(problem)
        if layout is None and not for_aten and len(self._weights) > 1:
            # The layout is most likely a known one; the unfolded weight shows that without folding.
            unfolded = self._conv.weight.detach().to(self.dtype)
            layout = onednn.note_layout(problem, onednn.pack_weight(unfolded, geometry, shape))
        if (for_aten or layout is not None) and layout in self._weights:
            return layout, self._weights[layout]
        weight = self._folded_as_packed() if folded is None else folded
        if for_aten:
            # As x is: PyTorch's GEMM copies a weight in another layout in each call, which takes longer than the GEMM.
            return None, weight.contiguous(memory_format=torch.channels_last)
        weight = onednn.pack_weight(weight, geometry, shape)
        return onednn.note_layout(problem, weight), weight

    def is_of(self, conv: nn.Conv2d, bn: BatchNorm | None) -> bool:
        """Whether it was packed from these modules and their tensors, whatever the values, with these settings."""
        return self.has_settings(conv, bn) and self._watched.are_same()

    def is_unchanged(self, conv: nn.Conv2d, bn: BatchNorm | None) -> bool:
        """Whether the packed copies still match conv and bn."""
        return self.has_settings(conv, bn) and self._watched.are_unchanged()

    @property
    def sources(self) -> WatchedTensors:
        """The tensors that it was made from."""
        return self._watched

    def has_settings(self, conv: nn.Conv2d, bn: BatchNorm | None) -> bool:
        """Whether it was packed from these modules, with these settings."""
        return conv is self._conv and bn is self._bn and settings(conv, bn) == self._settings

    def bound(self, x_bound: float, offset: float | None = None) -> float:
        """Bound on the magnitude of bn(conv(x)), partial sums included, from a bound on x's."""
        return self._gain * x_bound + (self._offset if offset is None else offset)

    def out_shape(self, x_shape: torch.Size) -> torch.Size:
        """Output shape for an input that it `fits`."""
        return torch.Size(self._at(x_shape).geometry.out_shape(x_shape, self._conv.weight.shape))

    def call(self, sized: SizedConv, residual: object, activation: Last, overwrite_residual: bool) -> tuple[Any, ...]:
        """The single call that `__call__` makes if oneDNN's ReLU is safe, as onednn.call gives it; oneDNN has no other."""
        if sized.own is not None:
            return sized.own, False, (activation, overwrite_residual) if residual is not None else (None, activation)
        assert sized.weight is not None and activation in (None, RELU)  # it is one call
        return onednn.call(
            sized.weight, self.bias, residual is not None, sized.arguments, activation == RELU, overwrite_residual
        )

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        activation: Last,
        bound: float,
        overwrite_residual: bool,
    ) -> Tensor:
        """Returns act(bn(conv(x)) + residual); see onednn.run.

        It `fits` x. x and residual are channels_last; `bound` is a bound on the sum's magnitude, of use to oneDNN alone.
        """
        sized = self._at(x.shape)
        if sized.own is not None:
            return sized.own(x, residual, activation, overwrite_residual)
        if self._unfolded is not None:
            weight, shift, scale = self._unfolded
            return reference.conv_bias_act(x, weight, shift, residual, scale, sized.geometry, activation)
        assert sized.weight is not None
        if sized.for_aten:
            return reference.conv_bias_act(x, sized.weight, self.bias, residual, None, sized.geometry, activation)
        x = reference.pad_if_asymmetric(x, sized.geometry)
        return onednn.run(x, sized.weight, self.bias, residual, sized.arguments, activation, bound, overwrite_residual)
