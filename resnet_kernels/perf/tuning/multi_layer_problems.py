"""Problems to tune of several layers in one kernel: links and the stem."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...graph.recipe import CallStep, ConvStep, NormStep
from ...kernels.activations import RELU
from ...ops.conv_problem import ConvProblem
from ...runtime.gpu import launches, multi_layer
from ...runtime.gpu.constants import Constants
from ...runtime.gpu.multi_layer import APART, Link, LinkProblem, Stem, StemProblem
from ...runtime.parts import CallPart, ConvPart, NormPart, Part, scale_shift
from .autotuner import Problem
from .random_operands import Draw, output_shape, random_conv, random_norm


def link_problem(asked: LinkProblem, batch: int, dtype: torch.dtype, device: torch.device, calls: int = 1) -> Problem:
    """Returns the problem of a bottleneck's convolutions that could share launches."""
    # Values: 0 is the first layer's input, 1 the shortcut's input or conv3's residual; layers make the others.
    hidden, projected, y, normed, z = range(2, 7)
    reads = dict(conv2=0, shortcut=1, conv3=hidden if asked.conv2 else 0, conv1=normed if asked.norm else y)
    makes = dict(conv2=hidden, shortcut=projected, conv3=y, conv1=z)
    convs = {role: conv for role, conv in zip(multi_layer.ROLES, asked) if isinstance(conv, ConvProblem)}
    draw = Draw(dtype, device)
    parts: dict[str, Any] = {}
    for role, conv in convs.items():
        residual = None if role != "conv3" else projected if asked.shortcut else 1
        step = ConvStep(role, None, conv.activation, reads[role], makes[role], residual)
        parts[role] = ConvPart(step, random_conv(conv, draw), None)
    if asked.norm:
        parts["norm"] = NormPart(NormStep("norm", RELU, y, normed), random_norm(asked.conv3.weight_shape[0], draw))
    inputs = {
        0: (asked.conv2 or asked.conv3).x_shape(batch),
        1: asked.shortcut.x_shape(batch) if asked.shortcut else output_shape(asked.conv3, batch),
    }
    results = [y, z] if asked.conv1 else [y]
    made = {makes[role]: conv for role, conv in convs.items()}
    return _problem_of_parts(asked, Link(**parts).parts, made, inputs, results, batch, dtype, device, calls)


def stem_problem(asked: StemProblem, batch: int, dtype: torch.dtype, device: torch.device, calls: int = 1) -> Problem:
    """Returns the problem of a network's first convolution and its max-pool."""
    conv = ConvPart(
        ConvStep("conv", None, asked.conv.activation, 0, 1), random_conv(asked.conv, Draw(dtype, device)), None
    )
    kernel_size, stride, padding, dilation, ceil_mode = asked.window
    pool = nn.MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)
    parts = Stem(conv, CallPart(CallStep("pool", True, (1,), 2), pool)).parts
    inputs = {0: asked.conv.x_shape(batch)}
    return _problem_of_parts(asked, parts, {1: asked.conv}, inputs, [2], batch, dtype, device, calls)


def _problem_of_parts(
    asked: LinkProblem | StemProblem,
    parts: Sequence[Part],
    convs: Mapping[int, ConvProblem],
    inputs: Mapping[int, tuple[int, ...]],
    results: Sequence[int],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    calls: int,
) -> Problem:
    """Returns the problem of parts that could share launches. Candidates: APART, or a link's `name`, whose parts share one.

    Apart, each layer runs as the current table says, so layers have to be measured before links.

    Args:
        asked: The problem.
        parts: Its layers, in order.
        convs: Its convolutions, by the value that each makes.
        inputs: Shapes of the values that no part makes.
        results: Values to compare.
        batch: Number of images.
        dtype: The dtype of the activations.
        device: The device to measure on.
        calls: Number of times that the model has this problem.
    """
    shapes = multi_layer.shapes_of(parts, inputs, dtype)
    flops = sum(2 * math.prod(shapes[out]) * math.prod(conv.weight_shape[1:]) for out, conv in convs.items())
    moved = [*inputs.values(), *(shapes[value] for value in results), *(conv.weight_shape for conv in convs.values())]

    def operands() -> tuple:
        draw, vectors = Draw(dtype, device), {}
        for out, conv in convs.items():
            width = (conv.weight_shape[0],)
            scale = 1 + draw(width, 0.1, dtype=torch.float32) if conv.scale else None
            vectors[out] = Constants(scale, draw(width, dtype=torch.float32) if conv.bias else None)
        return {value: draw(shape) for value, shape in inputs.items()}, vectors

    def run(link: Link | Stem | None, backend: str, values: dict, vectors: dict) -> tuple[Tensor, ...]:
        own = parts
        if values[0].dtype == torch.float64:
            own = [
                part._replace(bn=copy.deepcopy(part.bn).double()) if isinstance(part, NormPart) else part
                for part in parts
            ]
        chosen = {} if link is None else {part.step.out: link for part in link.parts}
        norms = {
            part.step.out: Constants(*scale_shift(None, part.bn))
            for part in own
            if part.step.out in chosen and isinstance(part, NormPart)
        }
        values, vectors = dict(values), vectors | norms
        for launch in launches.in_order(own, chosen):
            launch.run(values, vectors, backend)
        return tuple(values[value] for value in results)

    def truth(values: dict, vectors: dict) -> tuple[Tensor, ...]:
        pairs = {out: Constants(*(None if t is None else t.double() for t in own)) for out, own in vectors.items()}
        return run(None, "eager", {value: t.double() for value, t in values.items()}, pairs)

    able = []
    if multi_layer.takes_links(device):
        found = [link for around in multi_layer.find(parts, results[-1]) for link in around]
        able = multi_layer.forms_of(found, shapes, dtype)
    return Problem(
        key=str(asked),
        batch=batch,
        dtype=dtype,
        device=device,
        default=APART,
        candidates={APART: partial(run, None, "auto")} | {link.name: partial(run, link, "auto") for link in able},
        operands=operands,
        eager=partial(run, None, "eager"),
        reference=truth,
        flops=flops,
        bytes=dtype.itemsize * sum(map(math.prod, moved)),
        calls=calls,
    )
