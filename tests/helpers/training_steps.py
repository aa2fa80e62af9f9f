"""A small net to train, and what of its training runs fused."""

from __future__ import annotations

from resnet_kernels.models import d2l
from resnet_kernels.runtime import training


def small_d2l():
    return d2l.d2l_resnet18(width=16, num_blocks=(1,))


def spy_on_training(monkeypatch):
    """Counts how many recipes run with gradients or batch statistics."""
    seen, original = [], training.run_recipe
    monkeypatch.setattr(
        training, "run_recipe", lambda recipe, *rest: seen.append(str(recipe)) or original(recipe, *rest)
    )
    return seen
