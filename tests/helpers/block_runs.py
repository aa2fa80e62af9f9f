"""One example of the fuzzer: a program, the steps between its calls, and how what they show is compared with plain PyTorch."""

from __future__ import annotations

import random
import re
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_legacy import profile

import resnet_kernels as rk
from helpers.block_edits import Call, Edit, Step, draw_steps
from helpers.block_grammar import Program, Writer
from helpers.block_worlds import Outcome, World, reseed
from helpers.oracle import error
from resnet_kernels.fusion.report import FuseReport
from resnet_kernels.ops import backends, error_budget
from resnet_kernels.runtime import fused_module

# Where fp64 and eager differ by more, they took different ways (a random draw, a flag of the dtype), and fp64 is no truth.
_ANOTHER_COMPUTATION = 0.1
# Then the fused result is compared with eager's itself, which shows faults, though no lack of accuracy.
_COARSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


# Of the size of image(2), and in another form.
OTHER_IMAGES = (
    "image(2)", "image(2)", "image(2).as_subclass(Picture)", "nn.Parameter(image(2))", "image(4)[::2]", "image(2).transpose(2, 3)",
    "image(2).to(memory_format=torch.channels_last)", "image(2).requires_grad_()",
)  # fmt: skip
# Tags of rules that nearly every program needs.
_COMMONPLACE = ("member nn.", "call", "subclass of nn.Module", "named Plain", "save", "super")


class Discard(Exception):
    """Plain PyTorch can't run an example."""


@dataclass
class Mismatch(Exception):
    """A difference between plain PyTorch and the fused model. what: its kind, without numbers and paths; detail: all of it."""

    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}"


@dataclass
class Example:
    """A program and its steps. in_place: fused by fuse_ and not as a copy."""

    program: Program
    steps: list[Step]
    in_place: bool = False
    backend: str = "auto"
    # Besides, a call on this image is to run fused wherever a call on a plain one does.
    other_image: str = "image(2)"

    def __str__(self) -> str:
        how = "rk.fuse_(model" if self.in_place else "model = rk.fuse(model"
        lines = [self.program.source(), "model = make().eval()", f"{how}, backend={self.backend!r})", *map(str, self.steps)]
        return "\n".join(lines)

    __repr__ = __str__

    def rename(self, old: str, new: str) -> None:
        """Gives a class another name, wherever it is named."""
        word = re.compile(rf"(?<![\w.]){old}(?!\w)")
        program = self.program
        program.model = word.sub(new, program.model)
        program.flags = [(new if name == old else name, word.sub(new, line)) for name, line in program.flags]
        for cls in program.classes:
            cls.name, cls.result = word.sub(new, cls.name), word.sub(new, cls.result)
            for statements in cls.statements():
                for statement in statements:
                    statement.line = word.sub(new, statement.line)
        for step in self.steps:
            if isinstance(step, Edit):
                step.line = re.sub(rf"(?<![\w.])(flip_)?{old}(?!\w)", rf"\g<1>{new}", step.line)

    def tags(self) -> set[str]:
        tags = self.program.tags() | ({"fuse_"} if self.in_place else set())
        tags = {tag for tag in tags if not tag.startswith(_COMMONPLACE)}
        return tags.union(*(step.tags() if isinstance(step, Call) else {f"edit {step.tag}"} for step in self.steps))


def draw(rnd: random.Random, backend: str = "auto") -> Example:
    """Draws an example; plain PyTorch may turn out to be unable to run it."""
    program = Writer(rnd).program()
    try:
        model = World(program, "blocks_drawn").model
    except Exception as reason:
        raise Discard(f"can't be built: {reason}") from reason
    finally:
        sys.modules.pop("blocks_drawn", None)
    return Example(program, draw_steps(rnd, program, model), rnd.random() < 0.3, backend, rnd.choice(OTHER_IMAGES))


@dataclass
class Result:
    """How a run ended. fused: whether any block was fused."""

    fused: bool = False
    mismatch: Mismatch | None = None
    skipped: list[Edit] = field(default_factory=list)


def run(example: Example) -> Result:
    """Runs an example in both worlds.

    Raises:
        Discard: if plain PyTorch can't run the first call.
    """
    result = Result()
    try:
        _run(example, result)
    except Mismatch as mismatch:
        result.mismatch = mismatch
    finally:
        torch.nn.modules.module._global_forward_hooks.clear()
        fused_module._classes.clear()
        backends._said.clear()
        for name in ("blocks_plain", "blocks_fused", "blocks_oracle"):
            sys.modules.pop(name, None)
    return result


def _run(example: Example, result: Result) -> None:
    try:
        plain, fused = World(example.program, "blocks_plain"), World(example.program, "blocks_fused", example.backend)
    except Exception as reason:
        raise Discard(str(reason)) from reason
    # Only what plain PyTorch runs is worth fusing.
    trial = World(example.program, "blocks_oracle")
    if (reason := trial.call(Call(), 0).error) is not None:
        raise Discard(str(reason))
    result.fused = bool(_fuse(fused, example).fused)
    oracle: list[Outcome] = []
    done: list[tuple[Step, int]] = []
    for number, step in enumerate(example.steps):
        if isinstance(step, Edit):
            failed = plain.edit(step.line, number)
            if failed is not None:
                # The edit may have been made in part.
                if any(isinstance(s, Call) for s in example.steps[number:]):
                    result.skipped.append(step)
                    raise Discard(f"{step}: {failed}")
                continue
            failed = fused.edit(step.line, number)
            if failed is not None:
                raise Mismatch(f"edit raises {type(failed).__name__}", f"{step}: {failed}")
            done.append((step, number))
            continue
        with_mkldnn_off = any("mkldnn" in c for c in step.context)
        expected = plain.call(step, number)
        if with_mkldnn_off:
            with profile() as profiler:
                found = fused.call(step, number)
            ops = sorted({event.name for event in profiler.function_events or () if "mkldnn" in event.name})
            if ops and not (expected.error or found.error):
                raise Mismatch("oneDNN runs where it is switched off", ", ".join(ops))
        else:
            found = fused.call(step, number)
        done.append((step, number))
        calls = sum(isinstance(s, Call) for s, _ in done)
        compare(expected, found, lambda: _oracle(example, done, oracle)[calls - 1], f"call {calls}")
        if expected.error is not None:
            return
        for world in (plain, fused):
            changed = [t for t, before in world.kept if not _same(t, before)]
            world.kept = [(t, t.detach().clone()) for t, _ in world.kept[-8:]]
            if world is fused and len(changed) > len(plain_changed):
                raise Mismatch("an earlier result is overwritten", f"call {calls}")
            plain_changed = changed
    _check_silence(example, result)


def _same(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(a.detach().nan_to_num(), b.nan_to_num())
    except RuntimeError:
        return True


def _fuse(world: World, example: Example) -> FuseReport:
    reseed(0)
    before = world.look()
    try:
        rk.explain(world.model, backend=example.backend)
    except Exception as error:
        raise Mismatch(f"explain raises {type(error).__name__}", str(error)) from error
    compare(Outcome(before), Outcome(world.look()), None, "explain")
    original = world.model
    try:
        report = rk.fuse_(world.model, backend=example.backend) if example.in_place else None
        if report is None:
            world.model = rk.fuse(original, backend=example.backend)
    except Exception as error:
        raise Mismatch(f"fuse raises {type(error).__name__}", str(error)) from error
    compare(Outcome(before), Outcome(world.look()), None, "fuse")
    fused, world.model = world.model, original
    compare(Outcome(before), Outcome(world.look()), None, "fuse, in the original,")
    world.model = fused
    return report or rk.explain(fused)


def _oracle(example: Example, done: list[tuple[Step, int]], outcomes: list[Outcome]) -> list[Outcome]:
    """All outcomes so far in fp64."""
    if len(outcomes) < sum(isinstance(step, Call) for step, _ in done):
        outcomes.clear()
        world = World(example.program, "blocks_oracle", double=True)
        for step, number in done:
            if isinstance(step, Edit):
                world.edit(step.line, number)
                world.model.double()
            else:
                outcomes.append(world.call(step, number))
    return outcomes


def compare(expected: Outcome, found: Outcome, oracle: Any, where: str) -> None:
    """Raises a Mismatch at the first difference, the plainest kinds first."""
    names = type(expected.error).__name__, type(found.error).__name__
    if names[0] != names[1]:
        text = str(found.error or expected.error).splitlines()[:1]
        raise Mismatch(f"{names[0]} became {names[1]}", f"{where}: {text}")
    if expected.error is not None:
        return
    kind = where if where.startswith(("fuse", "explain")) else "call"
    for path in sorted(expected.leaves.keys() ^ found.leaves.keys()):
        lost = path in expected.leaves
        raise Mismatch(f"{kind}: {_general(path)} {'is missing' if lost else 'is new'}", f"{where}: {path}")
    # Values come last: where the type or the layout is another, values tell less.
    order = sorted(expected.leaves, key=lambda path: (isinstance(expected.leaves[path], Tensor), path.endswith("strides")))
    for path in order:
        mine, theirs = found.leaves[path], expected.leaves[path]
        if isinstance(theirs, Tensor) and isinstance(mine, Tensor):
            if (difference := _difference(path, mine, theirs, oracle)) is not None:
                raise Mismatch(f"{kind}: {_general(path)} {difference[0]}", f"{where}: {path}: {difference[1]}")
        elif mine != theirs:
            raise Mismatch(f"{kind}: {_general(path)} differs", f"{where}: {path}: {theirs!r} became {mine!r}")
    if missing := [text for text in expected.warned if text not in found.warned]:
        raise Mismatch(f"{kind}: a warning is missing", f"{where}: {missing[0]}")


def _general(path: str) -> str:
    """A path without names and numbers."""
    path = re.sub(r"^module \S* ", "module ", path)
    path = re.sub(r"\[[^]]*\]", "[]", path)
    return re.sub(r"\d+", "", re.sub(r"(class|closure|global) \S+", r"\1", path))


def _difference(path: str, mine: Tensor, theirs: Tensor, oracle: Any) -> tuple[str, str] | None:
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
    truth = oracle().leaves.get(path)
    limit = _COARSE[theirs.dtype]
    if isinstance(truth, Tensor) and truth.shape == finite.shape and bool(truth[finite].isfinite().all()):
        truth = truth[finite]
        if truth.norm() < rounding * theirs.norm():
            # Everything cancels out: what is left are rounding errors.
            return None if mine.norm() <= 4 * theirs.norm() else ("is over the budget", "of a result that cancels out")
        if (eager := error(theirs, truth)) < _ANOTHER_COMPUTATION:
            ours, budget = error(mine, truth), error_budget.budget(eager, theirs.dtype, theirs.device)
            if ours <= budget:
                return None
            size = "differs" if ours > 100 * budget else "is over the budget"
            return size, f"error {ours:.2e}, eager's {eager:.2e}, budget {budget:.2e}"
    return None if distance < limit else ("differs", f"by {distance:.2e} from eager")


def _check_silence(example: Example, result: Result) -> None:
    """A model that runs fused on a tensor also runs fused on a tensor that only has another class, or a warning says why."""
    if not result.fused or example.backend != "auto":
        return
    world = World(example.program, "blocks_fused", example.backend)
    world.fuse()
    ran = []
    for image in ("image(2)", example.other_image):
        backends._said.clear()
        with profile() as profiler:
            outcome = world.call(Call(image=image), 0)
        ran.append(any("convolution_pointwise" in event.name for event in profiler.function_events or ()))
    if ran[0] and not (ran[1] or outcome.said or outcome.error):
        raise Mismatch("runs eager without a word", example.other_image)
