"""The forward of a random block: layers and adds as its skeleton, and between them what users do besides."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from helpers.block_grammar import ClassSource, Shape, Statement

if TYPE_CHECKING:
    from helpers.block_grammar import Writer

CONTEXTS = (
    "torch.no_grad()", "torch.enable_grad()", "torch.autocast('cpu', dtype=torch.bfloat16)", "torch.device('cpu')",
    "torch.profiler.record_function('part')", "torch.autograd.set_grad_enabled(self.training)",
    "torch.autocast('cpu', enabled=False)",
)  # fmt: skip
CHANCES = ("torch.rand(1).item() < 0.5", "random.random() < 0.5", "np.random.rand() < 0.5", "torch.rand(1)[0] >= 0.5")
# What a forward may ask of its input, of the mode and of its modules.
QUESTIONS = (
    "self.training", "not self.training", "torch.is_grad_enabled()", "x.requires_grad", "x.shape[0] > 1", "x.size(1) > 1",
    "x.is_contiguous()", "type(x) is torch.Tensor", "x.dtype == torch.float32", "torch.is_autocast_enabled('cpu')",
    "torch.get_default_dtype() == torch.float32", "isinstance(x, torch.Tensor)",
)  # fmt: skip


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
            self.insert(rnd.choice((self.side_effect, self.side_effect, self.arithmetic, self.again)))
        for _ in range(rnd.choice((0, 0, 0, 1, 1))):
            self.wrap(rnd.choice((self.condition, self.condition, self.context)))
        self.cls.body = [statement for statement, _ in self.body]
        self.results()
        self.cls.gives = self.shape

    def fresh(self, prefix: str) -> str:
        self.number += 1
        return f"{prefix}{self.number}"

    def member(self, prefix: str, expression: str, tag: str = "") -> str:
        name = self.fresh(prefix)
        self.cls.members.append(Statement(tag or f"member {expression.partition('(')[0]}", f"self.{name} = {expression}"))
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
            "x = F.relu(x)", "x = F.relu(x, inplace=True)", "x = torch.relu(x)", "x.relu_()", "x = x.relu()", "x = x.clamp(min=0)",
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
        rnd, classes = self.rnd, [cls for cls in self.writer.classes if cls.takes == self.shape == cls.gives and cls.body]
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
            body.append(Statement("isinstance", f"if isinstance({child}, {kind}):", [Statement("keep", "kept.append(x)")]))
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

    def insert(self, rule) -> None:
        place = self.rnd.randint(0, len(self.body))
        before = self.shape if place == len(self.body) else self.body[place][1]
        self.body[place:place] = [(statement, before) for statement in rule(before)]

    def side_effect(self, shape: Shape) -> list[Statement]:
        rnd, cls = self.rnd, self.cls
        target = rnd.choice(("self", "class", "global", "closure", "buffer", "attribute", "counter", "print", "warn", "random"))
        what = rnd.choice(("x", "x", "x.shape", "x.detach()", "x.is_contiguous()", "x.requires_grad"))
        if target == "self":
            return [Statement("append to self", f"self.{self.member('log', '[]', 'list on self')}.append({what})")]
        if target == "class":
            name = self.fresh("seen")
            cls.attributes.append(Statement("list on class", f"{name} = []"))
            return [Statement("append to class", f"self.{name}.append({what})")]
        if target == "global":
            return [Statement("append to global", rnd.choice((f"LOG.append({what})", "COUNT[0] += 1")))]
        if target == "closure":
            cls.closure = True
            return [Statement("append to closure", f"seen.append({what})")]
        if target == "buffer":
            name = self.fresh("buffer")
            cls.members.append(Statement("buffer", f"self.register_buffer('{name}', torch.zeros(()))"))
            return [Statement("write buffer", f"self.{name}{rnd.choice(('.add_(1)', '.copy_(x.detach().sum())', ' += 1'))}")]
        if target == "attribute":
            return [Statement("set attribute", f"self.{self.fresh('last')} = {what}")]
        if target == "counter":
            name = self.fresh("count")
            cls.attributes.append(Statement("counter", f"{name} = 0"))
            owner = rnd.choice(("self", "type(self)", cls.name))
            return [Statement("count", f"{owner}.{name} = {owner}.{name} + 1")]
        if target == "print":
            return [Statement("print", f"print({'x.shape' if what in ('x', 'x.detach()') else what})")]
        if target == "warn":
            return [Statement("warn", "warnings.warn(f'saw {tuple(x.shape)}')")]
        return [Statement("draw", rnd.choice(("x = x * torch.rand(1).to(x.dtype)", "x = x + torch.rand(x.shape).to(x.dtype)",
                                              "x = x * random.random()", "x = x * float(np.random.rand())")))]  # fmt: skip

    def arithmetic(self, shape: Shape) -> list[Statement]:
        return [Statement("arithmetic", self.rnd.choice((
            "x = x * 2", "x = x / 3", "x = -x", "x = x.clone()", "x = x.contiguous()", "x = x.detach()", "x.mul_(2)",
            "x = x[:]", "x = x.float()", "x = x.type_as(x)", "x = x.flip(1)", "x = x * x.shape[0]", "x = torch.sigmoid(x)",
        )))]  # fmt: skip

    def again(self, shape: Shape) -> list[Statement]:
        """Calls a child once more."""
        names = [name for name, takes, gives in self.children if takes == shape == gives]
        return [Statement("again", f"x = self.{self.rnd.choice(names)}(x)")] if names else []

    def condition(self) -> tuple[str, str]:
        rnd, cls, flags = self.rnd, self.cls, self.writer.flags
        kind = rnd.choice(("instance", "class", "config", "item", "global", "closure", "module", "question", "question", "chance"))
        negated = rnd.choice(("", "", "not "))
        if kind == "question":
            return "if question", rnd.choice(QUESTIONS)
        if kind == "chance":
            chance = rnd.choice(CHANCES)
            return "if chance", rnd.choice((chance, f"not self.training or {chance}"))
        name = self.fresh("on")
        value, flipped = rnd.choice((("True", "not {}"), ("1", "1 - {}"), ("0.5", "-{}"), ("[1]", "[] if {} else [1]"), ("'yes'", "'' if {} else 'yes'"), ("None", "None if {} else 1")))
        read = {"instance": f"self.{name}", "class": f"self.{name}", "config": f"self.{name}.on", "item": f"self.{name}['a']",
                "global": rnd.choice(("SWITCH", "SETTINGS['on']")), "closure": "switch", "module": ""}[kind]  # fmt: skip
        place = read.replace("self.", "at({path!r}).")
        if kind == "instance":
            cls.members.append(Statement("flag", f"self.{name} = {value}"))
        elif kind == "class":
            cls.attributes.append(Statement("flag", f"{name} = {value}"))
            place = rnd.choice((place, f"{cls.name}.{name}"))
        elif kind == "config":
            self.number, flipped = self.number, "not {}"
            cls.members.append(Statement("flag", f"self.{name} = Config()"))
        elif kind == "item":
            cls.members.append(Statement("flag", f"self.{name} = {{'a': {value}}}"))
        elif kind == "global":
            flipped = "not {}"
        elif kind == "closure":
            cls.closure = True
            flags.append((cls.name, f"flip_{cls.name}()"))
            return "if closure", f"{negated}switch"
        else:
            names = [name for name, *_ in self.children]
            if not names:
                return "if question", "self.training"
            child = f"self.{rnd.choice(names)}"
            return "if module", rnd.choice((f"{child} is not None", f"{child}.training", f"isinstance({child}, nn.Module)",
                                            f"getattr({child}, 'stride', 1) in (1, (1, 1))", f"hasattr({child}, 'extra')"))  # fmt: skip
        flags.append((cls.name, f"{place} = {flipped.format(place)}"))
        return f"if {kind}", negated + read

    def context(self) -> tuple[str, str]:
        return "with", self.rnd.choice(CONTEXTS)

    def wrap(self, rule) -> None:
        """Puts a part of the forward into an `if` or a `with`."""
        rnd = self.rnd
        tag, expression = rule()
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
