"""What users put between the layers of a forward: traces that a call leaves, arithmetic, conditions and contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.block_grammar import Shape, Statement

if TYPE_CHECKING:
    from helpers.block_statements import BodyWriter

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


def side_effect(writer: BodyWriter, shape: Shape) -> list[Statement]:
    rnd, cls = writer.rnd, writer.cls
    target = rnd.choice(
        ("self", "class", "global", "closure", "buffer", "attribute", "counter", "print", "warn", "random")
    )
    what = rnd.choice(("x", "x", "x.shape", "x.detach()", "x.is_contiguous()", "x.requires_grad"))
    if target == "self":
        return [Statement("append to self", f"self.{writer.member('log', '[]', 'list on self')}.append({what})")]
    if target == "class":
        name = writer.fresh("seen")
        cls.attributes.append(Statement("list on class", f"{name} = []"))
        return [Statement("append to class", f"self.{name}.append({what})")]
    if target == "global":
        return [Statement("append to global", rnd.choice((f"LOG.append({what})", "COUNT[0] += 1")))]
    if target == "closure":
        cls.closure = True
        return [Statement("append to closure", f"seen.append({what})")]
    if target == "buffer":
        name = writer.fresh("buffer")
        cls.members.append(Statement("buffer", f"self.register_buffer('{name}', torch.zeros(()))"))
        return [
            Statement("write buffer", f"self.{name}{rnd.choice(('.add_(1)', '.copy_(x.detach().sum())', ' += 1'))}")
        ]
    if target == "attribute":
        return [Statement("set attribute", f"self.{writer.fresh('last')} = {what}")]
    if target == "counter":
        name = writer.fresh("count")
        cls.attributes.append(Statement("counter", f"{name} = 0"))
        owner = rnd.choice(("self", "type(self)", cls.name))
        return [Statement("count", f"{owner}.{name} = {owner}.{name} + 1")]
    if target == "print":
        return [Statement("print", f"print({'x.shape' if what in ('x', 'x.detach()') else what})")]
    if target == "warn":
        return [Statement("warn", "warnings.warn(f'saw {tuple(x.shape)}')")]
    return [Statement("draw", rnd.choice(("x = x * torch.rand(1).to(x.dtype)", "x = x + torch.rand(x.shape).to(x.dtype)",
                                          "x = x * random.random()", "x = x * float(np.random.rand())")))]  # fmt: skip


def arithmetic(writer: BodyWriter, shape: Shape) -> list[Statement]:
    return [Statement("arithmetic", writer.rnd.choice((
        "x = x * 2", "x = x / 3", "x = -x", "x = x.clone()", "x = x.contiguous()", "x = x.detach()", "x.mul_(2)",
        "x = x[:]", "x = x.float()", "x = x.type_as(x)", "x = x.flip(1)", "x = x * x.shape[0]", "x = torch.sigmoid(x)",
    )))]  # fmt: skip


def again(writer: BodyWriter, shape: Shape) -> list[Statement]:
    """Calls a child once more."""
    names = [name for name, takes, gives in writer.children if takes == shape == gives]
    return [Statement("again", f"x = self.{writer.rnd.choice(names)}(x)")] if names else []


def condition(writer: BodyWriter) -> tuple[str, str]:
    rnd, cls, flags = writer.rnd, writer.cls, writer.writer.flags
    kind = rnd.choice(("instance", "class", "config", "item", "global", "closure", "module", "question", "chance"))
    negated = rnd.choice(("", "", "not "))
    if kind == "question":
        return "if question", rnd.choice(QUESTIONS)
    if kind == "chance":
        chance = rnd.choice(CHANCES)
        return "if chance", rnd.choice((chance, f"not self.training or {chance}"))
    name = writer.fresh("on")
    value, flipped = rnd.choice(
        (
            ("True", "not {}"),
            ("1", "1 - {}"),
            ("0.5", "-{}"),
            ("[1]", "[] if {} else [1]"),
            ("'yes'", "'' if {} else 'yes'"),
            ("None", "None if {} else 1"),
        )
    )
    read = {"instance": f"self.{name}", "class": f"self.{name}", "config": f"self.{name}.on", "item": f"self.{name}['a']",
            "global": rnd.choice(("SWITCH", "SETTINGS['on']")), "closure": "switch", "module": ""}[kind]  # fmt: skip
    place = read.replace("self.", "at({path!r}).")
    if kind == "instance":
        cls.members.append(Statement("flag", f"self.{name} = {value}"))
    elif kind == "class":
        cls.attributes.append(Statement("flag", f"{name} = {value}"))
        place = rnd.choice((place, f"{cls.name}.{name}"))
    elif kind == "config":
        flipped = "not {}"
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
        names = [name for name, *_ in writer.children]
        if not names:
            return "if question", "self.training"
        child = f"self.{rnd.choice(names)}"
        return "if module", rnd.choice((f"{child} is not None", f"{child}.training", f"isinstance({child}, nn.Module)",
                                        f"hasattr({child}, 'extra')",
                                        f"getattr({child}, 'stride', 1) in (1, (1, 1))"))  # fmt: skip
    flags.append((cls.name, f"{place} = {flipped.format(place)}"))
    return f"if {kind}", negated + read


def context(writer: BodyWriter) -> tuple[str, str]:
    return "with", writer.rnd.choice(CONTEXTS)
