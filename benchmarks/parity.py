"""Parity gate that a contender passes before its time counts.

fp64 is the oracle, and eager in the working dtype sets the budget: a contender passes if its relative norm error is at most
twice eager's plus one rounding of the dtype. Forward passes compare outputs, forward-backward passes every gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_kernels.ops import error_budget


@dataclass(frozen=True)
class Gate:
    """Parity of a contender with fp64: relative norm error, its budget, and the failing tensor with the reason, or ""."""

    error: float
    budget: float
    failure: str = ""


def compare(
    names: Sequence[str],
    tensors: Sequence[Tensor],
    eager: Sequence[Tensor],
    oracle: Sequence[Tensor],
    dtype: torch.dtype,
) -> Gate:
    """Returns the gate of the worst tensor: the one with the largest error / budget, a failed one first.

    dtype: the working dtype, whose rounding the budget adds to twice eager's error; the tensors may be wider.
    """
    whole = torch.stack([truth.norm() for truth in oracle]).norm().item()
    gates = []
    for name, tensor, reference, truth in zip(names, tensors, eager, oracle, strict=True):
        if tensor.shape != truth.shape:
            shapes = f"{tuple(tensor.shape)}, eager's is {tuple(truth.shape)}"
            return Gate(float("nan"), error_budget.rounding(dtype, tensors[0].device), f"{name} is of shape {shapes}")
        size = truth.norm().item()
        # A bias in front of a BN in training has a true gradient of zero, and any other value is rounding: its error counts
        # against the norm of all gradients.
        size = size if size > 1e-9 * whole else whole
        error, own = ((t.to(truth) - truth).norm().item() / size for t in (tensor, reference))
        budget = error_budget.budget(own, dtype, tensor.device)
        # `not <=`: NaN fails.
        failure = "" if error <= budget else f"{name} errs by {error:.2e}, eager by {own:.2e}"
        gates.append(Gate(error, budget, failure))
    return max(gates, key=lambda gate: (bool(gate.failure), gate.error / gate.budget))
