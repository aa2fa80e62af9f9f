"""What a time is worth nothing without: work, ceilings, versions; and what follows from a time and them."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import shutil
import subprocess

import torch
from torch.utils.flop_counter import FlopCounterMode

from resnet_kernels.perf.ceilings import ceilings as measured_ceilings
from resnet_kernels.perf.roofline import bounds as roofline_bounds
from resnet_kernels.perf.roofline import network
from resnet_kernels.perf.roofline.bounds import Kernel, Machine

from .cases import AddRelu, BatchNormAct, Case, Conv
from .workload import ModuleRunner, Workload

SCHEMA = 1
CEILINGS = "measured here: the better of a matmul and a 1x1 convolution in the case's dtype; a copy"


def of_case(workload: Workload) -> dict:
    """extra_info that all contenders of a case share; __init__.py says what each field is."""
    case = workload.case
    return {
        "schema": SCHEMA,
        "case": str(case),
        "system": case.subject.system,
        "level": case.level,
        "subject": case.subject.name,
        "direction": case.direction,
        "dtype": str(case.platform.dtype).removeprefix("torch."),
        "batch": case.batch,
        "image_size": case.subject.size,
        **_machine(workload.device),
        "input_copies": len(workload.copies),
    }


@functools.cache
def _machine(device: torch.device) -> dict:
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} ({name})",
        "device_type": device.type,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "tf32": on_gpu and torch.backends.cudnn.conv.fp32_precision == "tf32",
    }


def _driver() -> str | None:
    """The NVIDIA driver's version; PyTorch knows only the CUDA version that it is good for."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return found.stdout.split("\n")[0].strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def work(workload: Workload) -> list[Kernel]:
    """What a call has to do at least, as the kernels that per-layer fusion makes of it.

    One kernel without bytes where nothing counts them: forward-backward passes, but for ops that only stream.
    """
    case, operands = workload.case, workload.operands
    subject, x = case.subject, operands.inputs[0]
    if isinstance(subject, (AddRelu, BatchNormAct)):
        return [Kernel(subject.name, 0, _passes(case) * x.numel() * x.element_size(), 0)]
    if case.backward:
        return [Kernel(subject.name, _counted_flops(workload), 0, 0)]
    if isinstance(subject, Conv):
        with torch.no_grad():
            y = workload.eager(*operands.inputs)
        elements = sum(t.numel() for t in (*operands.inputs, workload.eager.weight, y))
        return [Kernel(subject.name, _counted_flops(workload), elements * x.element_size(), 0)]
    return roofline_bounds.per_layer(network.trace(workload.eager, x), x.element_size())


def _counted_flops(workload: Workload) -> int:
    """Of convolutions and matrix products, counted on eager."""
    with FlopCounterMode(display=False) as counter:
        ModuleRunner(workload.eager, workload.case.backward).bind(workload.operands)()
    return counter.get_total_flops()


def _passes(case: Case) -> int:
    """How often an op's kernels have to read or write an activation: the formulas of kernels/*.py."""
    if isinstance(case.subject, AddRelu):
        # x, residual, y; backward: dy, y, and one dx for both.
        return 6 if case.backward else 3
    passes = 4 if case.subject.residual else 3
    if case.backward:
        # reduce: dy, x, (y, and dz out); apply: dz or dy, x, dx
        passes += 7 if case.subject.residual else 5
    return passes


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Machine:
    """What this device reaches in this run."""
    return measured_ceilings(device, dtype)


def of_time(kernels: list[Kernel], machine: Machine, images: int, seconds: float) -> dict:
    """extra_info that follows from the median time of a call."""
    flops = sum(kernel.flops for kernel in kernels)
    counted = all(kernel.hbm_bytes for kernel in kernels)
    gigabytes = sum(kernel.hbm_bytes for kernel in kernels) / 1e9 if counted else None
    bounds = [machine.bound(kernel) for kernel in kernels]
    least = math.fsum(bound for bound, _ in bounds)
    by_flops = math.fsum(bound for bound, roof in bounds if roof == "FLOP")
    return {
        "gflop": flops / 1e9,
        "hbm_gb": gigabytes,
        "img_per_s": images / seconds,
        "gflop_per_s": flops / 1e9 / seconds,
        "tflop_per_s": flops / 1e12 / seconds,
        "gb_per_s": None if gigabytes is None else gigabytes / seconds,
        "ceilings": {
            "tflop_per_s": machine.flops_per_s / 1e12,
            "gb_per_s": machine.hbm_bytes_per_s / 1e9,
            "source": CEILINGS,
        },
        "roofline_seconds": least,
        "roofline_share": least / seconds,
        "roofline_bound": "FLOP" if by_flops > least / 2 else "HBM",
    }
