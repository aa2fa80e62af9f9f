"""Problems of a model, each as an autotuner.Problem: operands, candidates, oracle and cost.

A kind of problem is a hashable type whose `str` is the key. A call site passes it to `ops.tuned_table.choice`, and BUILDERS
has its builder. Running a model once notes the problems that it looks up (`tuned_table.noting`), so a new kind needs no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...fusion.convert import fuse
from ...kernels.activations import Last
from ...kernels.geometry import Geometry
from ...kernels.operands import ConvOperands
from ...ops import backends, conv_candidates, reference, tuned_table
from ...ops.batch_norm_act import NormProblem
from ...ops.conv_problem import ConvProblem, PackedProblem
from ...ops.conv_training import TrainedProblem
from ...runtime.gpu.multi_layer import APART, LinkProblem, StemProblem
from .autotuner import Problem
from .multi_layer_problems import link_problem, stem_problem
from .norm_problem import norm_problem
from .packed_problem import packed_problem
from .random_operands import Draw, with_slopes
from .trained_problem import trained_problem

# Most elements that the fp64 reference holds at a time.
_REFERENCE = 2**26


def note(model: nn.Module, x: Tensor, *, training: bool = False, packed: bool = False) -> list[tuple[Hashable, int]]:
    """Returns the problems that a model looks up, each with its number: in inference, or BN, add and ReLU in training.

    Args:
        model: A copy of it is fused and run once on x.
        x: a batch of images, at least 2 of them for training; their size matters, not their number.
        training: Whether to note a training step's problems.
        packed: whether to note a CPU's problems, with packed weights.

    Raises:
        ValueError: RESNET_KERNELS_BACKEND decides everything already.
    """
    if backends.requested("auto") != "auto":
        raise ValueError(f"{backends.ENVIRONMENT_VARIABLE} must not be set: with it no table is asked")
    fused = fuse(model)
    if fused.training is not training:
        fused.train(training)  # only if it differs: train() would unfreeze a BN that is in eval mode
    with torch.no_grad(), tuned_table.noting(packed) as noted:
        fused(x)
    by_key = {str(asked): asked for asked, _ in noted if not training or getattr(asked, "training", False)}
    calls = Counter(str(asked) for asked, _ in noted)
    return [(asked, calls[key]) for key, asked in by_key.items()]


def build(
    noted: Sequence[tuple[Hashable, int]], batches: Iterable[int], dtype: torch.dtype, device: torch.device
) -> list[Problem]:
    """Builds the problems that `note` found at these batch sizes: the costliest, which matter most, first; links last."""
    problems = [
        BUILDERS[type(asked)](asked, batch, dtype, device, calls) for batch in batches for asked, calls in noted
    ]
    return sorted(
        problems, key=lambda p: (p.default == APART, -p.calls * max(p.bytes, p.flops / _FLOPS_PER_BYTE))
    )  # fmt: skip


# An H200's ridge point. Only the order of the problems depends on it.
_FLOPS_PER_BYTE = 184


def conv_problem(asked: ConvProblem, batch: int, dtype: torch.dtype, device: torch.device, calls: int = 1) -> Problem:
    """Returns the problem of a convolution with its epilogue."""
    geometry, activation = asked.geometry, with_slopes(asked.activation, asked.weight_shape[0], device)
    x_shape, weight_shape = asked.x_shape(batch), asked.weight_shape
    y_shape = geometry.out_shape(x_shape, weight_shape)
    x_size, y_size, weight_size = (torch.Size(shape).numel() for shape in (x_shape, y_shape, weight_shape))
    fan_in = weight_size // weight_shape[0]

    def operands() -> tuple:
        draw = Draw(dtype, device)
        return (
            draw(x_shape),
            draw(weight_shape, fan_in**-0.5),
            draw(y_shape[1:2], dtype=torch.float32) if asked.bias else None,
            draw(y_shape) if asked.residual else None,
            1 + draw(y_shape[1:2], 0.1, dtype=torch.float32) if asked.scale else None,
        )

    def eager(x, weight, bias, residual, scale):
        return reference.conv_bias_act(x, weight, bias, residual, scale, geometry, activation)

    def truth(x, weight, bias, residual, scale):
        step = max(1, _REFERENCE * batch // max(x_size, y_size))
        weight, bias, scale = (None if t is None else t.double() for t in (weight, bias, scale))
        parts = []
        for start in range(0, batch, step):
            part = slice(start, start + step)
            added = None if residual is None else residual[part].double()
            # For 16-bit dtypes fp32 keeps enough of the oracle, in half the memory.
            y = eager(x[part].double(), weight, bias, added, scale)
            parts.append(y if dtype == torch.float32 else y.float())
        return torch.cat(parts)

    names = conv_candidates.candidates(asked, batch, dtype, device)
    return Problem(
        key=str(asked),
        batch=batch,
        dtype=dtype,
        device=device,
        default=names[0],
        candidates={name: _runner(name, geometry, activation) for name in names},
        operands=operands,
        eager=eager,
        reference=truth,
        flops=2 * y_size * fan_in,
        bytes=dtype.itemsize * (x_size + weight_size + y_size * (1 + asked.residual)),
        calls=calls,
    )


def _runner(name: str, geometry: Geometry, activation: Last) -> conv_candidates.Run:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None) -> Tensor:
        operands = ConvOperands(x, weight, bias, residual, scale, geometry, activation)
        # A plan folds for these candidates, and the copy's time is theirs.
        return conv_candidates.run(name, operands.folded() if name in conv_candidates.FOLDING else operands)

    return run


BUILDERS: dict[type, Callable[..., Problem]] = {
    ConvProblem: conv_problem,
    NormProblem: norm_problem,
    PackedProblem: packed_problem,
    TrainedProblem: trained_problem,
    LinkProblem: link_problem,
    StemProblem: stem_problem,
}


def training_record(name: str, layers: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Record for `tuned_table.trains`: whether the BNs, adds and ReLUs of all layers together are faster on our kernels.

    Args:
        name: the model's name, with the size of its images.
        layers: (number of times in the model, record) of each problem of its training, all of one batch, dtype and device.
    """
    both, rows = ("eager", "triton"), [record["candidates"] for _, record in layers]
    seconds = {
        clock: {
            who: sum(calls * record["candidates"][who][clock]["median"] for calls, record in layers) for who in both
        }
        for clock in ("call", "graph")
        if all(clock in row.get(who, {}) for row in rows for who in both)
    }
    wins = bool(seconds) and all(clock["triton"] < clock["eager"] for clock in seconds.values())
    first = layers[0][1]
    return {
        "key": f"{tuned_table.TRAINING} {name}",
        "batch": first["batch"],
        "dtype": first["dtype"],
        "winner": "triton" if wins else "eager",
        "default": "eager",
        "seconds": seconds,
        "measured": first["measured"],
    }
