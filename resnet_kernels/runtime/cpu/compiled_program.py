"""Recipes on the CPU as one call into C: all blocks of a network, or one block, for one shape of its input.

Everything in a program runs on our own kernels (kernels/cpu/program.py). Where a step has none, blocks run one by one, and
the steps of that block, too (executor.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ...graph import fusible
from ...graph.recipe import CallStep, Recipe
from ...kernels.activations import RELU, Last, PReLU
from ...kernels.cpu import convolution, plans
from ...kernels.cpu.convolution import Kernel, Preactivation
from ...kernels.cpu.program import Layer, Memories, Program, Slice
from ...ops import tuned_table
from ...ops.layouts import is_channels_last
from .. import profiler_ranges
from ..parts import CallPart, ConvPart, NormPart, Part, last_of, pack_name, plain_setting
from . import neighbors
from .packed_conv import PackedConv
from .packed_linear import PackedLinear

if TYPE_CHECKING:
    from ..live_modules import LiveModules
    from .program import Copies


class Section(NamedTuple):
    """A recipe in a program. live: its modules. copies: of the module that it is of. path: of that module, for profilers."""

    recipe: Recipe
    live: LiveModules
    copies: Copies
    path: str


def _sources(sections: Sequence[Section]) -> list[tuple[LiveModules, object]]:
    """What programs rest on: replaced modules get other `LiveModules`, and packed weights another dict of programs."""
    return [(section.live, section.copies.programs) for section in sections]


class CompiledProgram:
    """Recipes as one program for inputs of one shape and layout.

    The packed weights and BNs must stand for their modules as they are now: whoever calls has checked that, and asks `is_of`.
    """

    def __init__(self, sections: Sequence[Section], x: Tensor, head: PackedLinear | None = None):
        # Before they are read.
        self._sources = _sources(sections)
        self._head = head
        self._program: Program | None = None
        self._contiguous = x.is_contiguous() and not is_channels_last(x)
        # Settings that no packed weight knows of.
        self._pools: list[tuple[nn.Module, list[Any]]] = []
        try:
            self._program = self._made(sections, tuple(x.shape))
        except _HasNoKernel:
            pass

    def _made(self, sections: Sequence[Section], x_shape: tuple[int, ...]) -> Program:
        whole = _Layers(x_shape, sections)
        self._pools = whole.pools
        parts, shape, begin = [], x_shape, 0
        for images, group in itertools.groupby(whole.slices()):
            end = begin + len([*group])
            parts.append(_Layers((images, *shape[1:]), sections[begin:end]))
            shape, begin = parts[-1].out_shape, end
        self._contiguous &= parts[0].can_read_contiguous()
        if self._contiguous:
            parts[0].read_contiguous()
        if self._head is not None:
            parts.append(_Layers((x_shape[0], *shape[1:]), [], self._head))
        numbers = itertools.count(1)
        layers: list[Layer] = []
        results: dict[int, tuple[int, ...]] = {}
        value = 0
        for part in parts:
            x, value = value, next(numbers)
            for start in range(0, x_shape[0], part.images):
                values = {0: Slice(x, start), part.result: Slice(value, start)}
                for layer in part.layers:
                    uses = {name: getattr(layer, name) for name in ("x", "residual", "gates", "out")}
                    for name, use in uses.items():
                        if use is not None and use.value not in values:
                            values[use.value] = Slice(next(numbers))
                        uses[name] = None if use is None else values[use.value]
                    layers.append(layer._replace(**uses))
                if part.average is not None:
                    results[values[part.average].value] = part.shape_of(part.average)
        results[value] = (x_shape[0], *parts[-1].out_shape[1:])
        return Program(layers, x_shape, results, torch.get_num_threads())

    @property
    def runs(self) -> bool:
        """Whether there is a program: each step has a kernel of ours, and each packed weight is there."""
        return self._program is not None

    def is_of(self, sections: Sequence[Section], head: PackedLinear | None) -> bool:
        """Whether it was made of these very modules and packed weights, and all pools are set as they were."""
        then = self._sources
        return (
            head is self._head
            and len(sections) == len(then)
            and all(a is c and b is d for (a, b), (c, d) in zip(_sources(sections), then))
            and all(_settings(child) == found for child, found in self._pools)
        )

    def __call__(self, x: Tensor, memories: Memories) -> list[Tensor]:
        """Returns the output, channels_last: memory of its own. Behind a head with a BN the averages come before it.

        Args:
            x: fp32, of the shape that it was made for, in any layout.
            memories: of the model.
        """
        with torch._C.DisableTorchFunction():
            x = x.detach().resolve_neg()
            if not (self._contiguous and x.is_contiguous()):
                x = x.contiguous(memory_format=torch.channels_last)
            assert self._program is not None
            around = self._range if torch.autograd._profiler_enabled() else None
            return self._program(x, memories.of(self._program.floats), around)

    def _range(self, number: int) -> AbstractContextManager[Any]:
        """What profilers show of a layer: a range with the step's path, and in it an operation."""
        assert self._program is not None
        layer = self._program.layers[number]
        stack = ExitStack()
        stack.enter_context(torch.autograd.profiler.record_function(profiler_ranges.PREFIX + layer.label))
        kind = layer.kernel.kind
        name = f"conv_bias_act.{kind}" if kind in plans.KERNELS else kind
        stack.enter_context(torch._C._profiler._RecordFunctionFast(f"resnet_kernels::{name}"))
        return stack


class _HasNoKernel(Exception):
    """A step has no kernel of ours."""


# Bytes of values that stay in the last-level cache while a block runs: an input, a result and what is between.
_CACHE = 2**23
# FLOPs in the time of a byte of weights from memory, and the share of the time that reading them again may take.
_FLOPS_A_BYTE, _READING = 10, 0.02


class _Layers:
    """Layers of recipes that run one after the other on some images.

    Attributes:
        layers: in order. pools: the pools and PReLUs among them, with what programs rest on of theirs.
        images: their number. result: the number of the output. average: that of a head's averages, if the forward gets them.
    """

    def __init__(self, x_shape: tuple[int, ...], sections: Sequence[Section], head: PackedLinear | None = None):
        self.layers: list[Layer] = []
        self.pools: list[tuple[nn.Module, list[Any]]] = []
        self.images, self.result = x_shape[0], 0
        self.average: int | None = None
        self._shapes = {0: x_shape}
        self._threads = torch.get_num_threads()
        # Of each section: how many layers there are at its end.
        self._ends: list[int] = []
        for section in sections:
            self._add(section)
            self._ends.append(len(self.layers))
        if head is not None:
            self._add_head(head)
        if self.result == 0:
            raise _HasNoKernel

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return self.shape_of(self.result)

    def shape_of(self, number: int) -> tuple[int, ...]:
        """The shape of a value."""
        return self._shapes[number]

    def can_read_contiguous(self) -> bool:
        """Whether all that read the input read it by its strides."""
        readers = [layer for layer in self.layers if layer.x.value == 0]
        is_added = any(layer.residual is not None and layer.residual.value == 0 for layer in self.layers)
        return not is_added and all(layer.kernel.copies for layer in readers)

    def read_contiguous(self) -> None:
        """Lets the input be contiguous instead of channels_last."""
        _, c, h, w = self._shapes[0]
        for i, layer in enumerate(self.layers):
            if layer.x.value == 0:
                arguments = convolution.Arguments.from_buffer_copy(layer.kernel.arguments)
                arguments.x_image, arguments.x_channel, arguments.x_row, arguments.x_column = c * h * w, h * w, w, 1
                self.layers[i] = layer._replace(kernel=layer.kernel._replace(arguments=arguments))

    def slices(self) -> list[int]:
        """Returns for each section on how many images at a time it should run.

        If all images went through each layer together, their values would fall out of the cache from one layer to the next.
        In turn the weights are read once for each slice.
        """
        found, begin = [], 0
        for end in self._ends:
            layers, begin = self.layers[begin:end], end
            largest = max((math.prod(layer.kernel.out_shape[1:]) for layer in layers), default=1)
            weights = sum(4 * kept.numel() for layer in layers for kept in layer.kernel.keeps if kept is not None)
            flops = sum(layer.kernel.flops for layer in layers) / self.images
            images = max(
                _CACHE // (3 * 4 * largest), math.ceil(weights * _FLOPS_A_BYTE / (_READING * max(flops, 1))), 1
            )
            found.append(next((n for n in range(images, self.images) if self.images % n == 0), self.images))
        return found

    def _add(self, section: Section) -> None:
        """Adds a recipe, on what the one before it made."""
        recipe, parts, packs = section.recipe, section.live.parts, section.copies.packs
        on_load, pools = neighbors.norms_on_load(parts, recipe.result), neighbors.pools_behind(parts, recipe.result)
        adds = neighbors.adds_behind(parts, recipe.result)
        numbers = {0: self.result}  # of the program's values, by the recipe's
        pending: dict[int, Preactivation] = {}  # by the recipe's number of what the BN makes
        for part in parts:
            label, first = f"{section.path}.{part.step}".lstrip("."), part.step.inputs[0]
            x, shape = numbers[first], self._shapes[numbers[first]]
            if isinstance(part, CallPart):
                if part.child is not None:
                    self.pools.append((part.child, _settings(part.child)))
                if part.step.out in numbers:
                    continue  # the step before it has pooled, or added
                if any(value in pending for value in part.step.inputs):
                    raise _HasNoKernel
                inputs = [numbers[value] for value in part.step.inputs]
                if part.child is None and part.step.what in convolution.GATES:
                    add, residual, label = self._add_behind(part, adds, numbers, label)
                    last = None if add is None else add.activation
                    kernel = convolution.gate(part.step.what, shape, last, self._threads)
                    numbers[part.step.out] = self._layer(kernel, x, residual, label, inputs[1])
                    continue
                called, x, residual = self._call(part, inputs)
                numbers[part.step.out] = x if called is None else self._layer(called, x, residual, label)
                continue
            residual = None if part.step.residual is None else numbers[part.step.residual]
            if isinstance(part, NormPart):
                preactivation = neighbors.preactivation_of(packs.get(pack_name(part)), part, shape[1])
                if preactivation is None:
                    raise _HasNoKernel
                readers = [
                    packs.get(pack_name(p)) for p in parts if isinstance(p, ConvPart) and p.step.x == part.step.out
                ]
                if part.step.out in on_load and all(_activates(reader, torch.Size(shape)) for reader in readers):
                    pending[part.step.out], numbers[part.step.out] = preactivation, x
                    continue
                kernel = convolution.elementwise(
                    shape, preactivation.scale, preactivation.shift, self._last(part, shape[1]), self._threads
                )
            else:
                pool = pools.get(part.step.out)
                kernel = self._convolution(
                    packs.get(pack_name(part)),
                    shape,
                    self._last(part, part.conv.weight.shape[0]),
                    pending.get(first),
                    pool,
                )
            add, other, label = self._add_behind(part, adds, numbers, label)
            if add is not None:
                kernel, residual = kernel.adding_last(), other
            numbers[part.step.out] = self._layer(kernel, x, residual, label)
            if isinstance(part, ConvPart) and kernel.arguments.pool_h:
                reader = next(p for p in parts if isinstance(p, CallPart) and p.step.inputs[0] == part.step.out)
                numbers[reader.step.out] = numbers[part.step.out]
        if recipe.result in pending:
            raise _HasNoKernel
        self.result = numbers[recipe.result]

    def _add_head(self, linear: PackedLinear) -> None:
        value, shape = self.result, self.out_shape
        if linear.norm is not None:
            norm = linear.norm.preactivation
            if norm is None or len(norm.scale) != shape[1]:
                raise _HasNoKernel
            kernel = convolution.elementwise(shape, norm.scale, norm.shift, RELU, self._threads)
            value = self._layer(kernel, value, None, linear.pool_path)
        pooled = self._layer(convolution.global_average(shape, self._threads), value, None, linear.pool_path)
        if linear.norm is not None:
            self.average = pooled
        bound = linear.bound(*self._shapes[pooled][:2])
        if bound is None:
            raise _HasNoKernel
        self.result = self._layer(bound.kernel(None), pooled, None, linear.path)

    def _add_behind(
        self, part: Part, adds: dict[int, CallPart], numbers: dict[int, int], label: str
    ) -> tuple[CallStep | None, int | None, str]:
        """The add that joins the layer of a part, which is made next; the number of what it adds; and their label."""
        found = adds.get(part.step.out)
        if found is None:
            return None, None, label
        (other,) = (value for value in found.step.inputs if value != part.step.out)
        numbers[found.step.out] = len(self._shapes)
        return found.step, numbers[other], f"{label}+{found.step.what}"

    def _last(self, part: ConvPart | NormPart, channels: int) -> Last:
        """What a part ends in."""
        if part.prelu is None:
            return last_of(part)
        self.pools.append((part.prelu, _settings(part.prelu)))
        return _prelu(part.prelu, channels)

    def _layer(self, kernel: Kernel, x: int, residual: int | None, label: str, gates: int | None = None) -> int:
        """Adds a layer; returns the number of its output."""
        if residual is not None and self._shapes[residual] != kernel.out_shape:
            raise _HasNoKernel  # it broadcasts
        if gates is not None and self._shapes[gates] != kernel.gates_shape:
            raise _HasNoKernel
        out = len(self._shapes)
        self._shapes[out] = kernel.out_shape
        added, factors = (None if number is None else Slice(number) for number in (residual, gates))
        self.layers.append(Layer(kernel, Slice(x), added, Slice(out), label, factors))
        return out

    def _convolution(
        self,
        pack: Any,
        shape: tuple[int, ...],
        activation: Last,
        preactivation: Preactivation | None,
        pool: nn.MaxPool2d | None,
    ) -> Kernel:
        size = torch.Size(shape)
        if not _runs_ours(pack, size):
            raise _HasNoKernel
        bound = pack.own(size)
        if preactivation is not None:
            bound = pack.activated(size)
        elif pool is not None:
            bound = neighbors.pooled(pack, pool, size) or bound
        kernel: Kernel = bound.kernel(activation, preactivation)
        return kernel

    def _call(self, part: CallPart, inputs: list[int]) -> tuple[Kernel | None, int, int | None]:
        """The kernel of an add, an activation or a pool, what it reads, its residual; no kernel for an identity."""
        x, other = inputs[0], inputs[1] if len(inputs) > 1 else None
        shape, child, what = self._shapes[x], part.child, part.step.what
        if what == "mean" if child is None else fusible.is_global_average(child):
            return convolution.global_average(shape, self._threads), x, None
        if child is None:
            return convolution.elementwise(shape, None, None, part.step.activation, self._threads), x, other
        if type(child) is nn.Identity:
            return None, x, None
        if fusible.is_prelu(child):
            return convolution.elementwise(shape, None, None, _prelu(child, shape[1]), self._threads), x, None
        kind, pool = _pool(child, shape[2:])
        return convolution.pooling(kind, shape, pool, self._threads), x, None


def _prelu(child: nn.Module, channels: int) -> PReLU:
    """A PReLU whose slopes a program reads where they are."""
    slopes = neighbors.slopes_of(child, channels)
    if slopes is None:
        raise _HasNoKernel
    return PReLU(slopes)


def _runs_ours(pack: Any, size: torch.Size) -> bool:
    """Whether a packed convolution runs images of this shape on a kernel of ours."""
    return (
        isinstance(pack, PackedConv)
        and pack.dtype == torch.float32
        and pack.channels == size[1]
        and pack.at(size) is not None
        and pack.own(size) is not None
    )


def _activates(pack: Any, size: torch.Size) -> bool:
    """Whether that kernel can activate the images on the way in."""
    return _runs_ours(pack, size) and pack.activated(size) is not None


def _pool(child: nn.Module, size: Sequence[int]) -> tuple[str, plans.Pool]:
    """The kind and the window of a pool on images of this (h, w)."""
    if isinstance(child, nn.MaxPool2d) and (pool := neighbors.pool_of(child, size)) is not None:
        return "max_pool", pool
    if type(child) is nn.AvgPool2d and (pool := _average(child, size)) is not None:
        return "average_pool", pool
    raise _HasNoKernel


def _average(child: nn.AvgPool2d, size: Sequence[int]) -> plans.Pool | None:
    """An average pool on images of this (h, w) as our kernels take it; None for windows that they don't."""
    kernel, stride, padding = map(plain_setting, (child.kernel_size, child.stride, child.padding))
    if type(kernel) is not int or type(stride) is not int or padding != 0 or child.divisor_override is not None:
        return None
    if min(kernel, stride) < 1 or min(size) < kernel:
        return None
    beyond = []  # how far the last window reaches over the edge: what lies there doesn't count
    for extent in size:
        number = -(-(extent - kernel) // stride) if child.ceil_mode else (extent - kernel) // stride
        number -= number * stride >= extent  # it has to begin inside
        beyond.append(max(0, number * stride + kernel - extent))
    return plans.Pool(kernel, stride, (0, beyond[0], 0, beyond[1]))


# What a pool's result depends on.
_POOL_SETTINGS = (
    "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices", "count_include_pad", "divisor_override",
    "output_size",
)  # fmt: skip


def _settings(child: nn.Module) -> list[Any]:
    if fusible.is_prelu(child):
        slopes = child._parameters.get("weight")
        return [] if slopes is None else _as_read(slopes)
    return [plain_setting(child.__dict__.get(name)) for name in _POOL_SETTINGS]


def _as_read(slopes: Tensor) -> list[Any]:
    """Where a PReLU's slopes are: kernels read them there, but one for all channels is a part of the kernel."""
    value = slopes.item() if slopes.numel() == 1 and slopes.device.type == "cpu" else None
    return [type(slopes), slopes.shape, slopes.dtype, slopes.data_ptr(), slopes.is_contiguous(), slopes.is_neg(), value]


# Shapes of a chain's input for which programs are kept.
MOST_SHAPES = 4


def key_of(name: Hashable, x: Tensor) -> tuple[Any, ...]:
    """By what a program is kept: its name, and all that its kernels were chosen by."""
    layout = x.is_contiguous() and not is_channels_last(x)
    return name, x.shape, layout, torch.get_num_threads(), tuned_table.generation()


def find(
    programs: dict[Any, CompiledProgram],
    name: Hashable,
    x: Tensor,
    sections: Sequence[Section],
    head: PackedLinear | None = None,
) -> CompiledProgram | None:
    """The program of sections for x, made now if it is not among those that are kept; None if there can be none.

    Args:
        programs: those that are kept, the least recently used one first.
        name: of the sections among them.
        x: the input.
        sections: whose packed weights stand for their modules as they are now.
        head: the packed linear layer behind them, after a global average; None for none.
    """
    key = key_of(name, x)
    program = programs.get(key)
    if program is None or not program.is_of(sections, head):
        program = CompiledProgram(sections, x, head)
        own = [kept for kept in [*programs] if kept[0] == name and kept != key]
        for kept in own[: max(0, len(own) + 1 - MOST_SHAPES)]:
            programs.pop(kept, None)
    programs.pop(key, None)
    programs[key] = program  # the last one is the most recent
    return program if program.runs else None
