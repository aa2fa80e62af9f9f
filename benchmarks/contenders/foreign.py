"""Peers of other frameworks: forward passes of blocks, stages and models, with `--full`.

Each gets the eager module in the format that its own converter reads, and its conversions of inputs and outputs stay outside
the timed call as far as it allows. What a call returns may lie in the framework's own memory.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

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


class _OnCpu(_Foreign):
    def covers(self, case, full):
        return super().covers(case, full) and case.device == "cpu"


class _Float32OnCpu(_OnCpu):
    def why_not(self, case):
        return None if case.platform.dtype == torch.float32 else "its CPU cases are of float32 alone"


class OnnxRuntime(_Float32OnCpu):
    name, label, package, modules = "onnxruntime", "ONNX Runtime", "onnxruntime", ("onnxruntime", "onnx", "onnxscript")
    # allow_spinning=0: its spinning threads once made eager, which ran right after it, look 1.6 times slower.
    settings = (
        "CPUExecutionProvider, all graph optimizations, intra-op threads as PyTorch's, session.intra_op.allow_spinning=0; "
        "input and output NumPy arrays, NCHW"
    )

    def prepare(self, workload):
        session = onnx_session(_onnx(workload))
        name = session.get_inputs()[0].name
        return ForeignRunner(
            lambda x: session.run(None, {name: x})[0], lambda x: x.contiguous().numpy(), torch.from_numpy
        )


def onnx_session(program: bytes | str, batch: int | None = None) -> Any:
    """Returns ONNX Runtime's session of a program, or of its file, with these settings and as many threads as PyTorch's.

    batch: the only batch that will come, of a program exported for any (a dimension named "batch").
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    return onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])


def _onnx(workload: Workload) -> bytes:
    x = workload.operands.inputs[0].contiguous()
    file = io.BytesIO()
    with torch.no_grad():
        program = torch.onnx.export(workload.eager, (x,), dynamo=True, verbose=False)
        assert program is not None  # dynamo=True
        program.save(file)  # type: ignore[arg-type]  # a file object will do
    return file.getvalue()


class OpenVino(_OnCpu):
    name, label, package, modules = "openvino", "OpenVINO", "openvino", ("openvino",)
    settings = (
        "CPU, PERFORMANCE_HINT=LATENCY, threads as PyTorch's, no pinning, INFERENCE_PRECISION_HINT of the case's dtype, "
        "fixed shapes, shared inputs and outputs; input NCHW"
    )

    def prepare(self, workload):
        import openvino

        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[workload.case.platform.dtype]
        x = workload.operands.inputs[0].detach().float().contiguous()
        with warnings.catch_warnings():
            # SAME padding reads the input's size, of which tracing warns; the size is fixed here.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            plain = copy.deepcopy(workload.eager).float()
            model = openvino.convert_model(plain, example_input=x, input=[tuple(x.shape)])
        config = openvino_config(precision)
        request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
        return ForeignRunner(
            lambda x: request.infer({0: x}, share_inputs=True, share_outputs=True)[0],
            lambda x: x.float().contiguous().numpy(),
            torch.from_numpy,
        )


def openvino_config(precision: str) -> dict[str, Any]:
    """Returns these settings as OpenVINO's configuration of a CPU; precision: "f32" or "bf16"."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Pinned threads would keep PyTorch's threads off their cores, or the other way round.
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": precision,
    }


class Ncnn(_Float32OnCpu):
    name, label, package, modules = "ncnn", "ncnn", "ncnn", ("ncnn", "pnnx")
    settings = (
        "float32 weights, storage and arithmetic; Winograd, SGEMM, packed layouts and light mode, threads as PyTorch's; "
        "of a batch each layer runs the images one after another; input NCHW"
    )

    def prepare(self, workload):
        import ncnn

        net = ncnn.Net()
        net.opt.num_threads = torch.get_num_threads()
        # Winograd, SGEMM, packed layouts and light mode are on by default, and so is fp16.
        for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):
            setattr(net.opt, f"use_{option}", False)
        with tempfile.TemporaryDirectory() as folder:
            _pnnx(workload, Path(folder))
            if net.load_param(f"{folder}/module.ncnn.param") or net.load_model(f"{folder}/module.ncnn.bin"):
                raise RuntimeError("ncnn can't load what pnnx made of the module")

        def call(x):
            with net.create_extractor() as extractor:
                extractor.input("in0", x)
                failed, y = extractor.extract("out0")
                if failed:
                    raise RuntimeError(f"ncnn's extract returned {failed}")
                return y

        # batch_index: the axis of the batch. Without it a Mat is one image.
        return ForeignRunner(
            call,
            lambda x: ncnn.Mat(x.contiguous().numpy(), batch_index=0),
            lambda y: torch.from_numpy(y.numpy(batch_index=0)),
        )


def _pnnx(workload: Workload, folder: Path) -> None:
    """Converts the eager module for ncnn: module.ncnn.param and module.ncnn.bin in a folder."""
    import pnnx

    x = workload.operands.inputs[0].contiguous()
    with torch.no_grad(), warnings.catch_warnings():
        # torch.jit.trace is deprecated, but TorchScript is what pnnx reads.
        warnings.simplefilter("ignore", DeprecationWarning)
        # The exported module compares the input's size with the one it was exported for.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        # Exported before it is traced: in a trace alone, SAME padding depends on the input's size, and pnnx keeps such a
        # max-pool as an operation that ncnn doesn't have.
        module = torch.export.export(workload.eager, (x,)).module(check_guards=False)
        torch.jit.trace(module, x, check_trace=False).save(folder / "module.pt")
    # Not pnnx.export, which also imports the Python file that it writes. fp16=0: weights stay float32.
    _converted([pnnx.EXEC_PATH, "module.pt", "fp16=0"], folder)


class Mnn(_Float32OnCpu):
    """MNN; its Winograd tiles of up to 8x8 put it over the budget in most blocks and stages.

    ResNet-18's layer2 errs by 5e-6 on the network's own activations and by 6e-5 on the case's normal ones, eager by 3e-7. A
    whole network's logits hide it: with random weights they differ by a thousandth of their norm from image to image.
    """

    name, label, package, modules = "mnn", "MNN", "MNN", ("MNN", "onnx", "onnxscript")
    settings = (
        "converted from ONNX; CPU, precision high, memory and power normal, threads as PyTorch's, Winograd's tiles of MNN's "
        "own choice; copies of input and output timed, NCHW"
    )

    def prepare(self, workload):
        import MNN

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "module.onnx").write_bytes(_onnx(workload))
            # Not MNN.tools.mnnconvert: importing it pip-installs a package, and it reports each conversion over the network.
            command = [sys.executable, "-c", "import sys, _tools; _tools.mnnconvert(sys.argv)", "-f", "ONNX"]
            _converted([*command, "--modelFile", "module.onnx", "--MNNModel", "module.mnn"], Path(folder))
            interpreter = MNN.Interpreter(f"{folder}/module.mnn")
        # The enumerators of MNN's BackendConfig. Given as the string "high", precision is printed.
        high, normal = 1, 0
        session = interpreter.createSession(
            {
                "backend": "CPU",
                "numThread": torch.get_num_threads(),
                "precision": high,
                "memory": normal,
                "power": normal,
            }
        )
        inner_x, inner_y = interpreter.getSessionInput(session), interpreter.getSessionOutput(session)

        def tensor(x: torch.Tensor):
            array = x.contiguous().numpy()
            return MNN.Tensor(array.shape, MNN.Halide_Type_Float, array, MNN.Tensor_DimensionType_Caffe)

        y = tensor(torch.empty(inner_y.getShape()))

        def call(x):
            # Copies, because the session's tensors are of its own memory and layout.
            inner_x.copyFrom(x)
            if failed := interpreter.runSession(session):
                raise RuntimeError(f"MNN's runSession returned {failed}")
            inner_y.copyToHostTensor(y)
            return y

        return ForeignRunner(call, tensor, lambda y: torch.from_numpy(y.getNumpyData()))


class OpenCv(_Float32OnCpu):
    name, label, package, modules = "opencv", "OpenCV", "opencv-python-headless", ("cv2", "onnx", "onnxscript")
    settings = (
        "converted from ONNX; CPU, threads as PyTorch's, enableWinograd(True), which OpenCV 5.0 ignores; copy of the input "
        "timed, NumPy arrays, NCHW"
    )

    def prepare(self, workload):
        import cv2
        import numpy

        cv2.setNumThreads(torch.get_num_threads())
        net = cv2.dnn.readNetFromONNX(numpy.frombuffer(_onnx(workload), numpy.uint8))
        # OpenCV's own backend on the CPU is the default. OpenCV 5 warns if it is asked for.
        # With 5.0 the numbers and times are the same without.
        net.enableWinograd(True)

        def call(x):
            net.setInput(x)
            return net.forward()

        return ForeignRunner(call, lambda x: x.contiguous().numpy(), torch.from_numpy)


def _converted(command: list[str], folder: Path) -> None:
    """Runs a converter in a folder. Its output is seen only if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"{Path(command[0]).name} returned {done.returncode}: {' '.join(last)}")


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


FOREIGN: tuple[Contender, ...] = (OnnxRuntime(), OpenVino(), Ncnn(), Mnn(), OpenCv(), Jax())
