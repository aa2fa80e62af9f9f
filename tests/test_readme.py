"""The README's Python runs as it stands, and its shell lines are the ones that CI runs."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.splitlines()[2][:30])
def test_python_blocks_run(code, capsys):
    if "sklearn" in code:
        pytest.importorskip("sklearn", reason="needs scikit-learn")
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    if "sklearn" in code:
        text = capsys.readouterr().out
        accuracy = float(re.search(r"accuracy ([\d.]+)%, same predictions: True", text).group(1))
        assert accuracy > 80


def test_the_two_lines():
    for name, words in (("demo", "python -m resnet_kernels demo"), ("tests", "pytest")):
        assert re.search(rf"<!-- ci: {name} -->\n```bash\npip install .* && {words}\n```", README)


def test_results_are_the_files():
    """No number in the README is typed by hand."""
    shown = re.search(r"<!-- results -->\n(.*?)\n<!-- /results -->", README, re.S).group(1)
    name = re.search(r"\(`(.+?\.json)`\)", shown).group(1)
    table = runpy.run_path(str(ROOT / "benchmarks" / "table.py"))["table"]
    assert shown == table(ROOT / "benchmarks" / "results" / name)
