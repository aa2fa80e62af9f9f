"""Small examples out of large ones, and findings without repetitions.

A finding is the kind of a mismatch and the rules that the smallest example needs. A later example that has the same kind of
mismatch and all of those rules counts as the same finding.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from helpers.block_edits import Call
from helpers.block_runs import Discard, Example, Mismatch, Result, draw, run


def shrink(example: Example, mismatch: Mismatch, most_runs: int = 100) -> tuple[Example, Mismatch]:
    """Deletes whatever the mismatch does not need."""
    runs = 0
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(example):
            runs += 1
            if runs > most_runs:
                return example, mismatch
            found = outcome(smaller)
            if found is not None and found.mismatch is not None and found.mismatch.what == mismatch.what:
                example, mismatch, progress = smaller, found.mismatch, True
                break
    return example, mismatch


def outcome(example: Example) -> Result | None:
    """The result of a run; None if plain PyTorch can't run it."""
    try:
        return run(example)
    except Discard:
        return None


def _smaller(example: Example) -> Iterator[Example]:
    """Copies of an example with less in it, those that lose most first."""

    def changed(change: Callable[[Example], object]) -> Example:
        other = copy.deepcopy(example)
        change(other)
        return other

    for i in range(1, len(example.steps)):
        yield changed(lambda e, i=i: e.steps.__delitem__(slice(i, None)))  # type: ignore[misc]
    for i in range(len(example.steps)):
        if len(example.steps) > 1:
            yield changed(lambda e, i=i: e.steps.pop(i))  # type: ignore[misc]
    program = example.program
    used = program.source()
    for i, cls in enumerate(program.classes):
        if used.count(cls.name) - sum(line.count(cls.name) for line in cls.lines()) <= 0:
            yield changed(lambda e, i=i: e.program.classes.pop(i))  # type: ignore[misc]
        if f"{cls.name}({cls.arguments})" != program.model and len(cls.takes) == 3:
            yield changed(lambda e, new=f"{cls.name}({cls.arguments})": setattr(e.program, "model", new))  # type: ignore[misc]
    for simpler in _parts(program.model):
        yield changed(lambda e, new=simpler: setattr(e.program, "model", new))  # type: ignore[misc]
    for i, cls in enumerate(program.classes):
        for j, statements in enumerate(cls.statements()):
            for k, statement in enumerate(statements):
                yield changed(lambda e, i=i, j=j, k=k: e.program.classes[i].statements()[j].pop(k))  # type: ignore[misc]
                if statement.body:
                    yield changed(lambda e, i=i, j=j, k=k: _unwrap(e.program.classes[i].statements()[j], k))  # type: ignore[misc]
        if cls.result != "x":
            yield changed(lambda e, i=i: setattr(e.program.classes[i], "result", "x"))  # type: ignore[misc]
        if not cls.name.startswith("Plain"):
            yield changed(lambda e, old=cls.name, new=f"Plain{i}": e.rename(old, new))  # type: ignore[misc]
        if cls.closure:
            yield changed(lambda e, i=i: setattr(e.program.classes[i], "closure", False))  # type: ignore[misc]
    for i, step in enumerate(example.steps):
        if isinstance(step, Call) and (step.image != "image(2)" or step.context != ("torch.no_grad()",)):
            yield changed(lambda e, i=i: e.steps.__setitem__(i, Call()))  # type: ignore[misc]
            yield changed(lambda e, i=i, c=step.context: e.steps.__setitem__(i, Call(c)))  # type: ignore[misc]
            yield changed(lambda e, i=i, x=step.image: e.steps.__setitem__(i, Call(image=x)))  # type: ignore[misc]
    if example.in_place:
        yield changed(lambda e: setattr(e, "in_place", False))


def _unwrap(statements: list, k: int) -> None:
    statements[k : k + 1] = statements[k].body


def _parts(model: str) -> Iterator[str]:
    """A Sequential's expression with one child less."""
    start = "nn.Sequential("
    if not model.startswith(start):
        return
    parts, depth = [""], 0
    for letter in model[len(start) : -1]:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    for i in range(len(parts)):
        if len(parts) > 1:
            yield f"{start}{', '.join(part.strip() for j, part in enumerate(parts) if j != i)})"


@dataclass
class Finding:
    """A mismatch, its smallest example, and how many examples showed it."""

    example: Example
    mismatch: Mismatch
    count: int = 1

    def explains(self, example: Example, mismatch: Mismatch) -> bool:
        if self.mismatch.what != mismatch.what:
            return False
        # What goes wrong before any call, or with an exception, tells by itself which finding it is.
        return not mismatch.what.startswith("call: ") or self.example.tags() <= example.tags()

    def __str__(self) -> str:
        return f"## {self.mismatch.what} ({self.count}x)\n\n{self.mismatch.detail}\n\n```python\n{self.example}\n```\n"


# Kinds of mismatch have several causes, told apart by the rules that they need.
_MOST_CAUSES = 8


@dataclass
class Findings:
    """What many examples found. run, fused: how many examples plain PyTorch ran, and how many of them had a fused block."""

    found: list[Finding] = field(default_factory=list)
    failed: list[tuple[Example, Mismatch]] = field(default_factory=list)
    drawn: int = 0
    run: int = 0
    fused: int = 0

    def add(self, rnd: random.Random, backend: str = "auto") -> Mismatch | None:
        """Draws and runs one example."""
        self.drawn += 1
        try:
            example = draw(rnd, backend)
            result = run(example)
        except Discard:
            return None
        self.run += 1
        self.fused += result.fused
        if result.mismatch is not None:
            self.failed.append((example, result.mismatch))
        return result.mismatch

    def group(self) -> Iterator[Finding]:
        """Shrinks the failed examples, the smallest first, as far as no finding explains them; yields the findings."""
        for example, mismatch in sorted(self.failed, key=lambda pair: len(str(pair[0]))):
            if self._count(example, mismatch):
                continue
            if sum(finding.mismatch.what == mismatch.what for finding in self.found) < _MOST_CAUSES:
                smallest, mismatch = shrink(example, mismatch)
                if not self._count(smallest, mismatch):
                    self.found.append(Finding(smallest, mismatch))
                    yield self.found[-1]
        self.failed = []

    def _count(self, example: Example, mismatch: Mismatch) -> bool:
        finding = next((finding for finding in self.found if finding.explains(example, mismatch)), None)
        if finding is not None:
            finding.count += 1
        return finding is not None

    def __str__(self) -> str:
        rows = sorted(self.found, key=lambda finding: -finding.count)
        head = f"{self.drawn} drawn, {self.run} run, {self.fused} with a fused block, {len(self.found)} findings\n\n"
        return head + "\n".join(map(str, rows))
