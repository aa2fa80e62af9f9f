"""python -m resnet_kernels roofline: the limit on a network's speed, kernel by kernel, on a machine of given rates.

Only shapes are computed, so it needs no GPU. The rates are assumptions, an H200's unless others are given. perf/roofline says
how FLOPs and bytes are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from ..fusion.report import table
from ..models import by_name, from_file
from ..ops.dtypes import BY_SHORT_NAME
from ..perf.roofline import bounds, counting, network
from ..perf.roofline.bounds import Kernel, Machine, Tiling
from . import arguments, terminal

HELP = "compute the limit on a network's speed by FLOPs, HBM bytes and L2 bytes, for an assumed machine; needs no GPU"
EXAMPLES = (
    "--model resnet50 --batch-size 256",
    "--model FILE.py --execution chained",
    "--flop-tflops 300 --hbm-tbps 2 --json",
)

_DTYPES = ("bf16", "fp16", "fp32")
_BATCH_SIZE = 256
_WAYS = """\
eager, auto and triton are counted: the model runs on the meta device, and what it launches is recorded (counting.py).
auto is what runs without a table of measurements. torch.compile goes by a rule for what it fuses. The time is a limit
by FLOP and HBM, launch by launch. FLOPs of triton's launches are not known one by one: its time is among the limits above."""
_EXECUTIONS = ("eager", "per-layer", "chained", "compute")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.set_defaults(run=run)
    arguments.add_model_name(parser, "resnet50")
    arguments.add_dtype(parser, _DTYPES, "bf16")
    arguments.add_sizes(parser, str(_BATCH_SIZE))
    h200 = bounds.h200()
    for name, what, default in (
        ("--flop-tflops", "TFLOP/s", f"{h200.flops_per_s / 1e12:g}, and half of it for fp32, as TF32"),
        ("--hbm-tbps", "TB/s from and to HBM", f"{h200.hbm_bytes_per_s / 1e12:g}"),
        ("--l2-tbps", "TB/s from L2 to shared memory", f"{h200.l2_bytes_per_s / 1e12:g}"),
    ):
        parser.add_argument(
            name, type=arguments.positive_float, help=f"{what} to assume (default: an H200's, {default})"
        )
    tiling = Tiling()
    parser.add_argument(
        "--block-n",
        type=arguments.positive,
        default=tiling.block_n,
        help=f"output channels of a tile, {tiling.block_m} pixels high, in layers of more than 64 (default: {tiling.block_n})",
    )
    parser.add_argument(
        "--execution",
        choices=_EXECUTIONS,
        metavar="NAME",
        default="per-layer",
        help=f"the execution whose kernels to list: {', '.join(_EXECUTIONS)} (default: per-layer)",
    )
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the limits of a network, as tables or as a JSON object; returns the exit status."""
    model = _build(options.model)
    x = arguments.images_for(options, model, _BATCH_SIZE)
    # The printed values are those of the images, wherever their size came from.
    options.batch_size, options.image_size = len(x), arguments.size_value(x)
    net = network.trace(model, x)
    machine = _machine(options)
    dtype = BY_SHORT_NAME[options.dtype]
    executions = _executions(net, dtype.itemsize, options.block_n)
    ways = _ways(model, x.to(dtype), executions)
    if options.json:
        print(json.dumps(_values(options, machine, executions, ways), indent=2))
        return 0
    flops = sum(kernel.flops for kernel in executions["compute"]) / options.batch_size
    terminal.show(
        f"{options.model}: batch {options.batch_size}, {arguments.size_of(x)}, {options.dtype}, "
        f"{flops / 1e9:.3f} GFLOP an image\n"
        f"{_assumptions(options, machine)}\n\n"
        f"Kernels, {options.execution}\n\n{_kernel_table(executions[options.execution], machine)}\n\n"
        f"Limits\n\n{_limit_table(executions, machine, options.batch_size)}\n\n"
        f"Launches\n\n{_way_table(ways, machine)}\n\n{_WAYS}"
    )
    return 0


def _build(name: str) -> nn.Module:
    """Builds a model by its name, without memory or initial weights where its constructor can do without."""
    if not from_file.is_file(name):  # whose function may load a checkpoint
        try:
            with torch.device("meta"):
                return by_name.build(name)
        except (RuntimeError, NotImplementedError):
            pass  # its constructor reads a number from a tensor that it made
    return by_name.build(name).to("meta")


def _machine(options: argparse.Namespace) -> Machine:
    default = bounds.h200(options.dtype)
    given = (options.flop_tflops, options.hbm_tbps, options.l2_tbps)
    defaults = (default.flops_per_s, default.hbm_bytes_per_s, default.l2_bytes_per_s)
    return Machine(*(rate if value is None else value * 1e12 for value, rate in zip(given, defaults)))


def _executions(net: network.Network, itemsize: int, block_n: int) -> dict[str, list[Kernel]]:
    tiling, shared = Tiling(block_n=block_n), Tiling(block_n=block_n, columns=2)
    return {
        "eager": bounds.eager(net, itemsize, tiling),
        "torch.compile": bounds.compiled(net, itemsize, tiling),
        "per-layer": bounds.per_layer(net, itemsize, tiling),
        "per-layer, merged shortcut": bounds.per_layer(net, itemsize, tiling, merged_shortcut=True),
        "per-layer, stem + max-pool": bounds.per_layer(net, itemsize, tiling, stem_with_pool=True),
        "per-layer, tap sharing": bounds.per_layer(net, itemsize, shared),
        "chained": bounds.chained(net, itemsize, tiling),
        "chained, merged shortcut": bounds.chained(net, itemsize, tiling, merged_shortcut=True),
        "chained, across stages": bounds.chained(net, itemsize, tiling, across_stages=True),
        "chained, across stages, merged shortcut": bounds.chained(
            net, itemsize, tiling, across_stages=True, merged_shortcut=True
        ),
        "chained, width <= 128": bounds.chained(net, itemsize, tiling, max_width=128),
        "compute": bounds.compute(net),
    }


def _ways(model: nn.Module, x: Tensor, executions: dict[str, list[Kernel]]) -> dict[str, list[Kernel]]:
    """Returns the launches of each way to run the model; without Triton only those of eager and torch.compile."""
    ways = {"eager": counting.count(model, x), "torch.compile": executions["torch.compile"]}
    with contextlib.suppress(RuntimeError):
        ways |= {backend: counting.count(model, x, backend) for backend in ("auto", "triton")}
    return ways


def _seconds(way: str, kernels: list[Kernel], machine: Machine) -> float | None:
    """Returns the least time of all launches by FLOP and HBM; None where FLOPs are not known launch by launch."""
    return None if way == "triton" else sum(machine.without_l2().bound(kernel)[0] for kernel in kernels)


def _way_table(ways: dict[str, list[Kernel]], machine: Machine) -> str:
    rows = []
    for way, kernels in ways.items():
        seconds = _seconds(way, kernels, machine)
        moved = sum(kernel.hbm_bytes for kernel in kernels)
        rows.append((way, str(len(kernels)), f"{moved / 1e6:.1f}", "" if seconds is None else f"{1e6 * seconds:.1f}"))
    return table(("way of running", "launches", "HBM MB", "at least us"), rows)


def _assumptions(options: argparse.Namespace, machine: Machine) -> str:
    tf32 = " as TF32" if options.dtype == "fp32" and options.flop_tflops is None else ""
    rates = (
        (options.flop_tflops, f"{machine.flops_per_s / 1e12:g} TFLOP/s{tf32}"),
        (options.hbm_tbps, f"{machine.hbm_bytes_per_s / 1e12:g} TB/s from and to HBM"),
        (options.l2_tbps, f"{machine.l2_bytes_per_s / 1e12:g} TB/s from L2 to shared memory"),
    )
    tiles = f"{Tiling().block_m}x{options.block_n}, {Tiling().block_m}x64 where a layer has at most 64 output channels"
    return "\n".join(
        (
            "Assumptions of the model, not measurements of this machine:",
            *(f"  {rate} ({'an H200' if given is None else 'as given'})" for given, rate in rates),
            f"  tiles of {tiles}",
        )
    )


def _kernel_table(kernels: list[Kernel], machine: Machine) -> str:
    rows = []
    for kernel in kernels:
        seconds, roof = machine.bound(kernel)
        sizes = (f"{kernel.flops / 1e9:.2f}", f"{kernel.hbm_bytes / 1e6:.1f}", f"{kernel.l2_bytes / 1e6:.1f}")
        rows.append((kernel.name, *sizes, f"{1e6 * seconds:.1f}", roof))
    return table(("kernel", "GFLOP", "HBM MB", "L2 MB", "at least us", "bound by"), rows)


def _limit_table(executions: dict[str, list[Kernel]], machine: Machine, batch_size: int) -> str:
    rows = [
        (name, str(len(kernels)), *(f"{limit:.0f}" for limit in _limits(kernels, machine, batch_size).values()))
        for name, kernels in executions.items()
    ]
    return table(("execution", "kernels", "img/s by FLOP and HBM", "img/s by FLOP, HBM and L2"), rows)


def _limits(kernels: list[Kernel], machine: Machine, batch_size: int) -> dict[str, float]:
    return {
        "flop_hbm": bounds.limit(kernels, machine.without_l2(), batch_size),
        "flop_hbm_l2": bounds.limit(kernels, machine, batch_size),
    }


def _values(
    options: argparse.Namespace,
    machine: Machine,
    executions: dict[str, list[Kernel]],
    ways: dict[str, list[Kernel]],
) -> dict[str, Any]:
    return {
        **{key: getattr(options, key) for key in ("model", "batch_size", "image_size", "dtype", "block_n")},
        "assumed": {
            "flop_tflops": machine.flops_per_s / 1e12,
            "hbm_tbps": machine.hbm_bytes_per_s / 1e12,
            "l2_tbps": machine.l2_bytes_per_s / 1e12,
        },
        "executions": {
            name: {
                "img_per_s": _limits(kernels, machine, options.batch_size),
                "kernels": [
                    {**vars(kernel), **dict(zip(("seconds", "bound_by"), machine.bound(kernel)))} for kernel in kernels
                ],
            }
            for name, kernels in executions.items()
        },
        "ways": {
            way: {
                "launches": len(kernels),
                "hbm_bytes": sum(kernel.hbm_bytes for kernel in kernels),
                "seconds": _seconds(way, kernels, machine),
            }
            for way, kernels in ways.items()
        },
    }
