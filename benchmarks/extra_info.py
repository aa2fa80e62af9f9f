"""Metadata of a measured time: case, work, ceilings, versions, the rates they give, and a model's time by kernel."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import shutil
import subprocess

import torch
from torch.utils.flop_counter import FlopCounterMode

from resnet_kernels.kernels.target import allows_tf32
from resnet_kernels.perf import profiling, schema
from resnet_kernels.perf.ceilings import ceilings as measured_ceilings
from resnet_kernels.perf.roofline import bounds as roofline_bounds
from resnet_kernels.perf.roofline import network
from resnet_kernels.perf.roofline.bounds import Kernel, Machine
from resnet_kernels.perf.schema import CaseInfo, Ceilings, Rates, Versions

from .cases import AddRelu, BatchNormAct, Case, Conv
from .subjects import has_residual
from .workload import ModuleRunner, Runner, Workload

CEILINGS = (
    "measured here: FMAs alone for fp32 on a CPU with our kernels, else the better of a matmul and a 1x1 convolution in the "
    "case's dtype; a copy"
)
# Contenders whose layers a plot compares. False: no modules are called, so a compiled model's kernels have no paths.
PROFILED = {"eager": True, "fused": True, "compile": False}


def of_case(workload: Workload, busy_elsewhere: float | None) -> CaseInfo:
    """Returns the metadata that all contenders of a case share."""
    case, device = workload.case, workload.device
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    return CaseInfo(
        system=case.subject.system,
        level=case.level,
        subject=case.subject.name,
        direction=case.direction,
        dtype=str(case.platform.dtype).removeprefix("torch."),
        batch=case.batch,
        image_size=case.subject.size,
        device=f"{device.type} ({name})",
        device_type=device.type,
        threads=torch.get_num_threads(),
        busy_elsewhere=busy_elsewhere,
    )


@functools.cache
def versions(device: torch.device) -> Versions:
    """Returns the versions of the software that a time on a device depends on."""
    return Versions(
        torch=torch.__version__,
        triton=_version("triton"),
        driver=_driver() if device.type == "cuda" else None,
        cuda=torch.version.cuda,
        cudnn=str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
    )


def tf32(device: torch.device) -> bool:
    """Returns whether PyTorch's convolutions of float32 may run in TF32 on a device."""
    # torch.backends.cudnn.conv is an object that PyTorch's types don't mention.
    return device.type == "cuda" and allows_tf32(torch.float32)


def _driver() -> str | None:
    """The NVIDIA driver's version; PyTorch knows only the CUDA version that the driver supports."""
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
    """Returns the least work of a call, as the kernels that per-layer fusion makes of it.

    The result is one kernel without bytes where nothing counts them: forward-backward passes, except of ops that only stream.
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
    """FLOPs of convolutions and matrix products, counted on eager."""
    with FlopCounterMode(display=False) as counter:
        ModuleRunner(workload.eager, workload.case.backward).bind(workload.operands)()
    return counter.get_total_flops()


def _passes(case: Case) -> int:
    """Reads and writes of whole activations by an op's kernels, from the formulas in kernels/*.py."""
    if not has_residual(case.subject):
        # x twice, y; backward: reduce reads dy, x; apply reads dy, x and writes dx.
        return 8 if case.backward else 3
    if isinstance(case.subject, AddRelu):
        # x, residual, y; backward: dy, y, and one dx for both.
        return 6 if case.backward else 3
    # x twice, residual, y; backward: reduce reads dy, x, y and writes dz; apply reads dz, x and writes dx.
    return 11 if case.backward else 4


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measures the rates that a device reaches, once a run."""
    return measured_ceilings(device, dtype)


def of_time(kernels: list[Kernel], machine: Machine, images: int, seconds: float) -> Rates:
    """Returns the rates that a call's median time and its work give."""
    flops = sum(kernel.flops for kernel in kernels)
    counted = all(kernel.hbm_bytes for kernel in kernels)
    gigabytes = sum(kernel.hbm_bytes for kernel in kernels) / 1e9 if counted else None
    bounds = [machine.bound(kernel) for kernel in kernels]
    least = math.fsum(bound for bound, _ in bounds)
    by_flops = math.fsum(bound for bound, roof in bounds if roof == "FLOP")
    return Rates(
        gflop=flops / 1e9,
        hbm_gb=gigabytes,
        img_per_s=images / seconds,
        gflop_per_s=flops / 1e9 / seconds,
        tflop_per_s=flops / 1e12 / seconds,
        gb_per_s=None if gigabytes is None else gigabytes / seconds,
        ceilings=Ceilings(machine.flops_per_s / 1e12, machine.hbm_bytes_per_s / 1e9, CEILINGS),
        roofline_seconds=least,
        roofline_share=least / seconds,
        roofline_bound="FLOP" if by_flops > least / 2 else "HBM",
    )


def kernels(contender: str, runner: Runner, workload: Workload) -> tuple[schema.Kernel, ...]:
    """Returns a contender's time by range, as profiling.by_range has them, or by kernel for a compiled model.

    Args:
        contender: a name of PROFILED.
    """
    assert isinstance(runner, ModuleRunner)
    model = runner.module if PROFILED[contender] else None
    call = runner.bind(workload.operands)
    times = profiling.profile(call, model, device=workload.device, steps=3, warm_up=1)
    if model is None:
        return tuple(
            schema.Kernel(time.range, time.kind, time.seconds, time.name, call=time.call, backward=time.backward)
            for time in times
        )
    x = workload.operands.inputs[0]
    return tuple(
        schema.Kernel(
            path=row.range,
            kind=row.kind,
            seconds=row.seconds,
            name=" + ".join(dict.fromkeys(kernel.name for kernel in row.kernels)),
            flops=row.least.flops if row.least else None,
            hbm_bytes=row.least.hbm_bytes if row.least else None,
            call=row.call,
            layer=row.layer,
            backward=row.backward,
        )
        for row in profiling.by_range(times, network.trace(workload.eager, x), x.element_size())
    )
