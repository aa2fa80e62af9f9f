"""python -m resnet_kernels {demo, explain, verify, train}

    demo      fuse a network, show what was fused, prove parity, time it against eager PyTorch on this machine
    explain   what would be fused, and why the rest would not
    verify    parity, layer by layer, against fp64
    train     train a network of the zoo; see commands/train.py

Exit status: 0, or 1 where parity fails, or 2 for a wrong argument, or 130 when training was stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import resnet_kernels as rk

from . import models, timing
from .commands import train
from .report import table
from .verify import randomise_batch_norms_


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "train":
        return train.run(options)
    torch.manual_seed(options.seed)
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = _build(options.model).to(device, getattr(torch, options.dtype), memory_format=torch.channels_last)
        return options.run(options, randomise_batch_norms_(model.eval(), options.seed))
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
        command.add_argument(
            "--model",
            default="resnet50",
            help=f"{', '.join(models.BY_NAME)}, torchvision:NAME or timm:NAME (default: resnet50)",
        )
        command.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16", "float64"))
        command.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
        command.add_argument("--backend", default="auto", help="auto, triton, cudnn, cpu or eager (default: auto)")
        command.add_argument("--seed", type=int, default=0, help="of weights and images (default: 0)")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
        if run is not explain:
            command.add_argument("--batch-size", type=_positive, default=1 if run is demo else 2)
            command.add_argument("--image-size", type=_positive, help="default: 224, and 28 for d2l_resnet18")
        if run is demo:
            command.add_argument("--seconds", type=float, default=20.0, help="time to spend on timing (default: 20)")
    train.add_arguments(commands.add_parser("train", help=train.HELP, description=train.HELP))
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _build(name: str) -> nn.Module:
    source, _, rest = name.rpartition(":")
    if not source and rest in models.BY_NAME:
        return models.BY_NAME[rest]()
    if source == "torchvision":
        return _import("torchvision.models", "vision").get_model(rest, weights=None)
    if source == "timm":
        return _import("timm", "timm").create_model(rest, pretrained=False)
    known = ", ".join(models.BY_NAME)
    raise ValueError(f"--model must be one of {known}, torchvision:NAME or timm:NAME, got {name!r}")


def _import(package: str, extra: str):
    try:
        return __import__(package, fromlist=["_"])
    except ImportError as error:
        raise ValueError(
            f'{package} is needed for this model: pip install "resnet_kernels[{extra}]" ({error})'
        ) from error


def _image_batch(options: argparse.Namespace, model: nn.Module) -> Tensor:
    size = options.image_size or (28 if options.model == "d2l_resnet18" else 224)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    x = torch.randn(options.batch_size, first.in_channels, size, size)
    return x.to(first.weight.device, first.weight.dtype, memory_format=torch.channels_last)


def _announce(quiet: bool) -> Callable[[str], None]:
    """A line on a terminal's stderr that says what is being done, rewritten in place."""
    if quiet or not sys.stderr.isatty():
        return lambda what: None
    return lambda what: print(f"\r\033[K{what}", end="" if what else "\r", file=sys.stderr, flush=True)


def explain(options: argparse.Namespace, model: nn.Module) -> int:
    report = rk.explain(model, backend=options.backend)
    print(report.to_json(indent=2) if options.json else report)
    return 0


def verify(options: argparse.Namespace, model: nn.Module) -> int:
    announce = _announce(options.json)
    x = _image_batch(options, model)
    result = rk.verify(model, rk.fuse(model, backend=options.backend), x, progress=lambda p: announce(f"verifying {p}"))
    announce("")
    print(result.to_json(indent=2) if options.json else result)
    return 0 if result else 1


def demo(options: argparse.Namespace, model: nn.Module) -> int:
    announce = _announce(options.json)
    x = _image_batch(options, model)
    announce("fusing")
    fused = rk.fuse(model, backend=options.backend)
    report = rk.explain(fused)
    result = rk.verify(model, fused, x, progress=lambda path: announce(f"verifying {path}"))
    announce("")
    if not options.json:
        print(f"{_machine(x)}\n\n1. What was fused\n\n{report}\n\n2. Is it the same model?\n\n{result}\n")
    if not result:
        if options.json:
            print(json.dumps({"machine": _machine(x), "verify": json.loads(result.to_json())}, indent=2))
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
            "machine": _machine(x),
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


def _machine(x: Tensor) -> str:
    if x.is_cuda:
        name = torch.cuda.get_device_name(x.device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"resnet_kernels {rk.__version__}, torch {torch.__version__}, {name}, {str(x.dtype).removeprefix('torch.')}"


if __name__ == "__main__":
    # A warning about a fallback is a line of text here, not a traceback's.
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    sys.exit(main())
