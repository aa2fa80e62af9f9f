"""verify: is the fused model the same model? Layer by layer, against fp64, within eager's own error.

Nobody can say what error is right, but eager PyTorch's own can be measured: fp64 is the truth, and the fused result passes
if its relative norm error is at most twice eager's plus one rounding of the dtype. Each block is fed the very input that
eager feeds it, so a report line is about that block alone; the last line is the whole model.

The whole model's errors are measured at its output. A norm of few values is mostly chance, so an output of fewer than 64 is
computed for the input scaled by several factors, and the errors are those of all these outputs together.

Eager runs in channels_last here, the layout that the fused model computes in. It matters: oneDNN's fp32 channels_last
convolution (PyTorch's own, fused or not) errs up to 4.5 times as much as its NCHW one on long sums (docs/numerics.md).
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..graph.recipe import ContainerPlan
from ..ops import cudnn, error_budget
from ..runtime import container_runs, fused_module
from ..runtime.state import state_of
from .text_table import table

# With n values the ratio of two equal errors varies by 1 / sqrt(n), one standard deviation: an eighth, where 2 is the limit.
_FEWEST_VALUES = 64


@dataclass(frozen=True)
class Parity:
    """One comparison. Errors are ||y - fp64|| / ||fp64|| over the values that are finite in all three."""

    path: str
    steps: str
    max_abs: float  # largest |fused - eager|
    error: float  # fused against fp64
    eager_error: float  # eager against fp64
    budget: float  # 2 * eager_error + one rounding
    lost: int  # NaN or inf in fp64, but finite in fused
    new: int  # finite in eager, NaN or inf in fused

    @property
    def ok(self) -> bool:
        return self.error <= self.budget and self.lost == 0 and self.new == 0


@dataclass(frozen=True)
class VerifyResult:
    """Parity of each fused block and of the whole model. True in a boolean context if all are within budget."""

    blocks: tuple[Parity, ...]
    output: Parity
    top1_agreement: float | None  # share of rows with the same largest logit; None if the output is no (N, classes)
    dtype: str
    device: str
    tf32: bool

    @property
    def first_over_budget(self) -> Parity | None:
        return next((parity for parity in (*self.blocks, self.output) if not parity.ok), None)

    @property
    def ok(self) -> bool:
        return self.first_over_budget is None

    def __bool__(self) -> bool:
        return self.ok

    def to_json(self, **options) -> str:
        """The result as a JSON object; options go to json.dumps."""
        rows = [{**asdict(parity), "ok": parity.ok} for parity in (*self.blocks, self.output)]
        values = {"ok": self.ok, "top1_agreement": self.top1_agreement, "dtype": self.dtype, "device": self.device}
        return json.dumps({**values, "tf32": self.tf32, "rows": rows}, **options)

    def __str__(self) -> str:
        head = ("module", "max |fused-eager|", "error", "eager's", "budget", "NaN/inf", "")
        cells = [
            (
                p.path or "(model)",
                *(f"{v:.2e}" for v in (p.max_abs, p.error, p.eager_error, p.budget)),
                "same" if p.lost == p.new == 0 else f"{p.lost} lost, {p.new} new",
                "ok" if p.ok else "OVER BUDGET",
            )
            for p in (*self.blocks, self.output)
        ]
        agreement = "" if self.top1_agreement is None else f", top-1 agreement {self.top1_agreement:.1%}"
        first = self.first_over_budget
        verdict = "parity holds" if first is None else f"PARITY FAILS, first at {first.path or '(model)'}"
        tf32 = "on" if self.tf32 else "off"
        return f"{table(head, cells)}\n{verdict}{agreement} ({self.dtype}, {self.device}, TF32 {tf32})"


def unsearched() -> contextlib.AbstractContextManager[None]:
    """Lets cuDNN take its first algorithm: with `benchmark` on it would try each, in fp64, for results that are read once."""
    return cudnn.searching(False)


def verify(
    model: nn.Module, fused: nn.Module, x: Tensor, *, progress: Callable[[str], None] | None = None
) -> VerifyResult:
    """Compares a fused model with its reference on the user's own input, in eval mode and without gradients.

    Args:
        model: the reference: the model from before `fuse`, or `unfuse_` of a copy.
        fused: the fused model, on the same device and in the same dtype.
        x: an input of both, floating point, in the models' dtype.
        progress: called with the path of each block that was compared.

    Raises:
        TypeError: if an argument is no module, or x no floating-point tensor.
        ValueError: if `model` has fused blocks itself, or `fused` blocks that `model` lacks; if `fused` was fused with
            normalize.
    """
    for name, module in (("model", model), ("fused", fused)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if any(fused_module.is_fused(m) for m in model.modules()):
        raise ValueError("model must be the unfused reference, got a fused model (unfuse_ a copy of it)")
    if (state := state_of(fused)) is not None and state.normalize is not None:
        raise ValueError(
            "fused was fused with normalize and takes other images than model: verify rk.fuse(model) without normalize, "
            "which runs the same layers on images that are normalised already"
        )
    results: list[Parity] = []
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    def compare(path: str, steps: str, source: Tensor, eager: Tensor, run_fused: Callable, oracle: Callable) -> None:
        fused_output = run_fused(source.clone())
        with unsearched():
            truth = oracle(_wide(source))
        results.append(_parity(path, steps, fused_output, eager, truth))
        if progress is not None:
            progress(path)

    with torch.no_grad(), _eval_mode(model), _eval_mode(fused), contextlib.ExitStack() as hooks:
        for path, module in fused.named_modules():
            if fused_module.is_fused(module):
                for handle in _watch(model, path, module, compare):
                    hooks.callback(handle.remove)
        eager_output = model(x)
        hooks.close()
        fused_output = fused(x)
        oracle = copy.deepcopy(model).to(**_oracle_options(x))
        with unsearched():
            outputs = [(fused_output, eager_output, oracle(_wide(x)))]
        for scaled in _scaled(x, sum(leaf.numel() for leaf in _tensors(eager_output))):
            both = fused(scaled.clone()), model(scaled.clone())
            with unsearched():
                outputs.append((*both, oracle(_wide(scaled))))
    fused_flat, eager_flat, oracle_flat = (
        torch.cat([_wide(leaf).flatten().cpu() for output in several for leaf in _tensors(output)])
        for several in zip(*outputs)
    )
    dtype = _tensors(eager_output)[0].dtype
    output = _parity("", "the whole model", fused_flat, eager_flat, oracle_flat, dtype=dtype)
    top1 = None
    if isinstance(eager_output, Tensor) and eager_output.dim() == 2 and eager_output.shape[0]:
        top1 = (fused_output.argmax(1) == eager_output.argmax(1)).double().mean().item()
    tf32 = x.dtype == torch.float32 and x.is_cuda and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return VerifyResult(tuple(results), output, top1, str(x.dtype).removeprefix("torch."), str(x.device), tf32)


def _scaled(x: Tensor, values: int) -> Iterator[Tensor]:
    """X times factors from 1 down to 1/2, until outputs of so many values each are enough; each is rounded in its own way."""
    for i in range(1, math.ceil(_FEWEST_VALUES / values) if values else 1):
        yield x * (1 - i / (2 * _FEWEST_VALUES))


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _watch(model: nn.Module, path: str, module: nn.Module, compare: Callable) -> Iterator[Any]:
    """Hooks that compare a fused module as soon as the reference has run its twin."""
    state = state_of(module)
    assert state is not None
    runs = state.plan.runs.values() if isinstance(state.plan, ContainerPlan) else ()
    for wanted in (path, *(f"{path}.{member}" if path else member for recipe in runs for member in recipe.modules)):
        try:
            model.get_submodule(wanted)
        except AttributeError:
            raise ValueError(f"fused must be a fused copy of model, but model has no module {wanted!r}") from None
    twin = model.get_submodule(path)
    if not isinstance(state.plan, ContainerPlan):

        def after_block(_, inputs, output):
            oracle = copy.deepcopy(twin)
            oracle._forward_hooks.clear()
            compare(path, str(state.plan), inputs[0], output, module.forward, oracle.to(**_oracle_options(output)))

        yield twin.register_forward_hook(after_block)
        return
    for name, recipe in state.plan.runs.items():
        seen: list[Tensor] = []
        members = [twin._modules[member] for member in recipe.modules]
        # A clone: an in-place ReLU behind the run would write over what was seen.
        yield members[0].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].clone()))

        def after_run(_, inputs, output, name=name, recipe=recipe, seen=seen, members=members):
            oracle = nn.Sequential(*(copy.deepcopy(member) for member in members))
            for member in oracle:
                member._forward_hooks.clear()
                member._forward_pre_hooks.clear()
            run = lambda source: container_runs.call_run(module, name, state, source)[0]  # noqa: E731
            where = f"{path}.{name}" if path else name
            compare(where, str(recipe), seen.pop(), output, run, oracle.to(**_oracle_options(output)))

        yield members[-1].register_forward_hook(after_run)


def _parity(path: str, steps: str, fused: Tensor, eager: Tensor, oracle: Tensor, dtype=None) -> Parity:
    dtype, device = dtype or eager.dtype, eager.device
    fused, eager = (_wide(t).to(oracle.device) for t in (fused, eager))
    finite = fused.isfinite() & eager.isfinite() & oracle.isfinite()
    truth = oracle[finite]
    eager_error = error_budget.relative_error(eager[finite], truth)
    return Parity(
        path=path,
        steps=steps,
        max_abs=(fused[finite] - eager[finite]).abs().max().item() if truth.numel() else 0.0,
        error=error_budget.relative_error(fused[finite], truth),
        eager_error=eager_error,
        budget=error_budget.budget(eager_error, dtype, device),
        lost=int((fused.isfinite() & ~oracle.isfinite()).sum()),
        new=int((~fused.isfinite() & eager.isfinite()).sum()),
    )


def _oracle_options(x: Tensor) -> dict:
    # Apple's GPUs have no fp64.
    return {"device": "cpu" if x.device.type == "mps" else x.device, "dtype": torch.float64}


def _wide(x: Tensor) -> Tensor:
    return x.to(**_oracle_options(x))


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    flags = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in flags:
            m.training = training
