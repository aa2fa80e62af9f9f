"""The table of other people's networks: what runs is what the report claims, and the page is what the file says."""

import json
import warnings
from pathlib import Path

import pytest
import torch

import resnet_kernels as rk
from benchmarks.tools import coverage
from benchmarks.tools.readme_tables import fill
from resnet_kernels.kernels.cpu import library
from resnet_kernels.models.random_weights import randomise_batch_norms_

ROOT = Path(__file__).parents[2]
# The smallest image that a network takes, where it isn't 64.
SIZES = {"inception_resnet_v2": 75, "iresnet50": 112, "r3d_18": 0}
# Of each kind one runs in the quick tests.
QUICK = ("densenet121", "create_feature_extractor(resnet50)", "seresnet50", "ResNet-50, FrozenBatchNorm", "ResNet-50, with_cp",
         "iresnet50", "YOLOv8n's backbone", "ResNet-50")  # fmt: skip
MARKED = [pytest.param(net, marks=() if net.name in QUICK else pytest.mark.slow, id=net.name) for net in coverage.NETS]


def built(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return randomise_batch_norms_(make()).eval()
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"this network can't be built here: {error}")


@pytest.mark.parametrize("net", MARKED)
def test_what_runs_is_what_the_report_claims(net):
    if library.library_or_none() is None:
        pytest.skip("needs our CPU kernels, whose layers have names in profiles")
    torch.manual_seed(0)
    model = built(net.tiny)
    x = coverage.images(net, 2, SIZES.get(net.name, 64))
    fused = rk.fuse(model)
    with torch.no_grad():
        fused(x)
    report, ran = rk.explain(fused), coverage.that_ran(fused, x)
    left = sum(row.convolutions for row in report.unfused)
    assert report.convolutions - left == len(ran), str(report)
    assert all(row.reason for row in report.unfused) and report.convolutions == len(coverage.convolutions_of(model))
    result = rk.verify(model, fused, x)
    assert result, str(result)


def test_the_page_is_what_the_file_says():
    page = (ROOT / "docs" / "models.md").read_text()
    results = json.loads(coverage.RESULTS.read_text())
    assert fill(page, {"coverage": coverage.table(results)}) == page
    assert [row["name"] for row in results["networks"]] == [net.name for net in coverage.NETS]
    assert all(row["fused"] >= row["fused_before"] for row in results["networks"])
    assert all(row["verified"] for row in results["networks"])
    # Where something is fused it pays.
    assert all(row["times_eager"] > 1 for row in results["networks"] if row["fused"] and "times_eager" in row)
    assert sum("times_eager" in row for row in results["networks"]) >= 25
    assert f"[{len(coverage.NETS)} networks](docs/models.md)" in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("net", coverage.NETS, ids=lambda net: net.name)
def test_the_file_counts_as_the_report_does(net):
    row = next(row for row in json.loads(coverage.RESULTS.read_text())["networks"] if row["name"] == net.name)
    report = rk.explain(built(net.build))
    assert [[left.convolutions, left.reason] for left in report.unfused] == row["left"]
    assert row["convolutions"] - sum(count for count, _ in row["left"]) == row["fused"]


def test_a_network_whose_library_is_missing_is_left_out(monkeypatch, capsys, tmp_path):
    def absent():
        raise ImportError("No module named 'nowhere'")

    small = next(net for net in coverage.NETS if net.name == "RN50")
    monkeypatch.setattr(
        coverage, "NETS", (small._replace(name="absent", build=absent), small._replace(build=small.tiny, size=64))
    )
    before = tmp_path / "before.json"
    before.write_text(json.dumps({"networks": [{"name": "RN50", "fused": 3}]}))
    assert coverage.main(["--json", str(tmp_path / "new.json"), "--before", str(before)]) == 0
    assert "absent is left out: No module named 'nowhere'" in capsys.readouterr().err
    results = json.loads((tmp_path / "new.json").read_text())
    (row,) = results["networks"]
    assert row["fused_before"] == 3 and row["fused"] == row["convolutions"] and "times_eager" not in row
    assert "| RN50 | as in CLIP |" in coverage.table(results)
