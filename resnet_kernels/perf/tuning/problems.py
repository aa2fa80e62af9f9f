"""Which choices a model has, and each as a tuning.Problem: operands, candidates, the truth, what it costs.

A kind of problem is a hashable type whose `str` is the key, and which a call site hands to `ops.tuned.choice`; here it has a
builder in BUILDERS. What a model asks for is seen by running it once (`ops.tuned.noting`), so a new kind needs nothing else.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...fusion.convert import fuse
from ...graph.recipe import CallStep, ConvStep, NormStep
from ...ops import backends, conv_candidates, reference, tuned_table
from ...ops.batch_norm_act import NormProblem
from ...ops.batch_norm_act import untuned as untuned_norm
from ...ops.conv_candidates import ConvProblem
from ...runtime.bn import scale_shift
from ...runtime.gpu import multi_layer, plan
from ...runtime.gpu.constants import Constants
from ...runtime.gpu.multi_layer import APART, Link, LinkProblem, Part, Stem, StemProblem
from .autotuner import Problem

# Elements that the fp64 reference holds at a time.
_REFERENCE = 2**26


def note(model: nn.Module, x: Tensor, *, training: bool = False) -> list[tuple[Hashable, int]]:
    """What a model asks a table for, and how often: in inference, or in a training step for BN, add and ReLU.

    Args:
        model: is fused in a copy, and that is run once on x.
        x: a batch of images, at least 2 of them for training; their size counts, not how many there are.

    Raises:
        ValueError: if RESNET_KERNELS_BACKEND decides everything already.
    """
    if backends.requested("auto") != "auto":
        raise ValueError(f"{backends.ENVIRONMENT_VARIABLE} must not be set: with it no table is asked")
    fused = fuse(model)
    if fused.training is not training:
        fused.train(training)  # else its own modes stay: a BN may be frozen
    with torch.no_grad(), tuned_table.noting() as noted:
        fused(x)
    by_key = {str(asked): asked for asked, _ in noted if not training or getattr(asked, "training", False)}
    calls = Counter(str(asked) for asked, _ in noted)
    return [(asked, calls[key]) for key, asked in by_key.items()]


def build(
    noted: Sequence[tuple[Hashable, int]], batches: Iterable[int], dtype: torch.dtype, device: torch.device
) -> list[Problem]:
    """The problems of what `note` found at these batch sizes, dearest first, as they matter most; links after all layers."""
    problems = [
        BUILDERS[type(asked)](asked, batch, dtype, device, calls) for batch in batches for asked, calls in noted
    ]
    return sorted(
        problems, key=lambda p: (p.default == APART, -p.calls * max(p.bytes, p.flops / _FLOPS_PER_BYTE))
    )  # fmt: skip


# Of an H200's ridge. Only the order of the problems hangs on it.
_FLOPS_PER_BYTE = 184


def conv_problem(asked: ConvProblem, batch: int, dtype: torch.dtype, device: torch.device, calls: int = 1) -> Problem:
    """A convolution with its epilogue."""
    geometry, relu = asked.geometry, asked.relu
    x_shape, weight_shape = asked.x_shape(batch), asked.weight_shape
    y_shape = geometry.out_shape(x_shape, weight_shape)
    x_size, y_size, weight_size = (torch.Size(shape).numel() for shape in (x_shape, y_shape, weight_shape))
    fan_in = weight_size // weight_shape[0]

    def operands() -> tuple:
        draw = _Draw(dtype, device)
        return (
            draw(x_shape),
            draw(weight_shape, fan_in**-0.5),
            draw(y_shape[1:2], dtype=torch.float32) if asked.bias else None,
            draw(y_shape) if asked.residual else None,
            1 + draw(y_shape[1:2], 0.1, dtype=torch.float32) if asked.scale else None,
        )

    def eager(x, weight, bias, residual, scale):
        return reference.conv_bias_act(x, weight, bias, residual, scale, geometry, relu)

    def truth(x, weight, bias, residual, scale):
        step = max(1, _REFERENCE * batch // max(x_size, y_size))
        weight, bias, scale = (None if t is None else t.double() for t in (weight, bias, scale))
        parts = []
        for start in range(0, batch, step):
            part = slice(start, start + step)
            added = None if residual is None else residual[part].double()
            # In fp32 it is as good a truth for 16 bits, in half the memory.
            y = eager(x[part].double(), weight, bias, added, scale)
            parts.append(y if dtype == torch.float32 else y.float())
        return torch.cat(parts)

    names = conv_candidates.candidates(asked, batch, dtype, device)
    return Problem(
        key=str(asked),
        batch=batch,
        dtype=dtype,
        device=device,
        default=names[0],
        candidates={name: _runner(name, geometry, relu) for name in names},
        operands=operands,
        eager=eager,
        reference=truth,
        flops=2 * y_size * fan_in,
        bytes=dtype.itemsize * (x_size + weight_size + y_size * (1 + asked.residual)),
        calls=calls,
    )


def _runner(name: str, geometry, relu: bool) -> Callable[..., Tensor]:
    return lambda *operands: conv_candidates.run(name, *operands, geometry, relu)


def link_problem(asked: LinkProblem, batch: int, dtype: torch.dtype, device: torch.device, calls: int = 1) -> Problem:
    """A bottleneck's convolutions that could share launches."""
    # Values: 0 is the first layer's input, 1 the shortcut's or what conv3 adds, the others are made.
    hidden, projected, y, normed, z = range(2, 7)
    reads = dict(conv2=0, shortcut=1, conv3=hidden if asked.conv2 else 0, conv1=normed if asked.norm else y)
    makes = dict(conv2=hidden, shortcut=projected, conv3=y, conv1=z)
    convs = {role: conv for role, conv in zip(multi_layer.ROLES, asked) if isinstance(conv, ConvProblem)}
    draw, parts = _Draw(dtype, device), {}
    for role, conv in convs.items():
        residual = None if role != "conv3" else projected if asked.shortcut else 1
        step = ConvStep(role, None, conv.relu, reads[role], makes[role], residual)
        parts[role] = Part(step, _module(conv, draw), None)
    if asked.norm:
        parts["norm"] = Part(NormStep("norm", True, y, normed), None, _norm(asked.conv3.weight_shape[0], draw))
    inputs = {
        0: (asked.conv2 or asked.conv3).x_shape(batch),
        1: asked.shortcut.x_shape(batch) if asked.shortcut else _y_shape(asked.conv3, batch),
    }
    results = [y, z] if asked.conv1 else [y]
    convs = {makes[role]: conv for role, conv in convs.items()}
    return _problem_of_parts(asked, Link(**parts).parts, convs, inputs, results, batch, dtype, device, calls)


def stem_problem(asked: StemProblem, batch: int, dtype: torch.dtype, device: torch.device, calls: int = 1) -> Problem:
    """A network's first convolution and its max-pool."""
    conv = Part(ConvStep("conv", None, asked.conv.relu, 0, 1), _module(asked.conv, _Draw(dtype, device)), None)
    kernel_size, stride, padding, dilation, ceil_mode = asked.window
    pool = nn.MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)
    parts = Stem(conv, Part(CallStep("pool", True, (1,), 2), pool, None)).parts
    inputs = {0: asked.conv.x_shape(batch)}
    return _problem_of_parts(asked, parts, {1: asked.conv}, inputs, [2], batch, dtype, device, calls)


def _problem_of_parts(
    asked: LinkProblem | StemProblem,
    parts: Sequence[Part],
    convs: dict[int, ConvProblem],
    inputs: dict[int, tuple[int, ...]],
    results: Sequence[int],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    calls: int,
) -> Problem:
    """Parts that could share launches: which of them do; APART for none, else `roles` of the link.

    Apart, each runs as the table says that is there when this is measured, so layers are to be measured before links.

    Args:
        convs: by the value that each makes. inputs: shapes of the values that no part makes. results: values to compare.
    """
    shapes = multi_layer.shapes_of(parts, inputs, dtype)
    flops = sum(2 * math.prod(shapes[out]) * math.prod(conv.weight_shape[1:]) for out, conv in convs.items())
    moved = [*inputs.values(), *(shapes[value] for value in results), *(conv.weight_shape for conv in convs.values())]

    def operands() -> tuple:
        draw, vectors = _Draw(dtype, device), {}
        for out, conv in convs.items():
            width = (conv.weight_shape[0],)
            scale = 1 + draw(width, 0.1, dtype=torch.float32) if conv.scale else None
            vectors[out] = Constants(scale, draw(width, dtype=torch.float32) if conv.bias else None)
        return {value: draw(shape) for value, shape in inputs.items()}, vectors

    def run(link: Link | Stem | None, backend: str, values: dict, vectors: dict) -> tuple[Tensor, ...]:
        own = parts
        if values[0].dtype == torch.float64:
            own = [part if part.bn is None else part._replace(bn=copy.deepcopy(part.bn).double()) for part in parts]
        chosen = {} if link is None else {part.step.out: link for part in link.parts}
        norms = {
            part.step.out: Constants(*scale_shift(None, part.bn)) for part in own if part.step.out in chosen and part.bn
        }
        values, vectors = dict(values), vectors | norms
        for launch in plan.in_order(own, chosen):
            launch.run(launch.what, values, vectors, backend)
        return tuple(values[value] for value in results)

    def truth(values: dict, vectors: dict) -> tuple[Tensor, ...]:
        pairs = {out: Constants(*(None if t is None else t.double() for t in own)) for out, own in vectors.items()}
        return run(None, "eager", {value: t.double() for value, t in values.items()}, pairs)

    able = []
    if multi_layer.takes_links(device):
        found = (link for around in multi_layer.find(parts, results[-1]) for link in around)
        able = [link for link in found if multi_layer.why_not(link, shapes, dtype) is None]
    return Problem(
        key=str(asked),
        batch=batch,
        dtype=dtype,
        device=device,
        default=APART,
        candidates={APART: partial(run, None, "auto")} | {link.roles: partial(run, link, "auto") for link in able},
        operands=operands,
        eager=partial(run, None, "eager"),
        reference=truth,
        flops=flops,
        bytes=dtype.itemsize * sum(map(math.prod, moved)),
        calls=calls,
    )


def _y_shape(conv: ConvProblem, batch: int) -> tuple[int, ...]:
    return conv.geometry.out_shape(conv.x_shape(batch), conv.weight_shape)


def _module(conv: ConvProblem, draw: _Draw) -> nn.Conv2d:
    """A convolution of that shape, with random weights; its bias is the epilogue's."""
    c_out, c_in, *kernel_size = conv.weight_shape
    stride, padding, dilation, groups = conv.geometry
    module = nn.Conv2d(c_in * groups, c_out, kernel_size, stride, padding[::2], dilation, groups, bias=False)
    module.weight = nn.Parameter(draw(conv.weight_shape, math.prod(conv.weight_shape[1:]) ** -0.5), requires_grad=False)
    if not conv.geometry.symmetric:
        module.same_padding = lambda *size: padding
    return module


def _norm(channels: int, draw: _Draw) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels).to(draw.device).eval().requires_grad_(False)
    for vector in (bn.weight, bn.bias, bn.running_mean):
        vector.copy_(1 + draw((channels,), 0.1, dtype=torch.float32))
    return bn


def norm_problem(asked: NormProblem, batch: int, dtype: torch.dtype, device: torch.device, calls: int = 1) -> Problem:
    """A BN, residual add and ReLU; in training forward and backward: (y, dx, dresidual, dweight, dbias)."""
    shape = (batch, asked.channels, asked.height, asked.width)

    def operands() -> tuple:
        draw, vector = _Draw(dtype, device), (asked.channels,)
        mean, var = draw(vector, 0.1, dtype=torch.float32), 1 + draw(vector, 0.1, dtype=torch.float32).abs()
        weight, bias = (1 + draw(vector, 0.1, dtype=torch.float32), draw(vector, 0.1, dtype=torch.float32))
        dy = draw(shape) if asked.training else None
        return draw(shape), draw(shape) if asked.residual else None, weight, bias, mean, var, dy

    def truth(*tensors):
        return eager(*(None if t is None else t.double() for t in tensors))

    def eager(x, residual, weight, bias, mean, var, dy):
        return run(_by_pytorch, x, residual, weight, bias, mean, var, dy)

    def ours(backend: str):
        op = torch.ops.resnet_kernels.batch_norm_act.default
        return lambda *tensors: run(lambda *arguments: op(*arguments, backend)[0], *tensors)

    def run(normalise, x, residual, weight, bias, mean, var, dy):
        settings = (asked.training, 0.1, 1e-5, asked.relu)
        if not asked.training:
            return normalise(x, residual, weight, bias, mean, var, *settings)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias) if t is not None]
            given = iter(leaves)
            x, residual, weight, bias = (None if t is None else next(given) for t in (x, residual, weight, bias))
            # Copies, or each call would start from other running statistics.
            y = normalise(x, residual, weight, bias, mean.clone(), var.clone(), *settings)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

    names = ["eager"]
    if backends.why_not_on("triton", device, dtype) is None:
        names.append("triton")
    # Passes over data: x (and the residual) in, y out, and x once more for its statistics; backward twice dy and x ...
    passes = (2 + asked.residual) if not asked.training else (11 if asked.residual else 8)
    return Problem(
        key=str(asked),
        batch=batch,
        dtype=dtype,
        device=device,
        default=untuned_norm(asked, dtype, device),
        candidates={name: ours(name) for name in names},
        operands=operands,
        eager=eager,
        reference=truth,
        flops=0,
        bytes=passes * dtype.itemsize * torch.Size(shape).numel(),
        calls=calls,
    )


def _by_pytorch(x, residual, weight, bias, mean, var, training, momentum, eps, relu):
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return torch.relu(y) if relu else y


class _Draw:
    """Normal numbers, the same ones for each problem, on the device itself; images channels_last."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(0)
        self.dtype, self.device = dtype, device

    def __call__(self, shape, deviation: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        options = dict(dtype=dtype or self.dtype, device=self.device)
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, **options, memory_format=layout).normal_(0, deviation, generator=self.generator)


BUILDERS: dict[type, Callable[..., Problem]] = {
    ConvProblem: conv_problem,
    NormProblem: norm_problem,
    LinkProblem: link_problem,
    StemProblem: stem_problem,
}


def training_record(name: str, layers: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """What `ops.tuned.trains` reads: whether all layers' BN, add and ReLU together are faster on our kernels.

    Args:
        name: of the model, with the size of its images.
        layers: how often a model has it, and the record, of each problem of its training; of one batch, dtype and device.
    """
    both, rows = ("eager", "triton"), [record["candidates"] for _, record in layers]
    seconds = {
        clock: {
            who: sum(calls * record["candidates"][who][clock]["median"] for calls, record in layers) for who in both
        }
        for clock in ("call", "graph")
        if all(clock in row.get(who, {}) for row in rows for who in both)
    }
    wins = bool(seconds) and all(clock["triton"] < clock["eager"] for clock in seconds.values())
    first = layers[0][1]
    return {
        "key": f"{tuned_table.TRAINING} {name}",
        "batch": first["batch"],
        "dtype": first["dtype"],
        "winner": "triton" if wins else "eager",
        "default": "eager",
        "seconds": seconds,
        "measured": first["measured"],
    }
