"""Fused blocks: what `fuse` makes of a user's block; `BasicBlock`, `Bottleneck`, `PreactBottleneck`, `Residual` to build with.

A fused block is the user's own module, with the user's parameters, names and hooks, under a subclass of its own class, made
here: `isinstance` holds, and going back is setting `__class__` back. Its forward runs the recipe that reader.py found:

    FusedBlock.forward -> run_recipe -> ops.conv_bias_act (or oneDNN with packed weights) -> kernel

and the class's own forward whenever that is what eager semantics ask for: training, gradients, hooks on inner modules,
tracing, structure that changed since. `running.decide` holds all of these conditions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..graph import reader
from ..graph.recipe import CannotRead, Recipe
from ..models import d2l, resnet_v1, resnet_v2
from . import eligibility, inference, training
from .eligibility import UNKNOWN, FusedState, Go, Known, drop_copies, say_runs_eager


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


class FusedBlock(Fused):
    """A module whose whole forward is a recipe of fused steps."""

    def _rk_forward(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        if len(args) == 1 and not kwargs:
            return self._rk_call(args[0], UNKNOWN)[0]
        return original(self, *args, **kwargs)

    def _rk_call(self, x: Tensor, known: Known) -> tuple[Tensor, Known]:
        """Runs the block on x; returns its output, and what is known about it."""
        state: FusedState | None = self.__dict__.get("_rk_state")
        go, reason = (None, "") if state is None else eligibility.decide(self, state.plan, state, x, known)
        if go is None:
            if reason:
                say_runs_eager(reason)
            return type(self)._rk_original_class.forward(self, x), UNKNOWN
        return run(state.plan, state, go, x, known)


def run(recipe: Recipe, state: FusedState, go: Go, x: Tensor, known: Known) -> tuple[Tensor, Known]:
    """Runs a recipe on x, as inference or as training does; returns its output, and what is known about it."""
    if go.learns:
        return training.run_recipe(recipe, state, go, x), UNKNOWN
    return inference.run_recipe(recipe, state, go, x, known)


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
    module.__class__ = fused_class(reader.original_class(module), mixin)


def swap_back(module: nn.Module) -> None:
    """Undoes `swap`."""
    module.__class__ = reader.original_class(module)
    module.__dict__.pop("_rk_state", None)


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
