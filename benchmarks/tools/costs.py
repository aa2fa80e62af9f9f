"""python -m benchmarks.tools.costs: measures the package's costs beside its kernels, on the CPU.

    import   seconds that `import resnet_kernels` adds to `import torch`
    fuse     seconds of rk.fuse on ResNet-152
    checks   ms of a call of ResNet-50, batch 1, for seeing that model and weights have not changed, right after another call
    memory   peak resident memory of ResNet-50 at 224x224 over that of the built model, eager channels_last and fused

Each figure is the median of five fresh processes, because a process can't reset its memory peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cpuinfo import get_cpu_info


def import_seconds() -> float:
    import torch.fx  # noqa: F401

    start = time.perf_counter()
    import resnet_kernels  # noqa: F401

    return time.perf_counter() - start


def fuse_seconds() -> float:
    import resnet_kernels as rk

    model = rk.models.resnet152().eval()
    start = time.perf_counter()
    rk.fuse(model)
    return time.perf_counter() - start


def check_milliseconds() -> float:

    import resnet_kernels as rk
    from resnet_kernels.runtime import checked_calls
    from resnet_kernels.runtime.state import state_of

    torch.set_num_threads(2)
    eager = rk.models.resnet50().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's types lack memory_format
    model = rk.fuse(eager)
    x = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    samples = []
    with torch.inference_mode():
        for _ in range(60):
            model(x)  # which empties the caches, as calls do that follow each other
            state = state_of(model)
            assert state is not None and state.survey is not None
            start = time.perf_counter()
            with checked_calls.verified_below(state.survey, packs=True):  # as a call does
                samples.append(time.perf_counter() - start)
    return 1e3 * statistics.median(samples)


def peak_megabytes(fused: bool, batch: int) -> float:
    """Peak memory of five inferences in MB, less the resident memory of the built model and its input."""

    import resnet_kernels as rk

    torch.set_num_threads(2)
    model = rk.models.resnet50().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's types lack memory_format
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    if fused:
        rk.fuse_(model)
    with open("/proc/self/statm") as statm:
        built = int(statm.read().split()[1]) * resource.getpagesize()
    with torch.inference_mode():
        for _ in range(5):
            model(x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - built) / 1e6


FIGURES: dict[str, Callable[[], float]] = {
    "import_s": import_seconds,
    "fuse_resnet152_s": fuse_seconds,
    "checks_b1_ms": check_milliseconds,
    **{
        f"peak_{name}_b{batch}_MB": partial(peak_megabytes, fused, batch)
        for batch in (1, 8)
        for name, fused in (("eager", False), ("fused", True))
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=FIGURES, help="measure one figure in this process and print it")
    options = parser.parse_args()
    if options.one:
        print(FIGURES[options.one]())
        return
    command = [sys.executable, "-m", "benchmarks.tools.costs", "--one"]
    # pytest-benchmark's name of the CPU, as in the files of results.
    results: dict[str, Any] = {"cpu": f"{get_cpu_info()['brand_raw']}, {torch.backends.cpu.get_cpu_capability()}"}
    for name in FIGURES:
        runs = [subprocess.run([*command, name], capture_output=True, text=True, check=True) for _ in range(5)]
        results[name] = statistics.median(float(run.stdout.split()[-1]) for run in runs)
    import resnet_kernels as rk

    results["weights_MB"] = sum(p.numel() * p.element_size() for p in rk.models.resnet50().parameters()) / 1e6
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
