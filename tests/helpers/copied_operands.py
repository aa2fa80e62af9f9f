"""Launches whose every operand lies in a layout that no kernel reads, so that the launchers have to copy it."""

from functools import partial

import torch

from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.kernels.operands import ConvOperands
from resnet_kernels.kernels.sm90 import (
    chain,
    conv,
    specialized_chain,
    specialized_conv,
    specialized_layout,
    specialized_stem,
    stem,
    stem_layout,
    tap_sharing,
)
from resnet_kernels.kernels.sm90.conv_tiles import CONFIGS

FP16 = torch.float16


SAME = Geometry(padding=(1, 1, 1, 1))
POINTWISE = Geometry(padding=(0, 0, 0, 0))


def copied(*shape: int) -> torch.Tensor:
    """A tensor that no kernel reads as it is: every second element of a larger one."""
    return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=FP16)[..., ::2]


def vector(count: int) -> torch.Tensor:
    return torch.zeros(count, 2)[:, 0]


def convolution(residual: bool, split: int = 1, projection: bool = False, early: bool = False) -> None:
    config = next(c for c in CONFIGS if c.split_k == split and c.early == early)
    shortcut = None
    if projection:
        shortcut = conv.Shortcut(copied(2, 64, 8, 8), copied(64, 64, 1, 1), vector(64), vector(64), POINTWISE)
    added = copied(2, 64, 8, 8) if residual else None
    operands = ConvOperands(copied(2, 128, 8, 8), copied(64, 128, 3, 3), vector(64), added, vector(64), SAME)
    conv.launch(operands, config, shortcut)


def specialized(config: specialized_layout.SpecializedConfig, projection: bool = False) -> None:
    x, weight, shortcut = copied(2, 128, 8, 8), copied(128, 128, 3, 3), None
    if projection:
        shortcut = conv.Shortcut(copied(2, 128, 8, 8), copied(128, 128, 1, 1), vector(128), vector(128), POINTWISE)
    residual = None if projection else copied(2, 128, 8, 8)
    specialized_conv.launch(ConvOperands(x, weight, vector(128), residual, vector(128), SAME), config, shortcut)


def shared_taps() -> None:
    x, residual = copied(2, 64, 8, 8), copied(2, 64, 8, 8)
    tap_sharing.launch(ConvOperands(x, copied(64, 64, 3, 3), vector(64), residual, vector(64), SAME))


def chained(projection: bool, specialized: bool = False) -> None:
    layer = lambda *shape, relu=True: chain.Layer(copied(*shape), vector(shape[0]), vector(shape[0]), relu)  # noqa: E731
    residual: torch.Tensor | chain.Shortcut = copied(2, 256, 8, 8)
    if projection:
        residual = chain.Shortcut(copied(2, 64, 8, 8), layer(256, 64, 1, 1, relu=False), POINTWISE)
    (specialized_chain if specialized else chain).launch(
        copied(2, 64, 8, 8), layer(64, 64, 3, 3), SAME, layer(256, 64, 1, 1), residual,
        (vector(256), vector(256)), None if specialized and projection else layer(64, 256, 1, 1),
    )  # fmt: skip


def wide_chain() -> None:
    layer = lambda *shape: chain.Layer(copied(*shape), vector(shape[0]), vector(shape[0]), True)  # noqa: E731
    specialized_chain.launch(
        copied(2, 128, 8, 8), layer(128, 128, 3, 3), SAME, layer(512, 128, 1, 1), copied(2, 512, 8, 8),
        (vector(512), vector(512)), layer(128, 512, 1, 1),
    )  # fmt: skip


def stem_and_pool() -> None:
    config = next(c for c in stem_layout.CONFIGS if c.descriptor)
    stem.launch(copied(2, 3, 32, 32), copied(64, 3, 7, 7), vector(64), vector(64), config=config)


LAUNCHES = {
    "convolution with a residual": lambda: convolution(True),
    "split convolution with a residual": lambda: convolution(True, split=4),
    "split convolution that starts early": lambda: convolution(True, split=4, early=True),
    "convolution with a projection": lambda: convolution(False, projection=True),
    **{
        f"specialized convolution {config}": partial(specialized, config)
        for config in specialized_layout.CONFIGS
        if not config.resident
    },
    "specialized convolution with a projection": lambda: specialized(specialized_layout.MERGED, projection=True),
    "convolution with a projection and a residual": lambda: convolution(True, projection=True),
    "shared taps": shared_taps,
    "chain": lambda: chained(False),
    "chain with a projection": lambda: chained(True),
    "specialized chain": lambda: chained(False, specialized=True),
    "specialized chain with a projection": lambda: chained(True, specialized=True),
    "specialized chain of 128 channels": wide_chain,
    "stem": stem_and_pool,
    "specialized stem": lambda: specialized_stem.launch(
        copied(2, 3, 32, 32), copied(64, 3, 7, 7), vector(64), vector(64)
    ),
}
