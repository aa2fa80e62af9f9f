"""Our own fp32 convolutions on the CPU: relu(conv(act(x)) * scale + bias + residual).

    winograd   3x3 at stride 1 with 16 products for 2x2 outputs instead of 36 (winograd.h)
    direct     every other geometry without groups, as rows of pixels times panels of weights (direct.h); a 1x1 convolution is
               its simplest case, and a stem's max-pool can follow in the same pass

Cost of `direct`: 2 * pixels * C_in * kernel_h * kernel_w * C_out FLOPs, each of x, weight, residual and y from and to memory
once while they fit into the caches. `winograd` does 4/9 of the multiplications, and reads weights of 16/9 the size.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import Geometry
from . import library
from .library import Library, Missing

KERNELS = ("winograd", "direct")

_SIZES = (
    "batch", "c_in", "in_h", "in_w", "c_out", "out_h", "out_w",
    "kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "pad_top", "pad_left",
    "x_image", "x_channel", "x_row", "x_column",
    "block", "panels", "copies",
    "pool_h", "pool_w", "pool_kernel", "pool_stride", "pool_top", "pool_left",
    "relu", "pre_relu",
)  # fmt: skip
_POINTERS = ("x", "weight", "scale", "bias", "residual", "pre_scale", "pre_shift", "y")

# Plans kept: a net has some 25 layers that differ, times a few sizes of batch and image.
_CACHED = 4096
# The largest share of a thread over the mean that a plan may have.
_MOST_UNEVEN = 1.25
# Share of a task for which threads wait for the last one, on average.
_WAITING = 0.25
# Fewer channels than this are copied into runs of a kernel's row: a tap alone would be shorter than a loop's overhead.
_FEW_CHANNELS = 16


class _Convolution(ctypes.Structure):
    """convolution.h's structure of this name."""

    _fields_ = [(name, ctypes.c_int64) for name in _SIZES] + [(name, ctypes.c_void_p) for name in _POINTERS]


class Pool(NamedTuple):
    """A max-pool of square windows behind a convolution.

    Attributes:
        kernel: size of a window.
        stride: of both axes.
        padding: (top, bottom, left, right), in pixels.
    """

    kernel: int
    stride: int
    padding: tuple[int, int, int, int]

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns (h, w) of the pooled image."""
        top, bottom, left, right = self.padding
        return (
            (height + top + bottom - self.kernel) // self.stride + 1,
            (width + left + right - self.kernel) // self.stride + 1,
        )


class Activation(NamedTuple):
    """What is applied to x while it is read: relu(x * scale + shift).

    Attributes:
        scale, shift: (C_in,), fp32, contiguous.
        relu: False leaves the ReLU away.
    """

    scale: Tensor
    shift: Tensor
    relu: bool


class Shapes(NamedTuple):
    """A convolution without its tensors.

    Attributes:
        x: (N, C_in, H, W).
        weight: (C_out, C_in, kernel_h, kernel_w).
        geometry: of the convolution.
        copies: whether rows of x are copied before they are read: x is not channels_last, or is activated on the way to
            `direct`, or has few channels.
        pool: behind the convolution.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry
    copies: bool = False
    pool: Pool | None = None

    @property
    def out(self) -> tuple[int, int, int, int]:
        """The shape of the convolution's output, before a pool."""
        return self.geometry.out_shape(self.x, self.weight)


class Plan(NamedTuple):
    """How a convolution is cut into tasks.

    Attributes:
        block: pixels, Winograd's tiles, or rows of a task.
        panels: panels of output channels of a task.
        tasks: their number.
        cost: of the busiest thread, in steps of the micro-kernel: `rows` x `panel` products each.
        unevenness: the largest share of a thread over the mean.
    """

    block: int
    panels: int
    tasks: int
    cost: float
    unevenness: float


def library_or_none() -> Library | None:
    """Returns the compiled library; None if there is none that can run here."""
    found = library.find()
    return None if isinstance(found, Missing) else found


def why_not(name: str, shapes: Shapes, dtype: torch.dtype, threads: int) -> str | None:
    """Returns why a kernel can't run a convolution, as the end of a sentence; None if it can.

    Args:
        name: of `KERNELS`.
        shapes: of the convolution.
        dtype: of x.
        threads: that PyTorch's operations would use.
    """
    found = library.find()
    if isinstance(found, Missing):
        return f"needs our compiled CPU kernels: {found.reason}"
    if dtype != torch.float32:
        return f"runs float32, got {dtype}"
    stride, _, dilation, groups = shapes.geometry
    if groups != 1:
        return f"runs convolutions without groups, got groups={groups}"
    if min(*shapes.x, *shapes.weight, *shapes.out) < 1:
        return f"needs sizes of at least 1, got {shapes.x} and {shapes.weight}"
    if name == "winograd" and (shapes.weight[2:], stride, dilation) != ((3, 3), (1, 1), (1, 1)):
        return "runs 3x3 convolutions of stride and dilation 1"
    if name == "winograd" and (shapes.copies or shapes.pool):
        return "reads channels_last images, and has no pool behind it"
    if threads > 1 and found.parallel is None:
        return f"found no OpenMP runtime of PyTorch's to run {threads} threads on"
    plan = plan_for(name, shapes, threads)
    if plan.unevenness > _MOST_UNEVEN:
        return f"has too few tasks for {threads} threads: the busiest gets {plan.unevenness:.2f} times the mean"
    return None


@functools.lru_cache(_CACHED)
def plan_for(name: str, shapes: Shapes, threads: int) -> Plan:
    """Returns the tasks of a convolution: those whose busiest thread has the least to do."""
    found = library.find()
    assert isinstance(found, Library), "why_not has seen the library"
    panels = -(-shapes.weight[0] // found.panel)
    splits = sorted({min(panels, 2**i) for i in range(8)} | {panels})
    plans = []
    for block in _blocks(name, shapes, found.rows):
        for each in [panels] if shapes.pool else splits:
            cost, cost_of_all, tasks = _cost(name, shapes, found, block, each)
            share = cost * -(-tasks // threads)
            # A busy core holds the others up for a part of a task, so smaller ones are worth something.
            waiting = 0.0 if threads == 1 else _WAITING * cost
            plans.append(Plan(block, each, tasks, share + waiting, share * threads / cost_of_all))
    return min(plans, key=lambda plan: (plan.unevenness > _MOST_UNEVEN, plan.cost))


def _blocks(name: str, shapes: Shapes, rows: int) -> list[int]:
    """Sizes of a task, in its unit."""
    n, _, out_h, out_w = shapes.out
    if shapes.pool:
        return [*range(1, min(8, shapes.pool.out_size(out_h, out_w)[0]) + 1)]
    if shapes.copies:
        return [*range(1, min(16, out_h) + 1)]
    units = n * -(-out_h // 2) * -(-out_w // 2) if name == "winograd" else n * out_h * out_w
    sizes = [rows * i for i in ((1, 2, 4, 8, 16) if name == "winograd" else (1, 2, 4, 8, 16, 32))]
    # Few units are cut evenly: 49 pixels in two blocks are 25 and 24.
    even = [-(-units // parts) for parts in range(1, 9) if units // parts <= sizes[-1]]
    return sorted({min(size, units) for size in (*sizes, *even)})


# Costs in steps of the micro-kernel, measured on an AMD EPYC with AVX2 (two cores, 2026-11): a panel's weights on their way
# from the L2 cache or beyond, per k; a channel of a tile's transform; 16 outputs of a tile's transform back.
_WEIGHTS, _TRANSFORM_IN, _TRANSFORM_OUT = 0.6, 0.8, 10.0
# Weights larger than this come from memory each time: a step of theirs takes as long as so many of the micro-kernel's.
_LARGE_WEIGHT, _WEIGHTS_FROM_MEMORY = 2**22, 3.0


def _cost(name: str, shapes: Shapes, found: Library, block: int, panels: int) -> tuple[float, float, int]:
    """Returns the cost of a full task, that of all tasks, and their number."""
    n, c_out, out_h, out_w = shapes.out
    c_in, kernel_h, kernel_w = shapes.weight[1:]
    all_panels = -(-c_out // found.panel)
    across = -(-all_panels // panels)
    planes, units = 1, n * out_h * out_w
    depth = c_in * kernel_h * kernel_w
    if name == "winograd":
        planes, units, depth = 16, n * -(-out_h // 2) * -(-out_w // 2), c_in

    weights = _WEIGHTS
    if 4 * planes * depth * c_out > _LARGE_WEIGHT:
        weights = _WEIGHTS_FROM_MEMORY

    def task(size: int, columns: int) -> float:
        cost = planes * depth * columns * (-(-size // found.rows) + weights)
        if name == "winograd":
            return cost + size * c_in * _TRANSFORM_IN + size * columns * _TRANSFORM_OUT
        return cost + size * depth / 16

    if shapes.pool:
        height, _ = shapes.pool.out_size(out_h, out_w)
        rows = (block - 1) * shapes.pool.stride + shapes.pool.kernel
        tasks = n * -(-height // block)
        cost = task(min(rows, out_h) * out_w, all_panels)
        return cost, cost * n * height / block, tasks
    if shapes.copies:
        cost = task(block * out_w, panels)
        return cost, cost * n * out_h / block * all_panels / panels, n * -(-out_h // block) * across
    full, rest = divmod(units, block)
    of_all = sum(
        full * task(block, columns) + (task(rest, columns) if rest else 0)
        for columns in [panels] * (all_panels // panels) + ([all_panels % panels] if all_panels % panels else [])
    )
    return task(block, panels), of_all, (full + (rest > 0)) * across


def pack(name: str, weight: Tensor) -> Tensor | None:
    """Returns a copy of a weight in a kernel's order; None if the kernel can't take its values.

    Args:
        name: of `KERNELS`.
        weight: (C_out, C_in, kernel_h, kernel_w), fp32, on the CPU, any strides. Values that are not finite can't be taken,
            nor those whose transform overflows.
    """
    found = library.find()
    assert isinstance(found, Library), "why_not has seen the library"
    c_out, c_in, kernel_h, kernel_w = weight.shape
    planes = 16 if name == "winograd" else kernel_h * kernel_w
    packed = torch.empty(planes * -(-c_out // found.panel) * c_in * found.panel, dtype=torch.float32, device="cpu")
    four = ctypes.c_int64 * 4
    refused = found.calls.rk_pack(
        found.number, name == "winograd", weight.data_ptr(), four(*weight.shape), four(*weight.stride()),
        packed.data_ptr(), found.threads(), found.parallel,
    )  # fmt: skip
    return None if refused else packed


def unpack(name: str, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns the weight from a packed copy: the very values from `direct`'s, within rounding from `winograd`'s."""
    found = library.find()
    assert isinstance(found, Library), "why_not has seen the library"
    c_out, c_in, kernel_h, kernel_w = shape
    panels = -(-c_out // found.panel)
    if name == "direct":
        taps = packed.view(panels, kernel_h * kernel_w, c_in, found.panel).permute(0, 3, 2, 1)
        return taps.reshape(-1, c_in, kernel_h, kernel_w)[:c_out].contiguous()
    u = packed.view(4, 4, panels, c_in, found.panel)
    u = torch.stack((u[0], u[1] - u[2], u[3]))
    taps = torch.stack((u[:, 0], u[:, 1] - u[:, 2], u[:, 3]), 1)
    return taps.permute(2, 4, 3, 0, 1).reshape(-1, c_in, 3, 3)[:c_out].contiguous()


# Scratch memory of each calling thread, kept because fresh pages would have to be mapped in each call.
_scratch = threading.local()


def _scratch_of(elements: int) -> int:
    """Address of at least this many floats."""
    memory = getattr(_scratch, "memory", None)
    if memory is None or memory.numel() < elements:
        with torch.inference_mode(False):
            memory = _scratch.memory = torch.empty(elements, dtype=torch.float32, device="cpu")
    return memory.data_ptr()


class Bound:
    """A kernel for known shapes and packed weights, with all decided that can be.

    Args:
        name: of `KERNELS`; `why_not` has let it pass.
        shapes: of the convolution.
        packed: from `pack`.
        scale: (C_out,), fp32, contiguous; multiplies the convolution. None for ones.
        bias: as scale, added behind it; None for zeros.
        threads: that a call may use.
    """

    __slots__ = ("_arguments", "_convolve", "_keeps", "_out_shape", "_relu", "_scratch", "name", "packed", "shapes")

    def __init__(
        self,
        name: str,
        shapes: Shapes,
        packed: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        threads: int,
    ):
        found = library.find()
        assert isinstance(found, Library), "why_not has seen the library"
        plan = plan_for(name, shapes, threads)
        n, c_out, out_h, out_w = shapes.out
        sizes = dict(zip(_SIZES[:7], (n, shapes.x[1], *shapes.x[2:], c_out, out_h, out_w)))
        stride, padding, dilation, _ = shapes.geometry
        sizes |= dict(zip(_SIZES[7:15], (*shapes.weight[2:], *stride, *dilation, padding[0], padding[2])))
        sizes |= {"block": plan.block, "panels": plan.panels, "copies": shapes.copies}
        self._out_shape = (n, c_out, out_h, out_w)
        if (pool := shapes.pool) is not None:
            size = pool.out_size(out_h, out_w)
            sizes |= dict(zip(_SIZES[22:28], (*size, pool.kernel, pool.stride, pool.padding[0], pool.padding[2])))
            self._out_shape = (n, c_out, *size)
        vectors = {"scale": scale, "bias": bias}
        self.name, self.shapes, self.packed = name, shapes, packed
        self._keeps = (packed, *vectors.values())  # the addresses below are theirs
        self._arguments = _Convolution(
            **sizes, weight=packed.data_ptr(), **{k: v.data_ptr() for k, v in vectors.items() if v is not None}
        )
        winograd = name == "winograd"
        each = found.calls.rk_scratch(found.number, winograd, ctypes.byref(self._arguments))
        each = -(-each // 1024) * 1024  # two threads' memory shares no cache line, nor page
        self._scratch = each * threads
        self._convolve = functools.partial(_convolve, found, winograd, threads, each)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool = True,
        overwrite_residual: bool = False,
        activation: Activation | None = None,
    ) -> Tensor:
        """Returns relu(conv(act(x)) * scale + bias + residual), channels_last.

        Args:
            x: fp32, of the shape that it was made for; channels_last unless it copies.
            residual: the output's shape, channels_last; None for zeros.
            relu: False leaves the ReLU away.
            overwrite_residual: write the result over the residual.
            activation: what x goes through first; `direct` has to copy for that.
        """
        if torch.autograd._profiler_enabled():
            # An operation of its own: a record_function would be shown as a range around none.
            with torch._C._profiler._RecordFunctionFast(f"resnet_kernels::conv_bias_act.{self.name}"):
                return self._run(x, residual, relu, overwrite_residual, activation)
        return self._run(x, residual, relu, overwrite_residual, activation)

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        relu: bool,
        overwrite_residual: bool,
        activation: Activation | None,
    ) -> Tensor:
        y = residual if overwrite_residual else None
        if y is None:
            y = torch.empty(self._out_shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
        # A copy: other threads may be in a call of the same one.
        arguments = _Convolution.from_buffer_copy(self._arguments)
        arguments.x, arguments.y, arguments.relu = x.data_ptr(), y.data_ptr(), relu
        if residual is not None:
            arguments.residual = residual.data_ptr()
        if activation is not None:
            arguments.pre_scale, arguments.pre_shift = activation.scale.data_ptr(), activation.shift.data_ptr()
            arguments.pre_relu = activation.relu
        if arguments.copies:
            arguments.x_image, arguments.x_channel, arguments.x_row, arguments.x_column = x.stride()
        self._convolve(arguments, _scratch_of(self._scratch))
        return y


def _convolve(found: Library, winograd: bool, threads: int, each: int, arguments: _Convolution, scratch: int) -> None:
    found.calls.rk_convolve(
        found.number, winograd, ctypes.byref(arguments), threads, found.parallel, scratch, each
    )  # fmt: skip


def copies(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], channels_last: bool) -> bool:
    """Whether rows of x have to be copied for `direct`: it is not channels_last, or has few channels and several taps."""
    return not channels_last or (x_shape[1] < _FEW_CHANNELS and weight_shape[3] > 1)
