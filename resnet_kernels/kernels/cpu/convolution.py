"""Our own fp32 convolutions on the CPU: act(conv(pre(x)) * scale + bias + residual).

    winograd   3x3 at stride 1 with 16 products for 2x2 outputs instead of 36 (winograd.h)
    grouped    groups of as many input channels as output channels, whose rows are copied first (grouped.h)
    depthwise  groups of one channel, which are read where they lie (depthwise.h)
    direct     every other geometry without groups, as rows of pixels times panels of weights (direct.h); a 1x1 convolution is
               its simplest case, and a stem's max-pool can follow in the same pass

Cost of `direct`: 2 * pixels * C_in * kernel_h * kernel_w * C_out FLOPs, each of x, weight, residual and y from and to memory
once while they fit into the caches. `winograd` does 4/9 of the multiplications, and reads weights of 16/9 the size. For
`grouped` C_in is a group's; it writes and reads a copy of x, which stays in the L1 or L2 cache.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import KINDS as KINDS_OF_ACTIVATIONS
from ..activations import RELU, Last, as_arguments, slopes_of
from . import large_pages, library
from .library import Library
from .plans import Pool, Shapes, plan_for

_SIZES = (
    "batch", "c_in", "in_h", "in_w", "c_out", "out_h", "out_w",
    "kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "pad_top", "pad_left",
    "x_image", "x_channel", "x_row", "x_column",
    "block", "panels", "copies",
    "pool_h", "pool_w", "pool_kernel", "pool_stride", "pool_top", "pool_left",
    "activation", "pre_relu", "adds_last",
    "groups", "gate",
)  # fmt: skip
# convolution.h's kinds of layers, by number.
KINDS = ("direct", "winograd", "grouped", "depthwise", "elementwise", "gate", "max_pool", "average_pool")
_POINTERS = ("x", "weight", "scale", "bias", "residual", "pre_scale", "pre_shift", "slopes", "gates", "y")

# convolution.h's number of nn.PReLU.
_PRELU = 3 + len(KINDS_OF_ACTIVATIONS)
# Prepared calls that are kept.
_CACHED = 4096


class Arguments(ctypes.Structure):
    """convolution.h's structure Convolution."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        ("slope", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]

    def activate(self, activation: Last) -> Tensor | None:
        """Sets what comes last, behind `c_out` channels.

        Returns:
            What has to live as long as the arguments: a PReLU's slopes, which each call reads as they are then. One finite
            slope for all channels becomes a part of the arguments.
        """
        slopes = slopes_of(activation)
        if slopes is None:
            kind, self.slope = as_arguments(activation)
            self.activation = 0 if kind is None else 1 + KINDS_OF_ACTIVATIONS.index(kind)
            return None
        slopes = slopes.detach().resolve_neg()
        if slopes.numel() == 1 and slopes.isfinite():
            self.activation, self.slope = 1 + KINDS_OF_ACTIVATIONS.index("leaky_relu"), slopes.item()
            return None
        slopes = slopes if slopes.numel() != 1 else slopes.expand(self.c_out)
        slopes = slopes.contiguous()
        _check("slopes", slopes, (self.c_out,))
        self.activation, self.slopes = _PRELU, slopes.data_ptr()
        return slopes


class Kernel(NamedTuple):
    """A kernel of a program, with all decided but where x, residual and the result are.

    Attributes:
        kind: of `KINDS`.
        arguments: as C reads them.
        x_shape, out_shape: (N, C, H, W).
        scratch: floats of scratch memory that a thread needs.
        tasks: their number.
        keeps: tensors whose addresses are among the arguments.
        copies: whether it reads x by its strides.
        gates_shape: of its gates; None for other kernels than `gate`'s.
    """

    kind: str
    arguments: Arguments
    x_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    scratch: int
    tasks: int
    keeps: tuple[Tensor | None, ...] = ()
    copies: bool = False
    gates_shape: tuple[int, ...] | None = None

    def adding_last(self) -> Kernel:
        """Returns it with the residual behind the activation: act(conv(x) * scale + bias) + residual, in memory of its own."""
        arguments = Arguments.from_buffer_copy(self.arguments)
        arguments.adds_last = 1
        return self._replace(arguments=arguments)

    @property
    def flops(self) -> int:
        """A convolution's FLOPs, as if it were direct; few for other kernels."""
        sizes = self.arguments
        pixels = sizes.batch * sizes.out_h * sizes.out_w
        return int(2 * pixels * sizes.c_out * (sizes.c_in // max(1, sizes.groups)) * sizes.kernel_h * sizes.kernel_w)


class Preactivation(NamedTuple):
    """A BN before a convolution, which is applied to x while it is read: relu(x * scale + shift).

    Attributes:
        scale, shift: (C_in,), fp32, contiguous.
        relu: False leaves the ReLU away.
    """

    scale: Tensor
    shift: Tensor
    relu: bool


def weight_elements(name: str, shape: tuple[int, ...], panel: int) -> int:
    """Returns the number of elements of a packed weight, whose last panel is full."""
    c_out, c_in, kernel_h, kernel_w = shape
    return (16 if name == "winograd" else kernel_h * kernel_w) * -(-c_out // panel) * panel * c_in


def pack(name: str, weight: Tensor, for_gradient: bool = False, is_kept: bool = False) -> Tensor | None:
    """Returns a copy of a weight in a kernel's order; None if the kernel can't take its values.

    Args:
        name: of `plans.KERNELS`.
        weight: (C_out, C_in / groups, kernel_h, kernel_w), fp32, on the CPU, any strides. Values that are not finite can't
            be taken, nor those whose transform overflows.
        for_gradient: packs the weight of the convolution that computes x's gradient from y's at stride 1: rotated by 180
            degrees, with C_out and C_in exchanged.
        is_kept: whether many calls will read the copy: then it lies in large pages.
    """
    found = library.find()
    assert isinstance(found, Library), "why_not has seen the library"
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(
            f"weight must be float32 on the CPU, 4-D and not empty, got {weight.dtype} {tuple(weight.shape)}"
        )
    if name == "depthwise" and weight.shape[1] != 1:
        raise ValueError(f"the weight of groups of one channel must have one input channel, got {tuple(weight.shape)}")
    weight, four = weight.resolve_neg(), ctypes.c_int64 * 4
    shape, strides, first = tuple(weight.shape), weight.stride(), weight.data_ptr()
    if for_gradient:
        # A rotation is a walk backwards from the last tap.
        first += weight.itemsize * sum((size - 1) * step for size, step in zip(shape[2:], strides[2:]))
        shape, strides = (shape[1], shape[0], *shape[2:]), (strides[1], strides[0], -strides[2], -strides[3])
    elements = weight_elements(name, shape, found.panel)
    if is_kept:
        packed = large_pages.shared(elements)
    else:
        with torch._C.DisableTorchFunction():
            packed = torch.empty(elements, dtype=torch.float32, device="cpu")
    refused = found.calls.rk_pack(
        found.number, KINDS.index(name), first, four(*shape), four(*strides), packed.data_ptr(), found.threads(),
        found.parallel,
    )  # fmt: skip
    return None if refused else packed


def unpack(name: str, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns the weight from a packed copy: the very values, but within rounding from `winograd`'s."""
    found = library.find()
    assert isinstance(found, Library), "why_not has seen the library"
    c_out, c_in, kernel_h, kernel_w = shape
    panels = -(-c_out // found.panel)
    if name == "grouped" and c_in < found.panel // 2:
        # Output channel o of a group has its weight of input channel k in row o ^ k, lane k (narrow_groups.h).
        lanes = torch.arange(found.panel)[:, None]
        k = torch.arange(c_in)
        taps = packed.view(panels, -1, c_in, found.panel)[:, :, lanes % c_in ^ k, lanes - lanes % c_in + k]
        return taps.permute(0, 2, 3, 1).reshape(-1, c_in, kernel_h, kernel_w)[:c_out].contiguous()
    if name == "depthwise":
        return packed.view(kernel_h * kernel_w, -1).t().reshape(-1, 1, kernel_h, kernel_w)[:c_out].contiguous()
    if name != "winograd":
        taps = packed.view(panels, kernel_h * kernel_w, c_in, found.panel).permute(0, 3, 2, 1)
        return taps.reshape(-1, c_in, kernel_h, kernel_w)[:c_out].contiguous()
    u = packed.view(4, 4, panels, c_in, found.panel)
    u = torch.stack((u[0], u[1] - u[2], u[3]))
    taps = torch.stack((u[:, 0], u[:, 1] - u[:, 2], u[:, 3]), 1)
    return taps.permute(2, 4, 3, 0, 1).reshape(-1, c_in, 3, 3)[:c_out].contiguous()


# Scratch memory of each calling thread, kept because fresh pages would have to be mapped in each call; up to 64 MB.
_scratch = threading.local()
_MOST_KEPT = 2**24


def _scratch_of(elements: int) -> Tensor:
    """Memory of at least this many floats."""
    kept: Tensor | None = getattr(_scratch, "kept", None)
    if kept is None or kept.numel() < elements:
        kept = large_pages.own(elements)
        if elements <= _MOST_KEPT:
            _scratch.kept = kept
    return kept


@functools.lru_cache(_CACHED)
def _sized(name: str, shapes: Shapes, threads: int) -> tuple[Library, Kernel]:
    """Returns the library, and a convolution's kernel without the addresses of its weights."""
    plan = plan_for(name, shapes, threads)
    n, c_out, out_h, out_w = shapes.out
    sizes = dict(zip(_SIZES, (n, shapes.x[1], *shapes.x[2:], c_out, out_h, out_w)))
    stride, padding, dilation, groups = shapes.geometry
    sizes |= dict(zip(_SIZES[7:15], (*shapes.weight[2:], *stride, *dilation, padding[0], padding[2])))
    sizes |= {"block": plan.block, "panels": plan.panels, "copies": shapes.copies, "groups": groups}
    out_shape = (n, c_out, out_h, out_w)
    if (pool := shapes.pool) is not None:
        size = pool.out_size(out_h, out_w)
        sizes |= _pool_sizes(pool, size)
        out_shape = (n, c_out, *size)
    return _kernel(name, Arguments(**sizes), shapes.x, out_shape, shapes.copies)


def _pool_sizes(pool: Pool, size: tuple[int, int]) -> dict[str, int]:
    return dict(zip(_SIZES[22:28], (*size, pool.kernel, pool.stride, pool.padding[0], pool.padding[2])))


def _kernel(
    kind: str, arguments: Arguments, x_shape: tuple[int, ...], out_shape: tuple[int, ...], copies: bool = False
) -> tuple[Library, Kernel]:
    found = library.find()
    assert isinstance(found, Library), "why_not has seen the library"
    scratch, tasks = (
        call(found.number, KINDS.index(kind), ctypes.byref(arguments))
        for call in (found.calls.rk_scratch, found.calls.rk_tasks)
    )
    # Two threads' memory shares no page.
    return found, Kernel(kind, arguments, x_shape, out_shape, -(-scratch // 1024) * 1024, tasks, copies=copies)


# Tasks of a thread, at least, where a layer is a pass over memory; and floats of a task, at most.
_TASKS, _MOST_FLOATS = 4, 2**14


def elementwise(
    x_shape: tuple[int, ...], scale: Tensor | None, shift: Tensor | None, activation: Last, threads: int
) -> Kernel:
    """Returns the kernel of act(x * scale + shift + residual), on channels_last images.

    Args:
        x_shape: (N, C, H, W), not empty.
        scale: (C,), fp32, contiguous; None for ones.
        shift: as scale; None for zeros.
        activation: comes last; None for none.
        threads: that a call may use.
    """
    n, channels, height, width = x_shape
    pixels = n * height * width
    block = max(1, min(_MOST_FLOATS // channels, pixels // (_TASKS * threads)))
    arguments = Arguments(batch=n, c_in=channels, c_out=channels, out_h=height, out_w=width, block=block)
    slopes = arguments.activate(activation)
    for name, vector in (("scale", scale), ("bias", shift)):
        if vector is not None:
            _check(name, vector, (channels,))
            setattr(arguments, name, vector.data_ptr())
    return _kernel("elementwise", arguments, x_shape, x_shape)[1]._replace(keeps=(scale, shift, slopes))


def pooling(kind: str, x_shape: tuple[int, ...], pool: Pool, threads: int) -> Kernel:
    """Returns the kernel of a max_pool, or of an average_pool over the pixels inside the image, on channels_last images.

    Args:
        kind: "max_pool" or "average_pool".
        x_shape: (N, C, H, W), not empty.
        pool: none of its windows lies in the padding alone.
        threads: that a call may use.
    """
    n, channels, height, width = x_shape
    size = pool.out_size(height, width)
    block = max(1, min(size[0], n * size[0] // (_TASKS * threads)))
    arguments = Arguments(
        batch=n, c_in=channels, in_h=height, in_w=width, c_out=channels, block=block, **_pool_sizes(pool, size)
    )
    return _kernel(kind, arguments, x_shape, (n, channels, *size))[1]


# By name, what gates may be made of, as convolution.h's activations.
GATES = {"mul": 0, "sigmoid_mul": 1 + len(KINDS_OF_ACTIVATIONS), "hardsigmoid_mul": 2 + len(KINDS_OF_ACTIVATIONS)}


def gate(name: str, x_shape: tuple[int, ...], activation: Last, threads: int) -> Kernel:
    """Returns the kernel of squeeze-and-excitation's end on channels_last images, act(x * g(gates) + residual).

    Args:
        name: of `GATES`, says what g is: nothing, a sigmoid, or its piecewise linear form.
        x_shape: (N, C, H, W), not empty. That of the gates is (N, C, 1, 1).
        activation: comes last; None for none.
        threads: that a call may use.
    """
    n, channels, height, width = x_shape
    block = max(1, min(_MOST_FLOATS // channels, n * height * width // (_TASKS * threads), height * width))
    arguments = Arguments(batch=n, c_in=channels, c_out=channels, out_h=height, out_w=width, block=block)
    arguments.gate = GATES[name]
    slopes = arguments.activate(activation)
    return _kernel("gate", arguments, x_shape, x_shape)[1]._replace(keeps=(slopes,), gates_shape=(n, channels, 1, 1))


def global_average(x_shape: tuple[int, ...], threads: int) -> Kernel:
    """Returns the kernel of the mean over an image's pixels: (N, C, H, W) -> (N, C, 1, 1), on channels_last images.

    Args:
        x_shape: not empty.
        threads: that a call may use.
    """
    n, channels, height, width = x_shape
    found = library.find()
    assert isinstance(found, Library), "there are kernels"
    panels = -(-channels // found.panel)
    each = max(1, panels * n // (_TASKS * threads))
    arguments = Arguments(
        batch=n, c_in=channels, in_h=height, in_w=width, c_out=channels, block=1, panels=min(each, panels),
        pool_h=1, pool_w=1, pool_kernel=max(height, width), pool_stride=1,
    )  # fmt: skip
    return _kernel("average_pool", arguments, x_shape, (n, channels, 1, 1))[1]


class Bound:
    """A kernel for known shapes and packed weights, with all decided that can be.

    Args:
        name: of `plans.KERNELS`; `plans.why_not` has let it pass.
        shapes: of the convolution.
        packed: from `pack`.
        scale: (C_out,), fp32, contiguous; multiplies the convolution. None for ones.
        bias: as scale, added behind it; None for zeros.
        threads: that a call may use.
    """

    __slots__ = ("_arguments", "_convolve", "_kernel", "_out_shape", "_scratch", "name", "packed", "shapes")

    def __init__(
        self,
        name: str,
        shapes: Shapes,
        packed: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        threads: int,
    ):
        found, kernel = _sized(name, shapes, threads)
        _check("packed", packed, (weight_elements(name, shapes.weight, found.panel),))
        for what, vector in (("scale", scale), ("bias", bias)):
            if vector is not None:
                _check(what, vector, shapes.weight[:1])
        self.name, self.shapes, self.packed = name, shapes, packed
        self._arguments = Arguments.from_buffer_copy(kernel.arguments)
        self._arguments.weight = packed.data_ptr()
        if scale is not None:
            self._arguments.scale = scale.data_ptr()
        if bias is not None:
            self._arguments.bias = bias.data_ptr()
        self._kernel = kernel._replace(keeps=(packed, scale, bias))  # the addresses above are theirs
        self._out_shape = kernel.out_shape
        self._scratch = kernel.scratch * threads
        self._convolve = functools.partial(_convolve, found, KINDS.index(name), threads, kernel.scratch)

    def kernel(self, activation: Last, preactivation: Preactivation | None = None) -> Kernel:
        """Returns it as a kernel of a program, for a channels_last x.

        Args:
            activation: comes last; None for none.
            preactivation: what x goes through first; `direct` has to copy for that, and `depthwise` never does.
        """
        arguments, slopes = self._with(activation, preactivation)
        if arguments.copies:
            _, c, h, w = self.shapes.x
            arguments.x_image, arguments.x_channel, arguments.x_row, arguments.x_column = c * h * w, 1, w * c, c
        keeps = (*self._kernel.keeps, slopes)
        if preactivation is not None:
            keeps = (*keeps, preactivation.scale, preactivation.shift)
        return self._kernel._replace(arguments=arguments, keeps=keeps)

    def _with(self, activation: Last, preactivation: Preactivation | None) -> tuple[Arguments, Tensor | None]:
        """A copy of the arguments, as other threads may be in a call of the same ones; and what `activate` returns."""
        arguments = Arguments.from_buffer_copy(self._arguments)
        slopes = arguments.activate(activation)
        if preactivation is not None:
            if self.name == "depthwise" or (self.name == "direct" and not self.shapes.copies):
                raise ValueError(f"{self.name} activates x only where it copies rows")
            scale, shift, relu = preactivation
            for what, vector in (("preactivation.scale", scale), ("preactivation.shift", shift)):
                _check(what, vector, self.shapes.x[1:2])
            arguments.pre_scale, arguments.pre_shift = scale.data_ptr(), shift.data_ptr()
            arguments.pre_relu = relu
        return arguments, slopes

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        activation: Last = RELU,
        overwrite_residual: bool = False,
        preactivation: Preactivation | None = None,
    ) -> Tensor:
        """Returns act(conv(pre(x)) * scale + bias + residual), channels_last.

        Args:
            x: fp32, of the shape that it was made for; channels_last unless it copies.
            residual: the output's shape, channels_last; None for zeros.
            activation: comes last; None for none.
            overwrite_residual: write the result over the residual.
            preactivation: what x goes through first; `direct` has to copy for that, and `depthwise` never does.

        Raises:
            ValueError: a tensor has another shape, dtype or device than it was made for.
        """
        # A user's function mode sees operations, and what is called here is a part of one.
        with torch._C.DisableTorchFunction():
            if torch.autograd._profiler_enabled():
                # An operation of its own: a record_function would be shown as a range around none.
                with torch._C._profiler._RecordFunctionFast(f"resnet_kernels::conv_bias_act.{self.name}"):
                    return self._run(x, residual, activation, overwrite_residual, preactivation)
            return self._run(x, residual, activation, overwrite_residual, preactivation)

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        activation: Last,
        overwrite_residual: bool,
        preactivation: Preactivation | None,
    ) -> Tensor:
        # Native code believes what it is told, so each size and layout is checked here. It knows no lazy negation either.
        x = x.resolve_neg()
        _check("x", x, self.shapes.x, None if self.shapes.copies else torch.channels_last)
        y = None
        if residual is not None:
            if residual.is_neg():
                residual, overwrite_residual = residual.resolve_neg(), False
            if not residual.is_contiguous(memory_format=torch.channels_last):
                residual, overwrite_residual = residual.contiguous(memory_format=torch.channels_last), False
            _check("residual", residual, self._out_shape, torch.channels_last)
            if self.shapes.pool is not None:
                raise ValueError("there is no residual where a pool follows")
            y = residual if overwrite_residual else None
        if y is None:
            y = torch.empty(self._out_shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
        # `_kept` has to live until the call is over.
        arguments, _kept = self._with(activation, preactivation)
        arguments.x, arguments.y = x.data_ptr(), y.data_ptr()
        if residual is not None:
            arguments.residual = residual.data_ptr()
        if arguments.copies:
            arguments.x_image, arguments.x_channel, arguments.x_row, arguments.x_column = x.stride()
        scratch = _scratch_of(self._scratch)
        self._convolve(arguments, scratch.data_ptr())
        return y


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], layout: torch.memory_format | None = torch.contiguous_format
) -> None:
    if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be float32 of shape {tuple(shape)} on the CPU, got {tensor.dtype} of {tuple(tensor.shape)} on "
            f"{tensor.device}"
        )
    if layout is not None and not tensor.is_contiguous(memory_format=layout):
        raise ValueError(f"{name} must be dense in {layout}, got strides {tensor.stride()}")


def _convolve(found: Library, kind: int, threads: int, each: int, arguments: Arguments, scratch: int) -> None:
    found.calls.rk_convolve(
        found.number, kind, ctypes.byref(arguments), threads, found.parallel, scratch, each
    )  # fmt: skip
