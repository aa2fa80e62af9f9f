"""Contenders of the server's view: each is one model that several callers share, made from files that the parent wrote.

The parent exports once. A process of its own reads the files, because exporting in eight processes would take minutes.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resnet_kernels as rk

from ..contenders import foreign
from ..parity import compare

# Ten classes of one image are too few numbers: eager's error on them, which sets the budget, is a matter of luck.
_GATE_IMAGES = 8
_MODEL, IMAGES, _ONNX, _OPENVINO = "model.pt", "images.pt", "network.onnx", "network.xml"


class WrongNumbers(Exception):
    """A contender's output that is over the error budget."""


@dataclass(frozen=True)
class Shared:
    """A contender made ready.

    caller: returns the function that one caller calls; all callers' functions run the same model.
    convert: an image batch as the contender takes it, before the clock starts. restore: its output as a tensor.
    """

    caller: Callable[[], Callable[[Any], Any]]
    convert: Callable[[Tensor], Any]
    restore: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Demand:
    """Properties that a contender is made for.

    threads: intra-op threads of one call. streams: calls that OpenVINO runs at the same time, with `threads` threads each.
    any_batch: whether batches change; else all callers bring one image.
    """

    threads: int
    streams: int = 1
    any_batch: bool = False


def _module(folder: Path) -> nn.Module:
    # Our own file, of this run.
    return torch.load(folder / _MODEL, weights_only=False)


def _of_module(module: nn.Module) -> Shared:
    return Shared(lambda: module, lambda x: x.contiguous(memory_format=torch.channels_last), lambda y: y)


def _eager(folder: Path, demand: Demand) -> Shared:
    return _of_module(_module(folder))


def _fused(folder: Path, demand: Demand) -> Shared:
    return _of_module(rk.fuse(_module(folder)))


def _frozen(folder: Path, demand: Demand) -> Shared:
    return _of_module(rk.fuse(_module(folder), freeze=True))


def _onnxruntime(folder: Path, demand: Demand) -> Shared:
    session = foreign.onnx_session(str(folder / _ONNX), None if demand.any_batch else 1)
    name = session.get_inputs()[0].name
    return Shared(lambda: lambda x: session.run(None, {name: x})[0], lambda x: x.contiguous().numpy(), torch.from_numpy)


def _openvino(folder: Path, demand: Demand) -> Shared:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(folder / _OPENVINO))
    if not demand.any_batch:
        model.reshape([1, *list(model.input(0).partial_shape)[1:]])
    config = foreign.openvino_config("f32")
    if demand.streams > 1:
        del config["PERFORMANCE_HINT"]  # a latency hint stands for one stream
        config |= {"NUM_STREAMS": demand.streams, "INFERENCE_NUM_THREADS": demand.streams * demand.threads}
    compiled = core.compile_model(model, "CPU", config)

    def caller() -> Callable[[Any], Any]:
        request = compiled.create_infer_request()  # which one caller uses at a time
        return lambda x: request.infer({0: x}, share_inputs=True, share_outputs=True)[0]

    return Shared(caller, lambda x: x.contiguous().numpy(), torch.from_numpy)


MAKERS: dict[str, Callable[[Path, Demand], Shared]] = {
    "eager": _eager,
    "fused": _fused,
    "frozen": _frozen,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def make(name: str, folder: Path, demand: Demand) -> Shared:
    """Makes a contender from the files of `export`, on as many PyTorch threads as it is to use, and checks its numbers.

    Raises:
        WrongNumbers: The output on an image is over the error budget. No time counts then.
    """
    torch.set_num_threads(demand.threads)
    shared = MAKERS[name](folder, demand)
    known = torch.load(folder / IMAGES)
    call = shared.caller()
    with torch.inference_mode():
        # Cloned: an output may lie in memory that the next call overwrites.
        outputs = [shared.restore(call(shared.convert(image))).clone() for image in known["images"].split(1)]
    gate = compare(["y"], [torch.cat(outputs)], [known["eager"]], [known["truth"]], torch.float32)
    if gate.failure:
        raise WrongNumbers(f"{name}: {gate.failure}")
    return shared


def export(model: nn.Module, size: int, folder: Path) -> dict[str, str]:
    """Writes the files that contenders are made from.

    Args:
        model: a network in eval mode, float32; its input channels are its first convolution's.
        size: height and width of the images.
        folder: an empty folder.

    Returns:
        name -> reason, for each contender that can't take part.
    """
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    images = torch.randn(_GATE_IMAGES, first.in_channels, size, size)
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's types lack memory_format
    torch.save(model, folder / _MODEL)
    with torch.no_grad():
        eager = torch.cat([model(image.contiguous(memory_format=torch.channels_last)) for image in images.split(1)])
        double = copy.deepcopy(model).double()
        truth = torch.cat([double(image.double()) for image in images.split(1)])
    torch.save({"images": images, "eager": eager, "truth": truth}, folder / IMAGES)
    absent = {}
    for peer, write in ((foreign.OnnxRuntime, _write_onnx), (foreign.OpenVino, _write_openvino)):
        missing = [name for name in peer.modules if importlib.util.find_spec(name) is None]
        try:
            if missing:
                raise ImportError(f"not installed: {', '.join(missing)} (pip install 'resnet_kernels[peers]')")
            write(copy.deepcopy(model), images[:2], folder)
        except Exception as error:  # a peer's fault costs its own rows only
            absent[peer.name] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return absent


def _write_onnx(model: nn.Module, images: Tensor, folder: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.onnx.export(model, (images,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
    assert program is not None  # dynamo=True
    program.save(folder / _ONNX)


def _write_openvino(model: nn.Module, images: Tensor, folder: Path) -> None:
    import openvino

    with warnings.catch_warnings():
        # SAME padding reads the input's size, of which tracing warns; the size is fixed here.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        program = openvino.convert_model(model, example_input=images, input=[(-1, *images.shape[1:])])
    openvino.save_model(program, folder / _OPENVINO, compress_to_fp16=False)
