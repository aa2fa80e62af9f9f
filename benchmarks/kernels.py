"""Where a contender's time goes, kernel by kernel: `extra_info["kernels"]` of models, with --full."""

from __future__ import annotations

from resnet_kernels.perf import profiling
from resnet_kernels.perf.profiling import RangeTime
from resnet_kernels.perf.roofline import network

from .contenders.base import Contender
from .workload import ModuleRunner, Runner, Workload

# Of those that a plot of layers compares. A compiled model's modules are not called, so its kernels have no paths.
PROFILED = {"eager": True, "fused": True, "compile": False}


def kernels(contender: Contender, runner: Runner, workload: Workload) -> list[dict]:
    """A row for each range of a call, as profiling.by_range has them; for a compiled model, for each kernel.

    {path, call, layer, name, kind, backward, seconds, flops, hbm_bytes}: seconds of a call; flops and hbm_bytes null where
    they are unknown (every backward).
    """
    assert isinstance(runner, ModuleRunner) and contender.name in PROFILED
    model = runner.module if PROFILED[contender.name] else None
    call = runner.bind(workload.operands)
    times = profiling.profile(call, model, device=workload.device, steps=3, warm_up=1)
    if model is None:
        return [_row(time.range, time.call, "", time.name, time.kind, time.backward, time.seconds) for time in times]
    x = workload.operands.inputs[0]
    rows = profiling.by_range(times, network.trace(workload.eager, x), x.element_size())
    return [
        _row(row.range, row.call, row.layer, _names(row), row.kind, row.backward, row.seconds, row.least)
        for row in rows
    ]


def _names(row: RangeTime) -> str:
    return " + ".join(dict.fromkeys(kernel.name for kernel in row.kernels))


def _row(path, call, layer, name, kind, backward, seconds, least=None) -> dict:
    return {
        "path": path,
        "call": call,
        "layer": layer,
        "name": name,
        "kind": kind,
        "backward": backward,
        "seconds": seconds,
        "flops": least.flops if least else None,
        "hbm_bytes": least.hbm_bytes if least else None,
    }
