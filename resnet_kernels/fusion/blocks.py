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
    """Turns one block into its fused self, in place, and returns it.

    Raises:
        CannotRead: if its forward holds something that is not fused.
    """
    swap(module, FusedBlock, FusedState(reader.read(module).recipe(), backend))
    return module


def _fuse_if_readable(block: nn.Module) -> None:
    # A norm_layer, a downsample or a subclass may hold what is not fused. Such a block runs as plain PyTorch and says so once.
    try:
        fuse_block_(block)
    except CannotRead as reason:
        say_runs_eager(f"{type(block).__name__} was built unfused: {reason}")


class BasicBlock(resnet_v1.BasicBlock):
    """torchvision's BasicBlock, fused: two 3x3 convolutions; same signature, attributes, errors and state_dict keys.

    x: (N, inplanes, H, W), floating point -> (N, planes, H / stride, W / stride) in x's dtype.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: stride of the first convolution.
        downsample: the module on the shortcut; None adds x itself.
        groups: 1, as in torchvision.
        base_width: 64, as in torchvision.
        dilation: 1, as in torchvision.
        norm_layer: function that makes a norm from its number of channels; None is nn.BatchNorm2d.

    Raises:
        ValueError: if groups is not 1 or base_width is not 64.
        NotImplementedError: if dilation is above 1.

    Source: He et al. 2016 (arXiv:1512.03385), figure 5 left.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: resnet_v1.NormLayer | None = None,
    ):
        super().__init__(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer)
        _fuse_if_readable(self)


class Bottleneck(resnet_v1.Bottleneck):
    """torchvision's Bottleneck (v1.5: the stride is on the 3x3), fused: same signature, attributes and state_dict keys.

    x: (N, inplanes, H, W), floating point -> (N, 4 * planes, H / stride, W / stride) in x's dtype.

    Args:
        inplanes: channels of the input.
        planes: a quarter of the output's channels; the 3x3 convolution has planes * base_width / 64 * groups.
        stride: stride of the 3x3 convolution.
        downsample: the module on the shortcut; None adds x itself.
        groups: groups of the 3x3 convolution.
        base_width: channels of a group of the 3x3 convolution, where planes is 64.
        dilation: dilation of the 3x3 convolution.
        norm_layer: function that makes a norm from its number of channels; None is nn.BatchNorm2d.

    Source: He et al. 2016 (arXiv:1512.03385), figure 5 right.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: resnet_v1.NormLayer | None = None,
    ):
        super().__init__(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer)
        _fuse_if_readable(self)


class Residual(d2l.Residual):
    """d2l's Residual block, fused: two 3x3 convolutions with bias, and optionally a 1x1 shortcut without BN.

    x: (N, input_channels, H, W), floating point -> (N, num_channels, ceil(H / strides), ceil(W / strides)) in x's dtype.

    Args:
        input_channels: channels of the input.
        num_channels: channels of the output.
        use_1x1conv: whether the shortcut has a 1x1 convolution; needed where the shape changes.
        strides: stride of the first 3x3 convolution and of the shortcut.
        tf_padding: whether padding, BN and weights are those of the Keras text.

    Raises:
        TypeError: if a size or a stride is no int.
        ValueError: if one is below 1.

    Source: Zhang et al., d2l.ai, section 8.6.
    """

    def __init__(
        self,
        input_channels: int,
        num_channels: int,
        use_1x1conv: bool = False,
        strides: int = 1,
        *,
        tf_padding: bool = False,
    ):
        super().__init__(input_channels, num_channels, use_1x1conv, strides, tf_padding=tf_padding)
        _fuse_if_readable(self)


class PreactBottleneck(resnet_v2.PreactBottleneck):
    """slim's bottleneck_v2, fused: BN and ReLU come before the convolutions, and nothing follows the add.

    x: (N, in_channels, H, W), floating point -> (N, depth, ceil(H / stride), ceil(W / stride)) in x's dtype.

    Args:
        in_channels: channels of the input.
        depth: channels of the output.
        depth_bottleneck: channels of the 3x3 convolution.
        stride: stride of the 3x3 convolution and of the shortcut.

    Raises:
        TypeError: if an argument is no int.
        ValueError: if an argument is below 1.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks" (arXiv:1603.05027), figure 1(b).
    """

    def __init__(self, in_channels: int, depth: int, depth_bottleneck: int, stride: int = 1):
        super().__init__(in_channels, depth, depth_bottleneck, stride)
        _fuse_if_readable(self)
