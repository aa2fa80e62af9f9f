"""Fused blocks to build with: BasicBlock, Bottleneck, PreactBottleneck, Residual."""

from __future__ import annotations

from torch import nn

from ..graph import reader
from ..graph.recipe import CannotRead
from ..models import d2l, resnet_v1, resnet_v2
from ..runtime.eligibility import say_runs_eager
from ..runtime.fused_block import FusedBlock
from ..runtime.fused_module import swap
from ..runtime.state import FusedState


def fuse_block_(module: nn.Module, backend: str = "auto") -> nn.Module:
    """Turns one block into its fused self, in place.

    Raises:
        CannotRead: if its forward holds something that is not fused.
    """
    swap(module, FusedBlock, FusedState(reader.read(module).recipe(), backend))
    return module


class BasicBlock(resnet_v1.BasicBlock):
    """torchvision's BasicBlock, fused: same signature, attributes, errors and state_dict keys.

    x: (N, inplanes, H, W) -> (N, planes, H / stride, W / stride). Source: He et al. 2016, figure 5 left.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _fuse_if_readable(self)


class Bottleneck(resnet_v1.Bottleneck):
    """torchvision's Bottleneck (v1.5: the stride is on the 3x3), fused: same signature, attributes, errors and keys.

    x: (N, inplanes, H, W) -> (N, 4 * planes, H / stride, W / stride). Source: He et al. 2016, figure 5 right.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _fuse_if_readable(self)


class Residual(d2l.Residual):
    """d2l's Residual block, fused: 3x3 convolutions with bias, and a 1x1 shortcut without BN where asked for.

    x: (N, input_channels, H, W) -> (N, num_channels, H / strides, W / strides). Source: Zhang et al., d2l.ai, section 8.6.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _fuse_if_readable(self)


class PreactBottleneck(resnet_v2.PreactBottleneck):
    """slim's bottleneck_v2, fused: BN and ReLU before the convolutions, the raw add inside the last one.

    x: (N, in_channels, H, W) -> (N, depth, ceil(H / stride), ceil(W / stride)). Source: He et al. 2016 (arXiv:1603.05027),
    figure 1(b).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _fuse_if_readable(self)


def _fuse_if_readable(block: nn.Module) -> None:
    # A norm_layer, downsample or subclass may hold what is not fused: the block then runs as plain PyTorch.
    try:
        fuse_block_(block)
    except CannotRead as reason:
        say_runs_eager(f"{type(block).__name__} was built unfused: {reason}")
