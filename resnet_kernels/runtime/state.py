"""What a fused module keeps, and what a call knows about its input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .cpu.packed_conv import PackedConv
from .cpu.program import Copies
from .live_modules import Wiring
from .normalize_images import Normalize

if TYPE_CHECKING:
    from .checked_calls import Survey


class Known(NamedTuple):
    """What the caller of a block knows about its input.

    owned: nobody else holds it, so a step may write over it.
    bound: no value in it is larger in magnitude.
    backend: (asked for, found) of the block that made it; the next block asking for the same will find the same.
    """

    owned: bool = False
    bound: float | None = None
    backend: tuple[str, str] | None = None


UNKNOWN = Known()


class FusedState:
    """What fusing adds to a module's __dict__: its recipe or plan, the backend asked for, the CPU's packed weights.

    path: the module's, in the model that was fused; a label for profilers.
    normalize: in the model's outermost container, what `fuse(model, normalize=...)` asked for.
    frozen: the user has promised that weights stay, so copies are not compared with them; see freezing.py.
    """

    def __init__(
        self, plan: Any, backend: str, path: str = "", normalize: Normalize | None = None, frozen: bool = False
    ):
        self.plan = plan
        self.backend = backend
        self.path = path
        self.normalize = normalize
        self.frozen = frozen
        self.copies = Copies()
        self.wiring: dict[tuple[str, ...], Wiring] = {}
        self.plans: dict[tuple, Any] = {}
        self.survey: Survey | None = None

    def drop_copies(self) -> None:
        self.copies = Copies()
        if self.frozen:
            self.plans = {}  # they may hold copies, too

    def trusts(self, pack: PackedConv, conv: nn.Module, bn: nn.Module | None) -> bool:
        """Whether a pack may stand for these modules in this call."""
        return pack.is_of(conv, bn) if self.frozen else pack.is_unchanged(conv, bn)

    def __getstate__(self) -> dict:
        # Packed weights are opaque, the rest is of this very module: a copy makes its own in its first call.
        kept = dict(
            plan=self.plan, backend=self.backend, path=self.path, normalize=self.normalize, frozen=self.frozen
        )  # fmt: skip
        return kept | dict(copies=Copies(), wiring={}, plans={}, survey=None)


def drop_copies(module: nn.Module) -> None:
    """Forgets the copies of a fused module's weights; the next call makes them anew."""
    state = module.__dict__.get("_rk_state")
    if state is not None:
        state.drop_copies()


def tables_of(model: nn.Module) -> list[Any]:
    """What the kernels of a fused model read besides its own tensors: whoever replays their launches has to keep it."""
    states = (module.__dict__.get("_rk_state") for module in model.modules())
    return [plan.constants.tables for state in states if state is not None for plan in state.plans.values()]


class Go(NamedTuple):
    """Leave to run fused: on which backend, with which modules, whether their packed weights were checked already.

    learns: with gradients or batch statistics (training.py), and not as inference does (inference.py).
    """

    backend: str
    wiring: Wiring
    verified: bool
    learns: bool = False
