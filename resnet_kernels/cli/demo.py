"""The commands demo, explain and verify: the report, the parity and the speed of a fused network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import resnet_kernels as rk

from ..fusion.report import table
from ..perf import timing
from . import arguments, terminal
from .picture.draw import svg

HELP = {
    "demo": "fuse a network, show what was fused, prove parity, time it against eager",
    "explain": "show what would be fused, and why the rest would not",
    "verify": "compare a fused network with its original and with fp64, block by block",
}
EXAMPLES = {
    "demo": (
        "",
        "--model torchvision:resnet18 --batch-size 8",
        "--model my_model.py:build --seconds 5",
    ),
    "explain": (
        "--model resnet50 --svg resnet50.svg",
        "--model timm:seresnet18",
        "--model my_model.py:build --json",
    ),
    "verify": ("--model resnet_v2_50", "--model my_model.py:build --dtype bf16", "--json"),
}
_SECONDS = 20.0
_BATCH_SIZE = {"demo": 1, "verify": 2}


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Adds the options of demo, explain or verify to its parser."""
    parser.set_defaults(run={"demo": demo, "explain": explain, "verify": verify}[command])
    arguments.add_model_arguments(parser)
    if command in _BATCH_SIZE:
        arguments.add_sizes(parser, str(_BATCH_SIZE[command]))
    if command == "demo":
        arguments.add_seconds(parser, _SECONDS)
    if command == "explain":
        parser.add_argument("--svg", type=Path, metavar="FILE", help="write a picture of the report to this file")


def explain(options: argparse.Namespace) -> int:
    """Prints the report of the blocks that would be fused, and draws it if asked to; returns the exit status."""
    model = arguments.model_for(options)
    report = rk.explain(model, backend=options.backend)
    if options.svg is not None:
        options.svg.write_text(svg(report, options.model), encoding="utf-8", newline="\n")
    about = arguments.about_kernels(arguments.device_for(options))
    terminal.show(report.to_json(indent=2) if options.json else f"{report}\n{about}".rstrip())
    return 0


def verify(options: argparse.Namespace) -> int:
    """Prints the parity of each block; returns the exit status, 1 where parity fails."""
    model = arguments.model_for(options)
    announce = terminal.announce(options.json)
    x = arguments.images_for(options, model, _BATCH_SIZE["verify"])
    result = rk.verify(model, rk.fuse(model, backend=options.backend), x, progress=lambda p: announce(f"verifying {p}"))
    announce("")
    terminal.show(result.to_json(indent=2) if options.json else result)
    return 0 if result else 1


def demo(options: argparse.Namespace) -> int:
    """Prints the report, the parity and the times; returns the exit status, 1 where parity fails."""
    model = arguments.model_for(options)
    announce = terminal.announce(options.json)
    x = arguments.images_for(options, model, _BATCH_SIZE["demo"])
    announce("fusing")
    fused = rk.fuse(model, backend=options.backend)
    report = rk.explain(fused)
    result = rk.verify(model, fused, x, progress=lambda path: announce(f"verifying {path}"))
    announce("")
    if not options.json:
        about = arguments.about_kernels(x.device)
        terminal.show(
            f"{arguments.machine(x)}\n{about}\n1. What was fused\n\n{report}\n\n2. Is it the same model?\n\n{result}\n"
        )
    if not result:
        if options.json:
            print(json.dumps({"machine": arguments.machine(x), "verify": json.loads(result.to_json())}, indent=2))
        return 1
    with torch.inference_mode():
        timings = timing.interleave(
            {"eager channels_last": lambda: model(x), "fused": lambda: fused(x)},
            seconds=options.seconds,
            device=x.device,
            progress=lambda rounds, spent: announce(f"timing, round {rounds}, {spent:.0f} of {options.seconds:.0f} s"),
        )
    announce("")
    eager = timings["eager channels_last"]
    if options.json:
        values = {
            "machine": arguments.machine(x),
            "report": json.loads(report.to_json()),
            "verify": json.loads(result.to_json()),
            "timings": {name: t.to_dict() for name, t in timings.items()},
            "speedup": timing.ratio(eager, timings["fused"]),
        }
        print(json.dumps(values, indent=2))
        return 0
    rows = [
        (
            name,
            *(f"{1e3 * value:.2f}" for value in (t.median, t.p20, t.p80)),
            f"{x.shape[0] / t.median:.1f}",
            f"{timing.ratio(eager, t):.2f}x",
        )
        for name, t in timings.items()
    ]
    head = ("forward", "median ms", "p20", "p80", "img/s", "against eager")
    terminal.show(
        f"3. How fast is it here? (batch {x.shape[0]}, {arguments.size_of(x)}, interleaved)\n\n{table(head, rows)}"
    )
    return 0
