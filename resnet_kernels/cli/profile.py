"""python -m resnet_kernels profile: a network's time on this machine, kernel by kernel.

Each row is a call of a module or of a fused step: the kernels that ran in it, the rates that they reached, and their share of
the roofline. That is the least time that the FLOPs and bytes need on this machine, over the measured time. Data that stays in
a cache can make it more than 100%. perf/profiling.py says how time is measured, perf/roofline how FLOPs and bytes are counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import resnet_kernels as rk

from ..fusion.report import table
from ..ops import tuned_table
from ..ops.dtypes import short_name
from ..perf import ceilings, profiling, timing
from ..perf.profiling import KINDS, RangeTime
from ..perf.roofline import bounds, network
from ..perf.roofline.bounds import Machine
from ..perf.steps import forward, forward_backward
from . import arguments, terminal

HELP = "show where a network's time goes on this machine, kernel by kernel, as a share of the roofline"
EXAMPLES = (
    "--model resnet50 --batch-size 1",
    "--model timm:resnet50 --backward --top 10",
    "--model my_model.py:build --trace trace.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.set_defaults(run=run)
    arguments.add_model_arguments(parser)
    arguments.add_sizes(parser, "32 on a GPU, 2 on a CPU")
    parser.add_argument("--steps", type=arguments.positive, default=5, help="steps to average (default: 5)")
    parser.add_argument("--backward", action="store_true", help="profile a training step: forward and backward")
    parser.add_argument("--eager", action="store_true", help="profile plain PyTorch instead of the fused network")
    parser.add_argument("--top", type=arguments.positive, default=20, help="rows to show, slowest first (default: 20)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace (chrome://tracing, Perfetto)")


def run(options: argparse.Namespace) -> int:
    """Profiles a network and prints the tables or the JSON object; returns the exit status."""
    if options.trace and not options.trace.absolute().parent.is_dir():
        raise ValueError(f"--trace must be in a directory that exists, got {options.trace}")
    model = arguments.model_for(options)
    device = arguments.device_for(options)
    x = arguments.images_for(options, model, 2 if device.type == "cpu" else 32)
    net = network.trace(model, x)
    announce = terminal.announce(options.json)
    announce("fusing")
    profiled = model if options.eager else rk.fuse(model, backend=options.backend)
    call = forward_backward(model, x)(profiled, x) if options.backward else forward(profiled, x)

    announce("profiling")
    times = profiling.profile(call, profiled, device=device, steps=options.steps, trace=options.trace)
    rows = sorted(profiling.by_range(times, net, x.element_size()), key=lambda row: -row.seconds)
    announce("timing")
    step = timing.interleave({"step": call}, seconds=1.0, device=device)["step"].median
    announce("measuring ceilings")
    machine, whose = _machine(x)
    announce("")

    if options.json:
        print(json.dumps(_values(options, x, rows, machine, whose, step), indent=2))
        return 0
    terminal.show(f"{arguments.machine(x)}\n{_what(options, x)}\n{_ceilings(machine, whose)}\n")
    terminal.show(f"{_row_table(rows, machine, options.top)}\n\n{_total_table(rows)}\n")
    summed = sum(row.seconds for row in rows)
    print(f"{1e3 * summed:.2f} ms a step in all of these, {1e3 * step:.2f} ms (median) for a step without the profiler")
    if options.trace:
        print(f"Chrome trace: {options.trace}", file=sys.stderr)
    return 0


def _machine(x: Tensor) -> tuple[Machine, str]:
    """Returns the rates to compare with, and where they come from."""
    # The H200's rate in fp32 is TF32's.
    has_rate = tuned_table.dtype_name(x.dtype) in ("bf16", "fp16", "tf32")
    if x.is_cuda and "H200" in torch.cuda.get_device_name(x.device) and has_rate:
        return bounds.h200(short_name(x.dtype)), "of an H200"
    return ceilings.ceilings(x.device, x.dtype), "measured ceilings: FMAs or a matrix product, and a copy, here and now"


def _what(options: argparse.Namespace, x: Tensor) -> str:
    who = "plain PyTorch" if options.eager else f'fused, backend="{options.backend}"'
    what = "a training step" if options.backward else "inference"
    return f"{options.model}, {who}: {what}, batch {x.shape[0]}, {arguments.size_of(x)}, {options.steps} steps"


def _ceilings(machine: Machine, whose: str) -> str:
    return f"{machine.flops_per_s / 1e9:.0f} GFLOP/s, {machine.hbm_bytes_per_s / 1e9:.1f} GB/s ({whose})"


def _share(row: RangeTime, machine: Machine) -> float | None:
    return None if row.least is None or not row.seconds else machine.bound(row.least)[0] / row.seconds


def _row_table(rows: Sequence[RangeTime], machine: Machine, top: int) -> str:
    total = sum(row.seconds for row in rows)
    cells = []
    for row in rows[:top]:
        share, least = _share(row, machine), row.least
        rates = (0.0, 0.0) if least is None else (least.flops / row.seconds, least.hbm_bytes / row.seconds)
        cells.append(
            (
                (row.range or "(outside of modules)") + (" (backward)" if row.backward else ""),
                _kernels(row),
                row.kind,
                f"{1e3 * row.seconds:.3f}",
                f"{row.seconds / total:.1%}",
                *(f"{rate / 1e9:.1f}" if rate else "" for rate in rates),
                "" if share is None else f"{share:.0%}",
            )
        )
    head = ("module", "what ran", "kind", "ms", "of all", "GFLOP/s", "GB/s", "of roofline")
    rest = sum(row.seconds for row in rows[top:])
    if len(rows) > top:
        cells.append((f"{len(rows) - top} more", "", "", f"{1e3 * rest:.3f}", f"{rest / total:.1%}", "", "", ""))
    return table(head, cells)


def _kernels(row: RangeTime) -> str:
    """Returns the slowest kernel's name, cut because templates make names of a page, and the number of the others."""
    slowest = max(row.kernels, key=lambda kernel: kernel.seconds).name
    more = f" and {len(row.kernels) - 1} more" if len(row.kernels) > 1 else ""
    return (slowest if len(slowest) <= 48 else f"{slowest[:45]}...") + more


def _totals(rows: Sequence[RangeTime]) -> dict[str, dict[str, float]]:
    """Returns pass -> kind -> seconds per step, without a pass that has no time."""
    kernels = [kernel for row in rows for kernel in row.kernels]
    totals = {
        name: {kind: sum(k.seconds for k in kernels if k.backward == backward and k.kind == kind) for kind in KINDS}
        for name, backward in (("forward", False), ("backward", True))
    }
    return {name: kinds for name, kinds in totals.items() if any(kinds.values())}


def _total_table(rows: Sequence[RangeTime]) -> str:
    totals = _totals(rows)
    whole = sum(sum(kinds.values()) for kinds in totals.values())
    cells = []
    for kind in KINDS:
        seconds = [kinds[kind] for kinds in totals.values()]
        cells.append((kind, *(f"{1e3 * s:.3f}" for s in seconds), f"{sum(seconds) / whole:.1%}"))
    return table(("kind", *(f"{name} ms" for name in totals), "of all"), cells)


def _values(
    options: argparse.Namespace, x: Tensor, rows: Sequence[RangeTime], machine: Machine, whose: str, step: float
) -> dict[str, Any]:
    return {
        "machine": arguments.machine(x),
        **{key: getattr(options, key) for key in ("model", "backend", "eager", "backward", "steps")},
        "batch_size": x.shape[0],
        "image_size": arguments.size_value(x),
        "ceilings": {
            "flops_per_s": machine.flops_per_s,
            "hbm_bytes_per_s": machine.hbm_bytes_per_s,
            "whose": whose,
        },
        "seconds_per_step": step,
        "totals": _totals(rows),
        "rows": [
            {
                "range": row.range,
                "call": row.call,
                "backward": row.backward,
                "kind": row.kind,
                "layer": row.layer,
                "seconds": row.seconds,
                "flops": row.least and row.least.flops,
                "hbm_bytes": row.least and row.least.hbm_bytes,
                "share_of_roofline": _share(row, machine),
                "kernels": [{"name": k.name, "kind": k.kind, "seconds": k.seconds} for k in row.kernels],
            }
            for row in rows
        ],
    }
