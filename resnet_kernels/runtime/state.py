"""The state of a fused module, what a call knows about its input, and how `eligibility.decide` answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from torch import nn

from ..graph.fusible import BatchNorm
from ..graph.reads import UNREAD, LiveReads
from ..graph.recipe import ContainerPlan, Recipe
from .cpu.packed_conv import PackedConv
from .cpu.packed_norm import PackedNorm
from .cpu.program import Copies
from .live_modules import LiveModules
from .normalize_images import Normalize

if TYPE_CHECKING:
    from .checked_calls import Survey
    from .gpu.plan import Plan

Fusible = TypeVar("Fusible", bound=Recipe | ContainerPlan)


class BlockInput(NamedTuple):
    """What the caller of a block knows about the block's input.

    owned: nobody else holds it, so a step may write over it.
    bound: no value in it is larger in magnitude; None if unknown.
    backend: (asked for, found) of the block that made it. The next block asking for the same backend will find the same.
    """

    owned: bool = False
    bound: float | None = None
    backend: tuple[str, str] | None = None


UNKNOWN = BlockInput()


class FusedRun(NamedTuple):
    """The answer that a call runs fused.

    backend: the backend, resolved.
    live: the modules.
    verified: the packed weights are checked already.
    learns: the call needs gradients or batch statistics (training.py), and does not run as in inference (inference.py).
    """

    backend: str
    live: LiveModules
    verified: bool
    learns: bool = False


class Eager(NamedTuple):
    """The answer that a call runs the module's own forward. reason: "" where that goes without saying."""

    reason: str = ""


_KEPT = ("plan", "backend", "path", "normalize", "frozen")


class FusedState(Generic[Fusible]):
    """What fusing adds to a module's __dict__.

    plan: a block's recipe, or a container's plan.
    backend: the backend that was asked for.
    path: the module's path in the model that was fused, a label for profilers.
    normalize: in the outermost container, what `fuse(model, normalize=...)` asked for.
    frozen: the user has promised that weights stay, so copies are not compared with them; see freezing.py.

    unread: the plan is from a pickle, and the forward has to be read again. why_not: the reason why that failed.
    reads: in a container, what its forward reads.
    """

    def __init__(
        self,
        plan: Fusible,
        backend: str,
        path: str = "",
        normalize: Normalize | None = None,
        frozen: bool = False,
    ):
        self.plan: Fusible = plan
        self.backend = backend
        self.path = path
        self.normalize = normalize
        self.frozen = frozen
        self._forget()

    def _forget(self) -> None:
        self.copies = Copies()
        self.live: dict[tuple[str, ...], LiveModules] = {}
        self.plans: dict[tuple[Any, ...], Plan] = {}
        self.survey: Survey | None = None
        # The plan holds as long as what the forward reads is the same. A pickle doesn't know that: the forward is read again.
        self.unread = self.plan.reads is None or self.plan.reads.outside is UNREAD
        self.why_not: str | None = None
        self.reads: LiveReads | None = None

    def read_later(self) -> None:
        """Has the forward read again in the next call, because it may be another one."""
        self._forget()
        self.unread = True

    def drop_copies(self) -> None:
        """Forgets all copies of weights; the next call makes them anew."""
        self.copies = Copies()
        if self.frozen:
            self.plans = {}  # they may hold copies, too

    def holds(self, pack: PackedConv | PackedNorm, conv: nn.Conv2d | None, bn: BatchNorm | None) -> bool:
        """Whether a packed weight, or a packed BN, may stand for these modules in this call."""
        return pack.is_of(conv, bn) if self.frozen else pack.is_unchanged(conv, bn)  # type: ignore[arg-type]  # as packed

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are opaque, and the rest is of this very module: a copy makes its own in its first call.
        return {name: self.__dict__[name] for name in _KEPT}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update((name, kept[name]) for name in _KEPT)
        self._forget()


def state_of(module: nn.Module) -> FusedState[Any] | None:
    """The state of a fused module; None for any other module."""
    return module.__dict__.get("_rk_state")


def states_in(model: nn.Module) -> list[FusedState[Any]]:
    """The states of all fused modules in a model, itself included."""
    return [state for module in model.modules() if (state := state_of(module)) is not None]


def tables_of(model: nn.Module) -> list[Any]:
    """What the kernels of a fused model read besides its own tensors. Whoever replays their launches has to keep it."""
    return [plan.constants.tables for state in states_in(model) for plan in state.plans.values()]
