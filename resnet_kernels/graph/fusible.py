"""The modules that can be fused, and the reasons why others cannot."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import GraphModule

from ..kernels.activations import Activation
from ..models.same_padding import Conv2dSame, MaxPool2dSame
from . import activations

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# In eval mode they return their input. In train() mode a block with one of them runs its own forward.
_QUIET = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
)  # fmt: skip
# Classes of libraries that need not be installed: the module where each is looked up, and its name.
_QUIET_ELSEWHERE = (
    ("torchvision.ops.stochastic_depth", "StochasticDepth"),
    ("torchvision.ops.drop_block", "DropBlock2d"),
    ("timm.layers.drop", "DropPath"),
    ("timm.layers.drop", "DropBlock2d"),
)
_FROZEN_BN = (("torchvision.ops.misc", "FrozenBatchNorm2d"),)  # weight, bias, running_mean, running_var as buffers
_BN_ACT = (("timm.layers.norm_act", "BatchNormAct2d"),)  # a BatchNorm2d with `drop` and `act`
POOLS = (nn.MaxPool2d, MaxPool2dSame, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_PRELU_ELSEWHERE = (("timm.layers.activations", "PReLU"),)

# Classes whose forward was found to be that of a frozen BN, and the eps that it has in its code; None for the attribute `eps`.
_frozen_bn_classes: weakref.WeakKeyDictionary[type[nn.Module], float | None] = weakref.WeakKeyDictionary()

# The classes that `is_batch_norm` accepts have the attributes of this one in common.
BatchNorm = nn.BatchNorm2d

NOT_MATERIALIZED = "is lazy and not materialized yet: run the model once, then fuse"


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was fused."""
    cls: type[nn.Module] = getattr(type(module), "_rk_original_class", type(module))
    return cls


def signature(module: nn.Module) -> tuple[Any, ...]:
    """The names and classes of all modules inside a module: what a recipe depends on besides numbers."""
    return tuple(
        (name, type(None))
        if child is None
        else (name, original_class(child), *([signature(child)] if child._modules else []))
        for name, child in module._modules.items()
    )


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, as nn.Sequential and many of its subclasses do."""
    return original_class(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def _is_one_of(cls: type, known: tuple[tuple[str, str], ...]) -> bool:
    """Whether a class is one of those known. A name alone says nothing: users give famous names to classes of their own."""
    return any(cls.__name__ == name and getattr(sys.modules.get(library), name, None) is cls for library, name in known)


def note_frozen_bn(cls: type[nn.Module], eps: float | None) -> None:
    """Remembers that the forward of a class is a frozen BN's (strangers.py). eps: in its code; None for its attribute."""
    _frozen_bn_classes[cls] = eps


def eps_of(bn: BatchNorm) -> float:
    """What a BN adds to its variance."""
    if type(bn) is nn.BatchNorm2d:
        return bn.eps  # at once, because each call asks
    eps = _frozen_bn_classes.get(type(bn))
    return bn.eps if eps is None else eps


def is_batch_norm(module: nn.Module | None) -> TypeIs[BatchNorm]:
    """Whether a module is a scale and a shift per channel in eval mode. An activation may follow, as in BatchNormAct2d."""
    cls = type(module)
    return (
        cls in (nn.BatchNorm2d, nn.SyncBatchNorm) or _is_one_of(cls, _FROZEN_BN + _BN_ACT) or cls in _frozen_bn_classes
    )


def is_frozen(bn: BatchNorm) -> bool:
    """Whether a BN normalizes by its running statistics, and leaves them as they are."""
    return not bn.training or not isinstance(bn, nn.modules.batchnorm._BatchNorm)


def has_act(bn: nn.Module) -> bool:
    """Whether a BN is timm's BatchNormAct2d, with dropout and activation behind it."""
    return _is_one_of(type(bn), _BN_ACT)


def activation_behind(bn: nn.Module) -> Activation | None:
    """The activation that a BN itself ends in; None if it ends in none."""
    return activations.of_module(bn._modules["act"]) if has_act(bn) else None


def is_global_average(module: nn.Module | None) -> bool:
    """Whether a module is PyTorch's average over whole images, down to one pixel."""
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))


def is_prelu(module: nn.Module | None) -> bool:
    """Whether a module is a PReLU, whose slopes are a weight."""
    return type(module) is nn.PReLU or _is_one_of(type(module), _PRELU_ELSEWHERE)


def is_called(module: nn.Module) -> bool:
    """Whether a block calls a module as itself, in a step of its own."""
    return type(module) in POOLS


def is_quiet(module: nn.Module | None) -> bool:
    """Whether a module returns its input in eval mode: Identity, dropout, drop path."""
    return type(module) in _QUIET or _is_one_of(type(module), _QUIET_ELSEWHERE)


def is_not_materialized(module: nn.Module) -> bool:
    """Whether a lazy module has not seen its first input yet."""
    return isinstance(module, nn.modules.lazy.LazyModuleMixin) and any(
        tensor is not None and nn.parameter.is_lazy(tensor)
        for tensor in (*module._parameters.values(), *module._buffers.values())
    )


def why_not_conv(conv: nn.Module) -> str | None:
    """The reason why a convolution cannot go into a fused kernel; None if it can."""
    if is_not_materialized(conv):
        return NOT_MATERIALIZED
    if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, Conv2dSame):
        name = type(conv).__name__
        # Libraries give their own classes PyTorch's name: torch.ao's reference of a quantized one.
        name = f"{type(conv).__module__}.{name}" if name == "Conv2d" else name
        return f"is a {name}, only Conv2d is fused"
    if conv.padding_mode != "zeros":
        return f"has padding_mode={conv.padding_mode!r}, only zeros are fused"
    return why_not_patched(conv)


def why_not_bn(bn: nn.Module) -> str | None:
    """The reason why a BN cannot be a scale and a shift; None if it can."""
    if is_not_materialized(bn):
        return NOT_MATERIALIZED
    if getattr(bn, "running_mean", None) is None or getattr(bn, "running_var", None) is None:
        return "has track_running_stats=False, so it needs each batch's own statistics"
    if has_act(bn):
        for name in ("drop", "act"):
            child = bn._modules[name]
            if name == "act" and child is not None and (reason := activations.why_not(child)):
                return f"has a {type(child).__name__} behind it that {reason}"
            if not (is_quiet(child) or (name == "act" and activations.of_module(child) is not None)):
                return f"has a {type(child).__name__} behind it, which is not fused"
            if child is not None and (reason := why_not_patched(child)):
                return f"has a {type(child).__name__} behind it that {reason}"
    return why_not_patched(bn)


def why_not_patched(module: nn.Module) -> str | None:
    """The reason why a module's class does not say what the module computes; None if it does."""
    if hasattr(module, "parametrizations"):
        return "has a parametrization"
    for name in ("forward", "_conv_forward", "_compiled_call_impl"):
        if module.__dict__.get(name) is not None:
            return f"has a {name} of its own, set on the instance"
    return "has a __call__ of its own" if has_own_call(type(module)) else None


def has_own_call(cls: type[nn.Module]) -> bool:
    """Whether a class's __call__ may do more than nn.Module's. A torch.fx.GraphModule's only words errors."""
    if cls.__call__ is nn.Module.__call__:
        return False
    of_fx = getattr(cls.__call__, "__module__", None) == GraphModule.__module__
    return not (of_fx and issubclass(cls, GraphModule))


def is_known(module: nn.Module) -> bool:
    """Whether a module's class is PyTorch's own, or one of the classes above: its forward needn't be read."""
    cls = type(module)
    own = cls.__module__.startswith("torch.nn.") or cls is Conv2dSame or cls in POOLS
    return own or is_batch_norm(module) or is_quiet(module)


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is one convolution with pool, norm and activation under one name: a part of a block."""
    children = list(module._modules.values())
    convs = sum(isinstance(child, nn.Conv2d) for child in children)
    others = sum(
        type(child) in POOLS or is_batch_norm(child) or is_quiet(child) or activations.of_module(child) is not None
        for child in children
    )
    return (
        convs == 1
        and convs + others == len(children)
        and not is_plain_sequential(module)
        and "forward" not in module.__dict__
    )


def is_plain_max_pool(module: nn.Module | None) -> TypeIs[nn.MaxPool2d]:
    """Whether a module is a MaxPool2d, or one with SAME padding, that returns nothing but the maxima."""
    return (
        isinstance(module, nn.MaxPool2d) and type(module) in (nn.MaxPool2d, MaxPool2dSame) and not module.return_indices
    )


def shared_children(module: nn.Module) -> set[str]:
    """The paths of modules that are registered more than once inside a module."""
    paths: dict[int, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        paths.setdefault(id(child), []).append(path)
    return {path for same in paths.values() if len(same) > 1 for path in same}
