"""python -m benchmarks.tools.trim FILE OUT: shrinks a file of results, or a table of `tune`, to the size that is committed.

Results keep the fields that `report` and the pages' tables read, and the conditions of each measurement. Samples keep five
digits, other numbers six. Kernels' names lose their template arguments and parameters. A kernel that the roofline can't draw
loses its name and bytes, and a training step's kernels are added up by kind: the report shows no more of them. A table keeps
two candidates of each record, the winner and the default, with their medians.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from resnet_kernels.perf.results import Measurement
from resnet_kernels.perf.schema import CaseInfo, Conditions, Kernel, Versions
from resnet_kernels.perf.tuning.table_file import write_whole

_DIGITS = 6
_SAMPLES_DIGITS = 5  # four digits turned a speed of 0.995 into 1.00
_LONGEST_NAME = 60
_KEPT = {"schema", *(field.name for part in (CaseInfo, Versions, Measurement, Conditions) for field in fields(part))}
# The group is the case's name already.
_KEPT -= {"case"}


def trimmed(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the same results in fewer bytes."""
    kept = _rounded(document, _DIGITS)
    kept["benchmarks"] = [_benchmark(benchmark) for benchmark in kept["benchmarks"]]
    kept.get("machine_info", {}).get("cpu", {}).pop("flags", None)
    return kept


def _benchmark(benchmark: dict[str, Any]) -> dict[str, Any]:
    info = {name: v for name, v in benchmark["extra_info"].items() if name in _KEPT and v is not None}
    if kernels := [Kernel(**kernel) for kernel in info.pop("kernels", ())]:
        training = info["direction"] == "forward-backward"
        small = _by_kind(kernels) if training else map(_kernel, kernels)
        info["kernels"] = [_without_defaults(kernel) for kernel in small]
    stats = {"median": benchmark["stats"]["median"]}
    if "data" in benchmark["stats"]:
        stats["data"] = _rounded(benchmark["stats"]["data"], _SAMPLES_DIGITS)
    return {"group": benchmark["group"], "stats": stats, "extra_info": info}


def _by_kind(kernels: list[Kernel]) -> list[Kernel]:
    # A path, because rows of one kind without paths would look like the single region of a compiled model.
    path = "network" if any(kernel.path for kernel in kernels) else ""
    seconds: dict[str, float] = {}
    for kernel in kernels:
        seconds[kernel.kind] = seconds.get(kernel.kind, 0.0) + kernel.seconds
    return [Kernel(path, kind, _rounded(total, _DIGITS)) for kind, total in seconds.items()]


def _kernel(kernel: Kernel) -> Kernel:
    if not (kernel.flops and kernel.hbm_bytes):
        return Kernel(kernel.path, kernel.kind, kernel.seconds)
    name = " + ".join(map(_short, kernel.name.split(" + ")))
    return Kernel(kernel.path, kernel.kind, kernel.seconds, name, kernel.flops, kernel.hbm_bytes)


def _without_defaults(kernel: Kernel) -> dict[str, Any]:
    return {f.name: value for f in fields(kernel) if (value := getattr(kernel, f.name)) != f.default}


def trimmed_table(table: dict[str, Any]) -> dict[str, Any]:
    """Returns the table with each record's candidates cut to the winner and the default, with their medians."""
    kept = _rounded(table, _DIGITS)
    for record in kept["records"]:
        rows = record.get("candidates", {})
        record["candidates"] = {name: rows[name] for name in rows if name in (record["winner"], record["default"])}
        for row in record["candidates"].values():
            for clock in {"call", "graph"} & row.keys():
                row[clock] = {"median": row[clock]["median"]}
    return kept


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    return [_rounded(item, digits) for item in value] if isinstance(value, list) else value


def _short(name: str) -> str:
    """Kernel name without its template arguments and parameters, which stand in brackets."""
    while (inner := re.sub(r"<[^<>]*>|\([^()]*\)|\{[^{}]*\}", "", name)) != name:
        name = inner
    return name.removeprefix("void ").strip(" ,:<>")[:_LONGEST_NAME]


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    document = json.loads(source.read_text())
    name, document = (
        ("records", trimmed_table(document)) if "records" in document else ("benchmarks", trimmed(document))
    )
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in document.pop(name))
    head = json.dumps(document, separators=(",", ":"))
    write_whole(target, f'{head[:-1]},\n"{name}":[\n{rows}\n]}}\n')


if __name__ == "__main__":
    main()
