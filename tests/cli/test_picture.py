"""explain --svg: every row of the report is in the picture, and all text is inside its box, in a wide font as well."""

import functools
import re
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import hypothesis
import pytest
from hypothesis import strategies as st
from torch import nn

import resnet_kernels as rk
from resnet_kernels.cli import main as cli
from resnet_kernels.cli.picture import alike, words
from resnet_kernels.cli.picture.draw import svg
from resnet_kernels.fusion.report import FuseReport, Row
from resnet_kernels.fusion.unfused import Unfused

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"

LONG = "a module of a class that goes on and on, for reasons that nobody remembers any more, " * 6
SE = "se is a SEModule, a module that is not fused"
BOTTLENECK = "conv1+bn1+relu -> conv2+bn2+relu -> conv3+bn3"


def block(path, reason=SE):
    return Row(path, "Bottleneck (part)", True, BOTTLENECK), Row(path, "Bottleneck (rest)", False, reason=reason)


def report(*rows, convolutions=0, unfused=()):
    return FuseReport(rows, "auto", convolutions=convolutions, unfused=unfused)


@functools.cache
def reports():
    fused = rk.fuse(rk.models.resnet18().eval(), normalize=([0.4] * 3, [0.2] * 3), freeze=True)
    fused.layer2[0].bn1.register_forward_hook(lambda *_: None)
    fused.layer3[0].register_forward_hook(lambda *_: None)
    hostile = "a<b & \"c\" 'd' ]]> \x01\ud800\u202e \n+ -> e"
    return {
        "resnet18": rk.explain(rk.models.resnet18()),
        "resnet152": rk.explain(rk.models.resnet152()),
        "resnet_v2_50": rk.explain(rk.models.resnet_v2_50()),
        "d2l_resnet18": rk.explain(rk.models.d2l_resnet18()),
        "with hooks": rk.explain(fused),
        "nothing fused": rk.explain(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())),
        "empty": report(),
        "se": report(*block("layer1.0"), *block("layer1.1"), *block("layer1.2", LONG), *block("layer2.0")),
        "dense": report(
            Row("", "DenseNet (part)", True, "features.transition1.norm+relu -> features.transition1.conv"),
            *(Row("features.denseblock1", "DenseBlock (part)", True, f"l{i}.norm+relu -> l{i}.conv") for i in range(9)),
            Row("features.denseblock1", "DenseBlock (part)", True, "l9.norm+relu -> l9.conv -> l9.pool"),
        ),
        "hostile": report(
            Row(hostile, hostile, True, f"{hostile}+relu -> {hostile}", apart=hostile, table=hostile),
            Row(f"x.{hostile}", "<script>alert(1)</script>", False, reason=hostile),
            convolutions=2,
            unfused=(Unfused(hostile, 1, hostile, hostile),),
        ),
        "long": report(
            Row(".".join("WMW" * 9), "M" * 99, True, f"{'W' * 99}+{'m' * 99}+{'-' * 99}+relu"),
            Row("b." + "W" * 99, LONG, True, "+".join(f"part{i}" for i in range(99)), apart=LONG, table=LONG),
            Row("c", "名前" * 30, False, reason="名前" * 99),
            Row("d", "D", False, reason=LONG),
            convolutions=123456,
            unfused=(Unfused(LONG, 123456, "x" * 300, LONG), Unfused("W" * 300, 1, "x", "")),
        ),
    }


NAMES = (
    *("resnet18", "resnet152", "resnet_v2_50", "d2l_resnet18", "with hooks"),
    *("se", "dense", "hostile", "long", "nothing fused", "empty"),
)


def groups(picture):
    """(lines of the title, texts) of each block or group of blocks."""
    root = ElementTree.fromstring(picture)
    for group in root.iter(f"{SVG}g"):
        yield group.find(f"{SVG}title").text.split("\n"), [text.text or "" for text in group.iter(f"{SVG}text")]


def boxes(picture):
    rects = ElementTree.fromstring(picture).iter(f"{SVG}rect")
    for x, y, width, height in ((float(rect.get(name)) for name in ("x", "y", "width", "height")) for rect in rects):
        yield x, y, x + width, y + height


@functools.cache
def font(family, bold):
    manager = pytest.importorskip("matplotlib.font_manager", reason="needs matplotlib, whose fonts are wide ones")
    return manager.get_font(manager.findfont(f"DejaVu Sans{family}:bold" if bold else f"DejaVu Sans{family}"))


def texts(picture):
    """The box of every text, in DejaVu's fonts."""
    for text in ElementTree.fromstring(picture).iter(f"{SVG}text"):
        size, x, y = (float(text.get(name)) for name in ("font-size", "x", "y"))
        face = font(" Mono" if text.get("font-family") else "", text.get("font-weight") == "bold")
        width = float(text.get("textLength", 0)) or measured(face, text.text or "", size)
        yield text.text, (x, y - 0.8 * size, x + width, y + 0.24 * size)


def measured(face, text, size):
    face.set_size(1000, 72)  # at which rounding to pixels doesn't matter
    face.set_text(text)
    return face.get_width_height()[0] / 64 * size / 1000


def inside(box, other):
    return other[0] <= box[0] and other[1] <= box[1] and box[2] <= other[2] and box[3] <= other[3]


def apart(box, other):
    return box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]


def check_geometry(picture):
    """Boxes are nested or apart. A text is in the innermost box that it starts in, and apart from other texts."""
    rects = [*boxes(picture)]
    for one, other in combinations(rects, 2):
        assert inside(one, other) or inside(other, one) or apart(one, other), (one, other)
    placed = [*texts(picture)]
    for text, box in placed:
        start = (box[0], box[3] - 3, box[0], box[3] - 3)
        around = min((r for r in rects if inside(start, r)), key=lambda r: (r[2] - r[0]) * (r[3] - r[1]))
        assert inside(box, around), (text, box, around)
    for (text, one), (_, other) in combinations(placed, 2):
        assert apart(one, other), text


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_text_is_in_its_box(name):
    check_geometry(svg(reports()[name], name * (20 if name == "long" else 1)))


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_in_the_picture(name):
    """Each in the words that show where the pointer rests; of alike ones the first is drawn, with their number."""
    rows, shown = [*reports()[name]], [*groups(svg(reports()[name], name))]
    lines = [line for title, _ in shown for line in title]
    assert len(lines) == len(rows)
    for row in rows:
        path, kind, reason = map(words.clean, (row.path or "(model)", row.kind, row.reason))
        assert any(line.startswith(path) and line.endswith(reason) and f": {kind}: " in line for line in lines)
    for title, visible in shown:
        count = re.match(rf"(\d+) {words.TIMES} ", next((t for t in visible if words.TIMES in t), ""))
        blocks = {line.partition(": ")[0] for line in title}
        assert len(blocks) == (int(count.group(1)) if count else 1)


def test_alike_blocks_are_one():
    """A chain of equal blocks, but not across another block, another reason or another stage."""
    labels = [title[0].partition(":")[0] for title, _ in groups(svg(reports()["resnet152"]))]
    assert labels == ["(model)", *(f"layer{stage}.{first}" for stage in range(1, 5) for first in (0, 1))]
    assert [len(title) for title, _ in groups(svg(reports()["resnet152"]))] == [1, 1, 2, 1, 7, 1, 35, 1, 2]
    assert [[group.paths for group in of] for _, of in alike.stages(reports()["se"])] == [
        [("layer1.0", "layer1.1"), ("layer1.2",)],
        [("layer2.0",)],
    ]


def test_layers_that_a_block_runs_itself_are_alike():
    (_, [model]), (_, [layers, last]) = alike.stages(reports()["dense"])
    assert model.paths == ("",)
    assert layers.paths == tuple(f"features.denseblock1.l{i}" for i in range(9))
    assert layers.rows[0][0].steps == "norm+relu -> conv" and last.rows[0][0].steps == "norm+relu -> conv -> pool"


def test_parts_of_several_children_stay_together():
    rows = block("a.0")[0], Row("a.0", "Bottleneck (part)", True, "down.0+down.1"), block("a.0")[1]
    ((_, [group]),) = alike.stages(rows)
    assert group.rows == (rows,)


def test_kernels_are_boxes_around_their_layers():
    picture = svg(report(Row("a", "Block", True, "conv1+bn1+relu -> conv2+bn2+add+relu")))
    root = ElementTree.fromstring(picture)
    (group,) = root.iter(f"{SVG}g")
    rects, layers = [*group.iter(f"{SVG}rect")], [text.text or "" for text in group.iter(f"{SVG}text")]
    assert layers == ["a", "Block", "conv1", "bn1", "relu", "conv2", "bn2", "add", "relu"]
    assert [rect.get("stroke") is not None for rect in rects] == [True, *[False] * 3, True, *[False] * 4]
    assert len([*group.iter(f"{SVG}path")]) == 1


def test_what_runs_eager_is_dashed_and_says_why():
    picture = svg(reports()["with hooks"])
    of = {title[0].partition(":")[0]: visible for title, visible in groups(picture)}
    assert "runs eager now: a hook on bn1 has to fire" in of["layer2.0"]
    assert "apart from its neighbors: a hook on it has to fire" in of["layer3.0"]
    dashed = {
        group.find(f"{SVG}title").text.partition(":")[0]
        for group in ElementTree.fromstring(picture).iter(f"{SVG}g")
        if any(rect.get("stroke-dasharray") for rect in group.iter(f"{SVG}rect"))
    }
    assert dashed == {"layer2.0"} and "images normalized by mean" in picture and ", frozen" in picture


def test_counts_and_reasons():
    picture = svg(reports()["resnet_v2_50"], "resnet_v2_50")
    visible = [text.text for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]
    assert "53 of 54 convolutions are in fused kernels" in visible and "resnet_v2_50" in visible
    (row,) = reports()["resnet_v2_50"].unfused
    assert row.reason in visible and f"such as {row.example} → {row.hint}" in visible
    assert "Nothing to fuse" in svg(report()) and "Nothing to fuse" not in picture


def test_shortened_text_is_whole_under_the_pointer():
    picture = svg(report(Row("a", "A", False, reason=LONG)))
    texts = [text for text in ElementTree.fromstring(picture).iter(f"{SVG}text") if "…" in (text.text or "")]
    assert texts and all(text.find(f"{SVG}title").text == words.clean(LONG) for text in texts)


def test_a_file_of_its_own():
    """No script, no reference to another file or address, no style of the viewer's: it looks alike wherever it is."""
    picture = svg(reports()["hostile"], "<script>")
    tags = {element.tag.removeprefix(SVG) for element in ElementTree.fromstring(picture).iter()}
    assert tags == {"svg", "rect", "g", "title", "text", "path"}
    assert re.findall(r"https?://\S+?(?=\")", picture) == ["http://www.w3.org/2000/svg"]
    first = next(boxes(picture))
    assert all(inside(box, first) for box in boxes(picture)) and first[:2] == (0, 0)


def test_the_same_report_gives_the_same_picture():
    model = rk.models.resnet18()
    assert svg(rk.explain(model), "a") == svg(rk.explain(model), "a")


@pytest.mark.parametrize("family, bold", (("", False), ("", True), (" Mono", False)))
def test_no_character_is_wider_than_its_bound(family, bold):
    """The others are squeezed by the viewer."""
    face, monospace = font(family, bold), bool(family)
    known = [c for c in map(chr, (*range(0x20, 0x3000), *range(0x1F600, 0x1F610))) if words.is_of_known_width(c)]
    assert {*"azAZ09.()_→…ß"} <= {*known} and not {*"ڈ名ﷺ\u0301"} & {*known}
    for c in filter(str.isprintable, known):
        assert measured(face, c, 12) <= words.width(c, 12, monospace=monospace, bold=bold), c


rows = st.builds(
    Row, st.text(), st.text(), st.booleans(), st.text(), st.text(), apart=st.text(max_size=5), table=st.text(max_size=5)
)


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
@hypothesis.given(st.lists(rows, max_size=4), st.text())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_names(rows, title):
    picture = svg(report(*rows, unfused=tuple(Unfused(row.reason, 1, row.path, row.kind) for row in rows)), title)
    check_geometry(picture)


def test_the_command_writes_it(tmp_path, capsys):
    file = tmp_path / "net.svg"
    assert cli.main(["explain", "--model", "resnet18", "--json", "--svg", str(file)]) == 0
    assert file.read_text("utf-8") == svg(reports()["resnet18"], "resnet18")
    assert capsys.readouterr().out.startswith("{")
    assert cli.main(["explain", "--model", "resnet18", "--svg", str(tmp_path / "no" / "net.svg")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_the_shipped_picture_is_what_the_command_writes(tmp_path):
    command = ["explain", "--model", "resnet50", "--svg"]
    assert cli.main([*command, str(tmp_path / "now.svg")]) == 0
    assert (tmp_path / "now.svg").read_text() == (ROOT / "docs" / "resnet50.svg").read_text(), (
        f"write it anew: python -m resnet_kernels {' '.join(command)} docs/resnet50.svg"
    )
