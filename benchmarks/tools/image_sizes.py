"""python -m benchmarks.tools.image_sizes: times many image sizes in one process on the CPU, fused against eager, in turns.

A detector meets a new size in almost every call. So both are called once at each size first, when packed weights, oneDNN's
kernels and our programs are made, and several times more later, in another order. The ratio of a size is fused's time /
eager's, the median over its rounds; a first call has one round.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time

import torch
from torch import Tensor, nn

import resnet_kernels as rk
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.perf.timing import interleave, ratio

from ..parity import compare

Size = tuple[int, int]


def draw(count: int, smallest: int, largest: int, seed: int) -> list[Size]:
    """Returns random pairs (height, width)."""
    generator = random.Random(seed)
    return [(generator.randint(smallest, largest), generator.randint(smallest, largest)) for _ in range(count)]


def measure(model: nn.Module, sizes: list[Size], rounds: int, layout: torch.memory_format) -> dict:
    """Returns the ratios by size, {"first": [...], "later": [...]}, and the gate's "error" and "budget".

    Raises:
        AssertionError: if the fused model's numbers are wrong; no time counts then.
    """
    eager: nn.Module = randomise_batch_norms_(model).eval().to(memory_format=layout)  # type: ignore[call-overload]  # PyTorch's types lack memory_format
    fused, oracle = rk.fuse(eager, backend="cpu"), copy.deepcopy(eager).double()
    channels = next(m for m in eager.modules() if isinstance(m, nn.Conv2d)).in_channels
    images = [torch.randn(1, channels, *size).contiguous(memory_format=layout) for size in sizes]
    outputs: dict[str, list[Tensor]] = {"eager": [], "fused": []}

    def call(name: str, x: Tensor) -> None:
        outputs[name] = [(eager if name == "eager" else fused)(x)]

    first, later = [], []
    results: dict[str, list[Tensor]] = {"eager": [], "fused": [], "fp64": []}
    with torch.inference_mode():
        for i, x in enumerate(images):
            # The second finds the image, and the oneDNN kernels that both use, in the caches, so they swap places.
            names = ["eager", "fused"] if i % 2 else ["fused", "eager"]
            seconds = {}
            for name in names:
                started = time.perf_counter()
                call(name, x)
                seconds[name] = time.perf_counter() - started
                results[name] += outputs[name]
            first.append(seconds["fused"] / seconds["eager"])
            results["fp64"].append(oracle(x.double()))
        fused_y, eager_y, truth = ([torch.cat(results[name])] for name in ("fused", "eager", "fp64"))
        gate = compare(["y"], fused_y, eager_y, truth, torch.float32)
        assert not gate.failure, gate.failure
        order = random.Random(1).sample(range(len(images)), len(images))
        for i in order:
            calls = {name: (lambda name=name, x=images[i]: call(name, x)) for name in ("eager", "fused")}
            timings = interleave(calls, seconds=0, min_rounds=rounds)
            later.append((i, ratio(timings["fused"], timings["eager"])))
    return {"first": first, "later": [r for _, r in sorted(later)], "error": gate.error, "budget": gate.budget}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", choices=rk.models.BY_NAME)
    parser.add_argument("--sizes", type=int, default=50, help="how many")
    parser.add_argument("--smallest", type=int, default=64)
    parser.add_argument("--largest", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9, help="later calls of each size and contender")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contiguous", action="store_true", help="model and images in PyTorch's default layout")
    options = parser.parse_args()
    if min(options.sizes, options.smallest, options.rounds) < 1 or options.largest < options.smallest:
        parser.error("--sizes, --smallest and --rounds must be at least 1, and --largest at least --smallest")
    sizes = draw(options.sizes, options.smallest, options.largest, options.seed)
    layout = torch.contiguous_format if options.contiguous else torch.channels_last
    results = measure(rk.models.BY_NAME[options.model](), sizes, options.rounds, layout)
    for calls in ("first", "later"):
        ratios = results[calls]
        worst = max(range(len(sizes)), key=ratios.__getitem__)
        results[calls] = {
            "median": statistics.median(ratios),
            "worst": ratios[worst],
            "worst_size": sizes[worst],
            "slower": sum(r > 1 for r in ratios),
            "ratios": {f"{h}x{w}": round(r, 3) for (h, w), r in zip(sizes, ratios)},
        }
    print(
        json.dumps(
            {"torch": torch.__version__, "threads": torch.get_num_threads(), **vars(options), **results}, indent=1
        )
    )


if __name__ == "__main__":
    main()
