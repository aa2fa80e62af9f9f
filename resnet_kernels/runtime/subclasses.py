"""Inputs of a subclass of Tensor, such as fastai's TensorImage, MONAI's MetaTensor and torchvision's Image.

Eager hands each operation to the subclass's `__torch_function__`, which decides what comes out: the subclass (Tensor's own
rule), a plain Tensor (torchvision's), or the subclass with its metadata (MONAI's). A fused block or run is one operation to
that rule, computed on the data as a plain Tensor. A subclass with a `__torch_dispatch__` of its own (DTensor, fake and
quantized tensors) may hold no data that kernels could read: it runs eager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..ops import backends
from ..ops.library import is_traced

# Tracers by class: eager goes without saying.
_TRACERS = (FakeTensor, FunctionalTensor)


def is_plain_subclass(x: Any) -> bool:
    """Whether x is a tensor whose class is a subclass of Tensor, and keeps its numbers as Tensor does; False for tracers."""
    cls = type(x)
    if cls is Tensor or cls is nn.Parameter or torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return False
    return cls.__torch_dispatch__ is Tensor.__torch_dispatch__ and not is_traced()


def as_plain(x: Any) -> Any:
    """A view of a plain subclass's data as a Tensor; anything else as it is."""
    return x.as_subclass(Tensor) if is_plain_subclass(x) else x


def why_not(x: Any) -> str:
    """The reason why the class of x runs eager; "" if it does not, or where that goes without saying: tracers, no tensors."""
    if not isinstance(x, Tensor) or type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ or isinstance(x, _TRACERS):
        return ""
    return f"{type(x).__name__} is a subclass of Tensor with a __torch_dispatch__ of its own"


# Classes of weights that kernels read. Subclasses of Parameter are added as they come.
_READ: set[type] = {Tensor, nn.Parameter, type(None)}


def are_known(convs: Iterable[nn.Module]) -> bool:
    """Whether `why_not_weights` has let the classes of all these convolutions' weights pass; 0.1 us each."""
    return all([type(conv._parameters.get("weight")) in _READ for conv in convs])


def why_not_weights(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The reason why the classes of the modules' own tensors ask for eager; None if kernels may read them all.

    Only subclasses of Parameter let PyTorch's operations read them without a rule of their own.
    """
    for path, module in modules:
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if (cls := type(tensor)) not in _READ:
                    if not _is_read(cls):
                        return f"{path}.{name} is a {cls.__name__}, which has rules of its own for operations"
                    _READ.add(cls)
    return None


def _is_read(cls: type) -> bool:
    return (
        issubclass(cls, nn.Parameter)
        and cls.__torch_dispatch__ is Tensor.__torch_dispatch__
        and cls.__torch_function__ is nn.Parameter.__torch_function__
    )


class _Refused(Exception):
    """What the rule hands to the operation cannot run fused."""


def by_its_rule(x: Tensor, compute: Callable[[Tensor], Tensor | None]) -> Any:
    """Returns what the class of x makes of compute(its data); None if its rule refuses the operation.

    Args:
        x: of a plain subclass.
        compute: the operation on a plain Tensor; None where that has to run eager.
    """
    if not torch.overrides.has_torch_function_unary(x):
        return compute(x.as_subclass(Tensor))  # a rule that is switched off: eager gives plain tensors, too
    began = False

    def fused_forward(x: Tensor) -> Tensor:
        nonlocal began
        if torch.overrides.has_torch_function_unary(
            x
        ):  # a mode (torch.device) was asked first: now it is the class's turn
            return torch.overrides.handle_torch_function(fused_forward, (x,), x)
        y = compute(x.as_subclass(Tensor))
        if y is None:
            raise _Refused
        began = True
        return y

    try:
        return fused_forward(x)
    except Exception as error:
        if began or not isinstance(error, _Refused | TypeError | NotImplementedError):
            raise
        reason = f"the __torch_function__ of {type(x).__name__} refuses fused operations"
        backends.say_once(f"{reason}; such calls run the model's own PyTorch code", 6)
        return None
