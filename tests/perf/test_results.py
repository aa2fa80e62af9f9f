"""Results files: what is read from them, what is refused, and when a change is more than noise."""

import json
import math
import random
from pathlib import Path

import pytest

from helpers import results_files as files
from resnet_kernels.perf import read_results, regressions
from resnet_kernels.perf.results import ResultsError
from resnet_kernels.perf.schema import (
    CaseInfo,
    Ceilings,
    Conditions,
    ContenderInfo,
    ExtraInfo,
    Kernel,
    Rates,
    Spread,
    Versions,
)

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))


def read(tmp_path, benchmarks, name="results.json", **more):
    return read_results.read(files.write(tmp_path / name, {**files.document(benchmarks), **more}))


@pytest.mark.parametrize("path", [p for p in RESULTS if not p.name.startswith("costs-")], ids=lambda path: path.name)
def test_the_repository_s_files_are_read(path):
    read = read_results.read(path)
    assert read.cases and all("fused" in case.contenders for case in read.cases.values())


def test_what_may_be_unknown_may_be_missing(tmp_path):
    benchmark = files.benchmark()
    for field in ("driver", "triton", "ceilings", "parity_error", "parity_budget"):
        del benchmark["extra_info"][field]
    read_back = read(tmp_path, [benchmark])
    [case] = read_back.cases.values()
    fused = case.contenders["fused"]
    assert (
        read_back.versions == {"torch": "2.13.0"}
        and case.busy_elsewhere is fused.ceilings is fused.parity_error is None
    )
    assert (case.size, case.batch, case.dtype, case.label) == (224, 8, "float32", "resnet50 224px b8 fp32")


def test_what_is_written_is_read(tmp_path):
    """Every field that the reader has, under the name that the writer gives it."""
    case = CaseInfo(
        system="slim", level="model", subject="resnet_v2_50", direction="forward", dtype="bfloat16", batch=4,
        image_size=32, device="cuda (Some GPU)", device_type="cuda", threads=2, busy_elsewhere=0.5,
    )  # fmt: skip
    versions = Versions(torch="2.13.0", triton=None, driver="580", cuda="13.0", cudnn="91900")
    kernel = Kernel("layer1.0", "conv", 1e-3, "gemm", 1e9, 1e6, 1, "layer1.0", False)
    contender = ContenderInfo(
        contender="fused", label="ours", ours=True, settings="s", version="v", parity_error=0.1, parity_budget=0.2,
        parity_failure="y errs", kernels=(kernel, kernel),
    )  # fmt: skip
    spread = Spread(p20=1.0, p80=3.0, interleaved_ratio_to_eager=0.5)
    rates = Rates(
        ceilings=Ceilings(1.0, 2.0, "measured"), roofline_share=0.25, gflop=1.0, hbm_gb=None, img_per_s=2.0, gflop_per_s=0.5,
        tflop_per_s=5e-4, gb_per_s=None, roofline_seconds=0.5, roofline_bound="FLOP",
    )  # fmt: skip
    conditions = Conditions(case="c", tf32=True, input_copies=1, prepare_s=1.0, gate_s=1.0, saved_mib=None)
    info = ExtraInfo(case, versions, contender, spread, rates, conditions).to_json()
    entry = {"group": "c", "stats": {"median": 2.0, "data": [1.0, 2.0, 3]}, "extra_info": info}
    found = read(tmp_path, [entry])
    measured = found.cases["c"].contenders["fused"]
    for part, read_back in ((case, found.cases["c"]), (contender, measured)):
        assert vars(part).items() <= vars(read_back).items()
    assert (measured.median, measured.samples, measured.ratios) == (2.0, (1.0, 2.0, 3), {"eager": 0.5})
    assert measured.ceilings == rates.ceilings and measured.roofline_share == 0.25
    assert found.versions == {"torch": "2.13.0", "driver": "580", "cuda": "13.0", "cudnn": "91900"}


def test_ratios_are_of_rounds(tmp_path):
    """Eager is the faster in the median, and in most rounds the slower: it met the machine's slow phase."""
    fused, eager = files.benchmark("fused"), files.benchmark("eager")
    fused["stats"].update(data=[1.0, 1.0, 4.0, 4.0, 4.0], median=4.0)
    eager["stats"].update(data=[2.0, 2.0, 2.0, 8.0, 3.0], median=2.0)
    [case] = read(tmp_path, [eager, fused]).cases.values()
    assert case.interleaved and case.speed("fused", "eager") == 2.0 and case.speed("eager", "fused") == 0.5


def test_without_samples_the_file_s_own_ratios_count(tmp_path):
    """As pytest-benchmark's storage has it, without --benchmark-save-data."""
    fused, eager = files.benchmark("fused", interleaved_ratio_to_eager=0.5), files.benchmark("eager")
    del fused["stats"]["data"], eager["stats"]["data"]
    [case] = read(tmp_path, [eager, fused]).cases.values()
    assert not case.interleaved and case.speed("fused", "eager") == 2.0


def test_the_best_peer_is_not_ours(tmp_path):
    times = {"eager": 5.0, "compile": 3.0, "openvino": 2.9, "fused": 4.0, "triton": 1.0, "fused-graph": 1.0}
    [case] = read(tmp_path, [files.benchmark(name, t, noise=0) for name, t in times.items()]).cases.values()
    assert case.best_peer() == "openvino" and case.best_peer("missing") is None
    [case] = read(tmp_path, [files.benchmark("fused"), files.benchmark("triton")]).cases.values()
    assert case.best_peer() is None


def _with(change):
    document = files.document([files.benchmark("eager"), files.benchmark("fused")])
    change(document)
    return document


@pytest.mark.parametrize(
    "contents, message",
    [
        ("", "is empty"),
        ('{"benchmarks": [', "is damaged: Expecting"),
        (json.dumps(files.few())[:5000], "is damaged: "),
        ("[]", "is not from --benchmark-json"),
        ('{"weights_MB": 102}', "is not from --benchmark-json"),
        ('{"benchmarks": {}}', "is not from --benchmark-json"),
        (files.document([]), "holds no benchmark"),
        (files.document([5]), "is damaged: "),
        (_with(lambda d: d["benchmarks"][0].pop("stats")), "is damaged: 'stats' is missing"),
        (
            _with(lambda d: d["benchmarks"][0]["extra_info"].update(schema=2)),
            "of schema version 2, known here is 1",
        ),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(schema="1")), "of schema version '1'"),
        (_with(lambda d: d["benchmarks"][0]["stats"].update(median=math.nan)), "a median must be a finite number"),
        (_with(lambda d: d["benchmarks"][0]["stats"].update(median="fast")), "a median must be a finite number"),
        (_with(lambda d: d["benchmarks"][0]["stats"].update(data=[1.0, 0.0])), "a sample must be above 0"),
        (_with(lambda d: d["benchmarks"][0]["stats"]["data"].pop()), "not the same number of rounds"),
        (_with(lambda d: d["benchmarks"].append(d["benchmarks"][0])), "a contender is there twice"),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(device="cpu (AVX2)")), "one file from two devices"),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(kernels=[{"name": "k"}])), "'path' is missing"),
        (_with(lambda d: d["benchmarks"][0].update(extra_info=None)), "is damaged: "),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].pop("schema")), "of schema version None"),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].pop("system")), "is damaged: 'system' is missing"),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(batch="8")), "is damaged: batch must be int, got '8'"),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(batch=math.inf)), "batch must be int, got inf"),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(batch=10**400)), "batch must be at most 1e+18"),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(batch=0)), "batch must be above 0, got 0"),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(image_size=-1)), "image_size must be a finite number"),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(direction="x")), "direction must be one of forward, "),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(direction=[])), "direction must be one of forward, "),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(level="network")), "level must be one of op, block, "),
        (
            _with(lambda d: d["benchmarks"][0]["extra_info"].update(parity_error=10**400)),
            "parity_error must be at most",
        ),
        (_with(lambda d: d["benchmarks"][0]["stats"].update(median=10**400)), "a median must be a finite number"),
        ('{"benchmarks": [1' + "0" * 5000 + "]}", "is damaged: "),
        ("[" * 100_000, "is damaged: "),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(ours=1)), "is damaged: ours must be bool, got 1"),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(driver=1)), "driver must be str or null, got 1"),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(kernels={})), "kernels must be a list, got {}"),
        (_with(lambda d: d["benchmarks"][0]["extra_info"].update(roofline_share=-1)), "a rate, FLOPs or bytes must be"),
    ],
)
def test_a_bad_file_is_one_line(contents, message, tmp_path):
    path = files.write(tmp_path / "bad.json", contents)
    with pytest.raises(ResultsError) as error:
        read_results.read(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (tmp_path / "none.json", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "binary.json", "UTF-8"),
    ):
        with pytest.raises(ResultsError, match=message):
            read_results.read(path)


# Regressions.

CASES = [("resnet50", 1), ("resnet50", 8), ("resnet18", 1), ("resnet18", 8)]


def run_of(tmp_path, name, fused=1.0, machine=1.0, peers=1.0, seed=0, contenders=("eager", "fused", "compile"), **more):
    """A file in which fused, peers, or the whole machine take so many times their usual time."""
    factors = {"eager": machine, "fused": machine * fused, "compile": machine * peers, "openvino": machine * peers}
    usual = {"eager": 0.02, "fused": 0.014, "compile": 0.015, "openvino": 0.013}
    benchmarks = [
        files.benchmark(c, usual[c] * batch * factors[c], subject=subject, batch=batch, seed=seed, **more)
        for subject, batch in CASES
        for c in contenders
    ]
    return read(tmp_path, benchmarks, name)


def test_a_slower_machine_is_no_regression(tmp_path):
    comparison = regressions.compare(run_of(tmp_path, "new", machine=1.4, seed=1), run_of(tmp_path, "old"))
    assert {change.verdict for change in comparison.changes} == {"within noise"} and len(comparison.changes) == 8
    assert comparison.drift == pytest.approx(1.4, rel=0.05) and comparison.margin == regressions.MARGIN


@pytest.mark.parametrize("fused, verdict", [(1.1, "slower"), (0.9, "faster"), (1.02, "within noise")])
def test_changes_of_ours(fused, verdict, tmp_path):
    new = run_of(tmp_path, "new", fused, machine=0.8, seed=1)
    comparison = regressions.compare(new, run_of(tmp_path, "old"))
    assert len(comparison.of_ours(verdict)) == 4 and comparison.controls == 4 and not comparison.missing
    for change in comparison.changes:
        expected = fused if change.ours else 1.0
        assert change.low <= change.factor <= change.high and change.unit == "eager"
        assert change.factor == pytest.approx(expected, rel=0.02)
    assert [change.ours for change in comparison.changes] == [True] * 4 + [False] * 4


def test_peers_that_change_widen_the_margin(tmp_path):
    """Nobody touched them: what they changed by is what nothing at all changes by, from run to run."""
    comparison = regressions.compare(run_of(tmp_path, "new", 1.1, peers=1.08, seed=1), run_of(tmp_path, "old"))
    assert comparison.margin > 0.2 and not comparison.of_ours("slower")
    # Another version is another program: no control.
    newer = run_of(tmp_path, "new", 1.1, peers=1.08, seed=1, version="torch 2.14.0")
    assert regressions.compare(newer, run_of(tmp_path, "old")).margin == regressions.MARGIN
    alone = {"contenders": ("eager", "fused")}
    comparison = regressions.compare(run_of(tmp_path, "new", 1.1, seed=1, **alone), run_of(tmp_path, "old", **alone))
    assert (
        comparison.margin == regressions.MARGIN and len(comparison.of_ours("slower")) == 4 and comparison.controls == 0
    )


def test_few_noisy_rounds_prove_nothing(tmp_path):
    noisy = {"rounds": 5, "noise": 0.4}
    comparison = regressions.compare(run_of(tmp_path, "new", 1.06, seed=1, **noisy), run_of(tmp_path, "old", **noisy))
    assert not comparison.of_ours("slower")


def test_without_eager_times_stand_alone(tmp_path):
    alone = {"contenders": ("fused",)}
    comparison = regressions.compare(run_of(tmp_path, "new", 1.2, seed=1, **alone), run_of(tmp_path, "old", **alone))
    assert comparison.drift is None and {change.unit for change in comparison.changes} == {""}
    assert len(comparison.of_ours("slower")) == 4


def test_what_one_file_lacks_is_listed(tmp_path):
    old = run_of(tmp_path, "old", contenders=("eager", "fused", "openvino"))
    new = run_of(tmp_path, "new", contenders=("eager", "fused", "compile"))
    comparison = regressions.compare(new, old)
    assert len(comparison.changes) == 4 and len(comparison.missing) == 8
    assert "model-forward-resnet18-224px-b1-fp32-cpu, openvino" in comparison.missing
    without = [files.benchmark(name) for name in ("eager", "fused")]
    for benchmark in without:
        del benchmark["stats"]["data"]
    comparison = regressions.compare(read(tmp_path, without, "a"), read(tmp_path, without, "b"))
    assert not comparison.changes and "no samples" in comparison.missing[0]


def test_two_machines_do_not_compare(tmp_path):
    old = run_of(tmp_path, "old")
    for more in ({"threads": 8}, {"device": "cpu (AVX2)"}, {"device": "cuda (Some GPU)"}):
        with pytest.raises(ResultsError, match="times of two machines don't compare"):
            regressions.compare(run_of(tmp_path, "new", **more), old)
    other = read(tmp_path, [files.benchmark(subject="resnet34")])
    with pytest.raises(ResultsError, match="no case in common"):
        regressions.compare(other, old)


@pytest.mark.parametrize("n", (9, 20, 101))
def test_intervals_of_a_median_hold_it(n):
    """Of 2000 intervals of heavy-tailed samples, as times are, at most 2% miss the true median: 1% by construction."""
    chance = random.Random(n)
    missed, widths = 0, []
    for _ in range(2000):
        samples = [math.exp(chance.gauss(0, 1)) for _ in range(n)]
        median, low, high = regressions._median(samples)
        assert min(samples) <= low <= median <= high <= max(samples)
        missed += not low <= 1 <= high
        widths.append(math.log(high / low))
    assert missed <= 40
    # Nor are they right by being the whole range.
    assert n < 20 or sum(widths) / len(widths) < 9 / math.sqrt(n)


def test_intervals_of_a_change_hold_it():
    chance = random.Random(0)
    draw = lambda middle: [middle + 0.1 * chance.gauss(0, 1) for _ in range(30)]  # noqa: E731
    missed = 0
    for _ in range(1000):
        medians = [regressions._median(draw(middle)) for middle in (0.5, 0.2, 0.1, 0.3)]
        middle, low, high = regressions._joined(medians[:2], medians[2:])
        assert low <= middle <= high
        missed += not low <= 0.3 <= high
    assert missed <= 20
