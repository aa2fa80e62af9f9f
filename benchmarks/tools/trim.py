"""python -m benchmarks.tools.trim FILE OUT: a file of results, or a table of `tune`, as small as it is committed.

Results keep what `report` and README's tables read: numbers have six digits, and kernels' names lose their template arguments
and parameters. Of a table's candidates the winner and what runs without a table stay, with their medians.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from resnet_kernels.perf.tuning.table_file import write_whole

_DIGITS = 6
_LONGEST_NAME = 60


def trimmed(document: dict[str, Any]) -> dict[str, Any]:
    """The same results, smaller."""
    kept = _rounded(document)
    for benchmark in kept["benchmarks"]:
        for kernel in benchmark["extra_info"].get("kernels", ()):
            kernel["name"] = " + ".join(map(_short, kernel["name"].split(" + ")))
    kept.get("machine_info", {}).get("cpu", {}).pop("flags", None)
    return kept


def trimmed_table(table: dict[str, Any]) -> dict[str, Any]:
    """The same winners, with the times of each and of the default."""
    kept = _rounded(table)
    for record in kept["records"]:
        rows = record.get("candidates", {})
        record["candidates"] = {name: rows[name] for name in rows if name in (record["winner"], record["default"])}
        for row in record["candidates"].values():
            for clock in {"call", "graph"} & row.keys():
                row[clock] = {"median": row[clock]["median"]}
    return kept


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _short(name: str) -> str:
    """A kernel's name without what stands in brackets: its template arguments and parameters."""
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
