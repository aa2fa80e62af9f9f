"""A snapshot of a model that reveals every change but that of its tensors' values."""

from __future__ import annotations

import os
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import tuned_table
from ..ops.backends import ENVIRONMENT_VARIABLE
from .freezing import FrozenCopies, frozen_states
from .live_modules import has_global_hooks
from .object_watch import ObjectWatch


class Watch:
    """Everything that a CUDA graph of a model relies on, apart from the values of tensors.

    These are the modules, parameters and buffers with their classes, addresses and attributes (modes, eps, strides, a fused
    module's plan), the absence of hooks, and the settings of PyTorch and of ours that decide which kernels run. A change
    inside an attribute, such as a list's element, goes unseen.

    The snapshot keeps the memory of the tensors, so that no address can be another tensor's later.
    """

    def __init__(self, model: nn.Module):
        self._modules = [*model.modules()]
        self._classes = [*map(type, self._modules)]
        self._attributes = [module.__dict__ for module in self._modules]
        self._attributes_then = [dict(attributes) for attributes in self._attributes]
        registries: list[dict[str, Any]] = [r for m in self._modules for r in (m._parameters, m._buffers, m._modules)]
        self._registries = [registry for registry in registries if registry]
        self._empty: list[dict[Any, Any]] = [registry for registry in registries if not registry]
        self._empty += [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._writes = ObjectWatch(self._modules, [*self._attributes, *self._registries, *self._empty])
        self._members = [*chain.from_iterable(map(dict.values, self._registries))]
        self._ids = [*map(id, self._members)]
        self._tensors = [member for member in self._members if isinstance(member, Tensor)]
        self._memory = [tensor.detach() for tensor in self._tensors]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]
        # A graph of a frozen model may read copies of weights.
        self._frozen = FrozenCopies(frozen_states(model), [])
        self._settings = _settings()

    def is_current(self) -> bool:
        """Whether nothing has changed."""
        if not self._writes.are_unchanged():
            self._writes.renew()
            if not self._has_same_members():
                self._writes.forget()
                return False
        return (
            [*map(Tensor.data_ptr, self._tensors)] == self._addresses
            and self._frozen.hold()
            and _settings() == self._settings
            and not has_global_hooks()
        )

    def _has_same_members(self) -> bool:
        """Whether all modules have the attributes and members that they had. It takes as long as a small network on a GPU."""
        try:
            same_attributes = self._attributes == self._attributes_then
        except (RuntimeError, ValueError):
            return False  # a tensor or an array, which compares element by element: another one than then
        return (
            same_attributes
            and not any(self._empty)
            and [*map(type, self._modules)] == self._classes
            and [*map(id, chain.from_iterable(map(dict.values, self._registries)))] == self._ids
        )


def _settings() -> tuple[object, ...]:
    """The settings that decide which kernels run."""
    return (
        os.environ.get(ENVIRONMENT_VARIABLE),
        tuned_table.generation(),
        # What torch.backends' attributes read, with several calls of Python around it.
        torch._C._get_cudnn_enabled(),
        torch._C._get_fp32_precision_getter("cuda", "conv"),
        torch._C._get_fp32_precision_getter("cuda", "matmul"),
        torch.are_deterministic_algorithms_enabled(),
    )
