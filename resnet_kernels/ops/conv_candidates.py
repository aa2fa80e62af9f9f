"""All the ways to run a convolution of ours, by name; a measured table holds the names, `tune` times them.

cudnn, cpu, eager, triton    a backend; triton chooses its tile by itself and is in no table. cudnn is one fused operation
                             where there is a ReLU, on a weight with the scale in it
cudnn+epilogue               cuDNN's convolution, then one pass for all that follows; no weight is folded
pointer 128x64x64 w4 s3      a tile of kernels/conv_bias_act.py: pixels x output channels x step, warps, stages
tma 128x64x64 w4 s4 p2       a tile of kernels/sm90/conv.py, with the parts of its epilogue
shared 128x64x32 w4 s2 p4    a tile of kernels/sm90/tap_sharing.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import target
from ..kernels.geometry import Geometry
from . import backends, cudnn, onednn, reference, tuned_table


class ConvProblem(NamedTuple):
    """What a table knows a convolution by: everything but the batch. `str` is the key, with sizes as C x H x W."""

    c_in: int
    in_h: int
    in_w: int
    weight_shape: tuple[int, int, int, int]
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
        return batch, self.c_in, self.in_h, self.in_w


def _pair(values: tuple[int, int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]},{values[1]}"


# What takes a weight with the scale in it.
FOLDING = ("cudnn",)
# What runs without a table where a ReLU follows and the weight has its scale in it, or none. "cudnn+epilogue" in this place
# turns cuDNN's fused operations off wherever no table names them.
FUSED = "cudnn"


def untuned(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> str:
    """The name of what runs a problem without a table; a caller with folded weights has asked for one without a scale."""
    name = backends.untuned(device, dtype)
    if name != "cudnn":
        return name
    return FUSED if problem.relu and not problem.scale and not is_slow_when_fused(problem) else "cudnn+epilogue"


def is_slow_when_fused(problem: ConvProblem) -> bool:
    """Whether cuDNN's fused operation is out of the question: 17x slower for a channels_last 7x7 stem (pytorch#68506)."""
    return problem.c_in < 8 and max(problem.weight_shape[2:]) > 3


def folds(dtype: torch.dtype) -> bool:
    """Whether a scale may go into a weight of that dtype: fp16 has too few exponents, 6e-5 is its least normal number."""
    return dtype != torch.float16


def candidates(problem: ConvProblem, batch: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """The names of what can run a problem here; the first is what runs without a table."""
    able = lambda backend: backends.why_not_on(backend, device, dtype) is None  # noqa: E731
    names = [untuned(problem, dtype, device)]
    if names[0] == "cpu":
        names.append("eager")
    if able("cudnn"):
        others = ["cudnn"] if folds(dtype) or not problem.scale else []
        others += ["cudnn+epilogue"] if able("triton") else []
        names += [name for name in others if name not in names]
    if able("triton"):
        tiles = [name for name, tile in _tiles().items() if _fits(name, tile, problem, batch, dtype, device)]
        # Gathering with pointers has never come near to TMA: measured only where there is nothing else.
        by_tma = [name for name in tiles if not name.startswith("pointer ")]
        names += by_tma or tiles
    return names


@cache
def _tiles() -> dict[str, Any]:
    from ..kernels import conv_bias_act
    from ..kernels.sm90 import conv_tiles, tap_sharing

    tiles = {f"pointer {config}": config for config in conv_bias_act.CONFIGS}
    tiles |= {f"tma {config}": config for config in conv_tiles.CONFIGS}
    return tiles | {f"shared {config}": config for config in tap_sharing.CONFIGS}


def _fits(name: str, tile: Any, problem: ConvProblem, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    if name.startswith("pointer "):
        return True
    from ..kernels.sm90 import conv_layout, tap_sharing

    conv = conv_layout.ConvShape(problem.x_shape(batch), problem.weight_shape, problem.geometry)
    if name.startswith("shared "):
        return target.is_hopper(device) and tap_sharing.why_not(*conv, dtype) is None
    return (
        target.is_hopper(device)
        and conv_layout.why_not(*conv, dtype) is None
        and conv_layout.why_not_tile(conv, tile) is None
    )


def winner(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    geometry: Geometry,
    relu: bool,
) -> str:
    """The name of what a table says is fastest here; without an answer that can run, what `auto` runs untuned."""
    batch, *size = x.shape
    problem = ConvProblem(
        *size, tuple(weight.shape), geometry, scale is not None, bias is not None, residual is not None, relu
    )
    return choice(problem, batch, x.dtype, x.device) or untuned(problem, x.dtype, x.device)


def choice(problem: ConvProblem, batch: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """The name of what a table says is fastest here; None without an answer that can run."""
    return tuned_table.choice(problem, batch, dtype, device, _can_run)


def _can_run(name: str, problem: ConvProblem, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    return name in candidates(problem, batch, dtype, device)


Run = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


def bind(name: str, problem: ConvProblem, batch: int, dtype: torch.dtype, device: torch.device) -> Run:
    """`run` for a known problem: a function of (x, weight, bias, residual, scale), with all decided that can be."""
    geometry, relu = problem.geometry, problem.relu
    if name == "triton" or name.startswith("tma "):
        from ..kernels.sm90 import conv as kernel
        from ..kernels.sm90.conv_layout import ConvShape, why_not

        shapes = ConvShape(problem.x_shape(batch), problem.weight_shape, geometry)
        if name != "triton" or (target.is_hopper(device) and why_not(*shapes, dtype) is None):
            return kernel.Bound(shapes, relu, dtype, device, None if name == "triton" else _tiles()[name])
    return lambda x, weight, bias, residual, scale: run(name, x, weight, bias, residual, scale, geometry, relu)


def run(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    geometry: Geometry,
    relu: bool,
) -> Tensor:
    """relu(conv(x, weight) * scale + bias + residual) by the candidate of that name; channels_last."""
    operands = (x, weight, bias, residual, scale, geometry, relu)
    if name.startswith("tma "):
        from ..kernels.sm90 import conv as sm90_conv

        return sm90_conv.launch(*operands, _tiles()[name])
    if name.startswith("shared "):
        from ..kernels.sm90 import tap_sharing

        return tap_sharing.launch(*operands, _tiles()[name])
    if name == "triton" or name.startswith("pointer "):
        from ..kernels import conv_bias_act

        return conv_bias_act.launch(*operands, None if name == "triton" else _tiles()[name])
    if name == "cudnn":
        y = cudnn.conv_bias_act(*operands)
    elif name == "cudnn+epilogue":
        y = cudnn.conv_then_epilogue(*operands)
    elif name == "cpu" and x.shape[0]:
        if scale is not None:
            weight = (weight * scale[:, None, None, None]).to(x.dtype)
        y = onednn.conv_bias_act(x, weight, bias, residual, geometry, relu)
    else:
        y = reference.conv_bias_act(*operands)
    return y.contiguous(memory_format=torch.channels_last)
