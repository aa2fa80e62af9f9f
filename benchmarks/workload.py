"""Workload of a case: its module and operands, and the runners that contenders make for it.

A runner binds a copy of the operands and returns the call to time. It reads results from what that very call returned, so
that the gate checks the timed computation.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resnet_kernels.fusion.verify import unsearched
from resnet_kernels.models.random_weights import randomise_batch_norms_

from .cases import Case, Conv
from .parity import Gate, compare
from .subjects import build, has_residual

GATE_IMAGES = 8


@dataclass(frozen=True)
class Operands:
    """Tensors that a call reads besides parameters: input, residual if any, and in training the output's gradient."""

    inputs: tuple[Tensor, ...]
    grad_y: Tensor | None = None

    @property
    def nbytes(self) -> int:
        tensors = self.inputs if self.grad_y is None else (*self.inputs, self.grad_y)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def copy(self) -> Operands:
        inputs = (x.detach().clone().requires_grad_(x.requires_grad) for x in self.inputs)
        return Operands(tuple(inputs), None if self.grad_y is None else self.grad_y.clone())

    def double(self) -> Operands:
        inputs = (x.detach().double().requires_grad_(x.requires_grad) for x in self.inputs)
        return Operands(tuple(inputs), None if self.grad_y is None else self.grad_y.double())


class Runner(Protocol):
    """A contender made ready for a workload."""

    def bind(self, operands: Operands) -> Callable[[], object]:
        """Returns the call to time: a forward, or a forward and backward pass. On a GPU it returns before the work is done."""

    def read(self, operands: Operands, returned: object) -> list[Tensor]:
        """Results of a bound call from what it returned: the output, or all gradients."""


class ModuleRunner:
    """Runner of a torch module, as a user would call it."""

    def __init__(self, module: nn.Module, backward: bool):
        self.module, self.backward = module, backward

    def bind(self, operands: Operands) -> Callable[[], object]:
        module, inputs, grad_y, leaves = self.module, operands.inputs, operands.grad_y, self._leaves(operands)

        def forward():
            # no_grad, as in the gate: for inference_mode torch.compile would make another graph.
            with torch.no_grad():
                return module(*inputs)

        def forward_backward():
            # A training step does so, too: gradients are neither added up nor kept from the call before.
            for leaf in leaves:
                leaf.grad = None
            module(*inputs).backward(grad_y)

        return forward_backward if self.backward else forward

    def read(self, operands: Operands, returned: Any) -> list[Tensor]:
        if not self.backward:
            return [returned]
        return [leaf.grad for leaf in self._leaves(operands) if leaf.grad is not None]

    def saved_bytes(self, operands: Operands) -> int:
        """Bytes of all tensors that a forward pass keeps for its backward, except parameters, buffers and inputs."""
        module = self.module
        own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers(), *operands.inputs)}
        kept = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = module(*operands.inputs)
        del y
        return sum(kept.values())

    def _leaves(self, operands: Operands) -> list[Tensor]:
        return [*self.module.parameters(), *(x for x in operands.inputs if x.requires_grad)]


class GraphRunner:
    """Runner of another runner's call captured as a CUDA graph: the host launches once, whatever the call contains."""

    def __init__(self, inner: ModuleRunner):
        self.inner = inner

    def bind(self, operands: Operands) -> Callable[[], object]:
        call = self.inner.bind(operands)
        # torch.cuda.graph requires a warm-up on a side stream: lazy initialization and cuDNN's search stay out of the graph.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Read now: a replay writes to these tensors, even if the leaves' .grad is replaced later.
            results = self.inner.read(operands, call())

        def replay():
            graph.replay()
            return results

        return replay

    def read(self, operands: Operands, returned: Any) -> list[Tensor]:
        return [tensor.clone() for tensor in returned]


class ForeignRunner:
    """Runner of another framework's forward pass. Inputs are converted before the clock starts, the output after it stops."""

    def __init__(
        self,
        call: Callable[..., object],
        convert: Callable[[Tensor], object],
        restore: Callable[[object], Tensor],
    ):
        self.call, self.convert, self.restore = call, convert, restore

    def bind(self, operands: Operands) -> Callable[[], object]:
        call, inputs = self.call, [self.convert(x.detach()) for x in operands.inputs]
        return lambda: call(*inputs)

    def read(self, operands: Operands, returned: object) -> list[Tensor]:
        return [self.restore(returned)]


class Workload:
    """Eager module and operands of a case, all in channels_last."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case = case
        self.device = torch.device(case.device)
        if self.device.type == "cuda":
            # It serves every contender that calls cuDNN through PyTorch. Sizes never change here, so the search runs once.
            torch.backends.cudnn.benchmark = True
        subject = case.subject
        # Weights are drawn before they are moved and rounded, so that they are the same on each platform.
        plain = randomise_batch_norms_(build(subject)).train(case.backward)
        plain = plain.to(self.device, case.platform.dtype)
        self.eager: nn.Module = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's types lack memory_format
        size = (case.batch, subject.c_in, subject.size, subject.size)
        inputs = [torch.randn(size).to(self.device, case.platform.dtype, memory_format=torch.channels_last)]
        with torch.no_grad():
            if has_residual(subject):
                y = self.eager(*inputs) if isinstance(subject, Conv) else inputs[0]
                inputs.append(torch.randn_like(y))
            grad_y = torch.randn_like(self.eager(*inputs)) if case.backward else None
        # A model's input needs no gradient; the input of a stage, block or op comes from the layer before and does.
        needs_grad = case.backward and case.level != "model"
        self.operands = Operands(tuple(x.requires_grad_(needs_grad) for x in inputs), grad_y)

    @functools.cached_property
    def copies(self) -> tuple[Operands, ...]:
        """Copies of the operands, enough that each has left a GPU's L2 cache before its next turn.

        CPUs and models get one copy: a model's intermediate tensors by far outgrow an L2.
        """
        if self.device.type != "cuda" or self.case.level == "model":
            return (self.operands,)
        count = copies_beyond(torch.cuda.get_device_properties(self.device).L2_cache_size, self.operands.nbytes)
        return (self.operands, *(self.operands.copy() for _ in range(count - 1)))

    @functools.cached_property
    def gated(self) -> tuple[Operands, ...]:
        """Operands for the gate; in inference of models more are added, to make at least GATE_IMAGES images.

        A single image's ten probabilities are too few numbers: eager's error on them, which sets the budget, is a matter of
        luck.
        """
        if self.case.backward or self.case.level != "model":
            return (self.operands,)
        more = math.ceil(GATE_IMAGES / self.case.batch) - 1
        (x,) = self.operands.inputs
        return (self.operands, *(Operands((torch.randn_like(x),)) for _ in range(more)))

    def gate(self, runner: Runner) -> Gate:
        """Compares a runner's results with fp64's: the output in inference, every gradient in training."""
        eager, oracle = self._references
        results = self._results(runner, self.gated)
        names = ["y"]
        if self.case.backward:
            inputs = ["dx", "dresidual"][: sum(x.requires_grad for x in self.operands.inputs)]
            names = [*(f"d{name}" for name, _ in self.eager.named_parameters()), *inputs]
        return compare(names, results, eager, oracle, self.case.platform.dtype)

    @functools.cached_property
    def _references(self) -> tuple[list[Tensor], list[Tensor]]:
        """Results of eager and of the oracle, in this order."""
        backward = self.case.backward
        oracle = ModuleRunner(copy.deepcopy(self.eager).double(), backward)
        eager = self._results(ModuleRunner(self.eager, backward), self.gated)
        with unsearched():
            return eager, self._results(oracle, [operands.double() for operands in self.gated])

    def _results(self, runner: Runner, gated: Sequence[Operands]) -> list[Tensor]:
        """Results on all operands, outputs concatenated. In training there is one set of operands."""
        # Cloned: a result may lie in the runner's own memory, which the next call overwrites.
        found = [[t.detach().clone() for t in runner.read(some, runner.bind(some)())] for some in gated]
        return found[0] if len(found) == 1 else [torch.cat(outputs) for outputs in zip(*found)]


def copies_beyond(cache_bytes: int, operand_bytes: int) -> int:
    """Number of copies of the operands, at least two, that together are at least twice as large as a cache."""
    return max(2, math.ceil(2 * cache_bytes / max(1, operand_bytes)))
