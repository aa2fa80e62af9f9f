"""python -m resnet_kernels {demo, explain, verify, time, profile, train, roofline, report}

    demo      fuse a network, show what was fused, prove parity, time it against eager PyTorch on this machine
    explain   what would be fused, and why the rest would not
    verify    parity, layer by layer, against fp64
    time      the slim text's experiment: forward, then forward and backward, eager and fused side by side
    profile   where a network's time goes on this machine, kernel by kernel, as a share of the roofline; a Chrome trace
    train     train a network of the zoo on real data; see commands/train.py
    roofline  how fast a network could be at most, kernel by kernel, on an assumed machine
    report    a page with plots of what `pytest benchmarks` measured, and what changed against an older file

Exit status: 0, or 1 where parity fails or a report finds something slower, or 2 for a wrong argument or file, or 130 when
training was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings

import torch
from torch import Tensor, nn

import resnet_kernels as rk

from . import timing
from .commands import common, profile, report, roofline, time, train
from .report import table


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, TypeError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m resnet_kernels", description="Residual networks on fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    for run, help_text in (
        (demo, "fuse a network, show what was fused, prove parity, time it against eager"),
        (explain, "what would be fused, and why the rest would not"),
        (verify, "parity, layer by layer, against fp64"),
    ):
        command = commands.add_parser(run.__name__, help=help_text, description=help_text)
        command.set_defaults(run=run)
        common.add_model_arguments(command)
        if run is not explain:
            command.add_argument("--batch-size", type=common.positive, default=1 if run is demo else 2)
            command.add_argument("--image-size", type=common.positive, help="default: 224, and 28 for d2l")
        if run is demo:
            command.add_argument("--seconds", type=float, default=20.0, help="time to spend on timing (default: 20)")
    for command in (time, profile, train, roofline, report):
        name = command.__name__.rpartition(".")[2]
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=command.HELP))
    return parser


def _image_batch(options: argparse.Namespace, model: nn.Module) -> Tensor:
    return common.image_batch(model, options.batch_size, options.image_size or common.image_size(options.model))


def explain(options: argparse.Namespace) -> int:
    report = rk.explain(common.model_for(options), backend=options.backend)
    print(report.to_json(indent=2) if options.json else report)
    return 0


def verify(options: argparse.Namespace) -> int:
    model = common.model_for(options)
    announce = common.announce(options.json)
    x = _image_batch(options, model)
    result = rk.verify(model, rk.fuse(model, backend=options.backend), x, progress=lambda p: announce(f"verifying {p}"))
    announce("")
    print(result.to_json(indent=2) if options.json else result)
    return 0 if result else 1


def demo(options: argparse.Namespace) -> int:
    model = common.model_for(options)
    announce = common.announce(options.json)
    x = _image_batch(options, model)
    announce("fusing")
    fused = rk.fuse(model, backend=options.backend)
    report = rk.explain(fused)
    result = rk.verify(model, fused, x, progress=lambda path: announce(f"verifying {path}"))
    announce("")
    if not options.json:
        print(f"{common.machine(x)}\n\n1. What was fused\n\n{report}\n\n2. Is it the same model?\n\n{result}\n")
    if not result:
        if options.json:
            print(json.dumps({"machine": common.machine(x), "verify": json.loads(result.to_json())}, indent=2))
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
            "machine": common.machine(x),
            "report": json.loads(report.to_json()),
            "verify": json.loads(result.to_json()),
        }
        values["timings"] = {name: t.to_dict() for name, t in timings.items()}
        values["speedup"] = timing.ratio(eager, timings["fused"])
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
    print(
        f"3. How fast is it here? (batch {x.shape[0]}, {x.shape[2]}x{x.shape[3]}, interleaved)\n\n{table(head, rows)}"
    )
    return 0


if __name__ == "__main__":
    # A warning about a fallback is a line of text here, not a traceback's.
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    sys.exit(main())
