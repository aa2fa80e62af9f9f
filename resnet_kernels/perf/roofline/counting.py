"""Launches of a model on a GPU that need not be here: every kernel with its FLOPs and its bytes from and to HBM.

The model itself runs, on the meta device, and nothing is computed: PyTorch's operations are recorded when they are
dispatched, our kernels when they are launched. Fusion takes every decision that it takes on an NVIDIA GPU (compute
capability 9, cuDNN, no table), so no formula has to guess which kernels run.

How it is counted

    An ATen operation is one launch, a view is none. It reads each of its tensors once (only the touched pixels of a
    convolution's input) and writes its result. A convolution's bias is a launch of its own: PyTorch adds it to cuDNN's output.
    A launch of ours reads or writes each of its tensors once, and those behind a table of addresses.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...fusion.convert import fuse
from ...ops import backends
from .bounds import Kernel
from .network import pixels_read

# Name of the launch that adds a convolution's bias.
BIAS = "bias of a convolution"
# Number of an H200's multiprocessors.
MULTIPROCESSORS = 132
_CONVOLUTIONS = ("convolution", "cudnn_convolution_relu", "cudnn_convolution_add_relu")
# Operations that launch nothing.
_FREE = ("empty", "empty_strided", "empty_like", "new_empty", "lift_fresh", "as_strided_")


def count(model: nn.Module, x: Tensor, backend: str | None = None) -> list[Kernel]:
    """Returns the launches of one call in inference, channels_last, in order.

    Args:
        model: any module of one tensor; it is left as it is.
        x: (N, C, H, W), only its shape and dtype matter; the model is counted in this dtype.
        backend: "auto" or "triton" fuses the model first; None counts the model as it is.

    Raises:
        ValueError: if the backend is none of these.
        RuntimeError: if Triton is not installed and the model is to be fused.
    """
    if backend not in (None, "auto", "triton"):
        raise ValueError(f'backend must be "auto", "triton" or None, got {backend!r}')
    if backend is not None and (reason := backends.why_not("triton", "cuda", torch.float32)) is not None:
        raise RuntimeError(f"counting the launches of a fused model {reason}")
    model = copy.deepcopy(model).to("meta", x.dtype)
    model = model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # PyTorch's types lack memory_format
    x = torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=torch.channels_last)
    recorder = _Recorder()
    with torch.no_grad(), _gpu(recorder) if backend else contextlib.nullcontext():
        if backend is not None:
            model = fuse(model, backend=backend)
        with recorder:
            model(x)
            # The first call makes tables and plans, which are kept; the second counts.
            recorder.kernels.clear()
            model(x)
    return recorder.kernels


@contextlib.contextmanager
def _gpu(recorder: _Recorder) -> Iterator[None]:
    """Makes meta tensors look like an NVIDIA GPU's, and records Triton launches."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from ...kernels import target
    from ...kernels.sm90 import conv

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recorder.launched(kernel, arguments, options)

    patches = (
        (backends, "untuned", lambda device, dtype: "cudnn"),
        (backends, "why_not_on", lambda backend, device, dtype: None),
        (import_module("resnet_kernels.runtime.eligibility"), "is_ordinary", lambda x: isinstance(x, Tensor)),
        (target, "is_hopper", lambda device: True),
        (conv, "multiprocessors", lambda device: MULTIPROCESSORS),
        (JITFunction, "run", run),
        (InterpretedFunction, "run", run),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


class _Recorder(TorchDispatchMode):
    """Recorder of launches, PyTorch's and ours."""

    def __init__(self):
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "resnet_kernels":
            # The recorder stays on inside our op, so that it sees the op's launches.
            with self:
                return getattr(import_module(f"resnet_kernels.ops.{name}"), f"_{name}")(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        out = _convolve(name, args) if name in _CONVOLUTIONS else func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name not in _FREE and outputs and not _is_view(func, inputs, outputs):
            self._write_down(name.rstrip("_"), args, inputs, outputs)
        return out

    def _write_down(self, name: str, args: tuple, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        read, flops = sum(map(_bytes, inputs)), 0
        written = sum(map(_bytes, outputs))
        if name in _CONVOLUTIONS:
            x, weight, out = args[0], args[1], outputs[0]
            read -= _bytes(x) - x.element_size() * pixels_read(x, weight.shape[2:], out)
            flops = 2 * out.numel() * weight[0].numel()
            if name == "convolution" and args[2] is not None:
                read -= _bytes(args[2])
                self.kernels.append(Kernel(name, flops, read + written, 0))
                name, flops, read = BIAS, 0, written + _bytes(args[2])
        elif name in ("mm", "addmm"):
            flops = 2 * outputs[0].numel() * inputs[-1].shape[0]
        self.kernels.append(Kernel(name, flops, read + written, 0))

    def launched(self, kernel: Any, arguments: tuple, options: dict[str, Any]) -> None:
        """Records a launch of ours."""
        given = dict(zip(kernel.arg_names, arguments)) | options
        moved = sum(_argument_bytes(value) for value in given.values())
        if "pointers_ptr" in given:
            # Five vectors of each layer lie behind a table of addresses; scale is as long as one of them.
            moved += 5 * given["scale_ptr"].numel() * _itemsize(given["DTYPE"])
        elif "weights_ptr" in given:
            moved += given["weights_ptr"].numel() * _itemsize(given["DTYPE"])
        self.kernels.append(Kernel(kernel.__name__.strip("_"), 0, moved, 0))


def _convolve(name: str, args: tuple) -> Tensor:
    """Result of a convolution in cuDNN's layout, also of cuDNN's fused operations, which lack a meta implementation."""
    x, weight = args[:2]
    if name == "convolution":
        stride, padding, dilation, transposed, output_padding, groups = args[3:]
    else:
        (stride, padding, dilation, groups), transposed, output_padding = args[-4:], False, [0, 0]
    out = torch.ops.aten.convolution.default(
        x, weight, None, stride, padding, dilation, transposed, output_padding, groups
    )
    return torch.empty(out.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    memory = {t.untyped_storage()._cdata for t in inputs}
    return not func._schema.is_mutable and outputs[0].untyped_storage()._cdata in memory


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _argument_bytes(value: Any) -> int:
    """Bytes of a tensor, or of the tensor behind a descriptor; 0 for any other argument of a launch."""
    if isinstance(value, Tensor):
        return _bytes(value)
    base = getattr(value, "base", None)
    return 0 if base is None else math.prod(value.shape) * base.dtype.itemsize


def _itemsize(dtype: Any) -> int:
    return dtype.primitive_bitwidth // 8
