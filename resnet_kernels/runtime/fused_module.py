"""A fused module: its class, swapped in place and back, and how it is pickled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..graph import fusible
from .state import FusedState, state_of

if TYPE_CHECKING:
    from typing_extensions import Self, TypeIs

# The mixin's other base is the user's class, a subclass of nn.Module.
if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


def drop_copies(module: nn.Module) -> None:
    """Forgets the copies of a fused module's weights; the next call makes them anew."""
    if (state := state_of(module)) is not None:
        state.drop_copies()


class Fused(_Base):
    """Mixin of all fused modules: forward, pickling, and the calls that announce new weights: train, .to(), loading."""

    _rk_original_class: type[nn.Module]
    _rk_mixin: type[Fused]

    def _rk_forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of the fused module. original: the forward of its own class."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Sets the mode, as nn.Module.train does, and drops the copies of weights when training begins."""
        if mode:
            drop_copies(self)
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        try:
            return super()._apply(fn, recurse)
        finally:
            # Afterwards: what another thread makes meanwhile goes, too.
            drop_copies(self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Called for each module, but before its children's weights are loaded.
        drop_copies(self)
        super()._load_from_state_dict(*args, **kwargs)

    @functools.wraps(nn.Module.load_state_dict)
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # the user's class may take others
        """Loads weights, as nn.Module.load_state_dict does, and drops the copies of the old ones."""
        try:
            return super().load_state_dict(*args, **kwargs)
        finally:
            for module in self.modules():
                drop_copies(module)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self)._rk_original_class, type(self)._rk_mixin), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


_classes: dict[tuple[type[nn.Module], type[Fused]], type[Fused]] = {}


def fused_class(original: type[nn.Module], mixin: type[Fused]) -> type[Fused]:
    """The subclass of a user's class that a fused module has; it bears the same name."""
    if (found := _classes.get((original, mixin))) is not None:
        return found

    @functools.wraps(original.forward)  # torch.fx reads the argument names through __wrapped__
    def forward(self: Fused, *args: Any, **kwargs: Any) -> Any:
        return self._rk_forward(original.forward, args, kwargs)

    names = {
        "forward": forward,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_rk_original_class": original,
        "_rk_mixin": mixin,
    }
    return _classes.setdefault((original, mixin), type(original.__name__, (mixin, original), names))


def _rebuild(original: type[nn.Module], mixin: type[Fused]) -> Fused:
    cls = fused_class(original, mixin)
    return cls.__new__(cls)


def is_fused(module: nn.Module) -> TypeIs[Fused]:
    """Whether this very module is fused, by `fuse_` or by a fused constructor."""
    return isinstance(module, Fused) and state_of(module) is not None


def swap(module: nn.Module, mixin: type[Fused], state: FusedState[Any]) -> None:
    """Turns a module into its fused self, in place."""
    module.__dict__["_rk_state"] = state
    module.__class__ = fused_class(fusible.original_class(module), mixin)


def swap_back(module: nn.Module) -> None:
    """Undoes `swap`."""
    module.__class__ = fusible.original_class(module)
    module.__dict__.pop("_rk_state", None)
