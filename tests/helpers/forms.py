"""Which form `auto` gives each convolution of a plan, and what steers that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.stages import CHANNELS_LAST, run
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.runtime.gpu import forms, launches
from resnet_kernels.runtime.gpu import plan as gpu_plan


def prepared(make, dtype=torch.float32, layout=CHANNELS_LAST):
    stage, x = make("cpu")
    for module in stage.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)  # a new one may be zero
    return randomise_batch_norms_(stage).eval().to(dtype, memory_format=layout), x.to(dtype, memory_format=layout)


def cheaper(monkeypatch, what):
    """Makes folding, or a pass over the output, the cheaper one everywhere."""
    if what is not None:
        monkeypatch.setattr(forms, "_pass_bytes", lambda *_: float("inf") if what == "folding" else 0)


def plan_of(fused):
    states = [m.__dict__["_rk_state"] for m in fused.modules() if "_rk_state" in m.__dict__]
    (plan,) = [plan for state in states for plan in state.plans.values()]
    return plan


def forms_of(net, batch, dtype, size=224, layout=CHANNELS_LAST, channels=3, freeze=False):
    """By the name of each step, the forms of a network's plans; nothing is computed."""
    found, original = {}, gpu_plan.Plan.__init__

    def init(plan, *arguments):
        original(plan, *arguments)
        found.update((name, launch.run.args[1]) for name, launch in plan.launches if len(launch.run.args) == 2)

    with torch.device("meta"):
        fused = rk.fuse(net().eval().to(dtype, memory_format=layout), backend="auto", freeze=freeze)
        x = torch.empty(batch, channels, size, size, dtype=dtype).to(memory_format=layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_plan.Plan, "__init__", init)
        for kind in ("constants.LiveConstants", "frozen_constants.FrozenConstants"):
            patch.setattr(f"resnet_kernels.runtime.gpu.{kind}.read", lambda constants: _Anything())
        patch.setattr(launches, "convolve_as", _shape_only)
        run(fused, x)
    return found


class _Anything(dict):
    def __missing__(self, key):
        return None


def _shape_only(part, form, values, constants, backend):
    x = values[part.step.x]
    shape = launches._geometry(part, x).out_shape(x.shape, part.conv.weight.shape)
    values[part.step.out] = torch.empty(shape, dtype=x.dtype, device="meta").contiguous(memory_format=CHANNELS_LAST)
