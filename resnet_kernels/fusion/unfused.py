"""The convolutions of a model that run in no fused kernel: how many, why, and what would change that."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from ..graph import fusible
from ..graph.tracing import is_readable_conv

# What a module outside of all blocks lacks.
_ALONE = "no BN, activation or add follows that could join them"
_SMALL = "work on averages of whole images, as squeeze-and-excitation does"
# A part of a reason, and what would change it; the first that fits.
_HINTS = (
    (_ALONE, "nothing to gain: a convolution alone runs as fast as PyTorch's"),
    (_SMALL, "nothing to gain: they are too small"),
    (r"lazy and not materialized", "run the model once, then fuse it"),
    (r"only 2-D convolutions|Conv3d|Conv1d", "only Conv2d is fused"),
    (r"ConvTranspose", "only Conv2d is fused"),
    (r"padding_mode", "pad with zeros, or with F.pad in front of the convolution"),
    (r"has a parametrization", "remove_parametrizations(..., leave_parametrized=True) before fusing"),
    (r"track_running_stats", "train the BN with running statistics"),
    (r"a norm that is not fused", "only BN is fused: other norms need each image's own statistics"),
    (r"more than one argument", "call the block with one tensor"),
    (r"whether a value is a Tensor", "ask for lists and tuples instead: they are not tensors"),
    (r"enters a context", "move the `with` statement out of forward, around the model"),
    (r"takes more than one argument|takes \*", "give all arguments but the first a default"),
    (r"takes no positional argument", "give forward an argument for the images"),
    (r"a __call__ of its own|a forward of its own|set on the instance", "write it as a class's forward"),
    (r"TorchScript", "fuse before torch.jit.script"),
    (r"can't be traced", "no decision in forward may rest on a tensor's values or shape"),
    (r"only Conv2d is fused", "a Conv2d of your own class is fused if its code calls F.conv2d with its own weight, unchanged"),
    (r"registered more than once|has two names", "give each place a module of its own"),
    (r"its forward (sets|appends|writes|changed)", "let forward only compute, and keep records elsewhere"),
    (r"is a \w+, a module that is not fused", "it runs as itself, and what is around it is fused"),
)  # fmt: skip


@dataclass(frozen=True)
class Unfused:
    """Convolutions that run in no fused kernel for one reason.

    Args:
        reason: why.
        convolutions: how many.
        example: the path of one of them.
        hint: what would change it; "" if nothing is known.
    """

    reason: str
    convolutions: int
    example: str
    hint: str


def unfused(
    model: nn.Module, fused: Collection[str], reasons: Mapping[str, str], small: Collection[str]
) -> tuple[Unfused, ...]:
    """Returns what the convolutions of a model lack that are in no fused kernel, the most frequent reason first.

    Args:
        model: the model.
        fused: the paths of its convolutions that run in fused kernels.
        reasons: why modules are not fused, by path; that of the innermost module around a convolution counts.
        small: the paths of convolutions on averages of whole images.
    """
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and path not in fused:
            found.setdefault(_why(path, module, reasons, path in small), []).append(path)
    rows = [Unfused(reason, len(paths), paths[0], hint_for(reason)) for reason, paths in found.items()]
    return tuple(sorted(rows, key=lambda row: -row.convolutions))


def _why(path: str, conv: nn.Module, reasons: Mapping[str, str], is_small: bool) -> str:
    own = None if is_readable_conv(conv, False) else fusible.why_not_conv(conv)
    if is_small:
        return _SMALL
    if own is not None:
        return own
    parts = path.split(".")
    for end in range(len(parts), -1, -1):
        around = ".".join(parts[:end])
        if around in reasons:
            return _general(reasons[around])
    return _ALONE


def _general(reason: str) -> str:
    """A reason without the name of the module that it is about, so that those of many blocks are one."""
    return re.sub(r"^[\w.]+ (?=(is|has|runs|got|can't) )", "", reason)


def hint_for(reason: str) -> str:
    """Returns what would change a reason; "" if nothing is known."""
    return next((hint for pattern, hint in _HINTS if re.search(pattern, reason)), "")
