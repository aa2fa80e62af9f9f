"""A small ResNet to fuse, and what of it runs fused."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

import resnet_kernels as rk
from resnet_kernels.graph.recipe import ConvStep
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.runtime import chains, checked_calls, inference
from resnet_kernels.runtime.state import state_of


class PlainResidual(nn.Module):
    """A residual block as a notebook has it: module level, so that it pickles."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return F.relu(y)


def small_resnet(block=rk.models.resnet_v1.Bottleneck, layers=(2, 1, 1, 1), **options):
    return randomise_batch_norms_(rk.models.ResNet(block, layers, num_classes=10, **options)).eval()


def fused_names(model):
    return [row.path for row in rk.explain(model).fused]


@contextlib.contextmanager
def recipes_seen(note):
    """Spans calls of which each recipe that runs fused is noted, with the state of its module."""
    original, run_chain, run_verified = inference.run_recipes, chains.run, checked_calls.run_verified

    def spy(blocks, *rest):
        for recipe, state, _ in blocks:
            note(state, recipe)
        return original(blocks, *rest)

    def spy_on_chain(container, state, chain, *rest, **options):
        ran = run_chain(container, state, chain, *rest, **options)
        for part in chain.parts if ran is not None else ():
            own = state_of(container.get_submodule(part.path))
            note(own, own.plan if part.run is None else own.plan.runs[part.run])
        return ran

    def spy_on_verified(block, *rest):
        ran = run_verified(block, *rest)
        if ran is not None:
            note(state_of(block), state_of(block).plan)
        return ran

    inference.run_recipes, chains.run, checked_calls.run_verified = spy, spy_on_chain, spy_on_verified
    try:
        yield
    finally:
        inference.run_recipes, chains.run, checked_calls.run_verified = original, run_chain, run_verified


def ran_fused(module, x):
    """How many recipes this call runs fused."""
    seen = []
    with recipes_seen(lambda state, recipe: seen.append(recipe)), torch.no_grad():
        module(x)
    return len(seen)


def convolutions_that_ran(module, x):
    """The paths of the convolutions that run in fused kernels in this call."""
    seen = set()

    def note(state, recipe):
        steps = (step for step in recipe.steps if isinstance(step, ConvStep))
        seen.update(f"{state.path}.{step.conv}".strip(".") for step in steps)

    with recipes_seen(note), torch.no_grad():
        module(x)
    return seen


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
