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
from torch import Tensor, nn

import resnet_kernels as rk

from ..fusion.report import table
from ..models import by_name
from ..perf import timing
from ..perf.steps import forward, forward_backward
from ..perf.timing import Timing
from . import arguments, terminal

HELP = "repeat the slim text's experiment: forward, then forward and backward, eager and fused side by side"
EXAMPLES = (
    "",
    "--model resnet50 --batch-size 8 --num-batches 20",
    "--model my_model.py:build --dtype bf16",
)

# The text's numbers, for a GPU.
_BATCH_SIZE, _NUM_BATCHES, _BURN_IN = 32, 100, 10
# With these, two CPU cores need under two minutes for the zoo's deepest network: 71 s for resnet_v2_200, beside other work.
_CPU_BATCH_SIZE, _CPU_IMAGE_SIZE, _CPU_NUM_BATCHES, _CPU_BURN_IN = 2, 64, 10, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.set_defaults(run=run)
    arguments.add_model_arguments(parser, "resnet_v2_152")
    arguments.add_sizes(
        parser,
        f"{_BATCH_SIZE} on a GPU, {_CPU_BATCH_SIZE} on a CPU",
        f"224, and 28 for d2l's networks; on a CPU at most {_CPU_IMAGE_SIZE}",
    )
    parser.add_argument(
        "--num-batches",
        type=arguments.positive,
        metavar="N",
        help=f"steps to time (default: {_NUM_BATCHES} on a GPU, {_CPU_NUM_BATCHES} on a CPU)",
    )


def run(options: argparse.Namespace) -> int:
    """Proves parity, times both networks and prints the result; returns the exit status, 1 where parity fails."""
    model = arguments.model_for(options)
    device = arguments.device_for(options)
    x, burn_in, notes = _sizes(options, model, device)
    # With --json, stdout holds the object alone.
    stream = sys.stderr if options.json else sys.stdout
    print("\n".join([arguments.machine(x), *notes]), file=stream, flush=True)

    announce = terminal.announce(options.json)
    announce("fusing")
    fused = rk.fuse(model, backend=options.backend)
    result = rk.verify(model, fused, x[:2], progress=lambda path: announce(f"verifying {path}"))
    announce("")
    if not result:
        terminal.show(result.to_json(indent=2) if options.json else result)
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
        terminal.show(f"\n{_table(runs, options.batch_size)}")
    return 0


def _sizes(options: argparse.Namespace, model: nn.Module, device: torch.device) -> tuple[Tensor, int, list[str]]:
    """Returns the images, the burn-in steps and the lines to print about the sizes; fills in the sizes not given."""
    on_cpu, made_for = device.type == "cpu", by_name.image_size(options.model)
    burn_in = _CPU_BURN_IN if on_cpu and options.num_batches is None else _BURN_IN
    batch_size, image_size, num_batches = (
        (_CPU_BATCH_SIZE, min(made_for, _CPU_IMAGE_SIZE), _CPU_NUM_BATCHES)
        if on_cpu
        else (_BATCH_SIZE, made_for, _NUM_BATCHES)
    )
    given = {name for name in ("batch_size", "image_size", "num_batches") if getattr(options, name) is not None}
    if by_name.example_input(options.model) is not None:
        given |= {"batch_size", "image_size"}
    x = arguments.images_for(options, model, batch_size, image_size)
    options.batch_size, options.image_size = len(x), arguments.size_value(x)
    options.num_batches = options.num_batches or num_batches
    values = {"batch_size": len(x), "image_size": max(x.shape[2:]), "num_batches": options.num_batches}
    text = {"batch_size": _BATCH_SIZE, "image_size": made_for, "num_batches": _NUM_BATCHES}
    smaller = [name for name, value in values.items() if on_cpu and name not in given and value < text[name]]
    notes = [
        f"{options.model}: batch {options.batch_size}, {arguments.size_of(x)}, {options.num_batches} batches after "
        f"{burn_in} to warm up"
    ]
    if smaller:
        flags = ", ".join("--" + name.replace("_", "-") for name in smaller)
        notes.append(
            f"on a CPU these are smaller than the text's {_BATCH_SIZE}, {made_for}x{made_for} and {_NUM_BATCHES} after "
            f"{_BURN_IN} unless given: {flags}"
        )
    return x, burn_in, notes


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
