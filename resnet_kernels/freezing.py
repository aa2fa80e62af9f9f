"""freeze=True: the user's promise that weights stay, and how long copies of them hold.

A fused module's copies hang on `FusedState.copies`, an object of its own that `train()`, `.to()`, `load_state_dict` and
`refresh` replace. So whoever made something of frozen weights asks by identity whether it still holds:

    if copies is None or not copies.hold():
        copies = freezing.FrozenCopies.of(states, wirings)     # before the weights are read; None if not all are frozen
        ...                                                    # read the weights, write the copies

PackedConv asks for itself, through `FusedState.trusts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .running import FusedState
    from .wiring import Wiring


class FrozenCopies:
    """Whether copies of frozen modules' weights hold: no change was announced, and the tensors are the same objects.

    No values are compared; but torch.func.functional_call puts other tensors in the places of parameters.
    """

    def __init__(self, states: Sequence[FusedState], wirings: Sequence[Wiring]):
        self._then = [(state, state.copies) for state in states]
        self._tensors = [
            (registry, name, tensor)
            for wiring in wirings
            for child in wiring.children
            for registry in (child._parameters, child._buffers)
            for name, tensor in registry.items()
        ]

    @classmethod
    def of(cls, states: Sequence[FusedState], wirings: Sequence[Wiring]) -> FrozenCopies | None:
        """Of the copies that are about to be made; None if one of the modules is not frozen, so that no copy may be kept."""
        return cls(states, wirings) if all(state.frozen for state in states) else None

    def hold(self) -> bool:
        return all(state.frozen and state.copies is copies for state, copies in self._then) and all(
            registry.get(name) is tensor for registry, name, tensor in self._tensors
        )


def frozen_states(model: nn.Module) -> list[FusedState]:
    """The states of all frozen modules in a model."""
    states = (module.__dict__.get("_rk_state") for module in model.modules())
    return [state for state in states if state is not None and state.frozen]
