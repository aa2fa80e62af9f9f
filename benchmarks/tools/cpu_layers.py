"""Every distinct layer of the networks on this CPU, our kernels against oneDNN's fused convolution, in turns.

    python -m benchmarks.tools.cpu_layers [--threads 2] [--seconds 1.0] [--write benchmarks/results/cpu/NAME.json]

A layer is a convolution with a packed weight, bias and ReLU. Each candidate's error is judged against fp64 before it is timed.
The table names the one that runs without a measured table. A stem's convolution is also timed together with its max-pool,
oneDNN's with PyTorch's pool behind it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_kernels.fusion.report import table
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.cpu import convolution, library
from resnet_kernels.kernels.cpu.plans import Pool, Shapes
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.models import by_name
from resnet_kernels.ops import device_key, onednn, tuned_table
from resnet_kernels.ops.conv_problem import PackedProblem
from resnet_kernels.perf import ceilings, timing
from resnet_kernels.perf.environment import environment
from resnet_kernels.perf.tuning import autotuner, problems

NETWORKS = {
    "resnet18": 224,
    "resnet50": 224,
    "resnet_v2_50": 224,
    "resnext50_32x4d": 224,
    "d2l_resnet18": 96,
    "d2l_resnet18_keras": 28,
}
BATCHES = (1, 8)
CPU = torch.device("cpu")


def layers(networks: dict[str, int]) -> dict[PackedProblem, list[str]]:
    """The distinct layers of networks by name and image size, each with the networks that have it."""
    found: dict[PackedProblem, list[str]] = {}
    for name, size in networks.items():
        model = by_name.build(name).eval()
        noted = problems.note(model, by_name.image_batch(model, 1, size), packed=True)
        for asked, _ in noted:
            if isinstance(asked, PackedProblem):
                found.setdefault(asked, []).append(name)
    return found


def measure(asked: PackedProblem, batch: int, seconds: float) -> dict[str, Any]:
    """The times and errors of a layer's candidates; times in ms, ratios within rounds."""
    problem = problems.build([(asked, 1)], [batch], torch.float32, CPU)[0]
    operands = problem.operands()
    record: dict[str, Any] = {"candidates": {}}
    with torch.inference_mode():
        autotuner.check_candidates(problem, operands, record)
        calls = {name: _call(problem.candidates[name], operands) for name in problem.candidates}
        timings = timing.interleave(calls, seconds=seconds, device=CPU)
    best = timings[problem.default]
    return {
        "layer": str(asked),
        "batch": batch,
        "gflop": problem.flops / 1e9,
        "runs": problem.default,
        "against_onednn": round(timing.ratio(timings["onednn"], best), 3),
        "candidates": {
            name: {
                "ms": round(1e3 * timings[name].median, 4),
                "error": row.get("error"),
                "budget": row.get("budget"),
                **({"refused": row["refused"]} if "refused" in row else {}),
            }
            for name, row in record["candidates"].items()
        },
    }


def _call(run: Callable[..., Any], operands: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: run(*operands)


def stem(batch: int, size: int, seconds: float, channels: int = 3) -> dict[str, Any]:
    """A 7x7 convolution of stride 2 with bias and ReLU, and the 3x3 max-pool behind it, in one pass and in two."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(64, channels, 7, 7) / (49 * channels) ** 0.5, torch.randn(64)
    geometry, pool = Geometry((2, 2), (3, 3, 3, 3)), Pool(3, 2, (1, 1, 1, 1))
    packed, arguments = onednn.pack_weight(weight, geometry, x.shape), onednn.arguments(geometry)

    def by_onednn() -> Tensor:
        y = onednn.run(x, packed, bias, None, arguments, activation=RELU, bound=0.0)
        return torch.max_pool2d(y, 3, 2, 1)

    own = convolution.pack("direct", weight)
    assert own is not None
    shapes = Shapes(tuple(x.shape), tuple(weight.shape), geometry, True, pool)
    bound = convolution.Bound("direct", shapes, own, None, bias, torch.get_num_threads())
    calls = {"onednn": by_onednn, "direct": lambda: bound(x)}
    with torch.inference_mode():
        torch.testing.assert_close(bound(x), by_onednn(), rtol=1e-4, atol=1e-4)
        timings = timing.interleave(calls, seconds=seconds, device=CPU)
    return {
        "layer": f"stem with its pool {channels}x{size}x{size}->64 7x7/2, 3x3/2",
        "batch": batch,
        "gflop": 2 * batch * (size // 2) ** 2 * 64 * 49 * channels / 1e9,
        "runs": "direct",
        "against_onednn": round(timing.ratio(timings["onednn"], timings["direct"]), 3),
        "candidates": {name: {"ms": round(1e3 * timings[name].median, 4)} for name in calls},
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        ours = row["candidates"][row["runs"]]
        error = f"{ours['error']:.1e} / {ours['budget']:.1e}" if ours.get("budget") else ""
        cells.append(
            (
                row["layer"].removeprefix("packed conv "),
                str(row["batch"]),
                row["runs"],
                f"{row['candidates']['onednn']['ms']:.3f}",
                f"{ours['ms']:.3f}",
                f"{1e3 * row['gflop'] / ours['ms']:.0f}",
                f"{row['against_onednn']:.2f}",
                error,
            )
        )
    head = ("layer", "batch", "runs", "oneDNN ms", "ms", "GFLOP/s", "times oneDNN's speed", "error / budget")
    return table(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="for each layer, all candidates together (default: 1)"
    )
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(library.describe(), flush=True)
    tuned_table.cache_directory = lambda: None  # type: ignore[assignment]  # the rule is measured, not a table
    rate = ceilings.ceilings(CPU, torch.float32, seconds=2).flops_per_s
    rows = []
    found = layers({name: NETWORKS[name] for name in options.network})
    for batch in BATCHES:
        for asked, networks in found.items():
            rows.append({**measure(asked, batch, options.seconds), "networks": networks})
            print(as_table(rows[-1:]).splitlines()[-1], flush=True)
        rows.append({**stem(batch, 224, options.seconds), "networks": ["resnet18", "resnet50"]})
        print(as_table(rows[-1:]).splitlines()[-1], flush=True)
    print(as_table(rows))
    if options.write is not None:
        about = library.find()
        values = {
            "cpu": device_key.cpu_name(),
            "isa": getattr(about, "isa", None),
            "threads": options.threads,
            "fma_gflop_per_s": round(rate / 1e9, 1),
            "measured": environment(CPU),
            "rows": rows,
        }
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
