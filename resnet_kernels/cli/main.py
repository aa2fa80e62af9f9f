"""The command line: python -m resnet_kernels {demo, explain, verify, env, time, profile, train, tune, roofline, report}.

    demo      fuse a network, show what was fused, prove parity, time it against eager PyTorch on this machine
    explain   show what would be fused, and why the rest would not
    verify    compare a fused network with its original and with fp64, block by block
    env       show what the package runs on here: versions, devices, its compiled CPU kernels
    time      repeat the slim text's experiment: forward, then forward and backward, eager and fused side by side
    profile   show where a network's time goes on this machine, kernel by kernel; write a Chrome trace
    train     train a network of the zoo on real data; see train/command.py
    tune      measure what is fastest on this GPU, for backend="auto" to use; see tune.py
    roofline  compute how fast a network could be at most, kernel by kernel, on an assumed machine
    report    plot the results of `pytest benchmarks`, and compare them with an older file

Exit status: 0 is success. 1 means that parity fails or a report finds something slower, 2 that an argument or a file is
wrong, 130 that training or tuning was stopped.
"""

from __future__ import annotations

import argparse
import sys

from . import demo, profile, roofline, time, tune
from .arguments import add_model_arguments, positive
from .report import command as report
from .train import command as train

# The commands with a module of their own. Its add_arguments sets `run` in the options.
MODULES = {
    "time": time,
    "profile": profile,
    "train": train,
    "tune": tune,
    "roofline": roofline,
    "report": report,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command, sys.argv's unless arguments are given; returns the exit status."""
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
        (demo.demo, "fuse a network, show what was fused, prove parity, time it against eager"),
        (demo.explain, "show what would be fused, and why the rest would not"),
        (demo.verify, "compare a fused network with its original and with fp64, block by block"),
    ):
        command = commands.add_parser(run.__name__, help=help_text, description=help_text)
        command.set_defaults(run=run)
        add_model_arguments(command)
        if run is not demo.explain:
            command.add_argument("--batch-size", type=positive, default=1 if run is demo.demo else 2)
            command.add_argument("--image-size", type=positive, help="default: 224, and 28 for d2l")
        if run is demo.demo:
            command.add_argument("--seconds", type=float, default=20.0, help="time to spend on timing (default: 20)")
    what = "show what the package runs on here"
    command = commands.add_parser("env", help=what, description=what)
    command.set_defaults(run=demo.env)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    for name, module in MODULES.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.HELP))
    return parser
