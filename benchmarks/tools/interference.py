"""python -m benchmarks.tools.interference: measures how much a contender slows down the next one.

In rounds of eager, eager, peer, peer each contender is called once after the other contender and once after itself. The ratio
of the two times is 1 if they leave each other alone. It is taken without uncounted calls in between, and with them, as the
benchmarks do (peers.LEAD_IN_SECONDS). The control is `twin`, a copy of the eager model with its own weights and PyTorch's
threads.
"""

from __future__ import annotations

import argparse
import copy

import torch

from resnet_kernels.fusion.report import table
from resnet_kernels.perf.timing import interleave, ratio, ratios

from ..cases import Case, Model, Platform
from ..contenders.peers import LEAD_IN_SECONDS
from ..harness import CONTENDERS
from ..neighbors import Neighbors
from ..workload import ModuleRunner, Runner, Workload


def effects(eager, peer, seconds: float, lead_in: float) -> tuple[str, str]:
    """Slowdowns (eager after the peer / after itself, the peer after eager / after itself): medians, with p20 and p80."""
    calls = {"eager after peer": eager, "eager after eager": eager, "peer after eager": peer, "peer after peer": peer}
    after_peer, after_eager, crossed, own = interleave(calls, seconds=seconds, lead_in=lead_in).values()
    return _spread(after_peer, after_eager), _spread(crossed, own)


def _spread(a, b) -> str:
    low, high = torch.tensor(ratios(a, b)).quantile(torch.tensor([0.2, 0.8])).tolist()
    return f"{ratio(a, b):.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="of rk.models (default: resnet18)")
    parser.add_argument("--image-size", type=int, default=64, help="default: 64")
    parser.add_argument("--batch-size", type=int, default=2, help="default: 2")
    parser.add_argument("--seconds", type=float, default=10.0, help="of rounds, for each figure (default: 10)")
    options = parser.parse_args()
    subject = Model(options.model, options.image_size, batch=options.batch_size)
    workload = Workload(Case(subject, "forward", Platform("cpu", torch.float32)))
    eager = ModuleRunner(workload.eager, False).bind(workload.operands)
    runners: dict[str, Runner] = {"twin": ModuleRunner(copy.deepcopy(workload.eager), False)}
    for contender in CONTENDERS:
        if contender.name != "eager" and contender.covers(workload.case, True):
            if reason := contender.why_absent(workload.case):
                print(f"{contender.name}: {reason}")
            else:
                runners[contender.name] = contender.prepare(workload)
    rows, neighbors = [], Neighbors()
    for name, runner in runners.items():
        call = runner.bind(workload.operands)
        found = (effects(eager, call, options.seconds, lead_in) for lead_in in (0.0, LEAD_IN_SECONDS))
        rows.append((name, *(cell for pair in found for cell in pair)))
    head = ("peer", "eager after it", "it after eager", "eager after it, led in", "it after eager, led in")
    print(table(head, rows))
    cores = neighbors.cores()
    print("" if cores is None else f"other processes kept {cores:.1f} cores busy meanwhile")


if __name__ == "__main__":
    main()
