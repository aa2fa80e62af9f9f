"""Modules by the names that version 0.1.0 had, which pickles of whole fused models hold. Importing it registers them."""

from __future__ import annotations

import sys
from types import ModuleType

from .graph.recipe import CallStep, ContainerPlan, ConvStep, NormStep, Recipe
from .runtime.cpu.program import Copies
from .runtime.fused_block import FusedBlock
from .runtime.fused_container import FusedContainer
from .runtime.fused_module import _rebuild
from .runtime.normalize_images import Normalize
from .runtime.state import FusedState

_MOVED: dict[str, dict[str, object]] = {
    "blocks": {"FusedBlock": FusedBlock, "_rebuild": _rebuild},
    "normalize": {"Normalize": Normalize},
    "programs": {"Copies": Copies},
    "recipe": {
        "CallStep": CallStep,
        "ConvStep": ConvStep,
        "HostPlan": ContainerPlan,
        "NormStep": NormStep,
        "Recipe": Recipe,
    },
    "running": {"FusedState": FusedState},
    "stages": {"FusedHost": FusedContainer},
}

for _name, _values in _MOVED.items():
    _module = ModuleType(f"{__package__}.{_name}", "Moved; here for pickles of version 0.1.0.")
    _module.__dict__.update(_values)
    sys.modules.setdefault(_module.__name__, _module)
