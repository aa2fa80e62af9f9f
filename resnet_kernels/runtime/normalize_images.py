"""Normalization of decoded images inside a model: `fuse(model, normalize=(mean, std))`.

Such a model gives on x what the original gives on ((x / 255) - mean) / std for uint8 images, and on (x - mean) / std for
floating-point images in 0..1. The normalization is computed in fp32 and rounded to the model's dtype: by the stem's packing
pass (kernels/sm90/stem.py) where that kernel runs, elsewhere in front of the model's forward.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Normalize:
    """Mean and standard deviation of each channel, for images in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, normalize: object) -> Normalize:
        """Checks a user's (mean, std).

        Raises:
            ValueError: unless it is a pair of equally long sequences of finite numbers, no std being 0.
        """
        pair = normalize if isinstance(normalize, Sequence) and not isinstance(normalize, str) else ()
        if len(pair) != 2 or not all(isinstance(side, Sequence) and not isinstance(side, str) for side in pair):
            raise ValueError(f"normalize must be (mean, std), a number a channel each, got {normalize!r}")
        mean, std = pair
        if len(mean) != len(std) or not mean:
            raise ValueError(f"normalize must have a mean and a std for each channel, got {len(mean)} and {len(std)}")
        if not all(isinstance(v, numbers.Real) and math.isfinite(v) for v in (*mean, *std)):
            raise ValueError(f"normalize must hold finite numbers, got {normalize!r}")
        if 0 in std:
            raise ValueError(f"normalize must have no std of 0, got {tuple(std)}")
        return cls(tuple(map(float, mean)), tuple(map(float, std)))

    def check(self, x: object) -> None:
        """Raises TypeError or ValueError unless x is a batch of images, (N, C, H, W), that can be normalized."""
        if not isinstance(x, Tensor) or not (x.dtype == torch.uint8 or x.is_floating_point()):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a uint8 or floating-point tensor for a model fused with normalize, got {got}")
        if x.dim() != 4 or x.shape[1] != len(self.mean):
            raise ValueError(f"x must be (N, {len(self.mean)}, H, W), as normalize says, got shape {tuple(x.shape)}")

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns (x / 255 - mean) / std or (x - mean) / std in `dtype`, in x's layout."""
        v = x.to(torch.promote_types(dtype, torch.float32))
        if x.dtype == torch.uint8:
            v = v / 255
        # Channel by channel with numbers: each call would copy vectors to the GPU, which no graph can capture.
        channels = [(channel - m) / s for channel, m, s in zip(v.unbind(1), self.mean, self.std)]
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        layout = torch.contiguous_format if x.is_contiguous() else layout
        return torch.stack(channels, 1).to(dtype).contiguous(memory_format=layout)

    def __str__(self) -> str:
        return f"images normalized by mean {self.mean} and std {self.std}"


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point parameter."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())
