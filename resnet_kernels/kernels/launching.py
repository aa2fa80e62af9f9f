"""Repeated launches of one plan: the compiled kernel is kept, so that Triton is not asked again which one it is.

`kernel[grid](...)` looks at each of fifty arguments to find the compiled kernel for them. All but tensors are a plan's own and
never change; of a tensor Triton's compiler heeds presence, dtype, and whether 16 divides its address. The compiled kernel is
launched as Triton's tutorials do it, `compiled[grid](*arguments)`.
Source: Triton's tutorial 02, fused softmax (3.6 and 3.9).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Prepared(NamedTuple):
    """A compiled kernel and its arguments in order, with gaps for the tensors."""

    compiled: Any
    arguments: list[Any]
    places: list[tuple[int, str]]


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    tensors: Mapping[str, Any],
    fixed: Mapping[str, Any],
    prepared: dict[tuple, Prepared],
    **options: Any,
) -> None:
    """Launches a kernel on the current device.

    Args:
        kernel: a @triton.jit function; interpreted ones run as ever.
        device: of the tensors, the current one.
        tensors: arguments that differ from call to call, by name: tensors, descriptors, None.
        fixed: all others; `prepared` belongs to them and to the options.
        prepared: what earlier launches found; filled here.
        options: num_warps and so on.
    """
    key = (kernel, device, *map(_kind, tensors.values()))
    known = prepared.get(key)
    if known is None:
        compiled = kernel[(programs,)](**tensors, **fixed, **options)
        if compiled is not None:  # the interpreter compiles nothing
            arguments = [fixed.get(name) for name in kernel.arg_names]
            places = [(i, name) for i, name in enumerate(kernel.arg_names) if name in tensors]
            prepared[key] = Prepared(compiled, arguments, places)
        return
    arguments = known.arguments.copy()
    for place, name in known.places:
        arguments[place] = tensors[name]
    known.compiled[programs, 1, 1](*arguments)


def _kind(value: Any) -> Any:
    """What of an argument decides which compiled kernel takes it; a descriptor's box is its plan's."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return None if value is None else value.base.dtype
