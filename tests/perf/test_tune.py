"""autotuner.py, problems.py, table_file.py and the tune command: right before fast, whole files, nothing by itself."""

import functools
import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import resnet_kernels as rk
from helpers.oracle import runnable, skip_unless_eager_runs, skip_unless_runnable
from helpers.tiny import tiny
from helpers.tuned_tables import KEY, ran, small_model, table
from helpers.tuned_tables import record as entry
from resnet_kernels.cli import main as cli
from resnet_kernels.kernels.activations import PRELU, RELU
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.ops import conv_candidates, error_budget, reference, tuned_table
from resnet_kernels.ops.batch_norm_act import NormProblem
from resnet_kernels.ops.conv_problem import ConvProblem
from resnet_kernels.perf import environment, timing
from resnet_kernels.perf.timing import Timing
from resnet_kernels.perf.tuning import autotuner, problems, table_file, tune_model

CPU = torch.device("cpu")
NAME = "small"
CONV = ConvProblem(8, 6, 5, (16, 8, 3, 3), Geometry((2, 2), (0, 1, 0, 1)), True, True, True, RELU)
DRY = ["tune", "--dry-run", "--model", NAME, "--image-size", "8"]


@pytest.fixture
def small_in_zoo(monkeypatch):
    monkeypatch.setitem(rk.models.BY_NAME, NAME, lambda: tiny(10, 3))
    # As few rounds as there may be: the interpreter is slow.
    monkeypatch.setattr(tune_model, "SECONDS_EACH", 1e-9)
    monkeypatch.setattr(timing, "_WARM_UP_ROUNDS", 0)
    monkeypatch.setattr(autotuner, "interleave", functools.partial(timing.interleave, min_rounds=1))


def problem(candidates, default="right", dtype=torch.float32):
    """y = x / 3 for 2 images, by whatever the candidates do."""
    return autotuner.Problem(
        key="third",
        batch=2,
        dtype=dtype,
        device=CPU,
        default=default,
        candidates=candidates,
        operands=lambda: (torch.arange(1.0, 2 * 4 * 9 + 1).view(2, 4, 3, 3).to(dtype),),
        eager=lambda x: x / 3,
        reference=lambda x: x.double() / 3,
        flops=72,
        bytes=576,
    )


def right(x):
    time.sleep(0.002)
    return x / 3


def planted(change):
    def run(x):
        y = x / 3
        return change(y)

    return run


def ragged(y):
    y[-1, -1, -1, -1] = 0
    return y


WRONG = {
    "a scale": (lambda y: 1.001 * y, "errs by 1.00e-03"),
    "the last pixel": (ragged, "errs by"),
    "NaN": (lambda y: y.index_fill_(0, torch.tensor([1]), math.nan), "errs by nan"),
    "inf": (lambda y: y.index_fill_(0, torch.tensor([1]), math.inf), "errs by"),
    "shape": (lambda y: y[:, :, :2], r"gives shape \(2, 4, 2, 3\)"),
    "dtype": (lambda y: y.double(), "gives torch.float64, not torch.float32"),
    "too many": (lambda y: (y, y), "gives 2 tensors, not 1"),
    "a crash": (lambda y: y.frobnicate(), "AttributeError: .*frobnicate"),
    "an arithmetic error": (lambda y: 1 // 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_candidate_cannot_win(name):
    change, reason = WRONG[name]
    wrong = planted(change)
    record = autotuner.measure(problem({"right": right, "wrong": wrong}), 0.0)
    assert record["winner"] == "right"
    assert re.search(reason, record["candidates"]["wrong"]["refused"])
    assert "call" not in record["candidates"]["wrong"]  # not even timed
    json.loads(json.dumps(record, allow_nan=False))


def test_the_faster_right_one_wins():
    record = autotuner.measure(problem({"right": right, "fast": lambda x: x / 3}), 0.0, samples=True)
    assert record["winner"] == "fast"
    fast = record["candidates"]["fast"]
    assert fast["error"] == record["candidates"]["right"]["error"] <= fast["budget"]
    assert len(fast["call"]["samples"]) == fast["call"]["rounds"] == 5
    assert "samples" not in autotuner.measure(problem({"right": right}), 0.0)["candidates"]["right"]["call"]


def test_a_wrong_default_does_not_run():
    wrong = planted(lambda y: y + 1)
    record = autotuner.measure(problem({"right": wrong, "slow": right}), 0.0)
    assert record["winner"] == "slow"
    assert autotuner.measure(problem({"right": wrong}), 0.0)["winner"] is None


def test_no_budget_where_eager_overflows():
    whole = problem({"right": lambda x: x * math.inf}, dtype=torch.float16)
    overflows = autotuner.Problem(**{**vars(whole), "eager": lambda x: x * 1e5})
    assert "refused" in autotuner.measure(overflows, 0.0)["candidates"]["right"]


def test_what_does_not_fit_is_no_error():
    def too_large(x):
        raise torch.OutOfMemoryError("256 GiB")

    whole = autotuner.Problem(**{**vars(problem({"right": right})), "reference": too_large})
    record = autotuner.measure(whole, 0.0)
    assert record["winner"] is None and "256 GiB" in record["failed"]


def timings(**seconds):
    return {name: Timing(tuple(samples)) for name, samples in seconds.items()}


def test_the_winner_beats_the_default_by_every_clock():
    graph = timings(cudnn=(2, 2), ours=(1, 1), other=(1.5, 1.5))
    assert autotuner.fastest("cudnn", [timings(cudnn=(5, 5), ours=(6, 6), other=(4, 4)), graph]) == "other"
    assert autotuner.fastest("cudnn", [timings(cudnn=(5, 5), ours=(4, 4), other=(4, 4)), graph]) == "ours"
    assert autotuner.fastest("cudnn", [timings(cudnn=(5, 5), ours=(6, 6), other=(7, 7)), graph]) == "cudnn"
    assert autotuner.fastest("cudnn", [graph]) == "ours"
    # Slower round against round, if not by the median.
    assert autotuner.fastest("a", [timings(a=(1, 1, 9, 9, 9), b=(8, 8, 8, 9.5, 9.5))]) == "a"


def test_what_was_right_before_does_not_pass_for_what_is_written_now(monkeypatch):
    filled = []
    original = torch.full_like
    monkeypatch.setattr(torch, "full_like", lambda *a, **o: (filled.append(a[1]), original(*a, **o))[1])
    autotuner.measure(problem({"right": right, "other": right}), 0.0)
    assert len(filled) == 2 and all(map(math.isnan, filled))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_convolutions_problem(dtype):
    skip_unless_eager_runs(CPU, dtype)
    (built,) = problems.build([(CONV, 3)], [5], dtype, CPU)
    # oneDNN has bfloat16 on some CPUs only.
    default = "cpu" if runnable("cpu", "cpu", dtype) is None else "eager"
    assert (built.key, built.batch, built.calls, built.default) == (str(CONV), 5, 3, default)
    x, _, bias, residual, scale = operands = built.operands()
    assert x.shape == (5, 8, 6, 5) and residual.shape == (5, 16, 3, 2) and bias.dtype == scale.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(operands, built.operands()))
    wide = reference.conv_bias_act(*(t.double() for t in operands), CONV.geometry)
    truth = built.reference(*operands)
    assert truth.dtype == (torch.float64 if dtype == torch.float32 else torch.float32)
    assert torch.equal(truth, wide.to(truth.dtype))
    assert built.flops == 2 * 5 * 16 * 3 * 2 * 8 * 9
    assert built.bytes == dtype.itemsize * (5 * 8 * 30 + 16 * 8 * 9 + 2 * 5 * 16 * 6)
    record = autotuner.measure(built, 0.0)
    assert not any("refused" in row for row in record["candidates"].values()), record


@pytest.mark.parametrize("asked", (CONV._replace(activation=PRELU), NormProblem(6, 5, 4, True, PRELU, True)), ids=str)
def test_a_prelus_problem(asked, device):
    (built,) = problems.build([(asked, 1)], [2], torch.float32, device)
    record = autotuner.measure(built, 0.0)
    assert not any("refused" in row for row in record["candidates"].values()), record
    relu = problems.build([(asked._replace(activation=RELU), 1)], [2], torch.float32, device)[0]
    y, other = (one.reference(*one.operands()) for one in (built, relu))
    assert not torch.equal(*((values[0] if isinstance(values, tuple) else values) for values in (y, other)))


def test_the_reference_goes_piece_by_piece(monkeypatch):
    (built,) = problems.build([(CONV, 1)], [5], torch.float32, CPU)
    operands = built.operands()
    whole = built.reference(*operands)
    monkeypatch.setattr(problems, "_REFERENCE", 500)  # two images of 240
    monkeypatch.setattr(error_budget, "_COMPARED", 200)  # two outputs of 96
    assert torch.equal(built.reference(*operands), whole)
    off = whole + 1
    expected = ((off - whole).norm() / whole.norm()).item()
    assert error_budget.relative_error(off, whole) == pytest.approx(expected)


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("residual", (False, True))
def test_a_norms_problem(training, residual, device):
    asked = NormProblem(6, 5, 4, residual, RELU, training)
    (built,) = problems.build([(asked, 1)], [3], torch.float32, device)
    results = built.reference(*built.operands())
    results = results if training else (results,)
    assert len(results) == (4 + residual if training else 1)
    skip_unless_runnable("triton", device, torch.float32)
    record = autotuner.measure(built, 0.0)
    rows = record["candidates"]
    assert list(rows) == ["eager", "triton"] and not any("refused" in row for row in rows.values()), record


def test_what_a_model_asks_is_noted():
    x, model = torch.randn(2, 3, 16, 16), rk.models.d2l_resnet18(3, 10, width=8, num_blocks=(3, 1)).eval()
    asked, calls = zip(*problems.note(model, x))
    assert set(map(type, asked)) == {ConvProblem} and len(set(map(str, asked))) == len(asked) < sum(calls)
    assert sum(calls) == sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    asked, calls = zip(*problems.note(model, x, training=True))
    assert set(map(type, asked)) == {NormProblem} and all(norm.training for norm in asked)
    assert sum(calls) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def test_nothing_is_noted_where_the_environment_decides(monkeypatch):
    monkeypatch.setenv("RESNET_KERNELS_BACKEND", "cpu")
    with pytest.raises(ValueError, match="RESNET_KERNELS_BACKEND must not be set"):
        problems.note(small_model(), torch.randn(2, 3, 16, 16))


def test_a_training_record_sums_the_layers_up():
    def layer(eager, triton):
        rows = {who: {"call": {"median": seconds}} for who, seconds in (("eager", eager), ("triton", triton))}
        return {"candidates": rows, "batch": 4, "dtype": "bf16", "measured": {}}

    layers = [(1, layer(1.0, 3.0)), (3, layer(2.0, 1.0))]
    record = problems.training_record("net 3x8x8", layers)
    assert (record["key"], record["winner"]) == ("training net 3x8x8", "triton")
    assert record["seconds"] == {"call": {"eager": 7.0, "triton": 6.0}}
    assert problems.training_record("net", [(2, layers[0][1]), layers[1]])["winner"] == "eager"
    refused = layer(9.0, 1.0)
    refused["candidates"]["triton"] = {"refused": "wrong"}
    assert problems.training_record("net", [*layers, (1, refused)])["winner"] == "eager"


def tune(arguments, path):
    status = cli.main([*arguments, "--output", str(path)])
    return status, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.slow
def test_the_whole_way(small_in_zoo, fake_device, write, monkeypatch, capsys):
    """From tune's dry run to a table that a fused model runs by."""
    skip_unless_runnable("triton", CPU, torch.float32)
    path = fake_device / "dry.json"
    status, values = tune(DRY, path)
    assert status == 0 and "a dry run on the CPU" in capsys.readouterr().out
    assert values["device"] == table_file.no_device()._asdict() and values["schema"] == 1
    records = values["records"]
    assert records and all(r["winner"] in r["candidates"] and r["dtype"] == "fp32" for r in records)
    for r in records:
        measured = r["measured"]
        assert (
            measured["torch"] == torch.__version__
            and {"driver", "triton", "cudnn", "commit", "time"} <= measured.keys()
        )
        for row in r["candidates"].values():
            assert row["error"] <= row["budget"]
            if "dropped" in row:
                assert row["dropped"].endswith("times as long as the fastest at first sight")
                continue
            assert row["call"]["p20"] <= row["call"]["median"] <= row["call"]["p80"]
    pointers = {n for r in records for n in r["candidates"]} & {f"pointer {c}" for c in _pointer_configs()}
    assert pointers == {f"pointer {c}" for c in _pointer_configs()}
    # As if it were this device's own, with a winner that the clock would not have chosen here.
    tile = "pointer 64x16x16 w2 s3"
    write(json.dumps({**values, "device": KEY._asdict(), "records": [{**r, "winner": tile} for r in records]}))
    model, x = rk.models.BY_NAME[NAME]().eval(), torch.randn(2, 3, 8, 8)
    fused = rk.fuse(model)
    with torch.no_grad(), ran(monkeypatch) as names:
        y = fused(x)
    assert names and set(names) == {tile}
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


def _pointer_configs():
    from resnet_kernels.kernels.conv_bias_act import CONFIGS

    return CONFIGS


def test_what_is_known_is_passed_over_unless_asked_for(small_in_zoo, tmp_path, monkeypatch, capsys):
    path = tmp_path / "t.json"
    measured = []

    def quick(problem, seconds, samples):
        measured.append(problem.key)
        return {
            **entry(problem.key, "cpu", problem.batch),
            "default": "cpu",
            "candidates": {},
            "measured": environment.versions(),
        }

    monkeypatch.setattr(autotuner, "measure", quick)
    assert tune(DRY, path)[0] == 0
    first = len(measured)
    assert tune(DRY, path)[0] == 0 and len(measured) == first > 3
    assert f"0 problems measured, {first} known already" in capsys.readouterr().out
    assert tune([*DRY, "--again"], path)[0] == 0 and len(measured) == 2 * first
    assert tune([*DRY, "--batch-size", "2", "3"], path)[0] == 0 and len(measured) == 3 * first
    monkeypatch.setattr(table_file, "versions", lambda: {"torch": "another"})
    assert tune(DRY, path)[0] == 0 and len(measured) == 4 * first
    assert len(json.loads(path.read_text())["records"]) == 2 * first


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(small_in_zoo, tmp_path, monkeypatch, capsys):
    path = tmp_path / "t.json"
    calls, original = [], autotuner.measure

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(autotuner, "measure", interrupted)
    precision = torch.backends.cudnn.conv.fp32_precision
    status, values = tune(DRY, path)
    assert status == 130 and len(values["records"]) == 2 and "stopped" in capsys.readouterr().out
    assert torch.backends.cudnn.conv.fp32_precision == precision
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_a_lost_gpu_is_noted_and_passed_over(small_in_zoo, tmp_path, monkeypatch, capsys):
    path = tmp_path / "t.json"
    lost = []

    def measure(problem, seconds, samples):
        record = {**entry(problem.key, None, problem.batch), "default": "cpu", "candidates": {"x": {"refused": "r"}}}
        record["measured"] = environment.versions()
        if not lost:
            lost.append(problem.key)
            raise autotuner.DeviceLost("x on the first: illegal address", record)
        return record

    monkeypatch.setattr(autotuner, "measure", measure)
    status, values = tune(DRY, path)
    assert status == 2 and [r["key"] for r in values["records"]] == lost
    assert "illegal address" in capsys.readouterr().err
    assert tune(DRY, path)[0] == 0 and len(json.loads(path.read_text())["records"]) > 3


def test_denied_candidates_are_left_out(small_in_zoo, tmp_path, monkeypatch, capsys):
    measured, denied = {}, tmp_path / "denied.json"

    def quick(problem, seconds, samples):
        measured[problem.key] = {*problem.candidates}
        return {**entry(problem.key, "cpu", problem.batch), "default": problem.default, "candidates": {}}

    monkeypatch.setattr(autotuner, "measure", quick)
    assert tune(DRY, tmp_path / "all.json")[0] == 0
    before = dict(measured)
    first, second, *rest = (key for key in before if key.startswith("conv "))
    assert all({"cpu", "eager"} <= names for names in before.values())
    rows = [("eager", None), ("*", first), ("cpu", second)]
    denied.write_text(json.dumps([{"candidate": name, "problem": key, "why": "hung"} for name, key in rows]))
    measured.clear()
    assert tune([*DRY, "--without", str(denied)], tmp_path / "left.json")[0] == 0
    assert measured.keys() == before.keys()
    assert measured[first] == {"cpu"}  # the default runs without a table, too
    assert all(measured[key] == before[key] - {"eager"} for key in (second, *rest))
    for text in ('{"candidate": 1}', "[{}]", "no JSON"):
        denied.write_text(text)
        assert cli.main([*DRY, "--output", str(tmp_path / "t.json"), "--without", str(denied)]) == 2
        assert "must hold a JSON list" in capsys.readouterr().err


def test_the_budget_is_kept(small_in_zoo, tmp_path, capsys):
    path = tmp_path / "t.json"
    assert tune([*DRY, "--seconds", "0"], path) == (0, None)
    assert re.search(r"0 problems measured.*\n[1-9] were left when the time was up", capsys.readouterr().out)


def test_training(small_in_zoo, tmp_path):
    path = tmp_path / "t.json"
    status, values = tune([*DRY, "--training"], path)
    keys = [r["key"] for r in values["records"]]
    assert status == 0 and f"training {NAME} 3x8x8" in keys and all("training" in key for key in keys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tune", "--device", "cuda"],
            "--device cuda: PyTorch sees no GPU here; --device cpu runs on the CPU; --dry-run",
        ),
        (["tune", "--device", "meta"], "--device must be a CUDA device or cpu, got meta"),
        (["tune", "--dry-run"], "--dry-run needs --output FILE"),
        (["tune", "--dry-run", "--model", "resnet51", "--output", "x.json"], "--model must be one of"),
    ],
)
def test_errors(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(tuned_table.CACHE_VARIABLE, str(tmp_path))
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_table_of_this_device_is_not_written_over(small_in_zoo, tmp_path, capsys):
    path = tmp_path / "t.json"
    path.write_text(table())
    assert cli.main([*DRY, "--output", str(path)]) == 2
    assert "can't be added to: it was measured on" in capsys.readouterr().err
    assert path.read_text() == table()


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "deeper" / "t.json"
    table_file.write_whole(path, "before")
    for failing in ("replace", "getpid"):
        with monkeypatch.context() as patch:
            patch.setattr(table_file.os, failing, lambda *_: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                table_file.write_whole(path, "after")
        assert path.read_text() == "before" and len(list(path.parent.iterdir())) == 1
    table_file.write_whole(path, "after")
    assert path.read_text() == "after"


def test_threads_write_one_file(tmp_path):
    """Each from a file of its own beside it: shared, the second one's was gone when it was to take its place."""
    path = tmp_path / "file.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: table_file.write_whole(path, f"{i}" * 100_000), range(8)))
    assert path.read_text() in [f"{i}" * 100_000 for i in range(8)] and list(tmp_path.iterdir()) == [path]


def test_the_names_of_the_candidates_lead_back_to_them(device):
    skip_unless_runnable("triton", device, torch.float32)
    names = conv_candidates.candidates(CONV, 2, torch.float32, device)
    built = problems.conv_problem(CONV, 2, torch.float32, device)
    operands = built.operands()
    truth = built.reference(*operands)
    assert len(names) >= 9
    for name in names:
        assert error_budget.relative_error(built.candidates[name](*operands), truth) < 1e-5, name


def test_runs_that_share_a_table_keep_each_others_records(tmp_path):
    """Each read the file when it began, and wrote what it had read and measured: the other's records were lost."""
    path = tmp_path / "table.json"
    first, second = (table_file.Table(path, KEY) for _ in range(2))
    first.put(entry("a", "tma"))
    second.put(entry("b", "tma"))
    second.put(entry("a", "eager"))
    first.put(entry("c", "cudnn"))
    found = {record["key"]: record["winner"] for record in tuned_table.read(path, KEY)}
    assert found == {"a": "tma", "b": "tma", "c": "cudnn"}, "of what both measured, the last writer's"
    assert second.has("c", 256, "fp32") is None and list(tmp_path.iterdir()) == [path]

    def run(i):
        own = table_file.Table(path, KEY)
        for j in range(10):
            own.put(entry(f"{i} {j}", "tma"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    assert len(tuned_table.read(path, KEY)) == 3 + 80 and list(tmp_path.iterdir()) == [path]


def test_what_took_a_tables_place_is_not_written_over(tmp_path):
    path = tmp_path / "table.json"
    own = table_file.Table(path, KEY)
    own.put(entry("a", "tma"))
    path.write_text("a letter")
    with pytest.raises(ValueError, match="can't be added to: it is no JSON"):
        own.put(entry("b", "tma"))
    assert path.read_text() == "a letter"


def test_a_table_where_nothing_can_be_locked(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
    table_file.Table(tmp_path / "t.json", KEY).put(entry("a", "tma"))
    assert len(tuned_table.read(tmp_path / "t.json", KEY)) == 1


@pytest.mark.slow
def test_a_table_that_cannot_be_written_is_one_line(small_in_zoo, tmp_path, monkeypatch, capsys):
    """Before anything is measured, or when the disk is full by then; both ended in a traceback and status 1."""
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(autotuner, "measure", lambda *_, **__: pytest.fail("it measured"))
        assert cli.main([*DRY, "--output", str(tmp_path / "file" / "t.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "can't be written" in error and error.count("\n") == 1
    monkeypatch.setattr(
        table_file, "write_whole", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    assert cli.main([*DRY, "--output", str(tmp_path / "t.json")]) == 2
    assert "can't be written (No space left on device)" in capsys.readouterr().err
