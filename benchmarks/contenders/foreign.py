"""Peers of other frameworks: forward passes of blocks, stages and models, with `--full`.

Each gets the eager module in the format that its own converter reads, and its conversions of inputs and outputs stay outside
the timed call as far as it allows. What a call returns may lie in the framework's own memory.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings

import torch

from ..cases import Case
from ..workload import ForeignRunner, Workload
from .base import Contender


class _Foreign(Contender):
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


FOREIGN: tuple[Contender, ...] = (OnnxRuntime(), OpenVino(), Jax())
