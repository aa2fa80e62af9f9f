"""The forward of a random block: layers and adds as its skeleton, and between them what users do besides."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from helpers.block_grammar import ClassSource, Shape, Statement
from helpers.block_habits import again, arithmetic, condition, context, side_effect

if TYPE_CHECKING:
    from helpers.block_grammar import Writer


class BodyWriter:
    """Writes the members and the forward of one class."""

    def __init__(self, writer: Writer, cls: ClassSource, depth: int):
        self.writer, self.cls, self.depth = writer, cls, depth
        self.rnd: random.Random = writer.rnd
        self.shape = cls.takes
        # Statements of the forward, and the shape of x before each.
        self.body: list[tuple[Statement, Shape]] = []
        self.saved: dict[str, Shape] = {}
        self.children: list[tuple[str, Shape, Shape]] = []
        self.number = 0

    def write(self) -> None:
        rnd = self.rnd
        if rnd.random() < 0.12:
            self.iteration()
        else:
            self.skeleton()
        if rnd.random() < 0.35 or self.depth:
            self.head()
        for _ in range(rnd.choice((0, 0, 0, 1, 1, 2))):
            self.insert(rnd.choice((side_effect, side_effect, arithmetic, again)))
        for _ in range(rnd.choice((0, 0, 1, 1))):
            self.wrap(rnd.choice((condition, condition, context)))
        self.cls.body = [statement for statement, _ in self.body]
        self.results()
        self.cls.gives = self.shape

    def fresh(self, prefix: str) -> str:
        self.number += 1
        return f"{prefix}{self.number}"

    def member(self, prefix: str, expression: str, tag: str = "") -> str:
        name = self.fresh(prefix)
        self.cls.members.append(
            Statement(tag or f"member {expression.partition('(')[0]}", f"self.{name} = {expression}")
        )
        return name

    def add(self, tag: str, line: str, shape: Shape | None = None) -> None:
        self.body.append((Statement(tag, line), self.shape))
        self.shape = self.shape if shape is None else shape

    def call(self, prefix: str, expression: str, shape: Shape) -> None:
        name = self.member(prefix, expression)
        self.children.append((name, self.shape, shape))
        self.add("call", f"x = self.{name}(x)", shape)

    # The skeleton.

    def skeleton(self) -> None:
        rnd = self.rnd
        for _ in range(rnd.randint(1, 3)):
            residual = rnd.random() < 0.5
            if rnd.random() < 0.5 or residual:
                self.save()
            name = next(reversed(self.saved), "")
            if self.depth and rnd.random() < 0.6:
                self.inner_blocks()
            elif rnd.random() < 0.15:
                parts, shape = self.writer.layer(self.shape, keep=residual)
                self.call("seq", f"nn.Sequential({', '.join(parts)})", shape)
            else:
                self.layer(keep=residual)
            if len(self.shape) == 3 and rnd.random() < 0.15:
                self.call("extra", *self.writer.other(self.shape))
            if residual:
                self.residual(name)
            if len(self.shape) < 3 or min(self.shape[1:]) < 3:
                break

    def save(self) -> None:
        name = self.fresh("v")
        self.saved[name] = self.shape
        self.add("save", f"{name} = x")

    def layer(self, keep: bool) -> None:
        parts, shape = self.writer.layer(self.shape, keep)
        for prefix, part in zip(("conv", "bn", "relu"), parts):
            if "ReLU(" in part and self.rnd.random() < 0.4:
                self.relu()
            else:
                prefix = "relu" if part.startswith("nn.ReLU") else prefix
                self.call(prefix, part, shape if prefix == "conv" else self.shape)

    def relu(self) -> None:
        self.add("relu", self.rnd.choice((
            "x = F.relu(x)", "x = F.relu(x, inplace=True)", "x = torch.relu(x)", "x.relu_()", "x = x.relu()",
            "x = x.clamp(min=0)",
        )))  # fmt: skip

    def residual(self, name: str) -> None:
        other = name
        if self.saved[name] != self.shape:
            if len(self.saved[name]) != 3 or self.saved[name][1:] != self.shape[1:]:
                return
            shortcut = self.member("down", f"nn.Conv2d({self.saved[name][0]}, {self.shape[0]}, 1)")
            other = f"self.{shortcut}({name})"
        self.add("add", self.rnd.choice((
            f"x = x + {other}", f"x += {other}", f"x = torch.add(x, {other})", f"x = {other} + x", f"x = x.add({other})",
            f"x = torch.add(x, {other}, alpha=2)", f"x = x + {other} * 0.5", f"x.add_({other})",
        )))  # fmt: skip
        if self.rnd.random() < 0.7:
            self.relu()

    def inner_blocks(self) -> None:
        rnd, classes = (
            self.rnd,
            [cls for cls in self.writer.classes if cls.takes == self.shape == cls.gives and cls.body],
        )
        cls = rnd.choice(classes) if classes and rnd.random() < 0.4 else self.writer.block(self.shape)
        if len(cls.gives) != 3 or cls.result != "x":
            self.call("inner", self.writer.new(cls), cls.gives) if cls.result == "x" else self.layer(False)
            return
        form = rnd.choice(("child", "sequential", "list"))
        if form == "child" or cls.gives != self.shape:
            self.call("inner", self.writer.new(cls), cls.gives)
        elif form == "sequential":
            self.call("stage", f"nn.Sequential({self.writer.new(cls)}, {self.writer.new(cls)})", cls.gives)
        else:
            name = self.member("layers", f"nn.ModuleList([{self.writer.new(cls)}, {self.writer.new(cls)}])")
            loop = Statement("loop", f"for child in self.{name}:", [Statement("call", "x = child(x)")])
            self.body.append((loop, self.shape))

    def iteration(self) -> None:
        """A forward that walks over its own children."""
        rnd = self.rnd
        shape = self.shape
        for _ in range(rnd.randint(1, 2)):
            parts, shape = self.writer.layer(shape)
            for part in parts:
                self.member("part", part)
        if rnd.random() < 0.4:
            part, shape = self.writer.other(shape)
            self.member("part", part)
        loop, child = rnd.choice((
            ("for child in self.children():", "child"), ("for _, child in self.named_children():", "child"),
            ("for child in self._modules.values():", "child"), ("for name in self._modules:", "self._modules[name]"),
        ))  # fmt: skip
        body = [Statement("call", f"x = {child}(x)")]
        kind = rnd.choice(("nn.ReLU", "nn.BatchNorm2d", "nn.Conv2d", "(nn.ReLU, nn.MaxPool2d)"))
        if rnd.random() < 0.7:
            body.append(
                Statement("isinstance", f"if isinstance({child}, {kind}):", [Statement("keep", "kept.append(x)")])
            )
        self.add("keep", "kept = []")
        self.body.append((Statement("iteration", loop, body), self.shape))
        self.shape = shape
        self.saved["kept"] = ()

    def head(self) -> None:
        if len(self.shape) != 3:
            return
        rnd, (c, h, w) = self.rnd, self.shape
        flat = (c * h * w,)
        line, shape = rnd.choice((
            ("x = x.view(x.size(0), -1)", flat), ("x = torch.flatten(x, 1)", flat), ("x = x.reshape(x.shape[0], -1)", flat),
            ("x = x.flatten(1)", flat), ("x = x.mean((2, 3))", (c,)), ("x = x.view(x.size(0), x.size(1), -1).mean(2)", (c,)),
            ("x = x.view(*x.shape[:2], -1).transpose(1, 2).reshape(x.shape)", (c, h, w)), ("x = x.mean([-1, -2])", (c,)),
            ("x = x.permute(0, 2, 3, 1)", (h, w, c)),
        ))  # fmt: skip
        self.add("reshape", line, shape)
        if rnd.random() < 0.6 and len(shape) == 1:
            self.call("fc", f"nn.Linear({shape[0]}, 4)", (4,))

    # What comes between.

    def insert(self, rule: Callable[[BodyWriter, Shape], list[Statement]]) -> None:
        place = self.rnd.randint(0, len(self.body))
        before = self.shape if place == len(self.body) else self.body[place][1]
        self.body[place:place] = [(statement, before) for statement in rule(self, before)]

    def wrap(self, rule: Callable[[BodyWriter], tuple[str, str]]) -> None:
        """Puts a part of the forward into an `if` or a `with`."""
        rnd = self.rnd
        tag, expression = rule(self)
        start = rnd.randrange(len(self.body))
        shapes = [shape for _, shape in self.body] + [self.shape]
        ends = [e for e in range(start + 1, len(self.body) + 1) if tag == "with" or shapes[e] == shapes[start]]
        if not ends:
            return
        end = rnd.choice(ends)
        inside = [statement for statement, _ in self.body[start:end]]
        head = f"with {expression}:" if tag == "with" else f"if {expression}:"
        tag = f"with {expression.partition('(')[0]}" if tag == "with" else tag
        self.body[start:end] = [(Statement(tag, head, inside), shapes[start])]

    def results(self) -> None:
        rnd, cls = self.rnd, self.cls
        if rnd.random() < 0.85 and "kept" not in self.saved:
            return
        other = next(iter(self.saved), "x")
        cls.result = rnd.choice(("x", "[x, {}]", "(x, {})", "{{'out': x, 'other': {}}}", "{}")).format(other)
