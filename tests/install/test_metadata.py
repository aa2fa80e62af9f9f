"""pyproject.toml, CITATION.cff and the issue templates: names that resolve, and versions that agree."""

import ast
import re
import sys
from pathlib import Path

import pytest

import resnet_kernels as rk

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
requirements = pytest.importorskip("packaging.requirements", reason="needs packaging, which pytest brings")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    name: [requirements.Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()
}
DEPENDENCIES = [requirements.Requirement(text) for text in PROJECT["dependencies"]]
# Distributions whose modules are named otherwise, and two modules that come with a dependency: py-cpuinfo, typing_extensions.
DISTRIBUTIONS = {
    "cpuinfo": "pytest-benchmark", "cv2": "opencv-python-headless", "sklearn": "scikit-learn", "typing_extensions": "torch",
}  # fmt: skip


def names(extra):
    """The distributions that an extra brings, those of the extras in it among them."""
    found = set()
    for requirement in EXTRAS[extra]:
        if requirement.name == PROJECT["name"]:
            found |= {name for other in requirement.extras for name in names(other)}
        else:
            found.add(requirement.name)
    return found


def imported(folder):
    """Third-party distributions that a folder's modules import, at whatever place."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    own = {"resnet_kernels", "benchmarks", "helpers"}
    return {DISTRIBUTIONS.get(name, name) for name in found - own if name not in sys.stdlib_module_names}


def test_every_extra_resolves():
    for extra, listed in EXTRAS.items():
        for requirement in listed:
            assert requirement.specifier or requirement.name == PROJECT["name"], (
                f"{extra}: {requirement} has no least version"
            )
            assert requirement.name != PROJECT["name"] or requirement.extras <= EXTRAS.keys(), f"{extra}: {requirement}"
        assert names(extra)


def test_every_import_is_of_a_dependency_or_an_extra():
    always = {requirement.name for requirement in DEPENDENCIES}
    used = imported("resnet_kernels")
    assert {"matplotlib", "tqdm"} <= used  # which are optional
    assert not used - always - {name for extra in ("vision", "timm", "report", "train") for name in names(extra)}
    benchmarks = imported("benchmarks")
    assert "onnxruntime" in benchmarks
    assert not benchmarks - always - {name for extra in EXTRAS for name in names(extra)}


def test_extras_that_messages_name_exist():
    sources = "".join(path.read_text() for path in (ROOT / "resnet_kernels").rglob("*.py"))
    named = {
        extra
        for found in re.findall(r'pip install "resnet_kernels\[([\w,]+)\]"', sources)
        for extra in found.split(",")
    }
    assert named and named <= EXTRAS.keys()
    # by_name.py imports by name.
    pairs = re.findall(r'_import\("(\w+)[\w.]*", "(\w+)"\)', (ROOT / "resnet_kernels/models/by_name.py").read_text())
    assert dict(pairs) == {"torchvision": "vision", "timm": "timm"} and all(
        name in names(extra) for name, extra in pairs
    )


def test_metadata_is_complete():
    assert PROJECT["license"] == "MIT" and not any("License ::" in text for text in PROJECT["classifiers"])
    assert PROJECT["keywords"] and any(text.startswith("Operating System ::") for text in PROJECT["classifiers"])
    assert (ROOT / PROJECT["readme"]).exists() and all((ROOT / name).exists() for name in PROJECT["license-files"])
    least = PROJECT["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {least}" in PROJECT["classifiers"]


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", text, re.M)[1] == rk.__version__
    assert re.search(r"^license: (.+)$", text, re.M)[1] == PROJECT["license"]
    for key in ("cff-version", "message", "title", "authors"):
        assert re.search(rf"^{key}:", text, re.M), key


def test_issue_templates_ask_for_what_is_needed():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("*.yml")}
    del forms["config"]
    assert forms.keys() == {"bug_report", "feature_request", "not_fused"}
    asked = {}
    for name, form in forms.items():
        assert form["name"] and form["description"] and form["body"]
        ids = [item["id"] for item in form["body"]]
        assert len(set(ids)) == len(ids)
        asked[name] = {item["id"] for item in form["body"] if item.get("validations", {}).get("required")}
        commands = re.findall(r"python -m resnet_kernels (\w+)", str(form))
        assert {*commands} <= {"env", "explain", "verify"}
    assert {"script", "env"} <= asked["bug_report"] and {"explain", "env"} <= asked["not_fused"]
