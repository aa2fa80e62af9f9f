"""How what the fused model shows is compared with what plain PyTorch shows, by the rules of docs/contract.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.block_worlds import Outcome
from helpers.oracle import error
from resnet_kernels.ops import error_budget

# Returns what fp64 shows.
Oracle = Callable[[], Outcome]

OVER_BUDGET = "is over the budget"
# Where fp64 and eager differ by more, they took different ways (a random draw, a flag of the dtype), and fp64 is no truth.
_ANOTHER_COMPUTATION = 0.1
# Then the fused result is compared with eager's itself, which shows faults, though no lack of accuracy.
_COARSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass
class Mismatch(Exception):
    """A difference between plain PyTorch and the fused model. what: its kind, without numbers and paths; detail: all of it."""

    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}"


def compare(expected: Outcome, found: Outcome, oracle: Oracle | None, where: str) -> None:
    """Raises a Mismatch at the first difference, the plainest kinds first."""
    names = type(expected.error).__name__, type(found.error).__name__
    if found.error is None and "modified by an inplace operation" in str(expected.error):
        return  # a fused block keeps what eager's in-place ReLU has written over: it has a gradient where eager has none
    if names[0] != names[1]:
        text = str(found.error or expected.error).partition("\n")[0]
        raise Mismatch(f"{names[0]} became {names[1]}: {without_names(text)}", f"{where}: {text}")
    if expected.error is not None:
        return
    kind = where if where.startswith(("fuse", "explain")) else "call"
    # The gravest kinds come first: other traces, then other values, then another layout.
    known = expected.leaves.keys() & found.leaves.keys()
    order = sorted(known, key=lambda path: (_gravity(path, expected.leaves[path]), path))
    traces = [path for path in order if _gravity(path, expected.leaves[path]) == 0]
    for path in traces:
        _compare_leaf(path, expected, found, oracle, kind, where)
    for path in sorted(
        expected.leaves.keys() ^ found.leaves.keys(), key=lambda path: (bool(_LAYOUT.search(path)), path)
    ):
        how = "is missing" if path in expected.leaves else "is new"
        raise Mismatch(f"{kind}: {_general(path)} {how}", f"{where}: {path}")
    for path in order[len(traces) :]:
        _compare_leaf(path, expected, found, oracle, kind, where)
    if missing := [text for text in expected.warned if text not in found.warned]:
        raise Mismatch(f"{kind}: a warning is missing", f"{where}: {missing[0]}")


_LAYOUT = re.compile("strides$|shares memory")


def _gravity(path: str, value: object) -> int:
    return 2 if _LAYOUT.search(path) else int(isinstance(value, Tensor))


def _compare_leaf(path: str, expected: Outcome, found: Outcome, oracle: Oracle | None, kind: str, where: str) -> None:
    mine, theirs = found.leaves[path], expected.leaves[path]
    if isinstance(theirs, Tensor) and isinstance(mine, Tensor):
        if (difference := _difference(path, mine, theirs, oracle)) is not None:
            raise Mismatch(f"{kind}: {_general(path)} {difference[0]}", f"{where}: {path}: {difference[1]}")
    elif mine != theirs:
        raise Mismatch(f"{kind}: {_general(path)} differs", f"{where}: {path}: {theirs!r} became {mine!r}")


def _general(path: str) -> str:
    """A path without names and numbers."""
    path = re.sub(r"^module \S* ", "module ", path)
    path = re.sub(r"\[[^]]*\]", "[]", path)
    return re.sub(r"\d+", "", re.sub(r"(class|closure|global) \S+", r"\1", path))


def without_names(text: str) -> str:
    return re.sub(r"'[^']*'|\d+", "_", text)[:60]


def _difference(path: str, mine: Tensor, theirs: Tensor, oracle: Oracle | None) -> tuple[str, str] | None:
    """What is wrong with a tensor's values, and by how much: rule 1 of docs/contract.md."""
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return "has another shape or dtype", f"{theirs.shape} {theirs.dtype} became {mine.shape} {mine.dtype}"
    if torch.equal(mine, theirs):
        return None
    if not theirs.is_floating_point():
        return "differs", f"{theirs.flatten()[:4]} became {mine.flatten()[:4]}"
    if oracle is None:
        equal = torch.equal(mine.isnan(), theirs.isnan()) and torch.equal(mine.nan_to_num(), theirs.nan_to_num())
        return None if equal else ("differs", "")
    finite = theirs.isfinite()
    if not (torch.equal(mine.isfinite(), finite) and torch.equal(mine.isnan(), theirs.isnan())):
        return "has NaN or inf elsewhere", f"{int(theirs.isnan().sum())} NaN became {int(mine.isnan().sum())}"
    mine, theirs = mine[finite], theirs[finite]
    distance = error(mine, theirs)
    rounding = error_budget.rounding(theirs.dtype, theirs.device)
    if distance <= rounding:
        return None  # within any budget
    if max(mine.abs().max().item(), theirs.abs().max().item()) <= 64 * rounding:
        return None  # inputs are of the size of 1: everything has cancelled out
    truth = oracle().leaves.get(path)
    limit = _COARSE[theirs.dtype]
    if isinstance(truth, Tensor) and truth.shape == finite.shape and bool(truth[finite].isfinite().all()):
        truth = truth[finite]
        if truth.norm() <= rounding * theirs.norm():
            # Everything cancels out: what is left are rounding errors. The inputs are of the size of 1.
            most = max(4 * theirs.norm().item(), 16 * rounding * theirs.numel() ** 0.5)
            return None if mine.norm() <= most else (OVER_BUDGET, "of a result that cancels out")
        if (eager := error(theirs, truth)) < _ANOTHER_COMPUTATION:
            ours, budget = error(mine, truth), error_budget.budget(eager, theirs.dtype, theirs.device)
            if ours <= budget:
                return None
            size = "differs" if ours > 100 * budget else OVER_BUDGET
            return size, f"error {ours:.2e}, eager's {eager:.2e}, budget {budget:.2e}"
    return None if distance < limit else ("differs", f"by {distance:.2e} from eager")
