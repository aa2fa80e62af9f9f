"""Validity of copies of frozen weights: with freeze=True the user promises that weights stay.

A fused module's copies belong to the object `FusedState.copies`, which `train()`, `.to()`, `load_state_dict` and `refresh`
replace. So code that keeps copies of frozen weights checks by identity whether they still hold:

    if copies is None or not copies.hold():
        copies = freezing.FrozenCopies.of(states, modules)     # before the weights are read; None if not all are frozen
        ...                                                    # read the weights, write the copies

frozen_constants.py and model_snapshot.py do so. PackedConv checks by itself, through `FusedState.holds`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn

from .state import states_in

if TYPE_CHECKING:
    from .live_modules import LiveModules
    from .state import FusedState


class FrozenCopies:
    """Check that copies of frozen weights hold: no change was announced, and the tensors are the same objects.

    No values are compared. Objects are, because torch.func.functional_call puts other tensors in the places of parameters.
    """

    def __init__(self, states: Sequence[FusedState[Any]], modules: Sequence[LiveModules]):
        # Weak references: a state holds its plans, which hold their copies.
        self._states = [*map(weakref.ref, states)]
        # Each module's current copies; tensors made from its present weights belong there.
        self.of_state = [state.copies for state in states]
        registries: list[dict[str, Any]] = [
            r for block in modules for child in block.children for r in (child._parameters, child._buffers)
        ]
        self._registries = [registry for registry in registries if registry]
        # Held, so that no other tensor can get one of these ids.
        self._tensors = [*chain.from_iterable(map(dict.values, self._registries))]
        self._ids = [*map(id, self._tensors)]

    @classmethod
    def of(cls, states: Sequence[FusedState[Any]], modules: Sequence[LiveModules]) -> FrozenCopies | None:
        """Watches copies that are about to be made; None if a module is not frozen, because no copy may be kept then."""
        return cls(states, modules) if all(state.frozen for state in states) else None

    def hold(self) -> bool:
        """Whether the copies may still be used."""
        return (
            all(
                (state := reference()) is not None and state.frozen and state.copies is copies
                for reference, copies in zip(self._states, self.of_state)
            )
            # Lists of ids compare fast, and each call does this.
            and [*map(id, chain.from_iterable(map(dict.values, self._registries)))] == self._ids
        )


def frozen_states(model: nn.Module) -> list[FusedState[Any]]:
    """States of all frozen modules in a model."""
    return [state for state in states_in(model) if state.frozen]
