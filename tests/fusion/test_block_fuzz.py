"""Random networks with random edits between calls: each call of the fused model has to be plain PyTorch's.

RK_FUZZ_EXAMPLES sets the number of examples. As a script it goes on after failures, and prints a small example of each kind:

    python tests/fusion/test_block_fuzz.py --examples 2000 --keep-going
"""

import argparse
import os
import random
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    import conftest as conftest

from helpers.block_runs import Discard, draw, run
from helpers.block_shrink import Findings, shrink
from helpers.oracle import runnable

EXAMPLES = int(os.environ.get("RK_FUZZ_EXAMPLES", "300"))
# A fuzzer whose models are left as they are would find nothing.
LEAST_SHARE_FUSED = 0.25


@pytest.fixture
def one_thread():
    threads, always = torch.get_num_threads(), torch.is_warn_always_enabled()
    torch.set_num_threads(1)
    # PyTorch says some warnings once a process, and plain PyTorch is called first.
    torch.set_warn_always(True)
    yield
    torch.set_num_threads(threads)
    torch.set_warn_always(always)


@pytest.mark.slow
@pytest.mark.parametrize("backend, examples", [("auto", EXAMPLES), ("triton", max(20, EXAMPLES // 15))])
def test_random_blocks_are_plain_pytorchs(backend, examples, one_thread):
    if backend != "auto" and (reason := runnable(backend, "cpu", torch.float32)):
        pytest.skip(reason)
    shares = []
    # Seeds, as the script has them: what Hypothesis draws depends on the modules that other tests have imported.
    for seed in range(examples):
        try:
            example = draw(random.Random(seed), backend)
            result = run(example)
        except Discard:
            continue
        shares.append(result.fused)
        if result.mismatch is not None:
            smallest, mismatch = shrink(example, result.mismatch)
            raise AssertionError(f"seed {seed}: {mismatch}\n\n{smallest}")
    assert sum(shares) >= LEAST_SHARE_FUSED * len(shares), f"{sum(shares)} of {len(shares)} models had a fused block"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--keep-going", action="store_true", help="go on after the first finding")
    parser.add_argument("--out", help="a file for the findings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_warn_always(True)
    findings = Findings()
    for seed in range(arguments.seed, arguments.seed + arguments.examples):
        mismatch = findings.add(random.Random(seed), arguments.backend)
        if mismatch is not None:
            print(f"seed {seed}: {mismatch.what}", flush=True)
            if not arguments.keep_going:
                break
    for finding in findings.group():
        print(f"\n{finding}", flush=True)
    print(findings)
    if arguments.out:
        Path(arguments.out).write_text(str(findings))
    sys.exit(bool(findings.found))


if __name__ == "__main__":
    main()
