"""Constants of frozen modules: made once, and reused until one of the modules thaws.

They are the constants that constants.py makes in each call, and also each weight and bias that a kernel would have to copy
because of its dtype or layout. Where a kernel can read the model's own weight, the constant shares its memory.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...graph import fusible
from ..cpu.program import Copies
from ..freezing import FrozenCopies
from ..live_modules import LiveModules
from ..parts import ConvPart, bn_tensors
from ..state import FusedState
from .constants import Constants, Layer, LiveConstants, bias_of, folded_bias, scaled_weight

# One lock for all plans: others may read a block's copies as soon as they are stored, so they must be written by then.
_making = threading.Lock()


class FrozenConstants:
    """Constants of a plan whose modules are all frozen, in the place of its LiveConstants.

    A layer's constants stay with the copies of its block, where the plans of other sizes find them. So all sizes use the
    values that the first of them read, and no other size needs its own copies.

    Args:
        live: the constants made in each call, which are used once a module is no longer frozen.
        states: states of the blocks that the plan runs.
        modules: modules of these blocks.
        device: the plan's device.
    """

    def __init__(
        self,
        live: LiveConstants,
        states: Sequence[FusedState[Any]],
        modules: Sequence[LiveModules],
        device: torch.device,
    ):
        self._live, self._modules, self._device = live, modules, device
        # Weak references: the states hold the plan, which holds this object.
        self._states = [*map(weakref.ref, states)]
        owners = {id(child): i for i, block in enumerate(modules) for child in block.children}
        self._owners = [owners[id(part[1])] for part in live.layers]
        self._made: _Made | None = None

    @property
    def tables(self) -> tuple[Any, ...]:
        """LiveConstants.tables, and the constants themselves: a replay reads these, and does not write them."""
        return self._live.tables, self._made

    def read(self) -> dict[int, Constants]:
        """All constants, by the value that each layer makes."""
        made = self._made
        if made is None or not made.copies.hold():
            # Memory allocated during a capture is the graph's, and each replay writes it anew: no later call may read it.
            made = None if _is_capturing(self._device) else self._make()
        if made is None:
            return self._live.read()
        made.is_read_here()
        return made.constants

    def _make(self) -> _Made | None:
        """Makes the constants; None if a module is not frozen any more."""
        with _making:
            made = self._made
            if made is not None and made.copies.hold():
                return made  # another thread was here first
            states = [state for reference in self._states if (state := reference()) is not None]
            copies = FrozenCopies.of(states, self._modules) if len(states) == len(self._states) else None
            if copies is None:
                return None
            # Ordinary tensors even in inference mode, because the next call may be outside of it.
            with torch.inference_mode(False), torch.no_grad():
                made = _Made(copies, self._constants([copies.of_state[i] for i in self._owners]), self._device)
            self._made = made
            return made

    def _constants(self, kept: list[Copies]) -> dict[int, Constants]:
        """Constants by the value that each layer makes. kept: the copies of each layer's module."""
        live = self._live
        found, _ = live.vectors()
        for part, copies in zip(live.layers, kept):
            out = part.step.out
            bias, eps = bias_of(part), None if part.bn is None else fusible.eps_of(part.bn)
            if live.has_vectors(part):
                sources = bias, *bn_tensors(part.bn), eps
                found[out] = copies.first(("vectors", _path(part)), sources, partial(found.__getitem__, out))
            elif bias is not None and out not in live.forms:
                # The layer is in a link. A chain reads biases in fp32, and would have to copy others.
                wide = copies.first(("bias", _path(part)), (bias,), partial(_wide, bias))
                found[out] = Constants(None, wide)
        vectors = dict(found)  # a copy, because two layers read a projection's shift
        for part, copies in zip(live.layers, kept):
            if not isinstance(part, ConvPart):
                continue
            form, (scale, shift, _) = live.forms.get(part.step.out), vectors[part.step.out]
            inside = None
            if form is not None and form.folds:
                inside = None if part.bn is None else scale
                scale, shift = None, folded_bias(part, form, vectors, live.dtype)
            key = "weight", _path(part), live.dtype, inside is None
            make = partial(scaled_weight, part.conv.weight, inside, live.dtype)
            found[part.step.out] = Constants(scale, shift, copies.first(key, (part.conv.weight, inside), make))
        return found


class _Made:
    """Constants that hold as long as `copies` does; the GPU has written them before this object exists."""

    def __init__(self, copies: FrozenCopies, constants: dict[int, Constants], device: torch.device):
        self.copies, self.constants, self._device = copies, constants, device
        self._streams: set[int] = set()
        if device.type == "cuda":
            # Synchronize once, so that no other stream has to wait for this one.
            stream = torch.cuda.current_stream(device)
            stream.synchronize()
            self._streams.add(stream.cuda_stream)

    def is_read_here(self) -> None:
        """Tells the allocator which streams read the constants: after a thaw their memory returns to its first stream."""
        if self._device.type != "cuda":
            return
        # Not torch.cuda.current_stream, which makes an object in each call.
        if torch._C._cuda_getCurrentRawStream(self._device.index) not in self._streams:
            stream = torch.cuda.current_stream(self._device)
            for tensor in {
                id(t): t for constants in self.constants.values() for t in constants if t is not None
            }.values():
                tensor.record_stream(stream)
            self._streams.add(stream.cuda_stream)


def _wide(vector: Tensor) -> Tensor:
    return vector.detach().float()


def _path(part: Layer) -> str:
    return part.step.conv if isinstance(part, ConvPart) else part.step.bn


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
