"""The pages of docs/: all are in the site, all public names are in the reference, terms and rules can be looked up."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
# Words that the pages use in a sense of their own.
TERMS = """backend block budget candidate captured case chain container contender eager fused host launch launcher link oracle
    parity peer plan problem recipe record residual round run stem step table tile winner""".split()
TERMS += ["frozen / thaw", "packed weight", "projection / shortcut", "scale and shift", "split K"]


def names(module: str) -> list[str]:
    """A module's __all__, without importing it."""
    tree = ast.parse((ROOT / module / "__init__.py").read_text())
    values = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    return ast.literal_eval(next(values))


def slugs(text: str) -> set[str]:
    """The anchors that GitHub and mkdocs give to a page's headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.M)}


def test_every_page_is_in_the_site():
    nav = re.search(r"^nav:\n(.*?)^\w", (ROOT / "mkdocs.yml").read_text(), re.S | re.M).group(1)
    assert sorted(re.findall(r": (\S+\.md)$", nav, re.M)) == sorted(PAGES)


def test_every_public_name_is_in_the_reference():
    entries = re.findall(r"^::: (resnet_kernels\.\S+)$", PAGES["api.md"], re.M)
    assert len(set(entries)) == len(entries)
    known = {entry.rpartition(".")[2] for entry in entries}
    assert known >= {*names("resnet_kernels"), *names("resnet_kernels/ops")} - {"models", "ops", "timing"}


def test_terms_are_in_the_glossary():
    _, *table = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", PAGES["glossary.md"], re.M)
    terms = [term for term, _, _ in table]
    assert terms == sorted(terms, key=str.lower) and len(set(terms)) == len(terms)
    assert not {*TERMS} - {*terms}
    assert all(meaning.endswith(".") and where for _, meaning, where in table)


def test_rules_name_the_tests_that_hold_them():
    _, *rules = re.split(r"^## Rule (?=\d)", PAGES["contract.md"], flags=re.M)
    assert [rule.partition(":")[0] for rule in rules] == [*"123456"]
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for rule in rules:
        held_by = re.findall(r"`(test_\w+\.py)`", rule)
        assert held_by and not {*held_by} - there


# test_readme.py sees that the files exist which README.md and the pages link to.
@pytest.mark.parametrize("page", ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", *(f"docs/{page}" for page in PAGES)))
def test_links_lead_to_headings(page):
    page = ROOT / page
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor and target.name != "api.md":  # whose anchors mkdocstrings makes: the build checks them
            assert anchor in slugs(target.read_text()), f"{page.name} links to {path}#{anchor}"


def test_the_picture_of_the_rooms_is_up_to_date_and_all_arcs_go_down():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_rooms.py"))
    assert drawn["draw"]() == drawn["PICTURE"].read_text(), "run python docs/draw_rooms.py"
    floors = list(drawn["FLOORS"])
    assert all(floors.index(upper) < floors.index(lower) for upper, lower in drawn["imports"]())
