"""All packed convolutions and BNs of a network, whose sources are compared in one go."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...graph.fusible import BatchNorm
from .packed_conv import PackedConv
from .packed_norm import PackedNorm
from .watched_tensors import WatchedTensors

# A copy, if there is one, and what it has to be of: a convolution with or without a BN, or a BN alone.
PackedPart = tuple[PackedConv | PackedNorm | None, nn.Conv2d | None, BatchNorm | None]


class PackedTogether:
    """Packed convolutions and BNs of a whole network, whose sources are compared in one go."""

    def __init__(self, parts: Sequence[PackedPart]):
        self._parts = [*parts]
        packs = [pack for pack, _, _ in parts if pack is not None]
        # Of the computation; an autocast region leaves others behind.
        self.dtypes = {pack.dtype for pack in packs}
        self._sources = WatchedTensors.of_all([pack.sources for pack in packs]) if len(packs) == len(parts) else None
        # Identity of each setting comes first: comparing the values takes three times as long.
        places: list[tuple[dict[str, Any], str]] = []
        for _, conv, bn in parts:
            places += [] if conv is None else [(conv.__dict__, name) for name in _SETTINGS]
            places += [] if bn is None else [(bn.__dict__, "eps")]
        self._registries, self._names = [registry for registry, _ in places], [name for _, name in places]
        self._settings = [registry.get(name) for registry, name in places]
        # A list can be changed in place.
        are_plain = all(type(value) in (int, float, str, tuple) for value in self._settings)
        self._identity_tells = are_plain and self._have_settings()

    def are_of(self, parts: Sequence[PackedPart]) -> bool:
        """Whether they are of these very packed convolutions and modules."""
        # Tuples of objects without an __eq__ compare by identity.
        return self._parts == parts

    def are_unchanged(self) -> bool:
        """Whether each stands for its modules as they are now."""
        return (
            self._sources is not None
            and (self._are_as_they_were() or self._have_settings())
            and self._sources.are_unchanged()
        )

    def have_same_values(self) -> bool:
        """As `are_unchanged`, where nobody has written to the modules' dicts."""
        return (
            self._sources is not None
            and (self._identity_tells or self._have_settings())
            and self._sources.have_same_values()
        )

    def _are_as_they_were(self) -> bool:
        return self._identity_tells and all(
            map(operator.is_, map(dict.get, self._registries, self._names), self._settings)
        )

    def _have_settings(self) -> bool:
        return all(pack is not None and pack.has_settings(conv, bn) for pack, conv, bn in self._parts)  # type: ignore[arg-type]  # as packed


# What `parts.settings` reads of a convolution.
_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode")
