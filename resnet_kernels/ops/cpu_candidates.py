"""The ways to run a convolution on the CPU: our own kernels (kernels/cpu) and oneDNN's fused operation.

    winograd, direct, grouped, depthwise    kernels/cpu/convolution.py
    onednn                       onednn.py

A fused module packs weights once and asks `for_packed`, so that a table or the rule decides for each layer and size. The op
packs in each call, and asks the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.activations import RELU
from ..kernels.cpu import convolution, library, plans
from ..kernels.cpu.plans import KERNELS, Shapes
from ..kernels.geometry import Geometry
from ..kernels.operands import ConvOperands
from . import onednn, tuned_table
from .conv_problem import ConvProblem, PackedProblem

# Answers that are kept.
_CACHED = 4096


def own_shapes(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: Geometry) -> Shapes:
    """Returns a convolution as our CPU kernels take it, on channels_last images."""
    return Shapes(x_shape, weight_shape, geometry, plans.copies(x_shape, weight_shape))


# Steps of the micro-kernel in which a weight is packed, per element: a call of the op packs anew, a fused module does not.
_PACKING = {"winograd": 20.0, "direct": 0.6, "grouped": 0.6, "depthwise": 0.6}


def for_packed(
    weight_shape: tuple[int, ...], geometry: Geometry, x_shape: tuple[int, ...], dtype: torch.dtype
) -> list[str]:
    """Returns our CPU kernels that are the choice for a packed weight, the best first; none where oneDNN is.

    A table's winner comes first. Without a table our kernels run all convolutions that they take on AVX2 and AVX-512,
    whichever costs less: where a layer alone is level with oneDNN's, a network of ours still is one program.
    With SSE or NEON alone they run only if the environment asks for them: nothing was measured there.
    """
    problem = packed_problem(weight_shape, geometry, x_shape)
    found = tuned_table.choice(problem, x_shape[0], dtype, torch.device("cpu"), _can_run_packed)
    if found is not None:
        return [found] if found in KERNELS else []
    return _own_by_rule(problem.conv, x_shape[0], dtype, packs=False)


def packed_problem(weight_shape: tuple[int, ...], geometry: Geometry, x_shape: tuple[int, ...]) -> PackedProblem:
    """Returns the problem of a packed weight."""
    _, c_in, in_h, in_w = x_shape
    return PackedProblem(ConvProblem(c_in, in_h, in_w, tuple(weight_shape), geometry, False, True, False, RELU))


def packed_candidates(problem: PackedProblem, batch: int, dtype: torch.dtype) -> list[str]:
    """Returns the names of all that can run a problem with a packed weight, first the one that runs without a table."""
    conv, threads = problem.conv, torch.get_num_threads()
    shapes = own_shapes(conv.x_shape(batch), conv.weight_shape, conv.geometry)
    able = [name for name in KERNELS if plans.why_not(name, shapes, dtype, threads) is None]
    default = [*_own_by_rule(conv, batch, dtype, packs=False), "onednn"][0]
    return [default, *(name for name in (*able, "onednn") if name != default)]


def _can_run_packed(name: str, problem: PackedProblem, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    return name in packed_candidates(problem, batch, dtype)


def _own_by_rule(problem: ConvProblem, batch: int, dtype: torch.dtype, packs: bool) -> list[str]:
    """Returns our CPU kernels that run without a table, the best first. packs: whether a call packs the weight."""
    compiled = library.library_or_none()
    if compiled is None or dtype != torch.float32:
        return []
    return _cheapest(compiled, library.is_asked_for(), problem, batch, dtype, packs, torch.get_num_threads())


@lru_cache(_CACHED)
def _cheapest(
    compiled: library.Library, asked_for: bool, problem: ConvProblem, batch: int, dtype: torch.dtype, packs: bool,
    threads: int,
) -> list[str]:  # fmt: skip
    shapes = own_shapes(problem.x_shape(batch), problem.weight_shape, problem.geometry)
    costs = {
        name: plans.plan_for(name, shapes, threads).cost
        + packs * _PACKING[name] * torch.Size(problem.weight_shape).numel() / threads
        for name in KERNELS
        if plans.why_not(name, shapes, dtype, threads) is None
    }
    if compiled.isa == "portable" and not asked_for:
        return []
    return sorted(costs, key=lambda name: costs[name])


def run(operands: ConvOperands, names: Sequence[str] | None = None) -> Tensor:
    """Returns act(conv(x, weight) * scale + bias + residual), with a weight that is packed in this call.

    Args:
        operands: on the CPU.
        names: our kernels, of which the first runs that takes the weight's values; None for those of the rule. Without one,
            oneDNN or PyTorch does.
    """
    if names is None:
        names = _own_by_rule(ConvProblem.of(operands), operands.x.shape[0], operands.x.dtype, packs=True)
    x, weight, bias, residual, scale, geometry, activation = operands
    for name in names:
        packed = convolution.pack(name, weight.detach())
        if packed is not None:
            shapes = own_shapes(tuple(x.shape), tuple(weight.shape), geometry)
            scale, bias = (onednn.as_bias(vector, x.dtype) for vector in (scale, bias))
            bound = convolution.Bound(name, shapes, packed, scale, bias, torch.get_num_threads())
            x = x.detach().contiguous(memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.detach().contiguous(memory_format=torch.channels_last)
            return bound(x, residual, activation)
    return onednn.conv_bias_act(operands)
