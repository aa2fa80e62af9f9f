"""What users do to a model between two calls, and how they call it, as lines of Python.

The lines run with the names that block_worlds.World sets: at(path), image(...), cast(dtype), handles, seen, those of
block_step_names, and the program's own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from torch import nn

from helpers.block_grammar import Program


@dataclass
class Edit:
    """A statement that changes a model, its hooks, or the process. tag: its rule."""

    tag: str
    line: str

    def __str__(self) -> str:
        return self.line


@dataclass
class Call:
    """A call of the model. context: expressions of context managers; image: an expression for the input."""

    context: tuple[str, ...] = ("torch.no_grad()",)
    image: str = "image(2)"

    def __str__(self) -> str:
        with_ = f"with {', '.join(self.context)}: " if self.context else ""
        return f"{with_}model({self.image})"

    def tags(self) -> set[str]:
        return {f"call {part}" for part in (*self.context, self.image)} - {"call torch.no_grad()", "call image(2)"}


Step = Edit | Call

CONTEXTS = (
    ("torch.inference_mode()",), ("torch.no_grad()", "torch.backends.mkldnn.flags(enabled=False)"),
    ("torch.no_grad()", "default_dtype(torch.float64)"), ("torch.no_grad()", "torch.device('cpu')"),
    ("torch.no_grad()", "torch.autocast('cpu', dtype=torch.bfloat16)"),
    ("torch.autocast('cpu', dtype=torch.bfloat16)",),
    ("torch.no_grad()", "torch.autograd.set_grad_enabled(True)"), ("torch.no_grad()", "default_dtype(torch.bfloat16)"),
)  # fmt: skip
IMAGES = (
    "image(1)", "image(5)", "image(0)", "image(2).to(memory_format=torch.channels_last)", "image(2).as_subclass(Picture)",
    "image(1).expand(3, -1, -1, -1)", "image(2)[:, :, ::2, ::2]", "image(2).transpose(2, 3)", "image(2).requires_grad_()",
    "image(2)[:, :1]", "image(2).double()", "image(2) * float('nan')", "image(2)[0]", "nn.Parameter(image(2))",
    "image(4)[::2]", "image(2) * 1e30", "image(2).flip(3)",
)  # fmt: skip


def draw_call(rnd: random.Random) -> Call:
    context: tuple[str, ...] = rnd.choices((("torch.no_grad()",), (), rnd.choice(CONTEXTS)), (6, 2, 2))[0]
    return Call(context, rnd.choice(IMAGES) if rnd.random() < 0.25 else "image(2)")


def draw_steps(rnd: random.Random, program: Program, model: nn.Module, training: float) -> list[Step]:
    """Draws a call, and up to three more, mostly with edits before them. training: the share that starts in train() mode."""
    steps: list[Step] = [Edit("train", "model.train()")] if rnd.random() < training else []
    steps.append(Call() if rnd.random() < 0.8 else draw_call(rnd))
    for _ in range(rnd.randint(0, 3)):
        for _ in range(rnd.choice((0, 1, 1, 1, 2))):
            steps.append(draw_edit(rnd, program, model))
        steps.append(draw_call(rnd))
    return steps


def draw_edit(rnd: random.Random, program: Program, model: nn.Module) -> Edit:
    if program.flags and rnd.random() < 0.6:
        name, line = rnd.choice(program.flags)
        paths = [path for path, module in model.named_modules() if type(module).__name__ == name]
        if paths or "{path" not in line:
            return Edit("flip a flag", line.format(path=rnd.choice(paths)) if paths else line)
    rule = rnd.choice((on_tensor, on_tensor, on_tensor, on_conv, on_conv, on_norm, on_module, on_module, on_model))
    return rule(rnd, model)


def _path(rnd: random.Random, model: nn.Module, kinds: type | tuple[type, ...] = nn.Module) -> str | None:
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    return rnd.choice(paths) if paths else None


def on_tensor(rnd: random.Random, model: nn.Module) -> Edit:
    """Writes values, or puts another tensor in a parameter's or buffer's place."""
    places = [(path, name) for path, module in model.named_modules()
              for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]  # fmt: skip
    if not places:
        return on_model(rnd, model)
    # Vectors are many, and weights are what users edit.
    path, name = rnd.choice(places + 2 * [place for place in places if place[1] == "weight"])
    t = f"at({path!r}).{name}"
    row = f"{rnd.randrange(40)} % len({t})"
    part = rnd.choice((f"[{row}]", f"[{row} :]", f"[torch.rand({t}.shape) < 0.5]"))
    whole = (
        ("copy_", f"with torch.no_grad(): {t}.copy_(like({t}))"), ("mul_", f"with torch.no_grad(): {t}.mul_(1.5)"),
        ("data", f"{t}.data = like({t})"), ("data mul_", f"{t}.data.mul_(-1)"), ("optimizer", f"sgd({t})"),
        ("data copy_", f"{t}.data.copy_(like({t}))"), ("numpy", f"{t}.detach().numpy()[...] = like({t}).numpy()"),
        ("nan", f"with torch.no_grad(): {t}.fill_(float('nan'))"), ("huge", f"with torch.no_grad(): {t}.mul_(1e25)"),
    )  # fmt: skip
    partly = (
        ("part of data", f"{t}.data{part} = 0"), ("part of data", f"{t}.data{part} = 0.5"),
        ("part of data", f"{t}.data{part} *= 2"), ("part", f"with torch.no_grad(): {t}{part} = 0"),
        ("part by numpy", f"{t}.detach().numpy()[{row}] = 0.25"),
    )  # fmt: skip
    other = (
        ("new Parameter", f"at({path!r}).{name} = nn.Parameter(like({t}))"),
        ("plain tensor", f"new = like({t}); delattr(at({path!r}), {name!r}); at({path!r}).{name} = new"),
        ("None", f"at({path!r}).{name} = None"), ("requires_grad_", f"{t}.requires_grad_(not {t}.requires_grad)"),
        ("resize storage", f"resize({t})"), ("swap storage", f"{t}.set_(like({t}))"),
        ("dtype of one", f"{t}.data = {t}.data.to(torch.bfloat16)"), ("layout of one", f"{t}.data = transposed({t}.data)"),
        ("expanded", f"{t}.data = {t}.data[:1].expand({t}.shape)"),
    )  # fmt: skip
    return Edit(*rnd.choice(rnd.choice((whole, partly, other))))


def on_conv(rnd: random.Random, model: nn.Module) -> Edit:
    path = _path(rnd, model, nn.Conv2d)
    if path is None:
        return on_model(rnd, model)
    conv = f"at({path!r})"
    n = rnd.choice((1, 1, 2))
    pair = rnd.choice((str(n), f"({n}, {n})", f"[{n}, {n}]", f"({n},)", "(1, 2)"))
    return Edit(*rnd.choice((
        ("stride", f"{conv}.stride = {pair}"), ("padding", f"{conv}.padding = {pair}"),
        ("dilation", f"{conv}.dilation = {pair}"),
        ("stride", f"{conv}.stride = {conv}.stride[0]"), ("padding", f"{conv}.padding = {conv}.padding[0]"),
        ("dilation", f"{conv}.dilation = {conv}.dilation[0]"), ("padding", f"{conv}.padding = 'same'"),
        ("padding_mode", f"{conv}.padding_mode = {rnd.choice(('circular', 'reflect', 'replicate'))!r}"),
        ("groups", f"{conv}.groups, {conv}.weight = {conv}.in_channels, nn.Parameter(like({conv}.weight[:, :1]))"),
        ("kernel", f"{conv}.weight = nn.Parameter(like({conv}.weight[..., :1, :1]))"),
        ("bias", f"{conv}.bias = nn.Parameter(torch.randn({conv}.out_channels))"),
        ("filters", f"{conv}.weight = nn.Parameter(like({conv}.weight).flip(0)); {conv}.bias = None"),
        ("parametrization", f"torch.nn.utils.parametrizations.weight_norm({conv})"),
        ("spectral norm", f"torch.nn.utils.spectral_norm({conv})"),
        ("prune", f"torch.nn.utils.prune.random_unstructured({conv}, 'weight', 0.5)"),
    )))  # fmt: skip


def on_norm(rnd: random.Random, model: nn.Module) -> Edit:
    path = _path(rnd, model, nn.BatchNorm2d)
    if path is None:
        return on_tensor(rnd, model)
    bn = f"at({path!r})"
    return Edit(*rnd.choice((
        ("eps", f"{bn}.eps = 0.5"), ("eps", f"{bn}.eps = {bn}.eps * 100"), ("momentum", f"{bn}.momentum = 0.5"),
        ("running_mean None", f"{bn}.running_mean = {bn}.running_var = None"),
        ("track", f"{bn}.track_running_stats = False"),
        ("reset", f"{bn}.reset_parameters()"), ("affine", f"{bn}.weight = {bn}.bias = None"),
        ("train one", f"{bn}.train()"),
        ("half statistics", f"{bn}.running_mean.data = {bn}.running_mean.data.double()"), ("eval one", f"{bn}.eval()"),
    )))  # fmt: skip


def on_module(rnd: random.Random, model: nn.Module) -> Edit:
    """Hooks, replaced and patched modules, modes of one module."""
    paths = [path for path, _ in model.named_modules()]
    path = rnd.choice(paths)
    m, parent, name = f"at({path!r})", f"at({path.rpartition('.')[0]!r})", path.rpartition(".")[2]
    new = rnd.choice(
        (
            "nn.Identity()",
            "nn.ReLU()",
            "nn.Tanh()",
            f"copy.deepcopy({m})",
            "nn.Dropout(0.5)",
            "nn.ReLU6()",
            f"nn.Sequential({m})",
        )
    )
    edits = [
        ("forward hook", f"handles.append({m}.register_forward_hook(lambda m, i, o: seen.append(o)))"),
        ("forward hook", f"handles.append({m}.register_forward_hook(lambda m, i, o: o * 2))"),
        ("forward hook", f"handles.append({m}.register_forward_hook(lambda m, i, o: seen.append(i[0])))"),
        ("pre hook", f"handles.append({m}.register_forward_pre_hook(lambda m, i: seen.append(i[0].shape)))"),
        ("pre hook", f"handles.append({m}.register_forward_pre_hook(lambda m, i: (i[0] + 1,)))"),
        ("global hook", "handles.append(register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__)))"),
        ("backward hook", f"handles.append({m}.register_full_backward_hook(lambda m, i, o: seen.append(len(i))))"),
        ("remove hook", "handles.pop().remove()"), ("train one", f"{m}.train()"), ("eval one", f"{m}.eval()"),
        ("patch forward", f"{m}.forward = lambda x, old={m}.forward: old(x) * 2"),
        ("patch call", f"patch_class({m})"), ("unpatch", f"del {m}.forward"), ("training flag", f"{m}.training = True"),
        ("freeze one", f"{m}.requires_grad_(False)"), ("cast one", f"cast(torch.bfloat16, {m})"),
        ("inplace", f"{m}.inplace = True"), ("new attribute", f"{m}.extra = 1"),
    ]  # fmt: skip
    if path:
        place = f"{parent}[{name}]" if name.isdigit() else f"{parent}.{name}"
        edits += [("replace", f"{place} = {new}")] * 3 + [("add child", f"{parent}.add_module('more', nn.ReLU())")]
        edits.append(("delete child", f"del {place}"))
        # A module inside itself would have no end.
        if others := [other for other in paths if not f"{path}.".startswith(f"{other}." if other else "")]:
            edits.append(("share", f"{place} = at({rnd.choice(others)!r})"))
    return Edit(*rnd.choice(edits))


def on_model(rnd: random.Random, model: nn.Module) -> Edit:
    return Edit(*rnd.choice((
        ("train", "model.train()"), ("train, eval", "model.train(); model.eval()"), ("eval", "model.eval()"),
        ("requires_grad_", "model.requires_grad_(False)"), ("cast", "cast(torch.float64)"),
        ("cast", "cast(torch.bfloat16)"),
        ("cast and back", "cast(torch.bfloat16); cast(torch.float32)"),
        ("channels_last", "model.to(memory_format=torch.channels_last)"),
        ("contiguous", "model.to(memory_format=torch.contiguous_format)"), ("deepcopy", "model = copy.deepcopy(model)"),
        ("shallow copy", "model = copy.copy(model)"), ("pickle", "model = pickle.loads(pickle.dumps(model))"),
        ("state_dict", "model.load_state_dict({k: like(v) for k, v in model.state_dict().items()})"),
        ("state_dict assign", "model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)"),
        ("explain", "explain()"), ("unfuse, fuse", "unfuse(); fuse()"), ("fuse again", "fuse()"),
        ("unfuse", "unfuse()"),
        ("apply", "model.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Conv2d) else None)"),
        ("zero_grad", "model.zero_grad()"),
        ("half and float", "model.bfloat16().float()"), ("share memory", "model.share_memory()"),
        ("step", "step(model)"),
    )))  # fmt: skip
