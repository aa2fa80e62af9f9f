"""A BN's scale and shift, kept until it changes: of a BN that comes before its convolution."""

from __future__ import annotations

import torch
from torch import nn

from ...graph import fusible
from ...graph.fusible import BatchNorm
from ...kernels.cpu.convolution import Preactivation
from ..parts import scale_shift
from .watched_tensors import WatchedTensors


class PackedNorm:
    """A BN in eval mode as act(x * scale + shift), with the interface of PackedConv's checks.

    Attributes:
        dtype: of the vectors.
        preactivation: without what follows; None if the BN's vectors differ in length, where eager has an error to raise.
    """

    __slots__ = ("_bn", "_eps", "_watched", "preactivation")
    dtype = torch.float32

    def __init__(self, bn: BatchNorm):
        self._bn, self._eps = bn, fusible.eps_of(bn)
        # Before they are read: what another thread changes meanwhile is noticed.
        self._watched = WatchedTensors([bn])
        scale, shift = scale_shift(None, bn)
        assert scale is not None and shift is not None
        scale, shift = (vector.detach().float().contiguous() for vector in (scale, shift))
        self.preactivation = Preactivation(scale, shift, False) if scale.shape == shift.shape else None

    @property
    def sources(self) -> WatchedTensors:
        """The tensors that it was made from."""
        return self._watched

    def has_settings(self, conv: nn.Conv2d | None, bn: BatchNorm | None) -> bool:
        """Whether it was made from this BN, with its present eps; `conv` is None."""
        return conv is None and bn is self._bn and fusible.eps_of(self._bn) == self._eps

    def is_of(self, conv: nn.Conv2d | None, bn: BatchNorm | None) -> bool:
        """Whether it was made from this BN and its tensors, whatever the values."""
        return self.has_settings(conv, bn) and self._watched.are_same()

    def is_unchanged(self, conv: nn.Conv2d | None, bn: BatchNorm | None) -> bool:
        """Whether it still matches its BN."""
        return self.has_settings(conv, bn) and self._watched.are_unchanged()
