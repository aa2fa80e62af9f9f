"""One example of the fuzzer: a program, the steps between its calls, and how what they show is compared with plain PyTorch."""

from __future__ import annotations

import contextlib
import io
import random
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn
from torch.autograd.profiler_legacy import profile

import resnet_kernels as rk
from helpers.block_compare import OVER_BUDGET, Mismatch, compare, without_names
from helpers.block_edits import Call, Edit, Step, draw_steps
from helpers.block_grammar import Program, Writer
from helpers.block_worlds import Outcome, World
from helpers.own_kernels import is_fused_convolution
from resnet_kernels.fusion.report import FuseReport
from resnet_kernels.ops import backends
from resnet_kernels.runtime import fused_module

# Of the size of image(2), and in another form.
OTHER_IMAGES = (
    "image(2)", "image(2)", "image(2).as_subclass(Picture)", "nn.Parameter(image(2))", "image(4)[::2]",
    "image(2).transpose(2, 3)", "image(2).to(memory_format=torch.channels_last)", "image(2).requires_grad_()",
)  # fmt: skip
# Tags of rules that nearly every program needs.
_COMMONPLACE = ("member nn.", "call", "subclass of nn.Module", "named Plain", "save", "super")


class Discard(Exception):
    """Plain PyTorch can't run an example."""


@dataclass
class Example:
    """A program and its steps. in_place: fused by fuse_ and not as a copy."""

    program: Program
    steps: list[Step]
    in_place: bool = False
    backend: str = "auto"
    # Besides, a call on this image is to run fused wherever a call on a plain one does.
    other_image: str = "image(2)"
    seed: int = 0

    def world(self, name: str, backend: str = "", double: bool = False) -> World:
        return World(self.program, f"blocks_{name}", backend, double, self.seed)

    def __str__(self) -> str:
        how = "rk.fuse_(model" if self.in_place else "model = rk.fuse(model"
        lines = [
            self.program.source(),
            "model = make().eval()",
            f"{how}, backend={self.backend!r})",
            *map(str, self.steps),
        ]
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
    # In train() mode the CPU's own backend has nothing faster than PyTorch.
    steps = draw_steps(rnd, program, model, training=0.15 if backend == "auto" else 0.5)
    return Example(program, steps, rnd.random() < 0.3, backend, rnd.choice(OTHER_IMAGES))


@dataclass
class Result:
    """How a run ended. fused: whether any block was fused."""

    fused: bool = False
    mismatch: Mismatch | None = None


def run(example: Example) -> Result:
    """Runs an example in both worlds.

    The errors of small tensors scatter: of a few numbers, a fused sum may by chance come out three times as far off as eager's
    does. So a result counts as over the budget if it is so with most other weights and images, too.

    Raises:
        Discard: if plain PyTorch can't run the first call.
    """
    result = run_once(example)
    if result.mismatch is not None and result.mismatch.what.endswith(OVER_BUDGET):
        others = [run_once(replace(example, seed=seed)).mismatch for seed in range(1, 11)]
        if sum(other is not None and other.what == result.mismatch.what for other in others) < 8:
            result.mismatch = None
    return result


def run_once(example: Example) -> Result:
    """Runs an example with one choice of weights and images; see `run`."""
    result = Result()
    try:
        _run(example, result)
    except Mismatch as mismatch:
        result.mismatch = mismatch
    finally:
        fused_module._classes.clear()
        backends._said.clear()
        for name in ("blocks_plain", "blocks_fused", "blocks_oracle"):
            sys.modules.pop(name, None)
    return result


def _run(example: Example, result: Result) -> None:
    try:
        plain, fused = example.world("plain"), example.world("fused", example.backend)
    except Exception as reason:
        raise Discard(str(reason)) from reason
    # Only what plain PyTorch runs is worth fusing.
    trial = example.world("oracle")
    if (failed := trial.call(Call(), 0).error) is not None:
        raise Discard(str(failed))
    result.fused = bool(_fuse(fused, example).fused)
    oracle: list[Outcome] = []
    done: list[tuple[Step, int]] = []
    for number, step in enumerate(example.steps):
        if isinstance(step, Edit):
            # An edit that does not fit this model raises, perhaps half done: in both worlds alike.
            expected_error, found_error = (world.edit(step.line, number) for world in (plain, fused))
            if type(expected_error) is not type(found_error):
                names = type(expected_error).__name__, type(found_error).__name__
                text = without_names(str(found_error or expected_error))
                raise Mismatch(
                    f"edit: {names[0]} became {names[1]}: {text}", f"{step}: {found_error or expected_error}"
                )
            done.append((step, number))
            continue
        with_mkldnn_off = any("mkldnn" in c for c in step.context)
        expected = plain.call(step, number)
        if with_mkldnn_off:
            with profile() as profiler:
                found = fused.call(step, number)
            seen = {event.name for event in profiler.function_events or ()}
            ops = sorted(name for name in seen if "mkldnn" in name or is_fused_convolution(name))
            if ops and not (expected.error or found.error):
                raise Mismatch("oneDNN runs where it is switched off", ", ".join(ops))
        else:
            found = fused.call(step, number)
        done.append((step, number))
        calls = sum(isinstance(s, Call) for s, _ in done)
        compare(expected, found, partial(_oracle, example, done, oracle, calls), f"call {calls}")
        if expected.error is not None:
            return
        if fused.overwritten() > plain.overwritten():
            raise Mismatch("an earlier result is overwritten", f"call {calls}")
    _check_silence(example, result)


def _fuse(world: World, example: Example) -> FuseReport:
    world.reseed()
    before = Outcome(world.look())
    original = world.model

    def watched(what: str, function: Callable[[], FuseReport | nn.Module]) -> FuseReport | nn.Module:
        printed = io.StringIO()
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
            warnings.simplefilter("always")
            try:
                result = function()
            except Exception as error:
                raise Mismatch(
                    f"{what} raises {type(error).__name__}: {without_names(str(error))}", str(error)
                ) from error
        compare(before, Outcome(world.look(printed.getvalue())), None, what)
        if texts := [text for warning in caught if not (text := str(warning.message)).startswith("resnet_kernels:")]:
            raise Mismatch(f"{what}: lets the forward warn", texts[0])
        return result

    watched("explain", lambda: rk.explain(original, backend=example.backend))
    if example.in_place:
        watched("fuse_", lambda: rk.fuse_(original, backend=example.backend))
        return rk.explain(original)
    fused = watched("fuse", lambda: rk.fuse(original, backend=example.backend))
    assert isinstance(fused, nn.Module)
    world.model = fused
    compare(before, Outcome(world.look()), None, "fuse, in the copy,")
    return rk.explain(fused)


def _oracle(example: Example, done: list[tuple[Step, int]], outcomes: list[Outcome], call: int) -> Outcome:
    """The outcome of a call in fp64. outcomes: those known so far."""
    if len(outcomes) < call:
        outcomes.clear()
        world = example.world("oracle", double=True)
        for step, number in done:
            if isinstance(step, Edit):
                world.edit(step.line, number)
                world.model.double()
            else:
                outcomes.append(world.call(step, number))
    return outcomes[call - 1]


def _check_silence(example: Example, result: Result) -> None:
    """A model that runs fused on a tensor also runs fused on a tensor that only has another class, or a warning says why."""
    if not result.fused or example.backend != "auto":
        return
    world = example.world("fused", example.backend)
    world.fuse()
    ran = []
    for image in ("image(2)", example.other_image):
        backends._said.clear()
        with profile() as profiler:
            outcome = world.call(Call(image=image), 0)
        ran.append(any("convolution_pointwise" in event.name for event in profiler.function_events or ()))
    if ran[0] and not (ran[1] or outcome.said or outcome.error):
        raise Mismatch("runs eager without a word", example.other_image)
