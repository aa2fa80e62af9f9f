"""Peers: other ways to run the same network fast, each with its best known settings, in the same rounds as eager and fused.

A peer that isn't installed, can't do a case or raises is listed as absent with the reason, and costs only its own row (a peer
that kills the process ends the run). Eager's CUDA graph and cuDNN's calls always run; the others need `--full`, because
preparing them takes longer than timing them.

No contender may slow the next one. `python -m benchmarks.tools.interference --seconds 8` on two CPU cores that nobody else
used, ResNet-18 (batch 2, 64x64), medians of time / time after its own kind of the same round:

                     eager after it    it after eager    eager, led in    it, led in
    a second eager        1.00              1.01              1.01            1.00
    fused                 1.05              1.13              1.02            1.10
    torch.compile         1.06              1.14              1.04            1.16
    ONNX Runtime          1.08              1.46              1.03            1.13
    OpenVINO              1.08              1.45              1.04            1.27

ONNX Runtime's threads are told not to spin: with theirs spinning, eager took about twice as long. PyTorch's own threads
do spin, for 4 to 8 ms after a parallel region (GNU OpenMP's default), and slow the others down by more than these slow eager.
So in cases where a contender has threads of its own, uncounted calls of the same contender come before each counted call, for
LEAD_IN_SECONDS. The rest of the effect slows everybody but eager, OpenVINO most, in this network of few milliseconds a call.
In a later run on two quiet cores (2 seconds), MNN took 1.88, OpenCV 1.58 and ncnn 1.01 times as long right after eager, led in
1.03, 1.01 and 1.00, and eager after them at most 1.05 and 1.01.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..cases import D2L_KERAS, Conv
from ..subjects import ConvBiasAct
from ..workload import GraphRunner, ModuleRunner, Workload
from .base import Contender
from .foreign import FOREIGN
from .ours import fused_module

# Longer than the 4 to 8 ms for which waiting threads spin.
LEAD_IN_SECONDS = 0.01


class Compile(Contender):
    """torch.compile; with freezing in inference on CPUs, where it is slow without."""

    name, label = "compile", "torch.compile"
    settings = "torch.compile(model); freezing on CPUs"
    own_threads = True  # its kernels link the compiler's own OpenMP runtime

    def covers(self, case, full):
        # Not training on CPUs: a model compiles for minutes.
        return full and (case.device == "cuda" or not case.backward)

    def prepare(self, workload):
        return self._compiled(workload, {}, freezing=workload.case.device == "cpu")

    def _compiled(self, workload: Workload, options: dict, freezing: bool) -> ModuleRunner:
        import torch._dynamo as dynamo
        import torch._inductor.config as inductor_config

        # All cases of a model share its forward's code, and after eight graphs of one code object Dynamo runs it eagerly.
        dynamo.config.fail_on_recompile_limit_hit = True
        # A copy: freezing turns the parameters into constants.
        compiled: Any = torch.compile(copy.deepcopy(workload.eager), **options)
        runner = _CompiledRunner(compiled, workload.case.backward)
        # The call below compiles. The global setting, not torch.compile's option: Dynamo reads it, too, to decide whether
        # parameters are constants, and with the option alone this peer loses a quarter of its speed.
        with inductor_config.patch(freezing=freezing):
            runner.bind(workload.operands)()
        return runner


class _CompiledRunner(ModuleRunner):
    saved_bytes: None = None  # type: ignore[assignment]  # hooks on saved tensors would be compiled, too: another graph than the timed one


class CompileMax(Compile):
    name, label = "compile-max", "torch.compile (max-autotune)"
    settings = 'torch.compile(model, mode="max-autotune"), which has CUDA graphs; freezing in inference'
    own_threads = False

    def covers(self, case, full):
        return full and case.device == "cuda"

    def prepare(self, workload):
        return self._compiled(workload, {"mode": "max-autotune"}, freezing=not workload.case.backward)


class EagerGraph(Contender):
    name, label = "eager-graph", "PyTorch eager (CUDA graph)"
    settings = "channels_last; cudnn.benchmark; one torch.cuda.CUDAGraph"

    def covers(self, case, full):
        return case.device == "cuda"

    def prepare(self, workload):
        return GraphRunner(ModuleRunner(workload.eager, workload.case.backward))


class CompileGraph(Compile):
    name, label = "compile-graph", "torch.compile (CUDA graph)"
    settings = "torch.compile(model); one torch.cuda.CUDAGraph"
    own_threads = False

    def covers(self, case, full):
        return full and case.device == "cuda"

    def prepare(self, workload):
        return GraphRunner(self._compiled(workload, {}, freezing=False))


class Cudnn(Contender):
    """cuDNN's fused convolution + bias (+ add) + ReLU, layer by layer, whatever "auto" chooses."""

    name, label = "cudnn", "cuDNN fused ops"
    settings = "torch.cudnn_convolution_relu / _add_relu per layer, channels_last, cudnn.benchmark"

    def covers(self, case, full):
        if case.device != "cuda" or case.backward:
            return False
        return case.level != "op" or isinstance(case.subject, Conv)

    def why_absent(self, case):
        if case.level == "op" and not (case.subject.relu and case.subject.system != D2L_KERAS):
            return "cuDNN's fused calls end in a ReLU and pad the same on both sides"
        return None

    def prepare(self, workload):
        if workload.case.level != "op":
            return ModuleRunner(fused_module(workload, "cudnn"), backward=False)
        assert isinstance(workload.eager, ConvBiasAct)
        return ModuleRunner(_CudnnConv(workload.eager), backward=False)


class _CudnnConv(nn.Module):
    """cuDNN's bare calls, without the host work that rk.ops adds."""

    def __init__(self, eager: ConvBiasAct):
        super().__init__()
        self.weight, self.bias = eager.weight, eager.bias
        stride, _, dilation, groups = eager.geometry
        self.options = (stride, eager.geometry.conv2d_padding, dilation, groups)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.options)
        return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, self.bias, *self.options)


PEERS: tuple[Contender, ...] = (
    Compile(),
    CompileMax(),
    EagerGraph(),
    CompileGraph(),
    Cudnn(),
    *FOREIGN,
)
