"""freeze=True: the user's promise that weights stay, and how long copies of them hold.

A fused module's copies hang on `FusedState.copies`, an object of its own that `train()`, `.to()`, `load_state_dict` and
`refresh` replace. So whoever made something of frozen weights asks by identity whether it still holds:

    if copies is None or not copies.hold():
        copies = freezing.FrozenCopies.of(states, modules)     # before the weights are read; None if not all are frozen
        ...                                                    # read the weights, write the copies

So do frozen_constants.py and model_snapshot.py. PackedConv asks for itself, through `FusedState.trusts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import nn

from .state import states_in

if TYPE_CHECKING:
    from .live_modules import LiveModules
    from .state import FusedState


class FrozenCopies:
    """Whether copies of frozen modules' weights hold: no change was announced, and the tensors are the same objects.

    No values are compared; but torch.func.functional_call puts other tensors in the places of parameters.
    """

    def __init__(self, states: Sequence[FusedState[Any]], modules: Sequence[LiveModules]):
        self._states = [*states]
        # Where each module keeps its copies; what is made of its weights as they are now belongs there.
        self.of_state = [state.copies for state in states]
        registries: list[dict[str, Any]] = [
            r for block in modules for child in block.children for r in (child._parameters, child._buffers)
        ]
        self._registries = [registry for registry in registries if registry]
        # Held, so that no other tensor can have the id of one of them.
        self._tensors = [*chain.from_iterable(map(dict.values, self._registries))]
        self._ids = [*map(id, self._tensors)]

    @classmethod
    def of(cls, states: Sequence[FusedState[Any]], modules: Sequence[LiveModules]) -> FrozenCopies | None:
        """Watches copies that are about to be made; None if one of the modules is not frozen, so that no copy may be kept."""
        return cls(states, modules) if all(state.frozen for state in states) else None

    def hold(self) -> bool:
        """Whether the copies may still be used."""
        return (
            all(state.frozen and state.copies is copies for state, copies in zip(self._states, self.of_state))
            # List against list: it is asked in each call.
            and [*map(id, chain.from_iterable(map(dict.values, self._registries)))] == self._ids
        )


def frozen_states(model: nn.Module) -> list[FusedState[Any]]:
    """The states of all frozen modules in a model."""
    return [state for state in states_in(model) if state.frozen]
