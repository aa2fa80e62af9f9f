"""Watch: has anything about a model changed but the values of its tensors?"""

from __future__ import annotations

import os
from itertools import chain

import torch
from torch import Tensor, nn

from ..ops import tuned_table
from ..ops.backends import ENVIRONMENT_VARIABLE
from .freezing import FrozenCopies, frozen_states
from .live_modules import has_global_hooks


class Watch:
    """All that a CUDA graph of a model takes for granted, and whether it still holds.

    Values aside: which modules, parameters and buffers there are, of which class, at which address, with which attributes
    (modes, eps, strides, a fused module's plan), whether there are hooks, and the settings of PyTorch and of ours that decide
    which kernels run. Attributes that are changed inside, a list's elements, go unseen.

    It holds on to the memory of the tensors, so that no address can come back as another's.
    """

    def __init__(self, model: nn.Module):
        self._modules = [*model.modules()]
        self._classes = [*map(type, self._modules)]
        self._attributes = [module.__dict__ for module in self._modules]
        self._attributes_then = [dict(attributes) for attributes in self._attributes]
        registries = [r for m in self._modules for r in (m._parameters, m._buffers, m._modules)]
        self._registries = [registry for registry in registries if registry]
        self._empty = [registry for registry in registries if not registry]
        self._empty += [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._members = [*chain.from_iterable(map(dict.values, self._registries))]
        self._ids = [*map(id, self._members)]
        self._tensors = [member for member in self._members if isinstance(member, Tensor)]
        self._memory = [tensor.detach() for tensor in self._tensors]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]
        # A graph of a frozen model may read copies of weights.
        self._frozen = FrozenCopies(frozen_states(model), [])
        self._settings = _settings()

    def is_current(self) -> bool:
        """Whether all of it is as it was. It takes the host as long as a small network takes a GPU."""
        try:
            same_attributes = self._attributes == self._attributes_then
        except (RuntimeError, ValueError):
            return False  # a tensor or an array, which compares element by element: another one than then
        return (
            same_attributes
            and not any(self._empty)
            and [*map(type, self._modules)] == self._classes
            and [*map(id, chain.from_iterable(map(dict.values, self._registries)))] == self._ids
            and [*map(Tensor.data_ptr, self._tensors)] == self._addresses
            and self._frozen.hold()
            and _settings() == self._settings
            and not has_global_hooks()
        )


def _settings() -> tuple:
    """What else decides which kernels run."""
    return (
        os.environ.get(ENVIRONMENT_VARIABLE),
        tuned_table.generation(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )
