"""Random programs of our CPU kernels with the results that they should have, and an independent look at their plans.

All values are small multiples of 1/16, so that every sum is exact in fp32: results have to be equal to fp64's.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_kernels.kernels import activations
from resnet_kernels.kernels.activations import RELU, Activation
from resnet_kernels.kernels.cpu import convolution, plans
from resnet_kernels.kernels.cpu.convolution import Kernel, Preactivation
from resnet_kernels.kernels.cpu.plans import Pool, Shapes
from resnet_kernels.kernels.cpu.program import Layer, Program, Slice
from resnet_kernels.kernels.geometry import normalize

CHANNELS_LAST = torch.channels_last
POOLS = (Pool(3, 2, (1, 1, 1, 1)), Pool(2, 2, (0, 1, 0, 1)), Pool(2, 1, (1, 0, 0, 1)))
# Larger values, and those that are no multiples of a sixteenth, are read by nobody: sums of theirs might be rounded.
_LARGEST = 512


class Example(NamedTuple):
    """A program's arguments, its input in fp32, and the results of fp64 in the order of `results`."""

    layers: list[Layer]
    x: Tensor
    results: dict[int, tuple[int, ...]]
    truth: list[Tensor]

    def program(self, threads: int) -> Program:
        return Program(self.layers, tuple(self.x.shape), self.results, threads)


class _Step(NamedTuple):
    """A layer of a section. x, residual, out: numbers of values; those that are not whole are of each slice anew."""

    kernel: Kernel
    x: int
    residual: int | None
    out: int


# Activations that leave integers integers.
_LAST = (None, RELU, RELU, Activation("relu6"), Activation("leaky_relu", -1))


class _Maker:
    """Draws layers on some images at a time, and computes each value on all images in fp64."""

    def __init__(self, seed: int, threads: int):
        self.draw, self.threads = random.Random(seed), threads
        self.numbers = itertools.count(1)
        self.n = self.draw.choice((1, 2, 4))
        shape = (self.n, self.draw.choice((3, 8, 20)), self.draw.randint(2, 12), self.draw.randint(2, 12))
        self.truth = {0: self.integers(*shape)}
        self.whole = {0}

    def integers(self, *shape: int, most: int = 2) -> Tensor:
        many = math.prod(shape)
        return torch.tensor([self.draw.randint(-most, most) for _ in range(many)], dtype=torch.float64).view(shape)

    def signs(self, count: int, size: float = 1.0) -> Tensor:
        return torch.tensor([self.draw.choice((-size, size)) for _ in range(count)], dtype=torch.float64)

    def maybe(self, vector: Tensor) -> Tensor | None:
        return vector if self.draw.random() < 0.5 else None

    def section(self, images: int, count: int) -> list[Layer]:
        """Layers on `images` at a time: slice after slice, or a layer of any slice whose turn has come."""
        steps: list[_Step] = []
        inner: set[int] = set()
        for i in range(count):
            x = self.draw.choice(self.readable(inner))
            kernel, residual, value = self.step(x, images, inner)
            out = next(self.numbers)
            self.truth[out] = value
            is_whole = i + 1 == count or images == self.n or self.draw.random() < 0.2
            steps.append(_Step(kernel, x, residual, out))
            (self.whole if is_whole else inner).add(out)
        queues = []
        for start in range(0, self.n, images):
            slices = {number: Slice(number, start) for number in self.whole}
            slices |= {number: Slice(next(self.numbers)) for number in inner}
            queues.append(
                [
                    Layer(s.kernel, slices[s.x], None if s.residual is None else slices[s.residual], slices[s.out])
                    for s in steps
                ]
            )
        if self.draw.random() < 0.5:
            return [*itertools.chain(*queues)]
        layers = []
        while queues := [queue for queue in queues if queue]:
            layers.append(self.draw.choice(queues).pop(0))
        return layers

    def readable(self, inner: set[int], shape: tuple[int, ...] | None = None) -> list[int]:
        """Values that a layer may read, the newest ones several times."""
        found = [
            number
            for number in sorted(self.whole | inner)
            if (shape is None or self.truth[number].shape == shape)
            and self.truth[number].abs().max() <= _LARGEST
            and torch.equal(16 * self.truth[number], (16 * self.truth[number]).round())
        ]
        return found + found[-3:] * 2

    def residual(self, inner: set[int], shape: tuple[int, ...]) -> int | None:
        found = self.readable(inner, shape)
        return self.draw.choice(found) if found and self.draw.random() < 0.6 else None

    def step(self, x: int, images: int, inner: set[int]) -> tuple[Kernel, int | None, Tensor]:
        """A kernel on a value, with what it adds, and the result on all images."""
        value = self.truth[x]
        shape = (images, *value.shape[1:])
        kind = self.draw.choice(
            ("winograd", "winograd", "direct", "direct", "grouped", "depthwise", "elementwise", "elementwise", "pool")
        )
        if kind == "pool" and (min(shape[2:]) < 2 or self.draw.random() < 0.2):
            return (
                convolution.global_average(shape, self.threads),
                None,
                value.sum((2, 3), keepdim=True) / value[0, 0].numel(),
            )
        if (kind == "grouped" and shape[1] % 4) or (kind == "depthwise" and shape[1] == 1):
            kind = "direct"
        if kind in plans.KERNELS:
            return self.convolution(kind, value, shape, inner)
        if kind == "elementwise":
            scale, shift = self.maybe(self.signs(shape[1])), self.maybe(self.integers(shape[1]))
            residual, last = self.residual(inner, tuple(value.shape)), self.draw.choice(_LAST)
            kernel = convolution.elementwise(shape, _fp32(scale), _fp32(shift), last, self.threads)
            return kernel, residual, self.finished(value, scale, shift, residual, last)
        pool, average = self.draw.choice(POOLS), self.draw.random() < 0.5
        kernel = convolution.pooling("average_pool" if average else "max_pool", shape, pool, self.threads)
        return kernel, None, _pooled(value, pool, average)

    def convolution(
        self, name: str, value: Tensor, shape: tuple[int, ...], inner: set[int]
    ) -> tuple[Kernel, int | None, Tensor]:
        winograd, c_in = name == "winograd", shape[1]
        groups = c_in if name == "depthwise" else 1
        if name == "grouped":
            groups = self.draw.choice([c_in // size for size in (2, 4) if c_in > size])
        size, stride = (3, 1) if winograd else self.draw.choice(((1, 1), (3, 1), (1, 1), (3, 1), (3, 2), (1, 2)))
        c_out = c_in if groups > 1 else self.draw.choice((c_in, c_in, c_in, 8, 20, 70))
        # Few taps, or values would grow beyond what is exact. Winograd's transform divides by four.
        weight = torch.zeros(c_out, c_in // groups * size**2, dtype=torch.float64)
        for row in weight:
            row[self.draw.randrange(row.numel())] = self.draw.choice((-1, 1))
            row[self.draw.randrange(row.numel())] = self.draw.choice((-1, 1))
        weight = weight.view(c_out, c_in // groups, size, size) * (4 if winograd else 1)
        scale = self.signs(c_out, 0.25) if winograd else self.maybe(self.signs(c_out))
        bias, last = self.maybe(self.integers(c_out)), self.draw.choice(_LAST)
        copies = name == "grouped" or (name == "direct" and self.draw.random() < 0.5)
        before = None
        if (winograd or copies) and self.draw.random() < 0.3:
            before = Preactivation(self.signs(c_in), self.integers(c_in), self.draw.random() < 0.5)
            value = self.finished(value, before.scale, before.shift, None, RELU if before.relu else None)
            before = before._replace(scale=before.scale.float(), shift=before.shift.float())
        made = F.conv2d(value, weight, stride=stride, padding=size // 2, groups=groups)
        pools = name == "direct" and copies and min(made.shape[2:]) > 1 and self.draw.random() < 0.4
        pool = self.draw.choice(POOLS) if pools else None
        residual = self.residual(inner, tuple(made.shape)) if pool is None else None
        made = self.finished(made, scale, bias, residual, last)
        packed = convolution.pack(name, weight.float())
        assert packed is not None
        shapes = Shapes(shape, tuple(weight.shape), normalize(stride, size // 2, 1, groups), copies, pool)
        bound = convolution.Bound(name, shapes, packed, _fp32(scale), _fp32(bias), self.threads)
        return (
            bound.kernel(last, before),
            residual,
            made if pool is None else _pooled(made, pool, False),
        )

    def finished(
        self,
        value: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: int | None,
        last: Activation | None,
    ) -> Tensor:
        value = value if scale is None else value * scale.view(-1, 1, 1)
        value = value if shift is None else value + shift.view(-1, 1, 1)
        value = value if residual is None else value + self.truth[residual]
        return activations.apply(last, value)


def _fp32(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float()


def _pooled(value: Tensor, pool: Pool, average: bool) -> Tensor:
    """The largest one, or the mean, of the pixels of each window that are inside the image."""
    top, bottom, left, right = pool.padding
    padded = F.pad(value, (left, right, top, bottom), value=0 if average else -math.inf)
    if not average:
        return F.max_pool2d(padded, pool.kernel, pool.stride)
    sums, counts = (
        F.avg_pool2d(F.pad(v, (left, right, top, bottom)), pool.kernel, pool.stride, divisor_override=1)
        for v in (value, torch.ones_like(value))
    )
    return sums / counts


def example(seed: int, threads: int = 3) -> Example:
    """Sections on ever more images, the last one on all; one to three results, which later layers may read.

    Args:
        seed: of everything.
        threads: for which kernels are cut into tasks.
    """
    maker = _Maker(seed, threads)
    parts = [images for images in (1, 2) if images < maker.n and maker.draw.random() < 0.6]
    layers = []
    for images in [*parts, maker.n]:
        layers += maker.section(images, maker.draw.randint(1, 7))
    written = sorted(maker.whole - {0})
    results = {*maker.draw.sample(written, min(len(written), maker.draw.randint(0, 2))), written[-1]}
    order = maker.draw.sample(sorted(results), len(results))
    truth = [maker.truth[number] for number in order]
    x = maker.truth[0].float().contiguous(memory_format=CHANNELS_LAST)
    return Example(layers, x, {number: tuple(maker.truth[number].shape) for number in order}, truth)


_GUARD, _MARK = 1024, 12345.0


def call(program: Program, x: Tensor, around: Callable[[int], Any] | None = None) -> list[Tensor]:
    """A call in memory of the very size that the program asks for, full of NaN, between values that have to stay."""
    memory = torch.full((program.floats + 2 * _GUARD,), math.nan)
    memory[:_GUARD] = memory[-_GUARD:] = _MARK
    results = program(x, memory[_GUARD:-_GUARD], around)
    assert (memory[:_GUARD] == _MARK).all() and (memory[-_GUARD:] == _MARK).all(), "it wrote beyond its memory"
    return results


def is_right(results: list[Tensor], example: Example) -> bool:
    """Whether results are equal to fp64's, rounded once, and channels_last."""
    return len(results) == len(example.truth) and all(
        torch.equal(result, truth.float()) and result.is_contiguous(memory_format=CHANNELS_LAST)
        for result, truth in zip(results, example.truth)
    )


def problems(program: Program) -> list[str]:
    """What is wrong with a plan: found from the places of the structures that C reads, and from nothing that planned them."""
    found = []
    sizes = [program.floats - program._workspace_at, math.prod(program.x_shape)]
    sizes += [math.prod(shape) for shape in program.results.values()]
    held = [[-1] * size for size in sizes]  # the layer that wrote each float last
    writers: dict[tuple[int, int], int] = {}  # of each image of a value
    touched: list[list[tuple[int, int, int, bool]]] = []  # by layer: base, begin, end, whether it writes
    for i, (layer, structure) in enumerate(zip(program.layers, program._layers)):
        kernel, parts = layer.kernel, []
        for place, part, (n, *image) in (
            (structure.x, layer.x, kernel.x_shape),
            (structure.residual, layer.residual, kernel.out_shape),
            (structure.y, layer.out, kernel.out_shape),
        ):
            if part is None:
                found += [f"layer {i} has a residual"] if place.base >= 0 else []
                continue
            size, begin, writes = math.prod(image), place.at, part is layer.out
            parts.append((place.base, begin, begin + n * size, writes))
            if not 0 <= begin <= begin + n * size <= sizes[place.base]:
                found.append(f"layer {i} leaves the memory")
            for k in range(n):
                floats = slice(begin + k * size, begin + (k + 1) * size)
                if writes:
                    writers[part.value, part.first + k] = i
                    held[place.base][floats] = [i] * size
                elif {*held[place.base][floats]} != {writers.get((part.value, part.first + k), -1)}:
                    found.append(f"layer {i} reads a value that was overwritten")
        for earlier, others in enumerate(touched):
            meet = any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] and (a[3] or b[3]) for a in parts for b in others)
            if meet and structure.needs <= earlier:
                found.append(f"layer {i} does not wait for layer {earlier}")
        read, written = parts[:-1], parts[-1]
        if any(a[0] == written[0] and a[1] < written[2] and written[1] < a[2] and a[1:3] != written[1:3] for a in read):
            found.append(f"layer {i} writes over a part of what it reads")
        if parts[0][0] == written[0] and parts[0][1:3] == written[1:3]:
            found.append(f"layer {i} writes over its x")
        if structure.needs > i:
            found.append(f"layer {i} waits for itself")
        touched.append(parts)
    return found
