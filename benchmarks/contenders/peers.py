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
"""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..cases import D2L_KERAS, Case, Conv
from ..subjects import ConvBiasAct
from ..workload import ForeignRunner, GraphRunner, ModuleRunner, Workload
from .base import Contender
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


class _Foreign(Contender):
    """Framework other than PyTorch: forward passes of blocks, stages and models, with --full."""

    own_threads = True
    modules: tuple[str, ...]

    def covers(self, case, full):
        return full and case.level != "op" and not case.backward

    def why_absent(self, case):
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)} (pip install 'resnet_kernels[peers]')"
        return self.why_not(case)

    def why_not(self, case: Case) -> str | None:
        """The reason why it can't do a case although it is installed; None if it can."""
        return None


class OnnxRuntime(_Foreign):
    name, label, package, modules = "onnxruntime", "ONNX Runtime", "onnxruntime", ("onnxruntime", "onnx", "onnxscript")
    # allow_spinning=0: its spinning threads once made eager, which ran right after it, look 1.6 times slower.
    settings = (
        "CPUExecutionProvider, all graph optimizations, intra-op threads as PyTorch's, session.intra_op.allow_spinning=0; "
        "input and output NumPy arrays, NCHW"
    )

    def covers(self, case, full):
        return super().covers(case, full) and case.device == "cpu"

    def why_not(self, case):
        return None if case.platform.dtype == torch.float32 else "its CPU convolutions are of float32 alone"

    def prepare(self, workload):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(_onnx(workload), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return ForeignRunner(
            lambda x: session.run(None, {name: x})[0], lambda x: x.contiguous().numpy(), torch.from_numpy
        )


def _onnx(workload: Workload) -> bytes:
    x = workload.operands.inputs[0].contiguous()
    file = io.BytesIO()
    with torch.no_grad():
        program = torch.onnx.export(workload.eager, (x,), dynamo=True, verbose=False)
        assert program is not None  # dynamo=True
        program.save(file)  # type: ignore[arg-type]  # a file object will do
    return file.getvalue()


class OpenVino(_Foreign):
    name, label, package, modules = "openvino", "OpenVINO", "openvino", ("openvino",)
    settings = (
        "CPU, PERFORMANCE_HINT=LATENCY, threads as PyTorch's, no pinning, INFERENCE_PRECISION_HINT of the case's dtype, "
        "fixed shapes, shared inputs and outputs; input NCHW"
    )

    def covers(self, case, full):
        return super().covers(case, full) and case.device == "cpu"

    def prepare(self, workload):
        import openvino

        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[workload.case.platform.dtype]
        x = workload.operands.inputs[0].detach().float().contiguous()
        with warnings.catch_warnings():
            # SAME padding reads the input's size, of which tracing warns; the size is fixed here.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            plain = copy.deepcopy(workload.eager).float()
            model = openvino.convert_model(plain, example_input=x, input=[tuple(x.shape)])
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # Pinned threads would keep PyTorch's threads off their cores, or the other way round.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": precision,
        }
        request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
        return ForeignRunner(
            lambda x: request.infer({0: x}, share_inputs=True, share_outputs=True)[0],
            lambda x: x.float().contiguous().numpy(),
            torch.from_numpy,
        )


class Jax(_Foreign):
    name, label, package, modules = "jax", "JAX / XLA", "jax", ("jax",)
    settings = (
        "one jax.jit, compiled ahead, NHWC, BN as scale and shift; matmul precision as PyTorch's TF32 switch says"
    )

    def why_not(self, case):
        import jax

        platform = {"cpu": "cpu", "cuda": "gpu"}[case.device]
        try:
            return None if jax.devices(platform) else f"jax has no {platform} device"
        except RuntimeError as error:
            return f"jax has no {platform} device: {error}"

    def prepare(self, workload):
        from .jax_resnet import convert

        return convert(workload)


PEERS: tuple[Contender, ...] = (
    Compile(),
    CompileMax(),
    EagerGraph(),
    CompileGraph(),
    Cudnn(),
    OnnxRuntime(),
    OpenVino(),
    Jax(),
)
