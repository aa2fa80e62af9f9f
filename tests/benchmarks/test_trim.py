"""What is committed of a results file and of a table says the same as the whole one."""

import json
from pathlib import Path

from benchmarks.tools import readme_tables
from benchmarks.tools.trim import trimmed, trimmed_table
from resnet_kernels.perf import read_results

RESULTS = Path(readme_tables.RESULTS)


def test_numbers_keep_six_digits_and_names_lose_their_brackets():
    name = "void a::kernel<4, b<int>::(anonymous namespace)::c>(int, float) + _ours"
    row = {"extra_info": {"kernels": [{"name": name, "seconds": 0.00012345678}]}, "stats": {"data": [1 / 3]}}
    assert trimmed({"benchmarks": [row]})["benchmarks"] == [
        {
            "extra_info": {"kernels": [{"name": "a::kernel + _ours", "seconds": 0.000123457}]},
            "stats": {"data": [0.333333]},
        }
    ]


def test_trimming_twice_is_trimming_once_and_says_the_same(tmp_path):
    for path in RESULTS.glob("*-2026-11-27.json"):
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
