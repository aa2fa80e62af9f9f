"""python -m benchmarks.table RESULTS.json: a Markdown table of forward passes of whole models, as README.md has it."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(path: Path) -> str:
    """Medians in ms of each contender, and the interleaved speed-up over eager, from a file of `--benchmark-json`."""
    results = json.loads(path.read_text())
    info = results["benchmarks"][0]["extra_info"]
    lines = [
        f"{info['device']}, {info['threads']} threads, torch {info['torch']}, {info['dtype']} (`{path.name}`):",
        "",
        "| case | contender | median ms | times eager's speed | times fused's speed | error / budget |",
        "|---|---|---|---|---|---|",
    ]
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        against = [
            f"{1 / info[key]:.2f}" if key in info else ""
            for key in ("interleaved_ratio_to_eager", "interleaved_ratio_to_fused")
        ]
        cells = [
            benchmark["group"].removeprefix("model-forward-"),
            benchmark["params"]["contender"],
            f"{1e3 * benchmark['stats']['median']:.1f}",
            *against,
            f"{info['parity_error']:.1e} / {info['parity_budget']:.1e}" if "parity_error" in info else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.table RESULTS.json")
    print(table(Path(sys.argv[1])))
