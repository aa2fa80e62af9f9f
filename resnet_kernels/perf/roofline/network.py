"""Work of a network on one batch, as data: its operations, the values that they read and write, and FLOPs.

The network runs once on the meta device under a dispatch mode that records each ATen operation, so any PyTorch module that
runs there can be traced, whatever its forward looks like. Nothing is computed and no weight is needed. reader.py reads a
block without shapes; this module traces a whole network with them.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Kinds by ATen name, in-place variants included. Anything else is "other": only bytes count, also for attention's products.
_KINDS = {
    "convolution": "conv",
    "mm": "matmul",
    "addmm": "matmul",
    "native_batch_norm": "bn",
    "cudnn_batch_norm": "bn",
    "_native_batch_norm_legit_no_training": "bn",
    "relu": "relu",
    "hardtanh": "relu6",
    "leaky_relu": "leaky_relu",
    "silu": "silu",
    "gelu": "gelu",
    "hardswish": "hardswish",
    "add": "add",
    "max_pool2d_with_indices": "max_pool",
    "constant_pad_nd": "pad",
}


# Kinds that can end a fused operation.
ACTIVATIONS = frozenset({"relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish"})


@dataclass(frozen=True)
class Gemm:
    """A convolution or matrix product as an implicit GEMM: (m, k) times (k, n), k = c_in / groups * taps.

    m: output pixels, or rows. n: output channels of all groups. c_in: input channels of all groups.
    kernel_size, stride: per axis, () for a matrix product. groups: as in nn.Conv2d.
    """

    m: int
    n: int
    c_in: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def taps(self) -> int:
        """Number of pixels of the kernel."""
        return math.prod(self.kernel_size)

    @property
    def flops(self) -> int:
        """FLOPs; a multiplication and an addition count as one each."""
        return 2 * self.m * self.weights

    @property
    def weights(self) -> int:
        """Number of elements of the weight."""
        return self.n * self.c_in // self.groups * self.taps

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a 1x1 convolution at stride 1, which maps each pixel by itself."""
        return bool(self.kernel_size) and self.taps == 1 and math.prod(self.stride) == 1


@dataclass(frozen=True)
class Operation:
    """One ATen operation.

    name: its module's path, and its kind where a module has several. kind: conv, matmul, bn, add, max_pool, pad, one of
    ACTIVATIONS, or other. reads: (value, number of elements read) for each tensor. writes: the value that it makes.
    elements: number of elements of that value. gemm: the GEMM of a conv or matmul.
    """

    name: str
    kind: str
    reads: tuple[tuple[int, int], ...]
    writes: int
    elements: int
    gemm: Gemm | None = None


@dataclass(frozen=True)
class Network:
    """Operations in the order of eager's calls. Value 0 is the input; `results` are the values that the caller gets."""

    operations: tuple[Operation, ...]
    results: frozenset[int]
    batch_size: int

    @cached_property
    def readers(self) -> Counter[int]:
        """Number of readers of each value; the caller counts as one."""
        read = Counter(value for operation in self.operations for value, _ in operation.reads)
        return read + Counter(self.results)


def trace(model: nn.Module, x: Tensor) -> Network:
    """Runs a copy of a model in eval mode on the meta device and returns its operations.

    Args:
        model: any module of one tensor; it is left as it is.
        x: (N, ...), only its shape and dtype matter.

    Raises:
        ValueError: The model runs a transposed convolution, or no convolution and no matrix product at all.
    """
    # Copied, because it gets hooks and loses its weights.
    model = copy.deepcopy(model).to("meta").eval()
    mode = _Tracer(model)
    x = x.to("meta")
    mode.make_value(x)
    with torch.no_grad(), mode:
        y = model(x)
    if all(operation.gemm is None for operation in mode.operations):
        raise ValueError(f"model must have a convolution or a linear layer, got a {type(model).__name__} without one")
    values = (mode.value_of(tensor) for tensor in tree_leaves(y) if isinstance(tensor, Tensor))
    results = frozenset(value for value in values if value is not None)
    return Network(tuple(mode.operations), results, x.shape[0])


class _Tracer(TorchDispatchMode):
    """Recorder of operations. A value is a storage between two writes: views and in-place operations are no special case."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.operations: list[Operation] = []
        self.values: dict[int, int] = {}
        self.n_values = 0
        self.kept: list[Any] = []  # storages, kept alive so that no address is reused
        self.path: list[tuple[str, nn.Module]] = []
        self.parameters = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, _, path=path: self.path.append((path, module)))
            module.register_forward_hook(self._leave)

    def _leave(self, *_) -> None:
        self.path.pop()

    def value_of(self, tensor: Tensor) -> int | None:
        """Returns the value that a tensor holds; None for a constant that no operation made."""
        return self.values.get(_storage(tensor))

    def make_value(self, tensor: Tensor) -> int:
        """Returns a new value that a tensor holds from now on."""
        self.kept.append(tensor.untyped_storage())
        value = self.values[_storage(tensor)] = self.n_values
        self.n_values += 1
        return value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) else out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if isinstance(first, Tensor):
            is_view = not func._schema.is_mutable and any(_storage(t) == _storage(first) for t in inputs)
            if not is_view:
                kind = _KINDS.get(func.overloadpacket.__name__.rstrip("_"), "other")
                self._write_down(kind, args, inputs, first)
        return out

    def _write_down(self, kind: str, args: tuple, inputs: list[Tensor], out: Tensor) -> None:
        # Inputs before the output: an in-place operation reads the old value of the tensor that it writes.
        activations = [(self.value_of(t), t.numel()) for t in inputs if _storage(t) not in self.parameters]
        reads = [(value, n) for value, n in activations if value is not None]
        if not reads:
            self.make_value(out)  # zeros or an arange: no work on the image
            return
        gemm = None
        if kind == "conv":
            gemm = _conv(args, out)
            reads = [(reads[0][0], pixels_read(args[0], gemm.kernel_size, out))]
        elif kind == "matmul" and _storage(inputs[-1]) in self.parameters:
            a, b = inputs[-2:]
            gemm = Gemm(m=a.shape[0], n=b.shape[1], c_in=a.shape[1])
        elif kind == "max_pool":
            reads = [(reads[0][0], pixels_read(args[0], args[1], out))]
        elif kind == "matmul" or (kind == "add" and len(reads) != 2):
            kind = "other"
        path, module = self.path[-1] if self.path else ("", self.model)
        alone = not module._modules and kind != "pad"
        name = path if alone and path else f"{path}.{kind}".lstrip(".")
        self.operations.append(Operation(name, kind, tuple(reads), self.make_value(out), out.numel(), gemm))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _conv(args: Sequence[Any], out: Tensor) -> Gemm:
    """GEMM of an aten.convolution."""
    x, weight, _, stride, _, dilation, transposed, _, groups = args
    if transposed:
        raise ValueError("model must have no transposed convolution, got one: its GEMM is another")
    return Gemm(
        m=out.shape[0] * math.prod(out.shape[2:]),
        n=out.shape[1],
        c_in=x.shape[1],
        kernel_size=tuple(weight.shape[2:]),
        stride=tuple(stride),
        dilation=tuple(dilation),
        groups=groups,
    )


def pixels_read(x: Tensor, kernel_size: Sequence[int], out: Tensor) -> int:
    """Number of elements of x that windows touch: windows smaller than their stride skip rows and columns."""
    touched = [min(size, n * k) for size, n, k in zip(x.shape[2:], out.shape[2:], kernel_size)]
    return x.shape[0] * x.shape[1] * math.prod(touched)
