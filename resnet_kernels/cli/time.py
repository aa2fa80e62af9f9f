"""python -m resnet_kernels time: the slim text's experiment, eager and fused side by side.

Parity is proved first, on a batch of two: the speed of wrong results means nothing. The forward run is in eval mode and
without gradients. The forward-backward run is in train mode, with cross-entropy on random labels and gradients of all
parameters. Eager and fused take turns in each step, so a clock that drifts affects both.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor

import resnet_kernels as rk

from ..fusion.report import table
from ..models import by_name
from ..perf import timing
from ..perf.steps import forward, forward_backward
from ..perf.timing import Timing
from . import arguments

HELP = "repeat the slim text's experiment: forward, then forward and backward, eager and fused side by side"

# The text's numbers, for a GPU.
_BATCH_SIZE, _NUM_BATCHES, _BURN_IN = 32, 100, 10
# With these, two CPU cores need under two minutes for the zoo's deepest network: 71 s for resnet_v2_200, beside other work.
_CPU_BATCH_SIZE, _CPU_IMAGE_SIZE, _CPU_NUM_BATCHES, _CPU_BURN_IN = 2, 64, 10, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.set_defaults(run=run)
    arguments.add_model_arguments(parser, "resnet_v2_152")
    for name, on_gpu, on_cpu in (
        ("--batch-size", _BATCH_SIZE, _CPU_BATCH_SIZE),
        ("--image-size", "224, and 28 for d2l", f"at most {_CPU_IMAGE_SIZE}"),
        ("--num-batches", _NUM_BATCHES, _CPU_NUM_BATCHES),
    ):
        parser.add_argument(name, type=arguments.positive, help=f"default: {on_gpu} on a GPU, {on_cpu} on a CPU")


def run(options: argparse.Namespace) -> int:
    """Proves parity, times both networks and prints the result; returns the exit status, 1 where parity fails."""
    model = arguments.model_for(options)
    device = next(model.parameters()).device
    burn_in, notes = _set_sizes(options, device)
    x = by_name.image_batch(model, options.batch_size, options.image_size)
    # With --json, stdout holds the object alone.
    stream = sys.stderr if options.json else sys.stdout
    print("\n".join([arguments.machine(x), *notes]), file=stream, flush=True)

    announce = arguments.announce(options.json)
    announce("fusing")
    fused = rk.fuse(model, backend=options.backend)
    result = rk.verify(model, fused, x[:2], progress=lambda path: announce(f"verifying {path}"))
    announce("")
    if not result:
        print(result.to_json(indent=2) if options.json else result)
        return 1

    runs = {}
    nets = {"eager": model, "fused": fused}
    for name, step in (("Forward", forward), ("Forward-backward", forward_backward(model, x))):
        steps = {f"{name}, {who}": step(net, x) for who, net in nets.items()}
        timings = timing.time_runs(steps, options.num_batches, burn_in, device, stream)
        runs[name] = dict(zip(nets, timings.values()))
    if options.json:
        print(json.dumps(_values(options, x, burn_in, runs), indent=2))
    else:
        print(f"\n{_table(runs, options.batch_size)}")
    return 0


def _set_sizes(options: argparse.Namespace, device: torch.device) -> tuple[int, list[str]]:
    """Fills in the sizes that were not given; returns the burn-in steps and the lines to print about the sizes."""
    on_cpu, made_for = device.type == "cpu", by_name.image_size(options.model)
    burn_in = _CPU_BURN_IN if on_cpu and options.num_batches is None else _BURN_IN
    defaults = {
        "batch_size": _CPU_BATCH_SIZE if on_cpu else _BATCH_SIZE,
        "image_size": min(made_for, _CPU_IMAGE_SIZE) if on_cpu else made_for,
        "num_batches": _CPU_NUM_BATCHES if on_cpu else _NUM_BATCHES,
    }
    smaller = [name for name in defaults if on_cpu and getattr(options, name) is None]
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    size = f"{options.image_size}x{options.image_size}"
    notes = [
        f"{options.model}: batch {options.batch_size}, {size}, {options.num_batches} batches after {burn_in} to warm up"
    ]
    if smaller:
        flags = ", ".join("--" + name.replace("_", "-") for name in smaller)
        notes.append(
            f"on a CPU these are smaller than the text's {_BATCH_SIZE}, {made_for}x{made_for} and {_NUM_BATCHES} after "
            f"{_BURN_IN} unless given: {flags}"
        )
    return burn_in, notes


def _table(runs: dict[str, dict[str, Timing]], batch_size: int) -> str:
    rows = [
        (
            f"{name}, {who}",
            f"{1e3 * t.mean:.2f} +/- {1e3 * t.std:.2f}",
            f"{batch_size / t.mean:.1f}",
            f"{timing.ratio(both['eager'], t):.2f}x",
        )
        for name, both in runs.items()
        for who, t in both.items()
    ]
    return table(("run", "ms / batch", "img/s", "times eager's speed (median of pairs)"), rows)


def _values(options: argparse.Namespace, x: Tensor, burn_in: int, runs: dict[str, dict[str, Timing]]) -> dict[str, Any]:
    return {
        "machine": arguments.machine(x),
        **{key: getattr(options, key) for key in ("model", "batch_size", "image_size", "num_batches")},
        "num_steps_burn_in": burn_in,
        "runs": {
            name: {
                **{who: {"mean": t.mean, "std": t.std, **t.to_dict()} for who, t in both.items()},
                "speedup": timing.ratio(both["eager"], both["fused"]),
            }
            for name, both in runs.items()
        },
    }
