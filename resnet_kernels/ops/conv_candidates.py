"""Every way to run a convolution, by name. Only this module picks a kernel: an op asks it, and it calls a launcher.

cudnn                     one fused operation of cuDNN where there is a ReLU and no scale; plans multiply scales into weights
cudnn+epilogue            cuDNN's convolution, then one pass for all that follows it; no weight is folded
cpu, eager                on the CPU one of the three below; plain PyTorch
winograd, direct, onednn  our own CPU kernels (kernels/cpu/convolution.py), and oneDNN's fused operation
triton                    a kernel of ours with a tile that it chooses itself: Hopper's where that takes the convolution, else
                          the portable one. No table holds this name
pointer 128x64x64 w4 s3   a tile of kernels/conv_bias_act.py: pixels x output channels x step, warps, stages
tma 128x64x64 w4 s4 p2    a tile of kernels/sm90/conv.py, with the parts of its epilogue
shared 128x64x32 w4 s2 p4 a tile of kernels/sm90/tap_sharing.py

Tables hold these names, and `tune` times the candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import limits, target
from ..kernels.cpu import convolution, library
from ..kernels.geometry import Geometry
from ..kernels.operands import ConvOperands
from . import backends, cudnn, onednn, reference, tuned_table

# Answers kept of what Hopper's kernel takes: a net has some 25 layers that differ, times a few batch and image sizes.
_CACHED = 512


class ConvProblem(NamedTuple):
    """A convolution and what follows it, without tensors and batch. `str` is the key in a table, with sizes as C x H x W."""

    c_in: int
    in_h: int
    in_w: int
    weight_shape: tuple[int, ...]
    geometry: Geometry
    scale: bool
    bias: bool
    residual: bool
    relu: bool

    def __str__(self) -> str:
        c_out, _, kernel_h, kernel_w = self.weight_shape
        stride, padding, dilation, groups = self.geometry
        epilogue = [name for name in ("scale", "bias", "residual", "relu") if getattr(self, name)]
        return " ".join(
            (
                f"conv {self.c_in}x{self.in_h}x{self.in_w}->{c_out} {kernel_h}x{kernel_w}/{_pair(stride)}",
                f"p{','.join(map(str, padding))} d{_pair(dilation)} g{groups}",
                *epilogue,
            )
        )

    def x_shape(self, batch: int) -> tuple[int, int, int, int]:
        """Returns the input's shape, (N, C_in, H, W)."""
        return batch, self.c_in, self.in_h, self.in_w


class PackedProblem(NamedTuple):
    """A convolution on the CPU whose weight was packed beforehand, with a BN folded in. `str` is the key in a table.

    Attributes:
        conv: with a bias, and without scale and residual, whatever follows: that makes no difference to the choice.
    """

    conv: ConvProblem

    def __str__(self) -> str:
        return f"packed {self.conv}"


def _pair(values: tuple[int, int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]},{values[1]}"


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
    return FUSED if problem.relu and not problem.scale and not is_slow_when_fused(problem) else "cudnn+epilogue"


def is_slow_when_fused(problem: ConvProblem) -> bool:
    """Whether cuDNN's fused operation is out of the question: 17x slower for a channels_last 7x7 stem (pytorch#68506)."""
    return problem.c_in < 8 and max(problem.weight_shape[2:]) > 3


def folds(dtype: torch.dtype) -> bool:
    """Whether a scale may go into a weight of a dtype. fp16 has too few exponents: its least normal number is 6e-5."""
    return dtype != torch.float16


def own_shapes(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: Geometry) -> convolution.Shapes:
    """Returns a convolution as our CPU kernels take it, on channels_last images."""
    copies = convolution.copies(x_shape, weight_shape, channels_last=True)
    return convolution.Shapes(x_shape, weight_shape, geometry, copies)


# Steps of the micro-kernel in which a weight is packed, per element: a call of the op packs anew, a fused module does not.
_PACKING = {"winograd": 20.0, "direct": 0.6}
# Tiles from which Winograd's kernel is chosen on an instruction set without measurements: it multiplies 2.25 times less.
_MANY_TILES = 64


def for_packed(
    weight_shape: tuple[int, ...], geometry: Geometry, x_shape: tuple[int, ...], dtype: torch.dtype
) -> list[str]:
    """Returns our CPU kernels that are the choice for a packed weight, the best first; none where oneDNN is.

    A table's winner comes first. Without a table our kernels run where they were measured to win: on AVX2 all convolutions
    without groups, whichever of the two costs less; elsewhere, unless the environment asks for an instruction set, 3x3
    convolutions by Winograd alone.
    """
    problem = packed_problem(weight_shape, geometry, x_shape)
    found = tuned_table.choice(problem, x_shape[0], dtype, torch.device("cpu"), _can_run_packed)
    if found is not None:
        return [found] if found in convolution.KERNELS else []
    return _own_by_rule(problem.conv, x_shape[0], dtype, packs=False)


def packed_problem(weight_shape: tuple[int, ...], geometry: Geometry, x_shape: tuple[int, ...]) -> PackedProblem:
    """Returns the problem of a packed weight."""
    _, c_in, in_h, in_w = x_shape
    return PackedProblem(ConvProblem(c_in, in_h, in_w, tuple(weight_shape), geometry, False, True, False, True))


def packed_candidates(problem: PackedProblem, batch: int, dtype: torch.dtype) -> list[str]:
    """Returns the names of all that can run a problem with a packed weight, first the one that runs without a table."""
    conv, threads = problem.conv, torch.get_num_threads()
    shapes = own_shapes(conv.x_shape(batch), conv.weight_shape, conv.geometry)
    able = [name for name in convolution.KERNELS if convolution.why_not(name, shapes, dtype, threads) is None]
    default = [*_own_by_rule(conv, batch, dtype, packs=False), "onednn"][0]
    return [default, *(name for name in (*able, "onednn") if name != default)]


def _can_run_packed(name: str, problem: PackedProblem, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    return name in packed_candidates(problem, batch, dtype)


def _own_by_rule(problem: ConvProblem, batch: int, dtype: torch.dtype, packs: bool) -> list[str]:
    compiled = convolution.library_or_none()
    if compiled is None:
        return []
    shapes = own_shapes(problem.x_shape(batch), problem.weight_shape, problem.geometry)
    threads = torch.get_num_threads()
    costs = {
        name: convolution.plan_for(name, shapes, threads).cost
        + packs * _PACKING[name] * torch.Size(problem.weight_shape).numel() / threads
        for name in convolution.KERNELS
        if convolution.why_not(name, shapes, dtype, threads) is None
    }
    if compiled.isa != "avx2" and not library.is_asked_for():
        out_h, out_w = shapes.out[2:]
        many = batch * -(-out_h // 2) * -(-out_w // 2) >= _MANY_TILES and compiled.isa != "portable"
        costs = {name: cost for name, cost in costs.items() if name == "winograd" and many and not packs}
    return sorted(costs, key=lambda name: costs[name])


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
        # Gathering with pointers has never come near to TMA: it is measured only where there is nothing else.
        names += [name for name in fitting if not name.startswith("pointer ")] or fitting
    return names


def winner(operands: ConvOperands) -> str:
    """Returns the name of the fastest candidate by a table; without an answer that can run, that of `untuned`."""
    x, problem = operands.x, _problem_of(operands)
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
        bind: makes `launch` for known shapes, ReLU or not, dtype and device, with all decided that can be; None where nothing
            can.
    """

    launch: Callable[[ConvOperands], Tensor]
    why_not: Callable[[Shapes, torch.dtype, torch.device], str | None]
    bind: Callable[[Shapes, bool, torch.dtype, torch.device], Run] | None = None


@cache
def _kernels() -> dict[str, Kernel]:
    """Returns our kernels with each of their tiles, by candidate, and those that choose a tile themselves."""
    # Imported at the first question: Triton may be absent.
    from ..kernels import conv_bias_act
    from ..kernels.sm90 import conv, conv_layout, conv_tiles, tap_sharing

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
        return Kernel(
            lambda operands: conv.launch(operands, config),
            lambda shapes, dtype, device: (
                why_not_hopper(shapes, dtype, device)
                or (None if config is None else conv_layout.why_not_tile(conv_layout.ConvShape(*shapes), config))
            ),
            lambda shapes, relu, dtype, device: conv.Bound(conv_layout.ConvShape(*shapes), relu, dtype, device, config),
        )

    def shared(config: conv_tiles.TmaConfig) -> Kernel:
        return Kernel(
            lambda operands: tap_sharing.launch(operands, config),
            lambda shapes, dtype, device: why_not_hopper(shapes, dtype, device) or tap_sharing.why_not(*shapes, dtype),
        )

    return (
        dict(zip(_OWN_CHOICE, (pointer(None), tma(None))))
        | {f"pointer {config}": pointer(config) for config in conv_bias_act.CONFIGS}
        | {f"tma {config}": tma(config) for config in conv_tiles.CONFIGS}
        | {f"shared {config}": shared(config) for config in tap_sharing.CONFIGS}
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
    geometry, relu = problem.geometry, problem.relu
    shapes = (problem.x_shape(batch), problem.weight_shape, geometry)
    if name == "triton":
        name = _by_triton(shapes, dtype, device)
    if " " in name and (bind_kernel := _kernels()[name].bind) is not None:
        return bind_kernel(shapes, relu, dtype, device)
    return lambda x, weight, bias, residual, scale: run(
        name, ConvOperands(x, weight, bias, residual, scale, geometry, relu)
    )


def run(name: str, operands: ConvOperands) -> Tensor:
    """Returns relu(conv(x, weight) * scale + bias + residual) by a candidate that can run it; channels_last."""
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
        y = _run_on_cpu(operands)
    elif name in convolution.KERNELS:
        y = _run_own([name], operands)
    elif name == "onednn":
        y = onednn.conv_bias_act(operands)
    else:
        y = reference.conv_bias_act(*operands)
    return y.contiguous(memory_format=torch.channels_last)


def _problem_of(operands: ConvOperands) -> ConvProblem:
    x, weight, bias, residual, scale, geometry, relu = operands
    _, c_in, in_h, in_w = x.shape
    return ConvProblem(
        c_in, in_h, in_w, tuple(weight.shape), geometry,
        scale is not None, bias is not None, residual is not None, relu,
    )  # fmt: skip


def _run_on_cpu(operands: ConvOperands) -> Tensor:
    names = _own_by_rule(_problem_of(operands), operands.x.shape[0], operands.x.dtype, packs=True)
    return _run_own(names, operands) if names else onednn.conv_bias_act(operands)


def _run_own(names: list[str], operands: ConvOperands) -> Tensor:
    """Runs the first of our CPU kernels that takes the weight's values; without one, oneDNN or PyTorch."""
    x, weight, bias, residual, scale, geometry, relu = operands
    for name in names:
        packed = convolution.pack(name, weight.detach())
        if packed is not None:
            shapes = own_shapes(tuple(x.shape), tuple(weight.shape), geometry)
            scale, bias = (onednn.as_bias(vector, x.dtype) for vector in (scale, bias))
            bound = convolution.Bound(name, shapes, packed, scale, bias, torch.get_num_threads())
            x = x.detach().contiguous(memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.detach().contiguous(memory_format=torch.channels_last)
            return bound(x, residual, relu)
    return onednn.conv_bias_act(operands)
