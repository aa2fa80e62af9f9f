"""The Python of README.md and docs runs as it stands, the shell lines are the ones that CI runs, the tables are the files'."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCKS = [
    pytest.param(page.name, code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M), 1)
]
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
    assert sum("README.md" in block.id for block in BLOCKS) >= 4
    assert {block.values[0] for block in BLOCKS} >= {"README.md", "inference.md", "kernels.md"}


def test_the_two_lines():
    for name, words in (("demo", "python -m resnet_kernels demo"), ("tests", "pytest -n auto .*")):
        assert re.search(rf"<!-- ci: {name} -->\n```bash\npip install .* && {words}\n```", README)


def test_results_are_the_files():
    """No number in the README's tables is typed by hand: writing them again changes nothing."""
    assert TABLE["fill"](README, TABLE["blocks"]()) == README


def test_every_result_is_in_the_readme():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files and all(f"(`{path.name}`)" in README or f"`{path.name}`:" in README for path in files)


def test_a_number_typed_by_hand_is_noticed():
    for name in ("results", "costs"):
        block = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.S).group(1)
        number = re.search(r"\| (\d+\.\d+)", block)
        typed = README.replace(block, f"{block[: number.start(1)]}9{block[number.start(1) :]}")
        assert typed != README and TABLE["fill"](typed, TABLE["blocks"]()) == README


@pytest.mark.parametrize("text", ("", "<!-- results -->\nx", "<!-- results -->\n<!-- /results -->\n" * 2))
def test_markers_that_are_not_there_once(text):
    with pytest.raises(ValueError, match="the text must hold <!-- results -->"):
        TABLE["fill"](text, {"results": "a table"})


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
