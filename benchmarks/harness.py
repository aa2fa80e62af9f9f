"""A case made runnable: its contenders as modules on the same data, and the gate that each passes before it is timed.

fp64 is the truth and eager in the working dtype the budget: a contender passes if its relative norm error is at most twice
eager's plus one rounding of the dtype. Inference of blocks and models goes through `rk.verify`, block by block.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_kernels as rk
from resnet_kernels.models import d2l, resnet_v1, resnet_v2
from resnet_kernels.verify import randomise_batch_norms_

from . import cases
from .cases import AddRelu, Block, Case, Conv


class ConvBiasAct(nn.Module):
    """relu(conv(x) + bias + residual), with the in-place add and ReLU that models use; or the op that fuses it."""

    def __init__(self, conv: Conv, backend: str | None = None):
        super().__init__()
        self.backend = backend
        self.geometry = {"stride": conv.stride, "padding": conv.kernel // 2}
        # He's initialisation: the outputs are as large as the inputs, and half of them negative.
        fan_in = conv.c_in * conv.kernel**2
        self.weight = nn.Parameter(torch.randn(conv.c_out, conv.c_in, conv.kernel, conv.kernel) * (2 / fan_in) ** 0.5)
        self.bias = nn.Parameter(torch.randn(conv.c_out))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.backend:
            return rk.ops.conv_bias_act(x, self.weight, self.bias, residual, **self.geometry, backend=self.backend)
        y = F.conv2d(x, self.weight, self.bias, **self.geometry)
        return (y if residual is None else y.add_(residual)).relu_()


class AddAndRelu(nn.Module):
    """relu(x + residual) with an in-place ReLU; or the op that fuses it."""

    def __init__(self, backend: str | None = None):
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return rk.ops.add_relu(x, residual, backend=self.backend) if self.backend else torch.add(x, residual).relu_()


class BatchNormAct(nn.Module):
    """relu(BN(x) + residual) with batch statistics and the in-place add and ReLU that models use; or the op that fuses it."""

    def __init__(self, channels: int, backend: str | None = None):
        super().__init__()
        self.bn, self.backend = nn.BatchNorm2d(channels), backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        bn = self.bn
        if self.backend:
            vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
            settings = dict(training=True, momentum=bn.momentum, eps=bn.eps, backend=self.backend)
            return rk.ops.batch_norm_act(x, residual, *vectors, **settings)
        y = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, True, bn.momentum, bn.eps)
        return (y if residual is None else y.add_(residual)).relu_()


def build(subject) -> nn.Module:
    """Returns a subject as a plain, eager module."""
    if isinstance(subject, Conv):
        return ConvBiasAct(subject)
    if isinstance(subject, AddRelu):
        return AddAndRelu()
    if isinstance(subject, cases.BatchNormAct):
        return BatchNormAct(subject.c_in)
    if not isinstance(subject, Block):
        return rk.models.BY_NAME[subject.name](**({"in_channels": 1} if subject.c_in == 1 else {}))
    changes_shape = subject.stride != 1 or subject.c_in != subject.c_out
    if subject.kind == "PreactBottleneck":
        return resnet_v2.PreactBottleneck(subject.c_in, subject.c_out, subject.c_out // 4, subject.stride)
    if subject.kind == "Residual":
        return d2l.Residual(subject.c_in, subject.c_out, changes_shape, subject.stride)
    cls = getattr(resnet_v1, subject.kind)
    shortcut = None
    if changes_shape:
        shortcut = nn.Sequential(
            resnet_v1.conv1x1(subject.c_in, subject.c_out, subject.stride), nn.BatchNorm2d(subject.c_out)
        )
    return cls(subject.c_in, subject.c_out // cls.expansion, subject.stride, shortcut)


@dataclass(frozen=True)
class Gate:
    """Parity of a contender with fp64: relative norm error, what it may be, and, where it fails, of what."""

    error: float
    budget: float
    failure: str = ""


class Workload:
    """A case's data and contenders. Everything is channels_last, eager too."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case = case
        self.device = torch.device(case.platform.device)
        options = {"device": self.device, "dtype": case.platform.dtype}
        # Weights are drawn before they are moved and rounded, so that they are the same on each platform.
        plain = randomise_batch_norms_(build(case.subject)).train(case.backward)
        self.eager = plain.to(**options, memory_format=torch.channels_last)
        subject = case.subject
        size = (case.batch, subject.c_in, subject.size, subject.size)
        x = torch.randn(size).to(**options, memory_format=torch.channels_last)
        self.inputs = [x]
        if isinstance(subject, AddRelu) or getattr(subject, "residual", False):
            with torch.no_grad():
                y = self.eager(x) if isinstance(subject, Conv) else x
            self.inputs.append(torch.randn_like(y))
        self._parity: dict[str, rk.VerifyResult] = {}
        self.grad_y = None
        if case.backward:
            # A model's input needs no gradient; a block's and an op's come from the layer before.
            for value in self.inputs:
                value.requires_grad_(subject.group != "model")
            with torch.no_grad():
                self.grad_y = torch.randn_like(self.eager(*self.inputs))

    @functools.cached_property
    def fused(self) -> nn.Module:
        return self._fused("auto")

    @functools.cached_property
    def triton(self) -> nn.Module:
        return self._fused("triton")

    def _fused(self, backend: str) -> nn.Module:
        if self.case.subject.group != "op":
            return rk.fuse(self.eager, backend=backend)
        fused = copy.deepcopy(self.eager)
        fused.backend = backend
        return fused

    @functools.cached_property
    def compile(self) -> nn.Module:
        import torch._inductor.config as inductor_config

        # For the whole session, and not as torch.compile's option: Dynamo asks the configuration, too, whether parameters
        # are constants, and as an option alone it costs this peer a quarter of its speed.
        inductor_config.freezing = True
        # A copy: freezing takes the parameters for constants.
        return torch.compile(copy.deepcopy(self.eager))

    def call(self, contender: str) -> Callable[[], object]:
        """Returns what is timed, one forward or forward and backward pass; on a GPU it returns before the work is done."""
        module = getattr(self, contender)
        leaves = _leaves(module, self.inputs)

        def forward():
            # As in the gate: torch.compile would make another graph for inference_mode, and the gated one go untimed.
            with torch.no_grad():
                module(*self.inputs)

        def forward_backward():
            # As a training step does, so that gradients are neither added up nor kept from the call before.
            for leaf in leaves:
                leaf.grad = None
            module(*self.inputs).backward(self.grad_y)

        return forward_backward if self.case.backward else forward

    def synchronised(self, contender: str) -> Callable[[], object]:
        """Returns `call(contender)` for a clock that knows nothing of GPUs."""
        call = self.call(contender)
        if self.device.type == "cpu":
            return call
        return lambda: (call(), torch.cuda.synchronize(self.device))

    def gate(self, contender: str) -> Gate:
        """Compares a contender with fp64: outputs in inference, every gradient in training."""
        if self.case.backward or self.case.subject.group == "op":
            return self._gate_of_tensors(contender)
        # Eager's own error is known from any comparison, and fp64 is slow on CPUs and most GPUs.
        result = self._verified("fused" if contender == "eager" else contender)
        if contender == "eager":
            return Gate(result.output.eager_error, result.output.budget)
        if contender in ("fused", "triton"):
            # A time of eager under the name of fused would be the worst of wrong numbers.
            report = rk.explain(getattr(self, contender))
            if not report.rows or any(row.reason or not row.fused for row in report):
                return Gate(result.output.error, result.output.budget, f"not all of it runs fused:\n{report}")
        return Gate(result.output.error, result.output.budget, "" if result.ok else str(result))

    def gflop(self) -> float:
        """Returns the 1e9 floating-point operations of a call, of convolutions and matrix products alone, counted on eager."""
        with FlopCounterMode(display=False) as counter:
            self.call("eager")()
        return counter.get_total_flops() / 1e9

    def traffic(self) -> int | None:
        """Returns the bytes that batch_norm_act's kernels have to move, each activation once a pass; None for other cases.

        The formulas of kernels/batch_norm_act.py.
        """
        subject = self.case.subject
        if not isinstance(subject, cases.BatchNormAct):
            return None
        passes = 4 if subject.residual else 3
        if self.case.backward:
            # reduce: dy, x, (y, and dz out); apply: dz or dy, x, dx
            passes += 7 if subject.residual else 5
        return passes * self.inputs[0].numel() * self.inputs[0].element_size()

    def saved_bytes(self, contender: str) -> int:
        """Returns the bytes of all tensors that a forward pass keeps for its backward, parameters and input left out."""
        module = getattr(self, contender)
        own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), *self.inputs)}
        kept = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = module(*self.inputs)
        del y
        return sum(kept.values())

    def info(self) -> dict:
        """What a time is worth nothing without."""
        on_gpu = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if on_gpu else torch.backends.cpu.get_cpu_capability()
        return {
            "device": f"{self.device.type} ({device})",
            "dtype": str(self.case.platform.dtype).removeprefix("torch."),
            "tf32": on_gpu and torch.backends.cudnn.conv.fp32_precision == "tf32",
            "torch": torch.__version__,
            "triton": _version("triton"),
            "threads": torch.get_num_threads(),
            "batch": self.case.batch,
            "gflop": self.gflop(),
        }

    def _verified(self, contender: str) -> rk.VerifyResult:
        if contender not in self._parity:
            self._parity[contender] = rk.verify(self.eager, getattr(self, contender), self.inputs[0])
        return self._parity[contender]

    def _gate_of_tensors(self, contender: str) -> Gate:
        eager, oracle = self._references
        tensors = eager if contender == "eager" else [t.double() for t in self._results(getattr(self, contender))]
        names = ["y"]
        if self.case.backward:
            inputs = ["dx", "dresidual"][: sum(x.requires_grad for x in self.inputs)]
            names = [*(f"d{name}" for name, _ in self.eager.named_parameters()), *inputs]
        return _compare(names, tensors, eager, oracle, torch.finfo(self.case.platform.dtype).eps / 2)

    @functools.cached_property
    def _references(self) -> tuple[list[Tensor], list[Tensor]]:
        """(eager's results, fp64's), as fp64."""
        oracle = copy.deepcopy(self.eager).double()
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in self.inputs]
        return [t.double() for t in self._results(self.eager)], self._results(oracle, wide)

    def _results(self, module: nn.Module, inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The output in inference; in training the gradients of all parameters and of the inputs that need one."""
        inputs = self.inputs if inputs is None else inputs
        if not self.case.backward:
            with torch.no_grad():
                return [module(*inputs)]
        y = module(*inputs)
        return list(torch.autograd.grad(y, _leaves(module, inputs), self.grad_y.to(y.dtype)))


def _leaves(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What gets a gradient: all parameters, then the inputs that need one."""
    return [*module.parameters(), *(x for x in inputs if x.requires_grad)]


def _compare(
    names: list[str], tensors: list[Tensor], eager: list[Tensor], oracle: list[Tensor], rounding: float
) -> Gate:
    """The gate of the tensor that comes nearest to its budget, or goes furthest over it."""
    whole = torch.stack([truth.norm() for truth in oracle]).norm().item()
    gates = []
    for name, tensor, reference, truth in zip(names, tensors, eager, oracle):
        size = truth.norm().item()
        # A bias in front of a BN in training has a true gradient of zero, which rounding alone makes anything else: there
        # the error counts against all gradients.
        size = size if size > 1e-9 * whole else whole
        error, own = ((t - truth).norm().item() / size for t in (tensor, reference))
        budget = 2 * own + rounding
        # `not <=`: NaN fails.
        failure = "" if error <= budget else f"{name} errs by {error:.2e}, eager by {own:.2e}"
        gates.append(Gate(error, budget, failure))
    return max(gates, key=lambda gate: (bool(gate.failure), gate.error / gate.budget))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
