"""Contenders of eager PyTorch and of this package. The peers are in peers.py."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

import resnet_kernels as rk
from resnet_kernels.runtime.fused_module import is_fused

from ..workload import ForeignRunner, ModuleRunner, Workload
from .base import Contender


class Eager(Contender):
    name, label = "eager", "PyTorch eager"
    settings = "channels_last; cudnn.benchmark on CUDA"

    def covers(self, case, full):
        return True

    def prepare(self, workload):
        return ModuleRunner(workload.eager, workload.case.backward)


class Fused(Contender):
    """rk.fuse, or the op alone, on a backend. freeze: models only, whose weights the user promises not to change."""

    ours = True
    package = "resnet_kernels"

    def __init__(self, name: str, backend: str, freeze: bool = False):
        self.name, self.backend, self.freeze = name, backend, freeze
        self.label = f"resnet_kernels ({backend}{', frozen' * freeze})"
        self.settings = f'rk.fuse(model, backend="{backend}"{", freeze=True" * freeze}), channels_last'

    @property
    def version(self) -> str:
        return f"resnet_kernels {rk.__version__}"

    def covers(self, case, full):
        if self.freeze and not (full and case.level == "model" and not case.backward):
            return False
        # "auto" uses none of the Triton kernels until a table shows that they win.
        return self.backend == "auto" or case.device == "cuda"

    def prepare(self, workload):
        return ModuleRunner(fused_module(workload, self.backend, self.freeze), workload.case.backward)

    def gate(self, workload, runner):
        case = workload.case
        if case.backward or case.level == "op":
            return workload.gate(runner)
        # Eager's time under the name of fused would be the worst wrong number. The report alone says what could be fused.
        report = rk.explain(runner.module)
        swapped = any(is_fused(module) for module in runner.module.modules())
        not_fused = not swapped or not report.rows or any(row.reason or not row.fused for row in report)
        # verify compares block by block, each on eager's own input; the gate compares the whole, as for every contender.
        result, whole = rk.verify(workload.eager, runner.module, workload.operands.inputs[0]), workload.gate(runner)
        failures = [f"not all of it runs fused:\n{report}"] if not_fused else []
        failures += [str(result)] if any(not block.ok for block in result.blocks) else []
        failures += [whole.failure] if whole.failure else []
        return replace(whole, failure="\n".join(failures))


class FusedGraph(Contender):
    """rk.capture of the fused model, our way to CUDA graphs."""

    ours, package = True, "resnet_kernels"

    def __init__(self, name: str, freeze: bool = False):
        self.name, self.freeze = name, freeze
        self.label = f"resnet_kernels (CUDA graph{', frozen' * freeze})"
        self.settings = f'rk.capture(rk.fuse(model, backend="auto"{", freeze=True" * freeze}), x)'

    @property
    def version(self) -> str:
        return f"resnet_kernels {rk.__version__}"

    def covers(self, case, full):
        if self.freeze and not (full and case.level == "model"):
            return False
        return case.device == "cuda" and case.level != "op" and not case.backward

    def prepare(self, workload):
        with torch.no_grad():
            run = rk.capture(fused_module(workload, "auto", self.freeze), *workload.operands.inputs)
        return ForeignRunner(run, lambda x: x, lambda y: y)


def fused_module(workload: Workload, backend: str, freeze: bool = False) -> torch.nn.Module:
    """Fused copy of a workload's module on a backend; the eager module stays as it is."""
    if workload.case.level != "op":
        return rk.fuse(workload.eager, backend=backend, freeze=freeze)
    fused = copy.deepcopy(workload.eager)
    fused.backend = backend  # type: ignore[assignment]  # every op's module has it
    return fused
