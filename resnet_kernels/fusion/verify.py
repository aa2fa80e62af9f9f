"""verify: a fused model compared with its reference, block by block, against fp64.

The fused result passes if its error stays within the budget (ops/error_budget.py): twice eager's own error plus one rounding.
Each block gets the very input that eager gives it, so a row of the result is about that block alone. The last row is the
whole model.

The whole model's errors are measured at its output. The norm of few values is mostly chance, so a model with fewer than 64
outputs runs on the input scaled by several factors, and the errors are those of all these outputs together.

Eager runs in channels_last here, the layout that the fused model computes in. It matters: oneDNN's fp32 channels_last
convolution (PyTorch's own, fused or not) errs up to 4.5 times as much as its NCHW one on long sums (docs/numerics.md).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from ..graph.recipe import ContainerPlan, Recipe
from ..ops import cudnn, error_budget, tuned_table
from ..runtime import container_runs, fused_module
from ..runtime.state import state_of
from .report import Parity, VerifyResult

# With n values the ratio of two equal errors has a standard deviation of 1 / sqrt(n): an eighth for 64, where 2 is the limit.
_FEWEST_VALUES = 64

_Forward = Callable[[Tensor], Tensor]
# Arguments: path, steps, input, eager's output, the fused forward, the reference's in fp64.
_Compare = Callable[[str, str, Tensor, Tensor, _Forward, _Forward], None]


def unsearched() -> contextlib.AbstractContextManager[None]:
    """Lets cuDNN take its first algorithm. With `benchmark` on it would time each in fp64, for results that are read once."""
    return cudnn.searching(False)


def verify(
    model: nn.Module, fused: nn.Module, x: Tensor, *, progress: Callable[[str], None] | None = None
) -> VerifyResult:
    """Compares a fused model with its reference on the user's own input, in eval mode and without gradients.

    Args:
        model: the reference: the model from before `fuse`, or `unfuse_` of a copy.
        fused: the fused model, on the same device and in the same dtype.
        x: an input of both models, (N, C, H, W) for a network, in their dtype, which is a floating one.
        progress: function that is called with the path of each block that was compared.

    Returns:
        The parity of each block and of the whole model.

    Raises:
        TypeError: if model or fused is no module, or x no floating-point tensor.
        ValueError: if model has fused blocks itself, if fused has blocks that model lacks, or if fused was fused with
            normalize.
    """
    _check(model, fused, x)
    results: list[Parity] = []
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    def compare(path: str, steps: str, source: Tensor, eager: Tensor, run_fused: _Forward, oracle: _Forward) -> None:
        fused_output = run_fused(source.clone())
        with unsearched():
            truth = oracle(_wide(source))
        results.append(_parity(path, steps, fused_output, eager, truth, eager.dtype))
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
        oracle = copy.deepcopy(model).eval().to(_oracle_device(x), torch.float64)
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
    output = _parity("", "the whole model", fused_flat, eager_flat, oracle_flat, dtype)
    top1 = None
    if isinstance(eager_output, Tensor) and eager_output.dim() == 2 and eager_output.shape[0]:
        top1 = (fused_output.argmax(1) == eager_output.argmax(1)).double().mean().item()
    tf32 = x.is_cuda and tuned_table.dtype_name(x.dtype) == "tf32"
    return VerifyResult(tuple(results), output, top1, str(x.dtype).removeprefix("torch."), str(x.device), tf32)


def _check(model: nn.Module, fused: nn.Module, x: Tensor) -> None:
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
            "which runs the same layers on images that are normalized already"
        )


def _scaled(x: Tensor, values: int) -> Iterator[Tensor]:
    """Yields x times factors below 1, down to 1/2: enough inputs for _FEWEST_VALUES outputs, if each gives `values`.

    Each is rounded in its own way.
    """
    for i in range(1, math.ceil(_FEWEST_VALUES / values) if values else 1):
        yield x * (1 - i / (2 * _FEWEST_VALUES))


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _joined(output: Any) -> Tensor:
    """The values of all tensors that a module returns."""
    leaves = _tensors(output)
    return leaves[0] if len(leaves) == 1 else torch.cat([leaf.flatten() for leaf in leaves])


def _watch(model: nn.Module, path: str, module: nn.Module, compare: _Compare) -> Iterator[RemovableHandle]:
    """Yields hooks on the reference that compare a fused module as soon as its twin in the reference has run."""
    state = state_of(module)
    assert state is not None
    runs: dict[str, Recipe] = state.plan.runs if isinstance(state.plan, ContainerPlan) else {}
    members = [f"{path}.{member}".lstrip(".") for recipe in runs.values() for member in recipe.modules]
    for wanted in (path, *members):
        try:
            model.get_submodule(wanted)
        except AttributeError:
            raise ValueError(f"fused must be a fused copy of model, but model has no module {wanted!r}") from None
    twin = model.get_submodule(path)
    if isinstance(state.plan, ContainerPlan) and not state.plan.instructions:
        for name, recipe in runs.items():
            run = functools.partial(container_runs.call_run, module, name, state)
            yield from _watch_run(twin, f"{path}.{name}".lstrip("."), recipe, run, compare)
        return

    if not path and runs:
        return  # the last row is about it
    steps = " | ".join(map(str, runs.values())) if runs else str(state.plan)

    def after_block(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if len(inputs) != 1:
            return  # it runs its own code then
        oracle = _without_our_hooks(copy.deepcopy(twin))
        # A copy of a torch.fx.GraphModule is in train() mode.
        oracle.eval().to(_oracle_device(inputs[0]), torch.float64)

        def run_fused(x: Tensor) -> Tensor:
            return _joined(module.forward(x))

        compare(path, steps, inputs[0], _joined(output), run_fused, lambda x: _joined(oracle(x)))

    yield twin.register_forward_hook(_marked(after_block))


def _watch_run(
    twin: nn.Module, path: str, recipe: Recipe, run: Callable[[Tensor], tuple[Tensor, object]], compare: _Compare
) -> Iterator[RemovableHandle]:
    """Yields the hooks for one run of a container: the first member's input is kept, the last one's output compared."""
    seen: list[Tensor] = []
    members = [twin.get_submodule(member) for member in recipe.modules]

    def before_run(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # A clone: an in-place ReLU behind the run would write over the input.
        seen.append(inputs[0].clone())

    def after_run(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        oracle = _without_our_hooks(nn.Sequential(*(copy.deepcopy(member) for member in members)))
        oracle.to(_oracle_device(output), torch.float64)
        compare(path, str(recipe), seen.pop(), output, lambda source: run(source)[0], oracle)

    yield members[0].register_forward_pre_hook(_marked(before_run))
    yield members[-1].register_forward_hook(_marked(after_run))


def _marked(hook: Any) -> Any:
    hook.of_verify = True
    return hook


def _without_our_hooks(module: nn.Module) -> nn.Module:
    """A copy of a module of the reference, without the hooks that are registered here: its inputs are in fp64."""
    for inner in module.modules():
        for hooks in (inner._forward_hooks, inner._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hasattr(hook, "of_verify")]:
                del hooks[key]
    return module


def _parity(path: str, steps: str, fused: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype) -> Parity:
    """Compares two results in `dtype` with the oracle's; they may come here in fp64 already."""
    device = eager.device
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


def _oracle_device(x: Tensor) -> torch.device:
    # Apple's GPUs have no fp64.
    return torch.device("cpu") if x.device.type == "mps" else x.device


def _wide(x: Tensor) -> Tensor:
    return x.to(_oracle_device(x), torch.float64)


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    flags = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in flags:
            m.training = training
