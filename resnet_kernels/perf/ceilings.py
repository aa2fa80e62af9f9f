"""Rates that a device reaches, measured with a large copy and a large matrix product, or with nothing but FMAs."""

from __future__ import annotations

import torch

from ..kernels.cpu import library
from . import timing
from .roofline.bounds import Machine


def ceilings(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.5) -> Machine:
    """Measures the rates of a large product and a copy, each in the fastest of some rounds; L2 is not measured.

    The product is the faster of a matmul and a 1x1 convolution: by default PyTorch lets only convolutions run in TF32. In fp32
    on a CPU where our kernels are compiled it is FMAs without memory, since MKL's product lies under what convolutions reach
    on AMD's processors. Winograd's kernel may exceed that rate: it multiplies 2.25 times less than is counted.

    Args:
        device: CPU or CUDA.
        dtype: Any floating point dtype.
        seconds: Approximate time to spend.
    """
    size, elements = (8192, 2**29) if torch.device(device).type == "cuda" else (1024, 2**24)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    image = a.t().reshape(1, size, size, 1).contiguous(memory_format=torch.channels_last)
    source = torch.zeros(elements, dtype=dtype, device=device)
    target = torch.zeros_like(source)  # zeros, not empty: its pages must exist before the copy
    calls = {
        "matmul": lambda: torch.mm(a, b, out=product),
        "convolution": lambda: torch.conv2d(image, b[:, :, None, None]),
        "copy": lambda: target.copy_(source),
    }
    found = library.library_or_none() if torch.device(device).type == "cpu" and dtype == torch.float32 else None
    steps = 2_000_000  # some milliseconds
    if found is not None:
        threads = found.threads()
        calls["FMA"] = lambda: found.calls.rk_peak(found.number, steps, threads, found.parallel)
    fastest = {
        name: min(samples.samples) for name, samples in timing.interleave(calls, seconds=seconds, device=device).items()
    }
    moved = 2 * elements * source.element_size()
    rate = 2 * size**3 / min(fastest["matmul"], fastest["convolution"])
    if found is not None:
        rate = found.calls.rk_peak(found.number, steps, threads, found.parallel) / fastest["FMA"]
    return Machine(rate, moved / fastest["copy"])
