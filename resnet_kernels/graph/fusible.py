"""Which modules can be fused, and why others can't."""

from __future__ import annotations

import operator

from torch import nn

from ..models.same_padding import Conv2dSame, MaxPool2dSame

# No numbers of their own in eval mode; a block with one of them in train() runs its own forward.
_QUIET_NAMES = frozenset(
    {"Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "DropPath",
     "DropBlock2d", "StochasticDepth"}
)  # fmt: skip


POOLS = (nn.MaxPool2d, MaxPool2dSame, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


_FROZEN_BN_NAME = "FrozenBatchNorm2d"  # torchvision.ops, detectron2: weight, bias, running_mean, running_var as buffers


_BN_ACT_NAME = "BatchNormAct2d"  # timm: a BatchNorm2d with `drop` and `act`


def original_class(module: nn.Module) -> type:
    """The class a module had before it was fused."""
    return getattr(type(module), "_rk_original_class", type(module))


def signature(module: nn.Module) -> tuple:
    """Names and classes of all modules below one: what a recipe depends on besides numbers."""
    return tuple(
        (name, original_class(child), signature(child))
        if child is not None and child._modules
        else (name, original_class(child))
        for name, child in module._modules.items()
    )


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, as nn.Sequential does (subclasses with names included)."""
    return original_class(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def is_batch_norm(module: nn.Module) -> bool:
    """A scale and a shift per channel in eval mode; a BatchNormAct2d has an activation behind it."""
    names = (_FROZEN_BN_NAME, _BN_ACT_NAME)
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or type(module).__name__ in names


def is_frozen(bn: nn.Module) -> bool:
    """Whether a BN takes its running statistics, and keeps them as they are."""
    return not bn.training or type(bn).__name__ == _FROZEN_BN_NAME


def has_act(bn: nn.Module) -> bool:
    """Whether a BN is timm's BatchNormAct2d, with dropout and activation behind it."""
    return type(bn).__name__ == _BN_ACT_NAME


def is_quiet(module: nn.Module) -> bool:
    """Whether a module returns its input in eval mode (Identity, dropout, drop path)."""
    return type(module).__name__ in _QUIET_NAMES


def why_not_conv(conv: nn.Module) -> str | None:
    """Why a convolution can't go into a fused kernel; None if it can."""
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin) and conv.has_uninitialized_params():
        return "is lazy and not materialised yet: run the model once, then fuse"
    if type(conv) not in (nn.Conv2d, Conv2dSame):
        return f"is a {type(conv).__name__}, only Conv2d is fused"
    if conv.padding_mode != "zeros":
        return f"has padding_mode={conv.padding_mode!r}, only zeros are fused"
    return why_not_patched(conv)


def why_not_bn(bn: nn.Module) -> str | None:
    """Why a BN can't be a scale and a shift; None if it can."""
    if isinstance(bn, nn.modules.lazy.LazyModuleMixin) and bn.has_uninitialized_params():
        return "is lazy and not materialised yet: run the model once, then fuse"
    if getattr(bn, "running_mean", None) is None:
        return "has track_running_stats=False, so it needs each batch's own statistics"
    if has_act(bn):
        for child in (bn.drop, bn.act):
            if not (is_quiet(child) or (child is bn.act and type(child) is nn.ReLU)):
                return f"has a {type(child).__name__} behind it, which is not fused"
            if why_not_patched(child):
                return f"has a {type(child).__name__} behind it that {why_not_patched(child)}"
    return why_not_patched(bn)


def why_not_patched(module: nn.Module) -> str | None:
    if hasattr(module, "parametrizations"):
        return "has a parametrization"
    if "forward" in module.__dict__:
        return "has a forward of its own, set on the instance"
    return None


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is a convolution, pool, norm and activation under a name: no block, only a part of one."""
    children = list(module._modules.values())
    parts = [type(child) in (nn.ReLU, *POOLS) or is_batch_norm(child) or is_quiet(child) for child in children]
    convs = [isinstance(child, nn.Conv2d) for child in children]
    return (
        sum(convs) == 1
        and all(map(operator.or_, parts, convs))
        and not is_plain_sequential(module)
        and "forward" not in module.__dict__
    )


def is_plain_max_pool(module: nn.Module) -> bool:
    return type(module) is nn.MaxPool2d and not module.return_indices and why_not_patched(module) is None


def shared_children(module: nn.Module) -> set[str]:
    """Paths of children that are registered more than once below a module."""
    paths: dict[int, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        paths.setdefault(id(child), []).append(path)
    return {path for same in paths.values() if len(same) > 1 for path in same}
