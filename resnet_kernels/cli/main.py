"""The command line: python -m resnet_kernels {demo, explain, verify, env, time, profile, train, tune, roofline, report}.

    demo      fuse a network, show what was fused, prove parity, time it against eager PyTorch on this machine
    explain   show what would be fused, and why the rest would not
    verify    compare a fused network with its original and with fp64, block by block
    env       show what the package runs on here, for a bug report; see env.py
    time      repeat the slim text's experiment: forward, then forward and backward, eager and fused side by side
    profile   show where a network's time goes on this machine, kernel by kernel; write a Chrome trace
    train     train a network of the zoo on real data; see train/command.py
    tune      measure what is fastest on this GPU, for backend="auto" to use; see tune.py
    roofline  compute how fast a network could be at most, kernel by kernel, on an assumed machine
    report    plot the results of `pytest benchmarks`, and compare them with an older file

Exit status: see EXIT_STATUS.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

from . import demo, env, profile, roofline, time, tune
from .report import command as report
from .train import command as train

# The commands with a module of their own. Its add_arguments sets `run` in the options.
MODULES = {
    "env": env,
    "time": time,
    "profile": profile,
    "train": train,
    "tune": tune,
    "roofline": roofline,
    "report": report,
}

EXAMPLES = ("demo", "explain --model resnet50", "verify --model my_model.py:build", "COMMAND --help")
EXIT_STATUS = """\
exit status:
  0    success
  1    parity fails, or a report finds something of ours slower
  2    an argument, a model or a file is wrong; one line on stderr says how
  130  stopped by Ctrl-C; what tune and train had finished is saved
  141  the program that reads the output has ended, such as head"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command, sys.argv's unless arguments are given; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:
        # `| head` has read enough. Python would complain once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m resnet_kernels",
        description="Residual networks on fused kernels.",
        epilog=f"{_examples('', EXAMPLES)}\n\n{EXIT_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in demo.HELP:
        demo.add_arguments(_add(commands, name, demo.HELP[name], demo.EXAMPLES[name]), name)
    for name, module in MODULES.items():
        module.add_arguments(_add(commands, name, module.HELP, module.EXAMPLES))
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str, examples: Sequence[str]
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        # The formatter leaves all text as it is, for the examples' sake.
        description=textwrap.fill(what, shutil.get_terminal_size().columns - 2),
        epilog=_examples(name, examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _examples(command: str, examples: Sequence[str]) -> str:
    lines = (" ".join(filter(None, ("  python -m resnet_kernels", command, example))) for example in examples)
    return "\n".join(("examples:", *lines))
