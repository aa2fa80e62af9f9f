"""Lower bounds on a network's inference time from FLOPs, HBM bytes and L2 bytes, for several ways to cut it into kernels.

    eager       a kernel for each ATen operation: convolution, BN, ReLU and add apart
    compiled    torch.compile's default: a kernel for each convolution, and one for all pointwise operations between two
    per_layer   a kernel for each convolution + BN (+ add) (+ ReLU), as in `fuse`
    chained     a kernel for each 3x3 -> 1x1 + add + ReLU -> the next block's first 1x1, and one for stem + max-pool
    compute     kernels that move no byte

A kernel takes no less than max(FLOPs / FLOP rate, HBM bytes / HBM rate, L2 bytes / L2 rate), a network no less than the sum
over its kernels, which run one after the other. That is a limit, not a forecast.

How bytes are counted

    HBM   Each activation that a kernel reads, and each that it makes and that another kernel or the caller reads, counts
          once: overlapping windows and a second read inside the kernel hit a cache. Pixels that a kernel skips (a strided
          1x1) don't count. Weights count once per kernel. Every element has the dtype's size, the image's included. Left
          out are vectors of a number per channel (bias, BN), the indices that eager's max-pool also writes, workspaces.
    L2    Loads of implicit GEMMs from L2 to shared memory: a step of a BLOCK_M x BLOCK_N tile loads (BLOCK_M + BLOCK_N) *
          BLOCK_K elements, so a kernel loads m * k * ceil(n / BLOCK_N) + ceil(m / BLOCK_M) * n * k, with no loads over the
          edges of m and n. k counts every tap, so a 3x3 loads its input nine times. With tap sharing `columns`
          neighboring columns of pixels, a block each, share a filter row's columns + 2 input tiles and 3 weight tiles. In
          a chain the 3x3's tile has all its channels and later products load weights only. Other kernels load from L2 as
          much as from HBM. Left out are residuals (1.5% of ResNet-50 per layer) and stores.

tests/perf/test_roofline.py compares these counts with limits that were worked out by hand beforehand. Chains of wide stages
are only limits: 128 pixels by 512 channels of fp32 accumulators are a multiprocessor's 256 KiB of registers; hence max_width.

Source: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from . import kernel_groups
from .kernel_groups import Group
from .network import Network, Operation


@dataclass(frozen=True)
class Kernel:
    """Least work of a kernel: name, FLOPs, and bytes from and to HBM and from L2 to shared memory."""

    name: str
    flops: int
    hbm_bytes: int
    l2_bytes: int


@dataclass(frozen=True)
class Machine:
    """Rates that kernels reach: FLOP/s, and bytes/s from HBM and from L2. math.inf removes a roof."""

    flops_per_s: float
    hbm_bytes_per_s: float
    l2_bytes_per_s: float = math.inf

    def bound(self, kernel: Kernel) -> tuple[float, str]:
        """Least time of a kernel in seconds, and the roof that bounds it: "FLOP", "HBM" or "L2"."""
        return max(
            (kernel.flops / self.flops_per_s, "FLOP"),
            (kernel.hbm_bytes / self.hbm_bytes_per_s, "HBM"),
            (kernel.l2_bytes / self.l2_bytes_per_s, "L2"),
            key=lambda bound: bound[0],
        )

    def without_l2(self) -> Machine:
        """Machine with FLOP and HBM as its only roofs."""
        return replace(self, l2_bytes_per_s=math.inf)


# TF32, which PyTorch's convolutions of fp32 take by default, runs at half of bf16's rate (NVIDIA's H100 and H200 data sheets).
H200_FLOPS_PER_S = {"bf16": 790e12, "fp16": 790e12, "fp32": 395e12}


def h200(dtype: str = "bf16") -> Machine:
    """Rates of an H200 from PyTorch: 790 TFLOP/s in a bf16 matmul, 4.3 TB/s in a copy, 8 TB/s from L2 in Hopper GEMMs.

    Raises:
        ValueError: `dtype` isn't bf16, fp16 or fp32.
    """
    if dtype not in H200_FLOPS_PER_S:
        raise ValueError(f"dtype must be one of {', '.join(H200_FLOPS_PER_S)}, got {dtype!r}")
    return Machine(H200_FLOPS_PER_S[dtype], 4.3e12, 8e12)


@dataclass(frozen=True)
class Tiling:
    """Tiles of implicit GEMMs: block_m pixels by block_n output channels, 64 where a layer has no more than that.

    columns: tiles that share loads in a 3x3 at stride 1 (tap sharing); 1 shares none.
    """

    block_m: int = 128
    block_n: int = 128
    columns: int = 1

    def loads(self, operation: Operation, from_inside: bool, whole_width: bool) -> int:
        """Elements that a convolution or matmul loads from L2.

        from_inside: whether its input is in shared memory already. whole_width: whether a tile has all output channels.
        """
        gemm = operation.gemm
        assert gemm is not None
        taps: float = gemm.taps
        block_m = self.block_m
        if gemm.kernel_size == (3, 3) and {*gemm.stride, *gemm.dilation} == {1}:
            # A filter row needs columns + 2 input tiles for `columns` tiles of the output; one column loads all nine taps.
            taps = 3 * (self.columns + 2) / self.columns
            block_m *= self.columns
        block_n = 64 if gemm.n <= 64 else self.block_n
        passes = 1 if whole_width else math.ceil(gemm.n // gemm.groups / block_n)
        inputs = 0 if from_inside else gemm.m * gemm.c_in * taps * passes
        return round(inputs + math.ceil(gemm.m / block_m) * gemm.weights)


def limit(kernels: Iterable[Kernel], machine: Machine, batch_size: int) -> float:
    """Upper limit on the images/s of kernels for a batch of that size."""
    return batch_size / sum(machine.bound(kernel)[0] for kernel in kernels)


def eager(net: Network, itemsize: int, tiling: Tiling = Tiling()) -> list[Kernel]:
    """Returns a kernel for each operation; itemsize: bytes of an element."""
    return _kernels([Group((operation,)) for operation in net.operations], net, itemsize, tiling)


def per_layer(
    net: Network,
    itemsize: int,
    tiling: Tiling = Tiling(),
    *,
    merged_shortcut: bool = False,
    stem_with_pool: bool = False,
) -> list[Kernel]:
    """Returns a kernel for each convolution with its BN, add and ReLU.

    Args:
        net: The network.
        tiling: Tiles of its GEMMs.
        itemsize: bytes of an element.
        merged_shortcut: whether a projection is a second loop of the kernel that adds it.
        stem_with_pool: whether a max-pool is in the kernel of the convolution before it.
    """
    groups = kernel_groups.layers(net)
    if merged_shortcut:
        groups = kernel_groups.merge_shortcuts(groups, net)
    if stem_with_pool:
        groups = kernel_groups.merge_pools(groups, net)
    return _kernels(groups, net, itemsize, tiling)


def chained(
    net: Network,
    itemsize: int,
    tiling: Tiling = Tiling(),
    *,
    merged_shortcut: bool = False,
    across_stages: bool = False,
    max_width: int | None = None,
) -> list[Kernel]:
    """Returns the stem with its pool, and a kernel for each 3x3 -> 1x1 + add + ReLU -> the next block's first 1x1.

    Args:
        net: The network.
        tiling: Tiles of its GEMMs.
        itemsize: bytes of an element.
        merged_shortcut: whether a projection is a second loop of the kernel that adds it.
        across_stages: whether to chain into the first 1x1 of a stage, too. A stage is a run of blocks of one width.
        max_width: most channels of the 3x3 in a chain: a tile holds them all, and registers are few.
    """
    groups = kernel_groups.merge_pools(kernel_groups.layers(net), net)
    if merged_shortcut:
        groups = kernel_groups.merge_shortcuts(groups, net)
    return _kernels(kernel_groups.chain(groups, net, across_stages, max_width), net, itemsize, tiling)


def compiled(net: Network, itemsize: int, tiling: Tiling = Tiling()) -> list[Kernel]:
    """Returns the kernels of torch.compile's default: one per convolution, one for all pointwise operations between two."""
    return _kernels(kernel_groups.pointwise(net), net, itemsize, tiling)


def compute(net: Network) -> list[Kernel]:
    """Returns a kernel for each layer, with its FLOPs and no bytes."""
    return [replace(kernel, hbm_bytes=0, l2_bytes=0) for kernel in per_layer(net, 1) if kernel.flops]


def _kernels(groups: Iterable[Group], net: Network, itemsize: int, tiling: Tiling) -> list[Kernel]:
    return [_kernel(group, net, itemsize, tiling) for group in groups]


def _kernel(group: Group, net: Network, itemsize: int, tiling: Tiling) -> Kernel:
    own = {operation.writes: operation for operation in group.operations}
    reads: dict[int, int] = {}
    read_inside = dict.fromkeys(own, 0)
    for operation in group.operations:
        for value, elements in operation.reads:
            if value in own:
                read_inside[value] += 1
            else:
                reads[value] = max(elements, reads.get(value, 0))
    writes = sum(o.elements for value, o in own.items() if net.readers[value] > read_inside[value])
    products = [(operation, operation.gemm) for operation in group.operations if operation.gemm]
    loads = 0 if products else sum(reads.values())
    for product, _ in products:
        maker = own.get(product.reads[0][0])
        loads += tiling.loads(product, maker is not None and maker.kind != "pad", product is group.head)
    hbm_elements = sum(reads.values()) + writes + sum(gemm.weights for _, gemm in products)
    flops = sum(gemm.flops for _, gemm in products)
    return Kernel(group.name, flops, itemsize * hbm_elements, itemsize * loads)
