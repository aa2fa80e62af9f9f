"""A fused module: its class, swapped in place and back, and how it is pickled."""

from __future__ import annotations

import copy
import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx import GraphModule

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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A class that fusing makes is not the user's: it has no place in a registry, and lacks the arguments of one.
        if "_rk_original_class" not in cls.__dict__:
            super().__init_subclass__(**kwargs)

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        """Follows the class's own way of pickling, with the class as it was before, and adds what fusing added."""
        cls, original, state = type(self), _unfused(type(self)), state_of(self)
        if isinstance(self, GraphModule):
            reduced = _without_fusing(self).__reduce_ex__(protocol)
        else:
            reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        make, args, *rest = reduced
        make, *args = (original if value is cls else value for value in (make, *args))
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != "_rk_state"}
        if state is None:
            return make, (*args,), *rest
        of = original.__module__, original.__qualname__
        return _restore, (make, (*args,), of, cls._rk_mixin, state), *rest

    def __setstate__(self, values: Any) -> None:
        state = state_of(self)
        super().__setstate__(values)
        if state is not None:
            self.__dict__["_rk_state"] = state  # it may have replaced the whole __dict__


# By the id of the user's class, which the fused class keeps alive. No reference keeps the fused class.
_classes: weakref.WeakValueDictionary[tuple[int, type[Fused]], type[Fused]] = weakref.WeakValueDictionary()
_classes_lock = threading.Lock()


def fused_class(original: type[nn.Module], mixin: type[Fused]) -> type[Fused]:
    """The subclass of a user's class that a fused module has; it bears the same name."""
    with _classes_lock:
        if (found := _classes.get((id(original), mixin))) is None:
            found = _classes[id(original), mixin] = _make_class(original, mixin)
        return found


def _make_class(original: type[nn.Module], mixin: type[Fused]) -> type[Fused]:
    if _is_of_fsdp(original):
        # FSDP's class has to stay outermost: it finds the class beneath it by its place among the bases.
        below = original.__bases__[-1]
        own = {"_rk_original_class": original, "_rk_mixin": mixin}
        return _over(original, below, _make_class(below, mixin), own)

    @functools.wraps(original.forward)  # torch.fx reads the argument names through __wrapped__
    def forward(self: Fused, *args: Any, **kwargs: Any) -> Any:
        # A user's class over this one may call it after unfuse_, and after another fuse_, whose state is of that class.
        if getattr(type(self), "_rk_forward_of", None) is not original:
            return original.forward(self, *args, **kwargs)
        # Not self._rk_forward: unfuse_ in another thread may have swapped the class back by now.
        return mixin._rk_forward(self, original.forward, args, kwargs)

    names: dict[str, Any] = {
        "forward": forward,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_rk_original_class": original,
        "_rk_forward_of": original,  # for FSDP the class beneath the original one
        "_rk_mixin": mixin,
    }
    if hasattr(original, "__deepcopy__"):
        names["__deepcopy__"] = _deepcopy
    if issubclass(original, GraphModule):
        names["recompile"] = _recompile
    return type(original.__name__, (mixin, original), names)


def _is_of_fsdp(cls: type[nn.Module]) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and issubclass(cls, fsdp.FSDPModule)


def _over(cls: type[Any], old: type[Any], new: type[Any], names: dict[str, Any]) -> type[Any]:
    """The class that `cls` is over one of its bases, made over another base."""
    bases = tuple(new if base is old else base for base in cls.__bases__)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    metaclass: Any = type(cls)
    made: type[Any] = metaclass(cls.__name__, bases, {**own, **names})
    return made


def _unfused(cls: type[Any]) -> type[Any]:
    """The class without what fusing added. PyTorch may have put a class of its own over a fused one since (FSDP)."""
    fused = next((base for base in cls.__mro__ if "_rk_original_class" in vars(base)), None)
    if fused is None:
        return cls
    original: type[Any] = vars(fused)["_rk_original_class"]
    return original if fused is cls else _over(cls, fused, original, {})


def _deepcopy(self: Fused, memo: dict[int, Any]) -> Any:
    """Follows the class's own __deepcopy__; the copy is fused, too."""
    state, original = state_of(self), _unfused(type(self))
    of_fx = isinstance(self, GraphModule)
    copied = original.__deepcopy__(_without_fusing(self) if of_fx else self, memo)
    memo[id(self)] = copied
    # Each GraphModule has a class of its own.
    is_same = type(copied) in (type(self), original) or of_fx
    if state is not None and is_same and state_of(copied) is None:
        swap(copied, type(self)._rk_mixin, copy.deepcopy(state, memo))
    return copied


def _without_fusing(module: nn.Module) -> nn.Module:
    """The module as it was before it was fused, with the same children and tensors. torch.fx looks at its class's bases."""
    plain: nn.Module = object.__new__(_unfused(type(module)))
    plain.__dict__.update((name, value) for name, value in module.__dict__.items() if name != "_rk_state")
    return plain


def _recompile(self: Any) -> Any:
    """Follows torch.fx, which sets another forward on the class; the next call reads it."""
    state, mixin = state_of(self), type(self)._rk_mixin
    if state is None:
        return super(type(self), self).recompile()
    swap_back(self)
    try:
        return self.recompile()
    finally:
        state.read_later()
        swap(self, mixin, state)


def _restore(
    make: Callable[..., Any], args: tuple[Any, ...], of: tuple[str, str], mixin: type[Fused], state: FusedState[Any]
) -> Any:
    """Makes an object as its class's own way of pickling says, and fuses it if it is of that class."""
    module = make(*args)
    cls = _unfused(type(module))
    if isinstance(module, nn.Module) and (cls.__module__, cls.__qualname__) == of:
        swap(module, mixin, state)
    return module


def _rebuild(original: type[nn.Module], mixin: type[Fused]) -> Fused:
    """Makes a fused module for pickles of version 0.1.0."""
    cls = fused_class(original, mixin)
    return object.__new__(cls)


def is_fused(module: nn.Module) -> TypeIs[Fused]:
    """Whether this very module is fused, by `fuse_` or by a fused constructor."""
    return isinstance(module, Fused) and state_of(module) is not None


def is_fused_as_is(module: nn.Module) -> bool:
    """Whether a module's class is the one that fusing made, and not a user's over it."""
    return "_rk_original_class" in vars(type(module))


def swap(module: nn.Module, mixin: type[Fused], state: FusedState[Any]) -> None:
    """Turns a module into its fused self, in place."""
    module.__dict__["_rk_state"] = state
    module.__class__ = fused_class(_unfused(type(module)), mixin)


def swap_back(module: nn.Module) -> None:
    """Undoes `swap`."""
    module.__class__ = _unfused(type(module))
    module.__dict__.pop("_rk_state", None)
