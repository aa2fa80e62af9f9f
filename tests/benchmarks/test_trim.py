"""What is committed of a results file and of a table says the same as the whole one."""

import json
from pathlib import Path

import pytest

from benchmarks.tools import readme_tables
from benchmarks.tools.trim import trimmed, trimmed_table
from helpers import results_files as files
from resnet_kernels.cli import main as cli
from resnet_kernels.perf import read_results

RESULTS = Path(readme_tables.RESULTS)


def test_what_the_report_does_not_show_is_left_out():
    name = "void a::kernel<4, b<int>::(anonymous namespace)::c>(int, float) + _ours"
    rows = [
        {
            "path": "conv1",
            "kind": "conv",
            "seconds": 0.00012345678,
            "name": name,
            "flops": 4,
            "hbm_bytes": 2,
            "call": 1,
        },
        {"path": "bn1", "kind": "bn", "seconds": 0.25, "name": "bn", "flops": 0, "hbm_bytes": 2},
        {"path": "bn2", "kind": "bn", "seconds": 0.5, "name": "bn", "flops": 0, "hbm_bytes": None},
    ]
    whole = {
        direction: files.benchmark(kernels=rows, direction=direction, busy_elsewhere=None, gb_per_s=1.0, saved_mib=2.0)
        for direction in ("forward", "forward-backward")
    }
    whole["forward"]["stats"].update(median=1 / 3, data=[1 / 3])
    forward, training = trimmed({"benchmarks": list(whole.values())})["benchmarks"]
    assert forward["stats"] == {"median": 0.333333, "data": [0.33333]}
    assert forward["extra_info"].keys() == whole["forward"]["extra_info"].keys() - {
        "case", "gflop", "hbm_gb", "gb_per_s", "driver", "busy_elsewhere",
    }  # fmt: skip
    assert forward["extra_info"]["kernels"] == [
        {
            "path": "conv1",
            "kind": "conv",
            "seconds": 0.000123457,
            "name": "a::kernel + _ours",
            "flops": 4,
            "hbm_bytes": 2,
        },
        {"path": "bn1", "kind": "bn", "seconds": 0.25},
        {"path": "bn2", "kind": "bn", "seconds": 0.5},
    ]
    assert training["extra_info"]["kernels"] == [
        {"path": "network", "kind": "conv", "seconds": 0.000123457},
        {"path": "network", "kind": "bn", "seconds": 0.75},
    ]


@pytest.mark.slow
def test_a_trimmed_file_has_the_same_report(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    pages = []
    for folder, contents in (("whole", files.few()), ("small", trimmed(files.few()))):
        path = files.write(tmp_path / "r.json", contents)
        assert cli.main(["report", str(path), "--out", str(tmp_path / folder)]) == 0
        pages.append((tmp_path / folder / "report.md").read_text())
    assert pages[0] == pages[1]


def test_trimming_twice_is_trimming_once_and_says_the_same(tmp_path):
    for path in RESULTS.glob("*-2026-11-27.json"):
        if path.name.startswith("costs-"):
            continue
        again = tmp_path / path.name
        again.write_text(json.dumps(trimmed(json.loads(path.read_text()))))
        assert readme_tables.results_table(read_results.read(again)) == readme_tables.results_table(
            read_results.read(path)
        )


def test_a_table_keeps_its_winners():
    clocks = {"call": {"median": 2e-4, "p20": 1e-4}, "graph": {"median": 1e-4, "p20": 1e-4}}
    record = {"key": "conv", "batch": 1, "dtype": "bf16", "winner": "a", "default": "b"}
    whole = {"records": [{**record, "candidates": {"a": clocks, "b": {"refused": "wrong"}, "c": clocks}}]}
    small = {"call": {"median": 2e-4}, "graph": {"median": 1e-4}}
    assert trimmed_table(whole)["records"] == [{**record, "candidates": {"a": small, "b": {"refused": "wrong"}}}]
