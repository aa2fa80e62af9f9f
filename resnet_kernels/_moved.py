"""Modules by the names that version 0.1.0 had, which pickles of whole fused models hold. Importing it registers them."""

from __future__ import annotations

import sys
from types import ModuleType

from .graph.recipe import CallStep, ConvStep, HostPlan, NormStep, Recipe
from .runtime.cpu.program import Copies
from .runtime.fused_block import FusedBlock
from .runtime.fused_container import FusedHost
from .runtime.fused_module import _rebuild
from .runtime.normalize_images import Normalize
from .runtime.state import FusedState

_MOVED = {
    "blocks": (FusedBlock, _rebuild),
    "normalize": (Normalize,),
    "programs": (Copies,),
    "recipe": (CallStep, ConvStep, HostPlan, NormStep, Recipe),
    "running": (FusedState,),
    "stages": (FusedHost,),
}

for _name, _values in _MOVED.items():
    _module = ModuleType(f"{__package__}.{_name}", "Moved; here for pickles of version 0.1.0.")
    _module.__dict__.update((value.__name__, value) for value in _values)
    sys.modules.setdefault(_module.__name__, _module)
