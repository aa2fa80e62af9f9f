"""The Python of README.md and docs runs as it stands, the shell lines are the ones that CI runs, the tables are the files'."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
import torch

from resnet_kernels.perf import read_results

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCKS = [
    pytest.param(page.name, code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M), 1)
]
RESULTS = ("cpu-2core-2026-11-28", "h100-2026-11-28")
TABLE = runpy.run_path(str(ROOT / "benchmarks" / "tools" / "readme_tables.py"))


@pytest.mark.parametrize("page, code", BLOCKS)
def test_python_blocks_run(page, code, capsys):
    """A block is a program of its own. What it asserts holds, and what a comment behind a print says is printed."""
    if "sklearn" in code:
        pytest.importorskip("sklearn", reason="needs scikit-learn")
    torch.manual_seed(0)
    # A file name that exists: Triton reads a kernel's source from there.
    exec(compile(code, page, "exec"), {"__name__": "readme"})
    text = capsys.readouterr().out
    if "sklearn" in code:
        accuracy = float(re.search(r"accuracy ([\d.]+)%, same predictions: True", text).group(1))
        assert accuracy > 80
    for expected in re.findall(r"^print\(.*?\)  # prints: (.+)$", code, re.M):
        assert expected in text


def test_blocks_are_found():
    pages = {block.values[0] for block in BLOCKS}
    assert pages >= {"README.md", "inference.md", "kernels.md", "numerics.md", "training.md", "tuning.md"}


def test_the_two_lines():
    for name, words in (("demo", "python -m resnet_kernels demo"), ("tests", "pytest -n auto .*")):
        assert re.search(rf"<!-- ci: {name} -->\n```bash\npip install .* && {words}\n```", README)


def filled(text, names):
    contents = TABLE["blocks"]()
    return TABLE["fill"](text, {name: contents[name] for name in names})


def test_tables_are_the_files():
    """No number in these tables is typed by hand: writing them again changes nothing."""
    pages = {page.read_text(): names for page, names in TABLE["PAGES"].items()}
    assert pages == {README: ("gains",), PERFORMANCE: ("results", "costs")}
    for text, names in pages.items():
        assert filled(text, names) == text, "run python -m benchmarks.tools.readme_tables --write"


def test_every_result_is_in_a_table():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files and all(f"(`{path.name}`):" in PERFORMANCE for path in files)


@pytest.mark.parametrize("text, name", ((README, "gains"), (PERFORMANCE, "results"), (PERFORMANCE, "costs")))
def test_a_number_typed_by_hand_is_noticed(text, name):
    block = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.S).group(1)
    number = re.search(r"\| (\d+\.\d+)", block)
    typed = text.replace(block, f"{block[: number.start(1)]}9{block[number.start(1) :]}")
    assert typed != text and filled(typed, [name]) == text


def test_the_readmes_rows_are_a_cpus_and_a_gpus():
    """Eager, ours and the fastest peer of each case, from its newest file."""
    rows = [line.split(" | ") for line in README.splitlines() if re.match(r"\| (cpu|cuda) ", line)]
    assert [(row[0].split()[1], row[1].split(",")[0], row[2]) for row in rows] == [
        *(("cpu", network, "1") for network in ("resnet18", "resnet50")),
        *(("cuda", "resnet50", batch) for batch in ("1", "256")),
    ]


def test_a_newer_file_gives_the_rows_that_it_has():
    older, gpu = (read_results.read(ROOT / "benchmarks" / "results" / f"{name}.json") for name in RESULTS)
    one = {name: case for name, case in older.cases.items() if (case.subject, case.batch) == ("resnet18", 1)}
    newer = dataclasses.replace(older, date="2999-01-01", devices={"cpu": "new"}, path=Path("new.json"), cases=one)
    table = TABLE["gains_table"]([newer, older, gpu]).splitlines()
    assert (
        table[2].startswith("| new | resnet18") and table[3].startswith("| cpu (AVX512)") and "`new.json`" in table[-1]
    )


@pytest.mark.parametrize("text", ("", "<!-- results -->\nx", "<!-- results -->\n<!-- /results -->\n" * 2))
def test_markers_that_are_not_there_once(text):
    with pytest.raises(ValueError, match="the text must hold <!-- results -->"):
        TABLE["fill"](text, {"results": "a table"})


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
