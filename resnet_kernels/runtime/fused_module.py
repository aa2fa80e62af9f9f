"""A fused module: its class, swapped in place and back, and how it is pickled."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from ..graph import fusible
from .state import FusedState, drop_copies


class Fused:
    """Mixin of all fused modules: forward, pickling, and the calls that announce new weights: train, .to(), loading."""

    _rk_original_class: type

    def train(self, mode: bool = True):
        if mode:
            drop_copies(self)
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True):
        try:
            return super()._apply(fn, recurse)
        finally:
            # Afterwards: what another thread makes meanwhile goes, too.
            drop_copies(self)

    def _load_from_state_dict(self, *args, **kwargs):
        # Called for each module, but before its children's weights are loaded.
        drop_copies(self)
        super()._load_from_state_dict(*args, **kwargs)

    @functools.wraps(nn.Module.load_state_dict)
    def load_state_dict(self, *args, **kwargs):
        try:
            return super().load_state_dict(*args, **kwargs)
        finally:
            for module in self.modules():
                drop_copies(module)

    def __reduce_ex__(self, protocol: int):
        return _rebuild, (type(self)._rk_original_class, type(self)._rk_mixin), self.__getstate__()

    def __getstate__(self) -> dict:
        return self.__dict__.copy()


@functools.cache
def fused_class(original: type, mixin: type) -> type:
    """The subclass that stands for `original` when fused; it bears the same name."""

    @functools.wraps(original.forward)  # torch.fx reads the argument names through __wrapped__
    def forward(self, *args, **kwargs):
        return self._rk_forward(original.forward, args, kwargs)

    names = {
        "forward": forward,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_rk_original_class": original,
        "_rk_mixin": mixin,
    }
    return type(original.__name__, (mixin, original), names)


def _rebuild(original: type, mixin: type) -> nn.Module:
    cls = fused_class(original, mixin)
    return cls.__new__(cls)


def is_fused(module: nn.Module) -> bool:
    """Whether fuse_ (or a fused constructor) has swapped this very module."""
    return isinstance(module, Fused) and "_rk_state" in module.__dict__


def swap(module: nn.Module, mixin: type, state: FusedState) -> None:
    """Turns a module into its fused self, in place."""
    module.__dict__["_rk_state"] = state
    module.__class__ = fused_class(fusible.original_class(module), mixin)


def swap_back(module: nn.Module) -> None:
    """Undoes `swap`."""
    module.__class__ = fusible.original_class(module)
    module.__dict__.pop("_rk_state", None)
