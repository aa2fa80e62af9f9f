"""The constants of a plan of frozen modules: made once, and handed out again until one of the modules thaws.

What constants.py makes in each call, and besides it each weight and bias that a kernel would have to copy: one in another
dtype or layout. Where a kernel reads the model's own weight, this is that very memory.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...graph.recipe import ConvStep
from ..bn import bn_tensors
from ..cpu.program import Copies
from ..freezing import FrozenCopies
from ..live_modules import Wiring
from ..state import FusedState
from .constants import Constants, LiveConstants, folded_bias, scaled_weight
from .parts import Part

# For all plans: what one has put among a block's copies, another may read at once, so it has to be written by then.
_making = threading.Lock()


class FrozenConstants:
    """In the place of a plan's LiveConstants.

    What is made of a layer stays with the copies of its block, where the plans of other sizes find it. So all are of the
    values that the first of them has read, and another size needs no copy of its own.

    Args:
        live: the same constants, made in each call: for what is not frozen any more, and to make them.
        states, wirings: of the modules that the plan runs.
    """

    def __init__(
        self, live: LiveConstants, states: Sequence[FusedState], wirings: Sequence[Wiring], device: torch.device
    ):
        self._live, self._states, self._wirings, self._device = live, states, wirings, device
        owners = {id(child): i for i, wiring in enumerate(wirings) for child in wiring.children}
        self._owners = [owners[id(part.bn if part.child is None else part.child)] for part in live.layers]
        self._made: _Made | None = None

    @property
    def tables(self) -> tuple:
        """As LiveConstants.tables, with the constants themselves: a replay reads these, and does not write them."""
        return self._live.tables, self._made

    def read(self) -> dict[int, Constants]:
        """All constants, by the value that each layer makes."""
        made = self._made
        if made is None or not made.copies.hold():
            # What a capture allocates is the graph's, and each replay writes it anew: no later call may read it.
            made = None if _is_capturing(self._device) else self._make()
        if made is None:
            return self._live.read()
        made.is_read_here()
        return made.constants

    def _make(self) -> _Made | None:
        """None if a module is not frozen any more."""
        with _making:
            made = self._made
            if made is not None and made.copies.hold():
                return made  # another thread was here first
            copies = FrozenCopies.of(self._states, self._wirings)
            if copies is None:
                return None
            # Ordinary tensors, even if this call is in inference mode: the next one need not be.
            with torch.inference_mode(False), torch.no_grad():
                made = _Made(copies, self._constants([copies.of_state[i] for i in self._owners]), self._device)
            self._made = made
            return made

    def _constants(self, kept: list[Copies]) -> dict[int, Constants]:
        """kept: by layer, where the module that it belongs to has its copies."""
        live = self._live
        found, _ = live.vectors()
        for part, copies in zip(live.layers, kept):
            out = part.step.out
            bias, eps = None if part.child is None else part.child.bias, None if part.bn is None else part.bn.eps
            if live.has_vectors(part):
                sources = bias, *bn_tensors(part.bn), eps
                found[out] = copies.first(("vectors", _path(part)), sources, lambda out=out: found[out])
            elif bias is not None and out not in live.forms:
                # In a link. A chain reads it in fp32, and would have to copy any other.
                wide = copies.first(("bias", _path(part)), (bias,), partial(_wide, bias))
                found[out] = Constants(None, wide)
        vectors = dict(found)  # a projection's shift is read by two
        for part, copies in zip(live.layers, kept):
            if not isinstance(part.step, ConvStep):
                continue
            form, (scale, shift, _) = live.forms.get(part.step.out), vectors[part.step.out]
            inside = None
            if form is not None and form.folds:
                inside = None if part.bn is None else scale
                scale, shift = None, folded_bias(part, form, vectors, live.dtype)
            key = "weight", _path(part), live.dtype, inside is None
            make = partial(scaled_weight, part.child.weight, inside, live.dtype)
            found[part.step.out] = Constants(scale, shift, copies.first(key, (part.child.weight, inside), make))
        return found


class _Made:
    """Constants that hold as long as `copies` does; written by the time that this is there."""

    def __init__(self, copies: FrozenCopies, constants: dict[int, Constants], device: torch.device):
        self.copies, self.constants, self._device = copies, constants, device
        self._streams: set[int] = set()
        if device.type == "cuda":
            # Once, so that no other stream has to wait for this one.
            stream = torch.cuda.current_stream(device)
            stream.synchronize()
            self._streams.add(stream.cuda_stream)

    def is_read_here(self) -> None:
        """Lets the allocator know which streams read them: after a thaw, memory goes back to the one that made it."""
        if self._device.type != "cuda":
            return
        # Not torch.cuda.current_stream: that makes an object in each call.
        if torch._C._cuda_getCurrentRawStream(self._device.index) not in self._streams:
            stream = torch.cuda.current_stream(self._device)
            for tensor in {
                id(t): t for constants in self.constants.values() for t in constants if t is not None
            }.values():
                tensor.record_stream(stream)
            self._streams.add(stream.cuda_stream)


def _wide(vector: Tensor) -> Tensor:
    return vector.detach().float()


def _path(part: Part) -> str:
    return part.step.conv if isinstance(part.step, ConvStep) else part.step.bn


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
