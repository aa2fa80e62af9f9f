"""Random small networks as Python source: what users write in a forward, drawn rule by rule.

A rule stands for a habit (append to a list, read a flag, wrap a part in torch.no_grad()), never for one known failure. Each
statement keeps the tag of its rule, so that findings can be grouped, and can be deleted, so that they can be shrunk.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

# (channels, height, width), or (features,) behind a flatten.
Shape = tuple[int, ...]

# Names that users give their classes. Some are names of well-known classes, which say nothing about the forward.
CLASS_NAMES = (
    "Block", "BasicBlock", "Bottleneck", "ConvBlock", "Encoder", "Stage", "Net", "ResNet", "Residual", "Layer",
    "Dropout2d", "Dropout", "Identity", "FrozenBatchNorm2d", "BatchNormAct2d", "DropPath", "StochasticDepth", "ReLU",
    "BatchNorm2d", "Conv2d", "Sequential", "MaxPool2d", "Scale", "Norm", "Act", "DropBlock2d", "AlphaDropout", "SyncBatchNorm",
)  # fmt: skip
BUFFER_NAMES = ("weight", "bias", "running_mean", "running_var", "scale", "offset", "eps", "momentum")


@dataclass
class Statement:
    """A line, or the head of a compound statement and its body. tag: the rule that made it."""

    tag: str
    line: str
    body: list[Statement] = field(default_factory=list)

    def lines(self, indent: int) -> list[str]:
        if self.line.endswith(":"):
            inner = [line for statement in self.body for line in statement.lines(indent + 4)]
            return [" " * indent + self.line, *inner] if inner else []
        return [" " * indent + self.line]

    def tags(self) -> set[str]:
        return {self.tag}.union(*(statement.tags() for statement in self.body))


@dataclass
class ClassSource:
    """A user's class. takes, gives: shape of the forward's input and of its output. closure: made inside a function."""

    name: str
    takes: Shape
    gives: Shape = ()
    base: str = "nn.Module"
    arguments: str = ""
    attributes: list[Statement] = field(default_factory=list)
    members: list[Statement] = field(default_factory=list)
    body: list[Statement] = field(default_factory=list)
    result: str = "x"
    closure: bool = False

    def lines(self) -> list[str]:
        attributes = [line for s in self.attributes for line in s.lines(4)]
        members = [line for s in self.members for line in s.lines(8)]
        body = [line for s in self.body for line in s.lines(8)]
        init = [
            f"    def __init__(self{self.arguments and ', *args'}):",
            f"        super().__init__({self.arguments and '*args'})",
        ]
        code = [f"class {self.name}({self.base}):", *attributes, *(init + members if members else [])]
        code += ["    def forward(self, x):", *body, f"        return {self.result}"]
        if not self.closure:
            return code
        return [
            f"def make_{self.name}():", "    switch, seen = True, []",
            *(" " * 4 + line for line in code), f"    {self.name}.__qualname__ = '{self.name}'",
            "    def flip():", "        nonlocal switch", "        switch = not switch",
            f"    return {self.name}, flip, lambda: (switch, seen)",
            f"{self.name}, flip_{self.name}, peek_{self.name} = make_{self.name}()",
        ]  # fmt: skip

    def statements(self) -> list[list[Statement]]:
        """All lists of statements, those in bodies too."""
        lists, found = [self.attributes, self.members, self.body], []
        while lists:
            found.append(lists.pop())
            lists += [statement.body for statement in found[-1] if statement.body]
        return found


@dataclass
class Program:
    """The source of a network. model: an expression; takes: shape of one image; flags: (tag, statement that flips a flag)."""

    classes: list[ClassSource]
    model: str
    takes: Shape
    flags: list[tuple[str, str]]

    def source(self) -> str:
        code = "\n".join(line for cls in self.classes for line in cls.lines())
        code += f"\ndef make():\n    return {self.model}\n"
        optional = {
            "random.": "import random", "np.": "import numpy as np", "warnings.": "import warnings",
            "F.": "import torch.nn.functional as F", "misc.": "from torchvision.ops import misc",
            "LOG": "LOG = []", "COUNT": "COUNT = [0]", "SWITCH": "SWITCH = True", "SETTINGS": "SETTINGS = {'on': True}",
            "Config": "class Config:\n    def __init__(self): self.on, self.levels = True, [1, 1]",
        }  # fmt: skip
        used = [line for word, line in optional.items() if word in code]
        return "\n".join(["import torch", "from torch import nn", *used, code])

    def tags(self) -> set[str]:
        found = {f"named {cls.name}" for cls in self.classes} | {f"subclass of {cls.base}" for cls in self.classes}
        return found.union(*(s.tags() for cls in self.classes for s in (*cls.attributes, *cls.members, *cls.body)))


class Writer:
    """Draws a program. Shapes are followed, so that most programs run."""

    def __init__(self, rnd: random.Random):
        self.rnd = rnd
        self.classes: list[ClassSource] = []
        self.flags: list[tuple[str, str]] = []
        self.names = list(CLASS_NAMES)

    def program(self) -> Program:
        rnd = self.rnd
        size = rnd.choice((6, 8, 9))
        takes: Shape = (rnd.choice((3, 4, 4)), size, size)
        kind = rnd.choice(("block", "sequential", "blocks", "net", "net", "plain"))
        if kind == "block":
            model = f"{self.block(takes).name}()"
        elif kind == "blocks":
            first = self.block(takes)
            model = (
                f"nn.Sequential({first.name}(), {self.block(first.gives).name}())"
                if len(first.gives) == 3
                else f"{first.name}()"
            )
        elif kind == "net":
            model = f"{self.block(takes, depth=1).name}()"
        else:
            shape, parts = takes, []
            for _ in range(rnd.randint(1, 3)):
                expression, shape = self.layer(shape)
                parts += expression
                if kind == "sequential" and rnd.random() < 0.5:
                    leaf = self.leaf(shape)
                    parts.insert(
                        rnd.randint(0, len(parts)) if len(self.classes) == 1 and leaf.takes == takes else len(parts),
                        self.new(leaf),
                    )
            model = f"nn.Sequential({', '.join(parts)})"
        return Program(self.classes, model, takes, self.flags)

    def new(self, cls: ClassSource) -> str:
        return f"{cls.name}({cls.arguments})"

    def name(self) -> str:
        return self.names.pop(self.rnd.randrange(len(self.names)))

    # Modules.

    def conv(self, shape: Shape, keep: bool = False) -> tuple[str, Shape]:
        rnd, (c, h, w) = self.rnd, shape
        out = c if keep else rnd.choice((c, c, 4, 8, 32, 32))
        kernel = rnd.choice((1, 3, 3, 3, 5))
        dilation = rnd.choice((1, 1, 1, 2))
        stride = 1 if keep else rnd.choice((1, 1, 1, 2))
        same = dilation * (kernel - 1) // 2
        padding = same if keep else rnd.choice((same, same, same, 0))
        reach = dilation * (kernel - 1)
        if min(h, w) + 2 * padding <= reach:
            padding = same
        groups = rnd.choice([g for g in (1, 1, 1, 2, 4, c) if c % g == 0 and out % g == 0])
        bias = rnd.choice((True, True, False))
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        given = "".join(f", {name}={value}" for name, value in options.items() if value != defaults[name])
        given += "" if bias else ", bias=False"
        size = tuple((n + 2 * padding - reach - 1) // stride + 1 for n in (h, w))
        return f"nn.Conv2d({c}, {out}, {kernel}{given})", (out, *size)

    def norm(self, shape: Shape) -> str:
        rnd = self.rnd.random()
        if rnd < 0.75:
            return f"nn.BatchNorm2d({shape[0]})"
        return f"misc.FrozenBatchNorm2d({shape[0]})" if rnd < 0.85 else self.new(self.leaf(shape))

    def relu(self) -> str:
        return self.rnd.choice(("nn.ReLU()", "nn.ReLU(inplace=True)"))

    def other(self, shape: Shape) -> tuple[str, Shape]:
        """A module that keeps channels: pool, dropout, identity, a class of the user's own."""
        rnd, (c, h, w) = self.rnd, shape
        choice = rnd.choice(("pool", "dropout", "identity", "leaf", "leaf"))
        if choice == "pool" and min(h, w) >= 4:
            pool = rnd.choice(("nn.MaxPool2d(2)", "nn.AvgPool2d(2)", "nn.AdaptiveAvgPool2d(2)"))
            return pool, (c, 2, 2) if "Adaptive" in pool else (c, h // 2, w // 2)
        if choice == "dropout":
            return rnd.choice(("nn.Dropout(0.5)", "nn.Dropout2d(0.5)", "nn.Dropout2d(0.2)")), shape
        return ("nn.Identity()", shape) if choice != "leaf" else (self.new(self.leaf(shape)), shape)

    def layer(self, shape: Shape, keep: bool = False) -> tuple[list[str], Shape]:
        """A convolution, and mostly a norm and a ReLU."""
        conv, shape = self.conv(shape, keep)
        rnd = self.rnd
        return [
            conv,
            *([self.norm(shape)] if rnd.random() < 0.85 else []),
            *([self.relu()] if rnd.random() < 0.7 else []),
        ], shape

    def leaf(self, shape: Shape) -> ClassSource:
        """A class of the user's own without a convolution, under any name, with any buffers."""
        rnd, (c, *_) = self.rnd, shape
        usable = [cls for cls in self.classes if cls.takes == shape == cls.gives and len(cls.members) < 4]
        if usable and rnd.random() < 0.3:
            return rnd.choice(usable)
        cls = ClassSource(self.name(), shape, shape)
        cls.base, cls.arguments = rnd.choice(
            (("nn.Module", ""),) * 5 + (("nn.BatchNorm2d", str(c)), ("nn.ReLU", ""), ("nn.Dropout2d", ""))
        )
        names = [] if cls.base != "nn.Module" else rnd.sample(BUFFER_NAMES, rnd.choice((0, 1, 2, 4)))
        cls.members = [Statement("buffer", f"self.register_buffer('{name}', torch.rand({c}) + 0.5)") for name in names]
        if cls.base != "nn.Module":
            cls.body.append(Statement("super", "x = super().forward(x)"))
        vector = [f"self.{name}.reshape(1, -1, 1, 1)" for name in names]
        forms = (
            [f"x * {v}" for v in vector] + [f"x + {v}" for v in vector] + [f"x * ({v} + 1e-5).rsqrt()" for v in vector]
        )
        forms += ["x * 2", "x - x.mean((2, 3), keepdim=True)", "x.relu()"] if not forms else []
        forms += ["F.dropout2d(x, 0.5, True)", "F.dropout2d(x, 0.5, self.training)"]
        forms += ["F.dropout(x, 0.5, True)"] if rnd.random() < 0.2 else []
        cls.body += [Statement("arithmetic", f"x = {rnd.choice(forms)}") for _ in range(rnd.randint(1, 3))]
        self.classes.append(cls)
        return cls

    # Classes with convolutions.

    def block(self, shape: Shape, depth: int = 0) -> ClassSource:
        from helpers.block_statements import BodyWriter

        cls = ClassSource(self.name(), shape)
        BodyWriter(self, cls, depth).write()
        self.classes.append(cls)
        return cls
