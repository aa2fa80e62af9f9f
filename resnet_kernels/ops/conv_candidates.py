"""Every way to run a convolution, by name. Only this module picks a kernel: an op asks it, and it calls a launcher.

cudnn                     one fused operation of cuDNN where there is a ReLU and no scale; plans multiply scales into weights
cudnn+epilogue            cuDNN's convolution, then one pass for all that follows it; no weight is folded
cpu, eager                on the CPU one of the next five; plain PyTorch
winograd, direct, grouped, depthwise, onednn    our own CPU kernels and oneDNN's fused operation (cpu_candidates.py)
triton                    a kernel of ours with a tile that it chooses itself: Hopper's where that takes the convolution, else
                          the portable one. No table holds this name
pointer 128x64x64 w4 s3   a tile of kernels/conv_bias_act.py: pixels x output channels x step, warps, stages
tma 128x64x64 w4 s4 p2    a tile of kernels/sm90/conv.py, with the parts of its epilogue; on data-center Blackwell, too
shared 128x64x32 w4 s2 p4 a tile of kernels/sm90/tap_sharing.py
specialized 128x128 c2 s4 b2    a tile of kernels/sm90/specialized_conv.py, with its consumers, stages and buffers

Tables hold these names, and `tune` times the candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import limits, target
from ..kernels.activations import RELU, Activation
from ..kernels.geometry import Geometry
from ..kernels.operands import ConvOperands
from . import backends, cpu_candidates, cudnn, onednn, reference, tuned_table
from .conv_problem import ConvProblem

# Answers kept of what Hopper's kernel takes: a net has some 25 layers that differ, times a few batch and image sizes.
_CACHED = 512


# Candidates that need the scale in the weight.
FOLDING = ("cudnn",)
# The candidate that runs without a table where a ReLU follows and there is no scale, or the weight has it. "cudnn+epilogue" in
# this place turns cuDNN's fused operations off wherever no table names them.
FUSED = "cudnn"


def untuned(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> str:
    """Returns the name of the candidate that runs without a table; folded weights are a problem without a scale."""
    name = backends.untuned(device, dtype)
    if name != "cudnn":
        return name
    return (
        FUSED
        if problem.activation == RELU and not problem.scale and not is_slow_when_fused(problem)
        else "cudnn+epilogue"
    )


def is_slow_when_fused(problem: ConvProblem) -> bool:
    """Whether cuDNN's fused operation is out of the question: 17x slower for a channels_last 7x7 stem (pytorch#68506)."""
    return problem.c_in < 8 and max(problem.weight_shape[2:]) > 3


def folds(dtype: torch.dtype) -> bool:
    """Whether a scale may go into a weight of a dtype. fp16 has too few exponents: its least normal number is 6e-5."""
    return dtype != torch.float16


def candidates(problem: ConvProblem, batch: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Returns the names of the candidates that can run a problem here, first the one that runs without a table."""
    able = lambda backend: backends.why_not_on(backend, device, dtype) is None  # noqa: E731
    names = [untuned(problem, dtype, device)]
    if names[0] == "cpu":
        names.append("eager")
    if able("cudnn"):
        others = ["cudnn"] if folds(dtype) or not problem.scale else []
        others += ["cudnn+epilogue"] if able("triton") else []
        names += [name for name in others if name not in names]
    if able("triton"):
        shapes = (problem.x_shape(batch), problem.weight_shape, problem.geometry)
        fitting = [name for name, kernel in tiles().items() if kernel.why_not(shapes, dtype, device) is None]
        if target.is_hopper(device):
            # Gathering with pointers has never come near to TMA: it is measured only where there is nothing else.
            fitting = [name for name in fitting if not name.startswith("pointer ")] or fitting
        names += fitting
    return names


def winner(operands: ConvOperands) -> str:
    """Returns the name of the fastest candidate by a table; without an answer that can run, that of `untuned`."""
    x, problem = operands.x, ConvProblem.of(operands)
    return choice(problem, x.shape[0], x.dtype, x.device) or untuned(problem, x.dtype, x.device)


def choice(problem: ConvProblem, batch: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns the name of the fastest candidate by a table; None without an answer that can run."""
    return tuned_table.choice(problem, batch, dtype, device, _can_run)


def _can_run(name: str, problem: ConvProblem, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    return name in candidates(problem, batch, dtype, device)


# Our kernels with a tile that they choose themselves, the portable one and Hopper's: "triton" is one of them.
_OWN_CHOICE = ("pointer auto", "tma auto")
# Shape of x, shape of the weight, geometry.
Shapes = tuple[tuple[int, ...], tuple[int, ...], Geometry]
# Takes (x, weight, bias, residual, scale).
Run = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


class Kernel(NamedTuple):
    """A kernel of ours with one of its tiles.

    Attributes:
        launch: runs it on operands that `why_not` lets pass; returns y, channels_last.
        why_not: says what keeps a convolution from it; None if nothing does.
        bind: makes `launch` for known shapes, activation, dtype and device, with all decided that can be; None where nothing
            can.
    """

    launch: Callable[[ConvOperands], Tensor]
    why_not: Callable[[Shapes, torch.dtype, torch.device], str | None]
    bind: Callable[[Shapes, Activation | None, torch.dtype, torch.device], Run] | None = None


@cache
def _kernels() -> dict[str, Kernel]:
    """Returns our kernels with each of their tiles, by candidate, and those that choose a tile themselves."""
    # Imported at the first question: Triton may be absent.
    from ..kernels import conv_bias_act
    from ..kernels.sm90 import conv, conv_layout, conv_tiles, specialized_layout, tap_sharing

    why_not_by_shape = lru_cache(_CACHED)(conv_layout.why_not)

    def why_not_hopper(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> str | None:
        if not target.is_hopper(device):
            return f"needs a GPU of compute capability 9, got {device}"
        return why_not_by_shape(*shapes, dtype)

    def pointer(config: conv_bias_act.ConvConfig | None) -> Kernel:
        return Kernel(
            lambda operands: conv_bias_act.launch(operands, config),
            lambda shapes, *_: limits.why_not_convolution(*shapes),
        )

    def tma(config: conv_tiles.TmaConfig | None) -> Kernel:
        def why_not(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> str | None:
            if config is None:
                return why_not_hopper(shapes, dtype, device)
            if not (target.is_hopper(device) or target.is_data_center_blackwell(device)):
                return f"needs a GPU of compute capability 9 or 10, got {device}"
            return why_not_by_shape(*shapes, dtype) or conv_layout.why_not_tile(conv_layout.ConvShape(*shapes), config)

        return Kernel(
            lambda operands: conv.launch(operands, config),
            why_not,
            lambda shapes, activation, dtype, device: conv.Bound(
                conv_layout.ConvShape(*shapes), activation, dtype, device, config
            ),
        )

    def shared(config: conv_tiles.TmaConfig) -> Kernel:
        return Kernel(
            lambda operands: tap_sharing.launch(operands, config),
            lambda shapes, dtype, device: why_not_hopper(shapes, dtype, device) or tap_sharing.why_not(*shapes, dtype),
        )

    specialized_tiles = specialized_layout.CONFIGS if target.has_gluon() else ()

    def specialized(config: specialized_layout.SpecializedConfig) -> Kernel:
        from ..kernels.sm90 import specialized_conv

        def why_not(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> str | None:
            return (
                why_not_hopper(shapes, dtype, device)
                or specialized_layout.why_not(*shapes, dtype)
                or specialized_layout.why_not_tile(conv_layout.ConvShape(*shapes), config)
            )

        return Kernel(
            lambda operands: specialized_conv.launch(operands, config),
            why_not,
            lambda shapes, activation, dtype, device: specialized_conv.Bound(
                conv_layout.ConvShape(*shapes), activation, dtype, device, config
            ),
        )

    return (
        dict(zip(_OWN_CHOICE, (pointer(None), tma(None))))
        | {f"pointer {config}": pointer(config) for config in conv_bias_act.CONFIGS}
        | {f"tma {config}": tma(config) for config in conv_tiles.CONFIGS}
        | {f"shared {config}": shared(config) for config in tap_sharing.CONFIGS}
        | {f"specialized {config}": specialized(config) for config in specialized_tiles}
    )


def tiles() -> dict[str, Kernel]:
    """Returns our kernels with each of their tiles, by candidate."""
    return {name: kernel for name, kernel in _kernels().items() if name not in _OWN_CHOICE}


def _by_triton(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> str:
    """Returns the name of the kernel that the candidate "triton" is."""
    portable, hopper = _OWN_CHOICE
    return portable if _kernels()[hopper].why_not(shapes, dtype, device) else hopper


def bind(name: str, problem: ConvProblem, batch: int, dtype: torch.dtype, device: torch.device) -> Run:
    """Returns `run` for a known problem, with all decided that can be."""
    geometry, activation = problem.geometry, problem.activation
    shapes = (problem.x_shape(batch), problem.weight_shape, geometry)
    if name == "triton":
        name = _by_triton(shapes, dtype, device)
    if " " in name and (bind_kernel := _kernels()[name].bind) is not None:
        return bind_kernel(shapes, activation, dtype, device)
    return lambda x, weight, bias, residual, scale: run(
        name, ConvOperands(x, weight, bias, residual, scale, geometry, activation)
    )


def run(name: str, operands: ConvOperands) -> Tensor:
    """Returns act(conv(x, weight) * scale + bias + residual) by a candidate that can run it; channels_last."""
    if name == "triton":
        x = operands.x
        name = _by_triton((x.shape, operands.weight.shape, operands.geometry), x.dtype, x.device)
    if " " in name:
        return _kernels()[name].launch(operands)
    if name == "cudnn":
        y = cudnn.conv_bias_act(operands)
    elif name == "cudnn+epilogue":
        y = cudnn.conv_then_epilogue(operands)
    elif name == "cpu":
        y = cpu_candidates.run(operands)
    elif name in cpu_candidates.KERNELS:
        y = cpu_candidates.run(operands, [name])
    elif name == "onednn":
        y = onednn.conv_bias_act(operands)
    else:
        y = reference.conv_bias_act(*operands)
    return y.contiguous(memory_format=torch.channels_last)
