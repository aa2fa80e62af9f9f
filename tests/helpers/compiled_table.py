"""Records of compiled cases, in words and as a table."""

from __future__ import annotations

from helpers.compile_targets import KIB, TARGETS

HEAD = "kernel,config,dtype,layer,target,registers,shared KiB,programs/SM,spills,multiply".split(",")


def describe(record: dict) -> str:
    """The case in words, as a failing test names it."""
    return f"{record['kernel']} {record['config']} {record['dtype']} ({record['layer']}) on {record['target']}"


def table(records: list[dict]) -> str:
    """One line for each record. Spills are bytes on NVIDIA; on AMD also VGPRs, and SGPRs that VGPRs hold."""
    rows = [HEAD]
    for r in sorted(records, key=lambda r: [t.name for t in TARGETS].index(r["target"])):
        row = [r["kernel"], r["config"], r["dtype"], r["layer"], r["target"]]
        if r["error"]:
            row += ["error", "", "", "", ""]
        else:
            spills = ", ".join(f"{n} {what}" for what, n in r["spills"].items() if n) or "none"
            instructions = ", ".join(r["tensor_cores"]) or "fma"
            row += [r["registers"], f"{r['shared'] / KIB:.1f}", r["programs"], spills, instructions]
        rows.append([str(cell) for cell in row])
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
