"""A linear layer's packed weight, and a BN's before it, for the head of a chain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...graph.fusible import BatchNorm
from ...kernels.cpu import convolution, library, plans
from ...kernels.cpu.convolution import Bound
from ...kernels.geometry import Geometry
from ..parts import bn_tensors
from .packed_norm import PackedNorm
from .watched_tensors import WatchedTensors


class PackedLinear:
    """A linear layer as a 1x1 convolution of images of one pixel, on a kernel of ours.

    Args:
        linear: nn.Linear, or a 1x1 convolution.
        path: of the layer, for profilers. pool_path: of the pool before it, or of the BN.
        bn: whose result goes through a ReLU and the pool; in eval mode. None for none.
    """

    __slots__ = ("_bias", "_linear", "_packed", "_shape", "_takes_norm", "_watched", "norm", "path", "pool_path")

    def __init__(self, linear: nn.Linear | nn.Conv2d, path: str, pool_path: str, bn: BatchNorm | None = None):
        self._linear, self.path, self.pool_path = linear, path, pool_path
        self.norm = None if bn is None else PackedNorm(bn)
        # Eager refuses to mix dtypes. A frozen BN has no affine=False.
        vectors = bn_tensors(bn)
        is_lax = bn is None or isinstance(bn, nn.modules.batchnorm._BatchNorm)
        self._takes_norm = all(_is_plain(vector, 1) if vector is not None else is_lax for vector in vectors)
        # Before they are read: what another thread changes meanwhile is noticed.
        self._watched = WatchedTensors([linear])
        weight, bias = linear.weight.detach(), linear.bias
        self._bias = self._packed = None
        if weight.dim() == 4 and weight.shape[2:] == (1, 1):
            weight = weight[:, :, 0, 0]
        self._shape = (*weight.shape, 1, 1)
        # PyTorch broadcasts a bias of another shape, and knows other kinds of tensors.
        if _is_plain(weight, 2) and (bias is None or (_is_plain(bias, 1) and len(bias) == len(weight))):
            self._packed = convolution.pack("direct", weight[:, :, None, None], is_kept=True)
            # Not the user's own memory: our kernels keep an address.
            self._bias = None if bias is None else bias.detach().clone().contiguous()

    @property
    def can_run(self) -> bool:
        """Whether the weight, the bias and the BN's vectors are ones that our kernels take."""
        return self._packed is not None and self._takes_norm

    def is_of(self, linear: nn.Module, bn: BatchNorm | None = None) -> bool:
        """Whether it was made from this layer, this BN and their tensors, whatever the values."""
        norm = bn is None if self.norm is None else self.norm.is_of(None, bn)
        return norm and linear is self._linear and self._watched.are_same()

    def is_unchanged(self, linear: nn.Module, bn: BatchNorm | None = None) -> bool:
        """Whether it still matches its layer and its BN."""
        norm = bn is None if self.norm is None else self.norm.is_unchanged(None, bn)
        return norm and linear is self._linear and self._watched.are_unchanged()

    def bound(self, batch: int, channels: int) -> Bound | None:
        """The kernel for a batch; None if the weights can't be packed, or don't fit."""
        if self._packed is None or channels != self._shape[1]:
            return None
        shapes, threads = plans.Shapes((batch, channels, 1, 1), self._shape, Geometry()), torch.get_num_threads()
        # Too few tasks for the threads are no reason here: a layer of few classes is done before another region begins.
        found = library.library_or_none()
        if found is None or (threads > 1 and found.parallel is None):
            return None
        return Bound("direct", shapes, self._packed, None, self._bias, threads)


def _is_plain(tensor: Tensor, dim: int) -> bool:
    """Whether a weight or a bias is one that our kernels read, in memory of the process's own."""
    is_dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.dtype == torch.float32
    return is_dense and tensor.dim() == dim and tensor.numel() > 0
