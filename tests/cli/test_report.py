"""python -m resnet_kernels report: what its pages say, whether its plots can be read, and what it refuses to overwrite."""

import base64
import html.parser
import itertools
import json
import os
import re
import shutil
import sys

import pytest

from helpers import results_files as files
from resnet_kernels.cli import main as cli
from resnet_kernels.cli.report import kernel_sections, page, plot_style, plots, sections
from resnet_kernels.perf import read_results
from resnet_kernels.perf.schema import Ceilings

pytest.importorskip("matplotlib", reason="needs matplotlib")
from matplotlib.text import Text


def report(*arguments):
    return cli.main(["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """(the file, the folder of its report)."""
    folder = tmp_path_factory.mktemp("few")
    path = files.write(folder / "few.json", files.few())
    assert report(path, "--out", folder / "out") == 0
    return path, folder / "out"


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order; collects images and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.addresses, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe")
        self.addresses += [value for name, value in attributes.items() if name in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_all_in_itself(few):
    text = (few[1] / "report.html").read_text()
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and "<title>" in text and 'charset="utf-8"' in text
    assert len(page.images) == 7 and all(image["alt"] for image in page.images)
    assert page.addresses and all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    for address in page.addresses:
        svg = base64.b64decode(address.partition(",")[2]).decode()
        assert svg.rstrip().endswith("</svg>") and not re.search(r'href="(?!#)', svg)
    assert "url(" not in text and "@import" not in text


def test_the_markdown_shows_its_plots(few):
    text = (few[1] / "report.md").read_text()
    names = re.findall(r"!\[[^\]]+\]\((.+?)\)", text)
    assert len(names) == 7 == len(set(names))
    assert {*names, "report.md", "report.html"} == {path.name for path in few[1].iterdir()}
    assert all((few[1] / name).read_bytes().startswith(b"\x89PNG") for name in names)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(tables) == 8
    for table in tables:
        assert len({row.replace(r"\|", "").count("|") for row in table.splitlines()}) == 1


def test_losses_are_as_plain_as_wins(few):
    for name in ("report.md", "report.html"):
        text = (few[1] / name).read_text()
        assert "fused is faster in 1, level in 2 and slower in 1 of 4 cases" in text
        assert "jax (not importable here: No module named 'jax')" in html.unescape(text)
    assert "| resnet50 224px b1 fp32 | 47.2 | compile | 35.67 | 0.75 | slower |" in (few[1] / "report.md").read_text()


def test_every_time_is_in_the_page(few):
    document = json.loads(few[0].read_text())
    text = Page((few[1] / "report.html").read_text()).text
    for benchmark in document["benchmarks"]:
        assert f"{1e3 * benchmark['stats']['median']:.4g}" in text


def test_a_file_without_profiles_says_what_it_lacks(tmp_path):
    over = files.benchmark("compile", parity_failure="y errs by 1.00e-02")
    cases = [files.benchmark(batch=batch) for batch in (1, 8)] + [files.benchmark("eager", batch=1), over]
    path = files.write(tmp_path / "r.json", files.document(cases))
    assert report(path, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("Nothing to draw: the file has no times of single kernels.") == 2
    assert "Nothing to draw: the file has no network's training step" in text
    assert "Over the error budget, and timed all the same: compile in model-forward-resnet50-224px-b8-fp32-cpu." in text
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_one_batch_is_no_curve(tmp_path):
    path = files.write(tmp_path / "r.json", files.document([files.benchmark("eager"), files.benchmark("fused")]))
    assert report(path, "--out", tmp_path) == 2  # holds r.json
    assert report(path, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Measured at one batch size only, so no curve: resnet50 224px b8 fp32 (inference)." in text
    assert "plot-throughput" not in text


def test_names_are_escaped(tmp_path):
    odd = files.benchmark("fused", settings="a|b <script>x</script> & more", label="ours")
    path = files.write(tmp_path / "r.json", files.document([files.benchmark("eager"), odd]))
    assert report(path, "--out", tmp_path / "out") == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "a|b <script>x</script> & more" in page.text
    assert r"a\|b &lt;script&gt;x&lt;/script&gt; &amp; more" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    "text, shown",
    [
        ("[x](http://y)", r"[x\](http://y)"),
        ("![x](y.png)", r"![x\](y.png)"),
        ("[x]: y", r"[x\]: y"),
        ("# heading", r"\# heading"),
        ("1. item", r"1\. item"),
        ("*a* _b_ `c` ~~d~~", r"\*a\* \_b\_ \`c\` \~\~d\~\~"),
        (r"back\slash", r"back\\slash"),
        ("d2l_resnet18 0.95 [0.90, 1.00] a\n# b", "d2l_resnet18 0.95 [0.90, 1.00] a # b"),
    ],
)
def test_markdown_shows_names_as_they_are(text, shown):
    assert page._text(text) == shown


@pytest.mark.parametrize("name", ["$^$", "100 $ or 200 $", "x" * 100_000, "line\nline"])
def test_any_name_can_be_drawn(name, tmp_path):
    """matplotlib read dollars as formulas, and a long name left a negative width for the bars."""
    curves = [plots.Curve(name, [1, 8], [10.0, 20.0])]
    figures = (
        plots.throughput({name: curves}, [name]),
        plots.best_peer([plots.Bar(name, 1.5, name), plots.Bar("b", 0.5, name)]),
        plots.stacks([plots.Stack(name, name, {"conv": 1.0})], "ms"),
    )
    for figure in figures:
        assert plot_style.save(figure, "png").startswith(b"\x89PNG")
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert all(len(text) < 120 and "\n" not in text for text in texts)


@pytest.mark.slow
def test_the_same_file_gives_the_same_bytes(few, tmp_path):
    assert report(few[0], "--out", tmp_path / "again") == 0
    for path in few[1].iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


# What is drawn.


@pytest.fixture(scope="module", params=("few", pytest.param("many", marks=pytest.mark.slow)))
def drawn(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "r.json"
    read = read_results.read(files.write(path, getattr(files, request.param)()))
    return [part for section in sections.sections(read) for part in section.parts if part.figure]


def test_texts_lie_apart_and_inside(drawn):
    """No label of a plot covers another one or leaves the picture, with few cases and with many."""
    from matplotlib.text import Text

    for part in drawn:
        figure = part.figure
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        # Ticks beyond an axis' limits are kept, and not drawn.
        ticks = [t for axes in figure.axes for t in _undrawn_ticks(axes)]
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t not in ticks]
        assert len(boxes) > 4
        for text, box in boxes:
            assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, (part.title, text)
            assert figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1, (part.title, text)
        for (a, box_a), (b, box_b) in itertools.combinations(boxes, 2):
            wide = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
            high = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
            assert wide <= 1 or high <= 1, f"{part.title}: {a!r} and {b!r} overlap by {wide:.0f} x {high:.0f}"


def _undrawn_ticks(axes):
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)


def test_axes_bear_units(drawn):
    for part in drawn:
        for axes in part.figure.axes:
            assert any(unit in axes.get_xlabel() for unit in ("images", "ms", "times", "FLOP / byte"))


def test_a_loss_has_its_own_look():
    figure = plots.best_peer([plots.Bar("a", 0.5, "x"), plots.Bar("b", 2.0, "y"), plots.Bar("c", 1.001, "z")])
    [axes] = figure.axes
    looks = {(patch.get_facecolor(), patch.get_hatch()) for patch in axes.patches}
    assert len(looks) == 3
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["2.00x y (faster)", "1.00x z (level)", "0.50x x (slower)"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "c", "a"]
    lengths = [patch.get_width() for patch in axes.patches]
    assert lengths[0] == pytest.approx(1) and lengths[2] == pytest.approx(-1)


def test_contenders_look_different():
    names = [f"contender {i}" for i in range(16)]
    styles = [tuple(plot_style.line_style(names, name).items()) for name in names]
    assert len(set(styles)) == 16


def test_roofline_draws_points_and_ceilings():
    points = [plots.Point("layer1", 4.0, 1e11, 0.5), plots.Point("layer2", 50.0, 3e11, 0.25)]
    figure = plots.roofline({"eager": points, "fused": points}, Ceilings(0.4, 20.0, "measured"))
    for axes in figure.axes:
        offsets = [tuple(map(float, xy)) for collection in axes.collections for xy in collection.get_offsets()]
        assert offsets == [(4.0, 1e11), (50.0, 3e11)]
        compute, memory = [line.get_xydata() for line in axes.lines]
        assert compute[:, 1].tolist() == [4e11, 4e11] and compute[0, 0] == pytest.approx(20.0)
        assert memory[:, 1] / memory[:, 0] == pytest.approx([2e10, 2e10]) and memory[1, 1] == pytest.approx(4e11)
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        assert left < 4 and right > 50 and low < 1e11 and high > 4e11
    assert not plots.roofline({"eager": points}, None).axes[0].lines
    # Winograd's kernels have a ceiling of their own, where they run.
    eager, fused = plots.roofline({"eager": points, "fused": points}, Ceilings(0.4, 20.0, "measured"), {"fused"}).axes[
        :2
    ]
    assert len(fused.lines) == len(eager.lines) + 1
    assert [line.get_ydata()[0] for line in fused.lines if line.get_linestyle() == ":"] == [2.25 * 0.4e12]


def test_stacks_add_up(tmp_path):
    read = read_results.read(files.write(tmp_path / "r.json", files.few()))
    case = read.cases["model-forward-resnet50-224px-b8-float32-cpu".replace("float32", "fp32")]
    [part] = kernel_sections.layers(read).parts
    for name in ("eager", "fused"):
        rows = [[float(cell.replace(",", "")) for cell in row[2:]] for row in part.rows if row[1] == name]
        whole = 1e3 * sum(kernel.seconds for kernel in case.contenders[name].kernels)
        # Written with three digits.
        assert rows[0][3] == pytest.approx(whole, rel=5e-3)
        assert sum(row[3] for row in rows[1:]) == pytest.approx(whole, rel=1e-2)
        assert all(sum(row[:3]) == pytest.approx(row[3], rel=1e-2) for row in rows)
    assert [row[0] for row in part.rows if row[1] == "fused"] == [
        "whole network", "stem", "layer1", "layer2", "layer3", "layer4", "head",
    ]  # fmt: skip
    assert [row[0] for row in part.rows if row[1] == "compile"] == ["whole network"] and "compile" in part.note


def test_stages_of_a_network(tmp_path):
    """As a profile has them: what a stage does itself, between its blocks, bears its name alone."""
    paths = ("", "conv1+bn1+relu", "maxpool", "layer1", "layer1.0.conv1", "layer1", "layer2.0.conv1", "avgpool", "fc")
    kernels = [{"path": path, "name": "k", "kind": "conv", "seconds": 1.0} for path in paths]
    eager = files.benchmark("eager", kernels=kernels)
    compiled = files.benchmark("compile", kernels=[{"path": "", "name": "region", "kind": "rest", "seconds": 1.0}])
    read = read_results.read(files.write(tmp_path / "r.json", files.document([eager, compiled])))
    [part] = kernel_sections.layers(read).parts
    assert [(row[0], row[2]) for row in part.rows if row[1] == "eager"] == [
        ("whole network", "9,000"), ("outside of modules", "1,000"), ("stem", "2,000"), ("layer1", "3,000"),
        ("layer2", "1,000"), ("head", "2,000"),
    ]  # fmt: skip
    assert part.head == ("layers", "contender", "convolution ms", "not told apart ms", "sum ms")
    assert [row for row in part.rows if row[1] == "compile"] == [("whole network", "compile", "0", "1,000", "1,000")]


# --against, and what is refused.


def write_run(path, fused=1.0, **more):
    times = {"eager": 0.05, "fused": 0.03 * fused, "compile": 0.031}
    benchmarks = [files.benchmark(name, t, batch=batch, **more) for name, t in times.items() for batch in (1, 8)]
    return files.write(path, files.document(benchmarks))


@pytest.mark.parametrize("fused, status, verdict", [(1.2, 1, "slower"), (0.8, 0, "faster"), (1.0, 0, None)])
def test_against(fused, status, verdict, tmp_path, capsys):
    old, new = write_run(tmp_path / "old.json"), write_run(tmp_path / "new.json", fused, seed=1)
    assert report(new, "--against", old, "--out", tmp_path / "out") == status
    out = capsys.readouterr().out
    counts = {v: 2 * (v == (verdict or "within noise")) for v in ("slower", "faster", "within noise")}
    assert "ours: {slower} slower, {faster} faster, {within noise} within noise".format(**counts) in out
    percent = {"slower": r"\+(?:19|20)\.\d%", "faster": r"-(?:19|20)\.\d%"}.get(verdict)
    assert len(re.findall(rf"^{verdict} +model-forward-.+fused +({percent}) ", out, re.M)) == (2 if verdict else 0)
    assert "## Against old.json" in (tmp_path / "out" / "report.md").read_text()


def test_against_tells_what_it_could_not_compare(tmp_path, capsys):
    old = files.document([files.benchmark(name, torch="2.12.0") for name in ("eager", "fused", "jax")])
    cases = [files.benchmark(name, subject=net) for name in ("eager", "fused") for net in ("resnet50", "resnet18")]
    new, old = files.write(tmp_path / "new.json", files.document(cases)), files.write(tmp_path / "old.json", old)
    report(new, "--against", old, "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "Other versions: torch 2.12.0 then, 2.13.0 now." in out and "In new.json alone: 1 case." in out
    assert "Not in both files: model-forward-resnet50-224px-b8-fp32-cpu, jax." in out
    assert "(no estimate: fewer than three peers' changes)" in out


@pytest.mark.parametrize(
    "contents, message",
    [
        ("", "is empty"),
        ("{", "is damaged"),
        (files.document([]), "holds no benchmark"),
        (files.document([files.benchmark(schema=9)]), "schema version 9"),
        (files.document([files.benchmark(device="cpu (AVX2)")]), "times of two machines don't compare"),
        (files.document([files.benchmark(device="cuda (H200)")]), "times of two machines don't compare"),
        (files.document([files.benchmark(subject="resnet34")]), "no case in common"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(contents, message, few, tmp_path, capsys):
    good, bad = write_run(tmp_path / "good.json"), files.write(tmp_path / "bad.json", contents)
    out = shutil.copytree(few[1], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    alone = "two machines" not in message and "in common" not in message
    for arguments in ((good, "--against", bad), *([(bad,)] if alone else [])):
        capsys.readouterr()
        assert report(*arguments, "--out", out) == 2
        text, error = capsys.readouterr()
        assert message in error and error.startswith("error: ") and error.count("\n") == 1 and not text
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert report(*arguments, "--out", tmp_path / "other") == 2 and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_folder_of_others_is_left_alone(few, tmp_path, capsys):
    (tmp_path / "report.html").write_text("<html>mine</html>")
    assert report(few[0], "--out", tmp_path) == 2
    assert "is not empty and holds no earlier report" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "file").touch()
    assert report(few[0], "--out", tmp_path / "file") == 2
    assert report(few[0], "--out", tmp_path / "file" / "below") == 2
    assert capsys.readouterr().err.count("error: --out") == 2


@pytest.mark.slow
def test_a_killed_report_is_in_nobodys_way(few, tmp_path):
    """Its temporary folder made the next one say that the folder was another program's."""
    old, new = (tmp_path / f".report-{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
        (folder / "report.html").touch()
    os.utime(old, (0, 0))
    assert report(few[0], "--out", tmp_path) == 0
    assert not old.exists() and new.exists() and (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_an_earlier_report_is_replaced(few, tmp_path):
    out = tmp_path / "out"
    assert report(few[0], "--out", out) == 0
    (out / "notes.txt").write_text("mine")
    assert report(write_run(tmp_path / "new.json"), "--out", out) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"notes.txt", "report.html", "report.md", "plot-best-peer-1.png", "plot-throughput-1.png"}
    assert "new.json" in (out / "report.md").read_text()


def test_a_failure_while_drawing_writes_nothing(few, tmp_path, monkeypatch):
    def fails(figure, kind):
        raise RuntimeError("no font")

    monkeypatch.setattr(plot_style, "save", fails)
    assert report(few[0], "--out", tmp_path / "out") == 2 and not (tmp_path / "out").exists()


def test_without_matplotlib(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report(few[0], "--out", tmp_path / "out") == 2
    assert 'pip install "resnet_kernels[report]"' in capsys.readouterr().err and not (tmp_path / "out").exists()
