"""Ceilings of a GPU, measured with minimal kernels, and the tensor descriptors that its driver accepts.

copy     HBM: a copy of one tensor into another, counting reads and writes
matmul   tensor cores: a large product in bf16 (cuBLAS)
l2       L2: every multiprocessor reads a buffer that fits into L2 again and again, past L1
l2_tma   L2 by TMA, in boxes as large as those of a convolution's operand
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_kernels.perf.timing import Timing, interleave

BLOCK = 4096
# (pixels, channels) of a TMA box in bf16: 16 KiB.
BOX = (128, 64)
# Number of programs: four for each of an H200's multiprocessors.
PROGRAMS = 4 * 132
# Bytes of the buffers read from L2. An H200's L2 has 50 MB in two halves, and a program reads both.
L2_BUFFERS = (2**23, 2**24, 2**25)


@triton.jit
def _read_kernel(x_ptr, sums_ptr, n_blocks, rounds, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(0, rounds, loop_unroll_factor=4):
        # Each program starts at another block. .cg bypasses L1.
        acc += tl.load(x_ptr + (pid + i) % n_blocks * BLOCK + offs, cache_modifier=".cg")
    tl.store(sums_ptr + pid, tl.sum(acc))


@triton.jit
def _read_by_tma_kernel(desc, sums_ptr, n_boxes, rounds, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    pid = tl.program_id(0)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Four boxes in flight: without num_stages on the loop, Triton pipelines only loads that feed a product.
    for i in tl.range(0, rounds, num_stages=4):
        acc += desc.load([(pid + i) % n_boxes * ROWS, 0]).to(tl.float32)
    tl.store(sums_ptr + pid, tl.sum(acc))


@triton.jit
def _window_kernel(desc, y_ptr, at_0, at_1, at_2, at_3, SIZE: tl.constexpr):
    window = desc.load([at_0, at_1, at_2, at_3]).reshape(SIZE)
    tl.store(y_ptr + tl.arange(0, SIZE), window)


def copy(device: torch.device, seconds: float, dry: bool) -> dict[str, Any]:
    source = torch.empty(2**16 if dry else 2**29, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    timing = _time(lambda: target.copy_(source), device, seconds, dry)
    moved = 2 * source.numel() * source.element_size()
    return {"bytes": moved, "tb_per_s": moved / timing.median / 1e12, **timing.to_dict()}


def matmul(device: torch.device, seconds: float, dry: bool) -> dict[str, Any]:
    n = 64 if dry else 8192
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    timing = _time(lambda: a @ b, device, seconds, dry)
    return {"size": n, "tflop_per_s": 2 * n**3 / timing.median / 1e12, **timing.to_dict()}


def l2(device: torch.device, seconds: float, dry: bool, *, by_tma: bool = False) -> dict[str, Any]:
    found = {}
    rows, columns = BOX
    # Bytes and elements that a program reads in a round.
    block, elements = (2 * rows * columns, rows * columns) if by_tma else (4 * BLOCK, BLOCK)
    for size in (2 * block,) if dry else L2_BUFFERS:
        programs, n_blocks = 2 if dry else PROGRAMS, size // block
        rounds = 8 if dry else 1024
        sums = torch.empty(programs, device=device)
        if by_tma:
            x = torch.ones(n_blocks * rows, columns, dtype=torch.bfloat16, device=device)
            desc = TensorDescriptor.from_tensor(x, [rows, columns])
        else:
            x = torch.ones(size // 4, device=device)

        def read(x=x, sums=sums, n_blocks=n_blocks, rounds=rounds, programs=programs):
            if by_tma:
                _read_by_tma_kernel[(programs,)](desc, sums, n_blocks, rounds, ROWS=rows, COLUMNS=columns, num_warps=8)  # noqa: B023
            else:
                _read_kernel[(programs,)](x, sums, n_blocks, rounds, BLOCK=BLOCK, num_warps=8)

        timing = _time(read, device, seconds / len(L2_BUFFERS), dry)
        moved = block * rounds * programs
        right = bool((sums == elements * rounds).all())
        found[str(size)] = {
            "bytes": moved,
            "tb_per_s": moved / timing.median / 1e12,
            "right": right,
            **timing.to_dict(),
        }
    return found


def _time(call, device: torch.device, seconds: float, dry: bool) -> Timing:
    return interleave({"": call}, seconds=0 if dry else seconds, device=device)[""]


CEILINGS: dict[str, Callable[[torch.device, float, bool], dict[str, Any]]] = {
    "copy": copy,
    "matmul": matmul,
    "l2": l2,
    "l2_tma": partial(l2, by_tma=True),
}


class View(NamedTuple):
    """View of memory through a descriptor: shape, strides and box in elements of 2 bytes, and `at`, where the box starts."""

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    box: tuple[int, int, int, int]
    at: tuple[int, int, int, int]


VIEWS = {
    "as it lies in memory": View((4, 8, 8, 64), (4096, 512, 64, 1), (2, 4, 4, 64), (2, 4, 4, 0)),
    # A 1x1 of stride 2.
    "doubled strides": View((4, 4, 4, 64), (4096, 1024, 128, 1), (2, 4, 4, 64), (1, 0, 0, 0)),
    # Batch as M: (H, W, N, C) over memory that is (N, H, W, C).
    "non-monotonic strides": View((8, 8, 32, 64), (512, 64, 4096, 1), (1, 1, 32, 64), (3, 5, 0, 0)),
    # The stem's rows: windows of 8 pixels of 4 channels, 2 pixels apart.
    "overlapping windows": View((2, 16, 64, 32), (16384, 1024, 8, 1), (1, 2, 32, 32), (1, 5, 30, 0)),
    # The stem's windows again, with one more dimension that steps over rows of memory.
    "overlapping and non-monotonic": View((16, 2, 64, 32), (1024, 16384, 8, 1), (2, 2, 16, 32), (4, 0, 48, 0)),
}


def read_through(view: View, device: torch.device) -> dict[str, Any]:
    """Reads a box through a descriptor of the view; "right" says whether its values are the expected ones."""
    # fp16 holds integers below 2039 exactly. The 64 extra elements are room for the overhang of the last windows.
    elements = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides)) + 1
    memory = (torch.arange(elements + 64, device=device) % 2039).to(torch.float16)
    size = torch.Size(view.box).numel()
    y = torch.full((size,), float("nan"), dtype=torch.float16, device=device)
    base = memory[:elements]
    descriptor = TensorDescriptor(base, list(view.shape), list(view.strides), list(view.box))
    _window_kernel[(1,)](descriptor, y, *view.at, SIZE=size)
    whole = memory.as_strided(view.shape, view.strides)
    for axis, (start, length) in enumerate(zip(view.at, view.box)):
        whole = whole.narrow(axis, start, length)
    expected = whole.flatten()
    return {
        **view._asdict(),
        "right": torch.equal(y, expected),
        "first": y[:4].tolist(),
        "expected": expected[:4].tolist(),
    }
