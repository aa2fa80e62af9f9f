"""Launches everything that a network would launch on a GPU, on the stand-in; test_rehearsal.py starts it.

    python rehearse.py call resnet18 --batch 1 2 256       inference, then the same inside a capture
    python rehearse.py call resnet18 --freeze              the same of a frozen network
    python rehearse.py train resnet50 --batch 2            a training step
    python rehearse.py copies                              operands in layouts that no kernel reads
    python rehearse.py tune resnet50 --batch 1             every candidate that `tune` would measure there
    python rehearse.py time resnet50                       the host's time: of a call, and of launches

Prints one line of JSON: launches by kernel and batch, or microseconds. Ends with an error at the first launch that a driver
would refuse, or that reads memory of a tensor that was freed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import stand_in
import torch

sys.path.append(str(Path(__file__).parents[1]))

stand_in.install()

import resnet_kernels as rk  # noqa: E402
from resnet_kernels.kernels.sm90 import split_k_counters, stem, stem_layout  # noqa: E402
from resnet_kernels.perf.tuning import problems  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZE = 224


def network(name: str, dtype: torch.dtype, memory_format=torch.channels_last) -> torch.nn.Module:
    return rk.models.BY_NAME[name]().to(dtype=dtype, memory_format=memory_format)


def images(batch: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(batch, 3, SIZE, SIZE, dtype=dtype)


def launched(run) -> Counter[str]:
    """By kernel, the launches of a call; all of them reached the driver."""
    stand_in.LAUNCHED.clear()
    before = stand_in.launches_that_reached_the_driver()
    run()
    count = Counter(stand_in.LAUNCHED)
    assert stand_in.launches_that_reached_the_driver() - before == sum(count.values())
    return count


def call(options: argparse.Namespace, mode: stand_in.Shapes) -> dict:
    """A second call launches what the first one did; so does one inside a capture, with counters of its own.

    A frozen network's first call has constants to write besides, and its captured one reads what earlier ones have written.
    """
    found = {}
    # A layout that no kernel reads, too: copies of weights and images then have to outlive their launches.
    formats = (torch.contiguous_format, torch.channels_last) if options.batch == [1] else (torch.channels_last,)
    for memory_format in formats:
        model = network(options.model, options.dtype, memory_format).eval()
        fused = rk.fuse(model, backend="triton", freeze=options.freeze)
        with torch.no_grad():
            for batch in options.batch:
                x = images(batch, options.dtype)
                first, second = (launched(partial(fused, x)) for _ in range(2))
                if options.freeze:
                    assert first > second, f"a frozen network's second call launches {second}, the first one {first}"
                else:
                    assert first == second, f"a second call launches {second}, the first one {first}"
                captured = capture(partial(fused, x), mode)
                assert captured == second, f"a captured call launches {captured}, an ordinary one {second}"
                cloned = mode.called["aten.clone.default"]
                assert not (options.freeze and cloned), f"a frozen network's call copies {cloned} tensors"
                found[batch] = dict(second)
    return found


def capture(run: Callable[[], object], mode: stand_in.Shapes) -> Counter[str]:
    """The launches of a captured call, which may not copy anything from the host."""
    split_k_counters._is_capturing = lambda device: True
    mode.called.clear()
    stand_in.SPANS.clear()
    try:
        count = launched(run)
    finally:
        split_k_counters._is_capturing = lambda device: False
    copied = mode.called["aten.lift_fresh.default"]
    assert not copied, f"{copied} tensors are made from host memory inside a capture"
    # A replay may run beside another launch, so nobody else may have its counters.
    spans = sorted(tensors["counter_ptr"] for tensors in stand_in.SPANS if "counter_ptr" in tensors)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "captured launches share counters"
    return count


def train(options: argparse.Namespace, mode: stand_in.Shapes) -> dict:
    fused = rk.fuse(network(options.model, options.dtype).train(), backend="triton")
    found = {}
    for batch in options.batch:
        x, labels = images(batch, options.dtype), torch.zeros(batch, dtype=torch.int64)

        def step(x=x, labels=labels) -> None:
            torch.nn.functional.cross_entropy(fused(x).float(), labels).backward()

        found[batch] = dict(launched(step))
    return found


def copies(options: argparse.Namespace, mode: stand_in.Shapes) -> dict:
    """Launches whose every operand is copied first; the second of each goes past Triton's launcher."""
    from helpers.copied_operands import LAUNCHES

    return {name: dict(launched(lambda run=run: (run(), run()))) for name, run in LAUNCHES.items()}


def tune(options: argparse.Namespace, mode: stand_in.Shapes) -> dict:
    model = network(options.model, options.dtype).eval()
    x, dtype, device = images(2, options.dtype), options.dtype, torch.device("cpu")
    noted = problems.note(model, x) + problems.note(model, x, training=True)
    os.environ["RESNET_KERNELS_BACKEND"] = "triton"  # of what a link leaves out
    found = {}
    for batch in options.batch:
        tried, early = Counter(), set()
        for layer, problem in enumerate(problems.build(noted, [batch], dtype, device)):
            operands = problem.operands()
            for i, (name, run) in enumerate(problem.candidates.items()):
                if name in ("cpu", "eager", "cudnn", problems.APART):
                    continue
                # Links have few candidates; of a layer's tiles each is left out at some layers.
                if str(problem).startswith("conv ") and (i + layer) % options.every:
                    continue
                if name.endswith(" early"):
                    # As without, but for what comes before the wait: once each will do.
                    if name in early:
                        continue
                    early.add(name)
                try:
                    count = launched(lambda run=run, operands=operands: run(*operands))
                except Exception as error:
                    raise RuntimeError(f"{name} on {problem}: {error}") from error
                assert count, f"{name} on {problem} launches nothing"
                tried[name.split()[0]] += 1
        for config in stem_layout.CONFIGS:
            weight = torch.empty(64, 3, 7, 7, dtype=dtype)
            x = images(batch, dtype)
            tried["stem"] += bool(launched(lambda x=x, w=weight, c=config: stem.launch(x, w, None, None, config=c)))
        found[batch] = dict(tried)
    return found


def host_time(options: argparse.Namespace, mode: stand_in.Shapes) -> dict:
    """Microseconds of the host's, the least of many rounds: `torch.empty` beside them says how fast this host is.

    A launch of a convolution by TMA: all of it, from tensors to the driver; of that what launching.py does, and what Triton
    does in its place.
    """
    from resnet_kernels.kernels import launching
    from resnet_kernels.kernels.geometry import Geometry
    from resnet_kernels.kernels.operands import ConvOperands
    from resnet_kernels.kernels.sm90 import conv

    layout = dict(dtype=options.dtype, memory_format=torch.channels_last)
    x, weight, residual = (torch.empty(size, **layout) for size in ((1, 64, 14, 14), (64, 64, 3, 3), (1, 64, 14, 14)))
    scale, shift, geometry = torch.empty(64), torch.empty(64), Geometry(padding=(1, 1, 1, 1))
    operands = ConvOperands(x, weight, shift, residual, scale, geometry)
    noted = []

    def note(self, *given):
        noted.append((self, given))
        stand_in.unwatched["launch"](self, *given)

    def convolution() -> None:
        conv.launch(operands)

    convolution()
    watched, launching.Prepared.launch = launching.Prepared.launch, note
    convolution()
    launching.Prepared.launch = watched
    ((prepared, given),) = noted
    fused = rk.fuse(network(options.model or "resnet50", options.dtype).eval(), backend="triton")
    images = torch.empty(1, 3, 32, 32, **layout)
    runs = {
        "torch.empty": lambda: torch.empty(x.shape, **layout),
        "a convolution": convolution,
        "of it launching.py": lambda: prepared.launch(*given),
        "Triton in its place": lambda: prepared.launch_by_triton(given[1]),
        "a call of the network": lambda: fused(images),
    }
    best = dict.fromkeys(runs, float("inf"))
    with torch.no_grad():
        for _ in range(300):
            for name, run in runs.items():
                for _ in range(4):  # what ran in between has emptied the caches
                    begin = time.perf_counter()
                    run()
                    best[name] = min(best[name], time.perf_counter() - begin)
    return {name: round(1e6 * seconds, 1) for name, seconds in best.items()}


RUNS = {"time": host_time, "call": call, "train": train, "tune": tune, "copies": copies}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("model", choices=sorted(rk.models.BY_NAME), nargs="?")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--every", type=int, default=1, help="tune: each N-th tile of a layer, others at other layers")
    parser.add_argument("--freeze", action="store_true")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", type=str)
    options = parser.parse_args()
    options.dtype = DTYPES[options.dtype]
    begin = time.perf_counter()
    with stand_in.nothing_checked() if options.what == "time" else stand_in.Shapes() as mode:
        found = RUNS[options.what](options, mode)
    print(f"{time.perf_counter() - begin:.0f} s, {stand_in.compiled()} kernels compiled", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
