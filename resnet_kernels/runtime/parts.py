"""A step of a recipe together with its live modules."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..graph import fusible
from ..graph.fusible import BatchNorm
from ..graph.recipe import CallStep, ConvStep, NormStep, PReLUAt
from ..kernels.activations import Last, PReLU
from ..kernels.geometry import plain_pair
from ..ops import reference


class ConvPart(NamedTuple):
    """A convolution and what follows it. path: the path of the block that the step is from. prelu: the step ends in it."""

    step: ConvStep
    conv: nn.Conv2d
    bn: BatchNorm | None
    path: str = ""
    prelu: nn.PReLU | None = None


class NormPart(NamedTuple):
    """A BN that comes before its convolution."""

    step: NormStep
    bn: BatchNorm
    path: str = ""
    prelu: nn.PReLU | None = None


class CallPart(NamedTuple):
    """A call. child: the module to call; None for an add or an activation."""

    step: CallStep
    child: nn.Module | None
    path: str = ""


Part = ConvPart | NormPart | CallPart


def last_of(part: ConvPart | NormPart) -> Last:
    """What a part ends in: of a PReLU, with its slopes as they are now."""
    activation = part.step.activation
    if not isinstance(activation, PReLUAt):
        return activation
    assert part.prelu is not None
    return PReLU(part.prelu.weight)


def label(part: Part) -> str:
    """The name of a part, as profilers show it: "layer1.0.conv1+bn1+relu"."""
    return f"{part.path}.{part.step}".lstrip(".")


# The paths of a convolution and of a BN in a module. One convolution may be called with a BN behind it, and without.
PackName = tuple[str | None, str | None]


def pack_name(part: ConvPart | NormPart) -> PackName:
    """What a part's packed weight, or packed BN, is kept by."""
    return part.step.conv if isinstance(part, ConvPart) else None, part.step.bn


def settings(child: nn.Module | None, bn: BatchNorm | None = None) -> tuple[Any, ...]:
    """The settings of modules that a plan or a packed weight rests on.

    Args:
        child: a convolution or a max-pool; other modules have no settings of interest.
        bn: the BN that follows.
    """
    eps = None if bn is None else fusible.eps_of(bn)
    if isinstance(child, nn.Conv2d):
        stride, padding, dilation = child.stride, child.padding, child.dilation
        if not type(stride) is type(padding) is type(dilation) is tuple:
            stride, padding, dilation = plain_setting(stride), plain_setting(padding), plain_setting(dilation)  # type: ignore[assignment]  # anything
        return stride, padding, dilation, child.groups, child.padding_mode, eps
    if type(child) is nn.MaxPool2d:
        return *window_of(child), child.return_indices, eps
    return (eps,)


def window_of(pool: nn.MaxPool2d) -> tuple[Any, ...]:
    """Kernel size, stride, padding and dilation of a pool, each an int or a pair, and its ceil_mode."""
    return *map(plain_setting, (pool.kernel_size, pool.stride, pool.padding, pool.dilation)), pool.ceil_mode


def plain_setting(setting: object) -> object:
    """A module's setting as a value that does not change: a user's list may, and NumPy's arrays don't compare as a whole."""
    if type(setting) in (int, str):
        return setting
    pair = plain_pair(setting)
    if pair is None:
        return str(setting)  # eager rejects it
    return pair[0] if pair[0] == pair[1] else pair


def bn_tensors(bn: BatchNorm | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """A BN's (weight, bias, running_mean, running_var); four times None for no BN."""
    return (None, None, None, None) if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var)


def scale_shift(conv_bias: Tensor | None, bn: BatchNorm | None) -> tuple[Tensor | None, Tensor | None]:
    """A BN in eval mode as (scale, shift), (C_out,) in fp32 each, computed from the live tensors.

    Without a BN they are (None, the convolution's bias).
    """
    if bn is None:
        return None, conv_bias
    assert bn.running_mean is not None and bn.running_var is not None  # fusible.why_not_bn
    eps = fusible.eps_of(bn)
    return reference.bn_scale_shift(bn.weight, bn.bias, bn.running_mean, bn.running_var, conv_bias, eps)
