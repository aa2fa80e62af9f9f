"""python -m benchmarks.tools.readme_tables [--write]: makes README's table and docs/performance.md's from benchmarks/results.

It prints them, or puts each between its markers, `<!-- results -->` to `<!-- /results -->`. A table of results shows networks
in inference, at their largest image size; the outcomes of all cases are counted below it. README's has
the rows of `_GAINS`, each from the newest file that has it. `python -m resnet_kernels report` shows all of a file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from resnet_kernels.perf import read_results
from resnet_kernels.perf.results import LEVELS, CaseResults, Results, outcomes

RESULTS = Path(__file__).parents[1] / "results"
ROOT = Path(__file__).parents[2]
# The pages, and the markers that each has.
PAGES = {ROOT / "README.md": ("gains",), ROOT / "docs" / "performance.md": ("results", "costs")}

_HEAD = (
    "network",
    "batch",
    "eager ms",
    "fused ms",
    "frozen ms",
    "captured ms",
    "captured, frozen ms",
    "times eager's speed",
    "fastest peer",
    "its ms",
    "faster of ours, times its speed",
    "error / budget",
)
_GAINS = {"cpu": (("resnet18", 1), ("resnet50", 1)), "cuda": (("resnet50", 1), ("resnet50", 256))}
_HOW = {"fused": "`rk.fuse`", "fused-graph": "`rk.capture`"}  # what serves every user; frozen asks for a promise
_OTHERS = ("frozen", "fused-graph", "frozen-graph")  # of ours
_DIRECTIONS = {"forward": "inference", "forward-backward": "training step"}
_COSTS = {
    "import_s": ("`import resnet_kernels` after `import torch`", "s"),
    "fuse_resnet152_s": ("`rk.fuse` of ResNet-152", "s"),
    "checks_b1_ms": ("ResNet-50 at batch 1: seeing in each call that model and weights have not changed", "ms"),
    "peak_eager_b1_MB": ("ResNet-50's memory in a call at batch 1, eager", "MB"),
    "peak_fused_b1_MB": ("the same, fused (packed weights are a copy)", "MB"),
    "peak_eager_b8_MB": ("at batch 8, eager", "MB"),
    "peak_fused_b8_MB": ("the same, fused", "MB"),
    "weights_MB": ("ResNet-50's weights", "MB"),
}


def blocks() -> dict[str, str]:
    """Text for each pair of markers, by the markers' name."""
    files = sorted(RESULTS.glob("*.json"))
    costs = [path for path in files if path.name.startswith("costs-")]
    results = [read_results.read(path) for path in files if path not in costs]
    return {
        "gains": gains_table(results),
        "results": "\n\n".join(map(results_table, results)),
        "costs": "\n\n".join(costs_table(path) for path in costs),
    }


def gains_table(results: Sequence[Results]) -> str:
    """README's table: a few networks on the newest CPU and GPU, eager's time, ours and the fastest peer's."""
    head = ("device", "network", "batch", "eager", "ours", "times eager's speed", "times the fastest peer's speed")
    rows, files = [], []
    for platform, shown in _GAINS.items():
        for subject, batch in shown:
            found = [
                (measured, case)
                for measured in results
                for case in measured.cases.values()
                if (case.platform, case.subject, case.batch) == (platform, subject, batch) and _is_shown(case, measured)
            ]
            measured, case = max(found, key=lambda pair: (pair[0].date, pair[0].path.name))
            peer = case.best_peer()
            assert peer is not None, "a case that is shown has eager"
            ours = min(
                (name for name in _HOW if name in case.contenders), key=lambda name: case.contenders[name].median
            )
            files.append(f"`{measured.path.name}`")
            rows.append(
                (
                    measured.devices[platform],
                    f"{subject}, {case.dtype}",
                    str(batch),
                    f"{_ms(case, 'eager')} ms",
                    f"{_ms(case, ours)} ms, by {_HOW[ours]}",
                    f"{case.speed(ours, 'eager'):.2f}",
                    f"{case.speed(ours, peer):.2f} ({peer})",
                )
            )
    return "\n".join([*_table(head, rows), "", f"From {' and '.join(dict.fromkeys(files))} in `benchmarks/results`."])


def results_table(measured: Results) -> str:
    """Tables of one file: networks in inference (eager, fused, the fastest peer), then the outcomes of all its cases."""
    versions = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    shown = [case for case in measured.cases.values() if _is_shown(case, measured)]
    groups: dict[tuple[str, str], list[CaseResults]] = {}
    for case in measured.cases.values():
        groups.setdefault((case.level, case.direction), []).append(case)
    counts = [outcomes(cases) for cases in groups.values()]
    lines = [
        f"{'; '.join(measured.devices.values())}, {versions} (`{measured.path.name}`):",
        "",
        *_table(_HEAD, [_row(case) for case in shown]),
        "",
        f"All of the file's {len(measured.cases)} cases, fused (not captured) against the fastest peer of each:",
        "",
        *_table(
            ("", "faster", "level", "slower"),
            [
                (f"{LEVELS[level]}, {_DIRECTIONS[direction]}", *map(str, count.values()))
                for (level, direction), count in zip(groups, counts)
            ],
        ),
    ]
    return "\n".join(lines)


def _is_shown(case: CaseResults, measured: Results) -> bool:
    if (case.level, case.direction) != ("model", "forward") or not {"eager", "fused"} <= case.contenders.keys():
        return False
    alike = [
        other.size
        for other in measured.cases.values()
        if (other.level, other.subject, other.platform) == (case.level, case.subject, case.platform)
    ]
    return case.size == max(alike)


def _row(case: CaseResults) -> tuple[str, ...]:
    fused, peer = case.contenders["fused"], case.best_peer()
    assert peer is not None, "a case that is shown has eager"
    # With rk.capture, the fused model's CUDA graph is compared with peers that are graphs, too.
    ours = [name for name in ("fused", *_OTHERS) if name in case.contenders]
    best = min(ours, key=lambda name: case.contenders[name].median)
    return (
        f"{case.subject} {case.size}px {case.dtype}",
        str(case.batch),
        _ms(case, "eager"),
        _ms(case, "fused"),
        *(_ms(case, name) if name in case.contenders else "" for name in _OTHERS),
        f"{case.speed('fused', 'eager'):.2f}",
        peer + (" (over the error budget)" if case.contenders[peer].parity_failure else ""),
        _ms(case, peer),
        f"{case.speed(best, peer):.2f}",
        "" if fused.parity_error is None else f"{fused.parity_error:.1e} / {fused.parity_budget:.1e}",
    )


def costs_table(path: Path) -> str:
    """Table of the package's costs beside its kernels, from a file of benchmarks.tools.costs."""
    costs = json.loads(path.read_text())
    cpu = costs.pop("cpu")
    rows = [
        (_COSTS[name][0], f"{value:.2g} {_COSTS[name][1]}" if value < 10 else f"{value:.0f} {_COSTS[name][1]}")
        for name, value in costs.items()
    ]
    return "\n".join([f"{cpu} (`{path.name}`):", "", *_table(("what", "cost"), rows)])


def _ms(case: CaseResults, contender: str) -> str:
    milliseconds = 1e3 * case.contenders[contender].median
    return f"{milliseconds:.2f}" if milliseconds < 1 else f"{milliseconds:.1f}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    for row in (head, ("---",) * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def fill(text: str, contents: dict[str, str]) -> str:
    """Returns a text with the contents between their markers.

    Raises:
        ValueError: if the text does not have each pair of markers exactly once.
    """
    for name, content in contents.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        # A function, because re would interpret the backslashes of a string.
        text, count = re.subn(f"{start}.*?{end}", lambda _: f"{start}{content}\n{end}", text, flags=re.S)  # noqa: B023
        if count != 1:
            raise ValueError(f"the text must hold <!-- {name} --> and <!-- /{name} --> once, got {count} pairs")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", action="store_true", help="rewrite what is between the markers of README.md and docs/performance.md"
    )
    contents = blocks()
    if not parser.parse_args().write:
        print("\n\n".join(contents.values()))
        return
    for page, names in PAGES.items():
        page.write_text(fill(page.read_text(), {name: contents[name] for name in names}))


if __name__ == "__main__":
    main()
