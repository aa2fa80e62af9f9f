"""rk.tune: a table for the user's own model, obeyed at once; all else is left alone. The CPU plays a device with tables."""

import json
import operator
import re
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import skip_unless_runnable
from helpers.tuned_tables import CONV, CPU, KEY, ran, record, small_model, table
from resnet_kernels.kernels.cpu import library
from resnet_kernels.ops import conv_candidates, tuned_table
from resnet_kernels.perf import timing
from resnet_kernels.perf.tuning import autotuner, tune_model
from resnet_kernels.runtime import eligibility
from resnet_kernels.runtime.gpu import multi_layer
from resnet_kernels.runtime.model_snapshot import Watch

TILE = "pointer 64x16x16 w2 s3"


@pytest.fixture
def quick(monkeypatch):
    """One tile of ours beside PyTorch's own, as few rounds as there may be."""
    pytest.importorskip("triton", reason="needs triton")
    tiles = conv_candidates.tiles()
    monkeypatch.setattr(conv_candidates, "tiles", lambda: {TILE: tiles[TILE]})
    monkeypatch.setattr(tune_model, "SECONDS_EACH", 1e-9)
    monkeypatch.setattr(timing, "_WARM_UP_ROUNDS", 0)
    monkeypatch.setattr(autotuner, "interleave", partial(timing.interleave, min_rounds=1))


@pytest.fixture
def won(monkeypatch):
    """Measuring takes no time, and the last candidate wins, twice as fast as the first; gives the problems measured."""
    measured = []

    def measure(problem, seconds, samples=False):
        measured.append(problem)
        names = list(problem.candidates)
        rows = {name: {"call": {"median": 2e-6}} for name in names}
        rows[names[-1]] = {"call": {"median": 1e-6}}
        found = {"default": problem.default, "candidates": rows, "measured": {**tune_model.table_file.versions()}}
        return {**record(problem.key, names[-1], problem.batch, tuned_table.dtype_name(problem.dtype)), **found}

    monkeypatch.setattr(autotuner, "measure", measure)
    return measured


def images(n=2, size=8, dtype=torch.float32):
    return torch.randn(n, 3, size, size, dtype=dtype)


def written(directory):
    return json.loads((directory / "cache" / KEY.file_name).read_text())


def everything(model):
    """What tune must leave as it is."""
    return (
        [module.training for module in model.modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        torch.get_rng_state(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.conv.fp32_precision,
        torch.is_grad_enabled(),
        [p.grad for p in model.parameters()],
    )


def assert_untouched(model, before):
    for now, then in zip(everything(model), before, strict=True):
        if isinstance(then, dict):
            assert now.keys() == then.keys() and all(torch.equal(now[name], then[name]) for name in then)
        elif isinstance(then, torch.Tensor):
            assert torch.equal(now, then)
        else:
            assert now == then


def test_a_model_is_measured_and_runs_by_it_at_once(fake_device, quick, monkeypatch, device):
    skip_unless_runnable("triton", device, torch.float32)
    monkeypatch.setattr(autotuner, "fastest", lambda default, clocks: TILE if TILE in clocks[-1] else default)
    # The interpreter would be left out at first sight.
    monkeypatch.setattr(autotuner, "glance", lambda call, device: 1.0)
    model, x = small_model(), images()
    fused = rk.fuse(model)
    assert "by a measured table" not in str(rk.explain(fused))
    before = everything(fused)
    result = rk.tune(fused, x, progress=False)
    assert_untouched(fused, before)
    assert result.path == fake_device / "cache" / KEY.file_name and not result.left and not result.known
    assert [(row.layer, row.batch, row.winner) for row in result] == [
        (r["key"], 2, TILE) for r in sorted(written(fake_device)["records"], key=lambda r: -_cost(r))
    ]
    for row in result:
        assert row.candidates >= 3 and not row.refused and row.seconds > 0 and row.gain > 0
    lines = str(result).splitlines()
    assert lines[0].split() == ["layer", "batch", "candidates", "winner", "us", "gain"]
    assert lines[2].startswith(f"{result.layers[0].layer}  2      3") and TILE in lines[2]
    assert lines[-1] == f"{len(result)} problems measured, 0 known already: {result.path}"
    with torch.no_grad(), ran(monkeypatch) as names:
        y = fused(x)
    assert names and set(names) == {TILE}
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


def _cost(r):
    return r["bytes"] + r["flops"] / 1e6


def test_what_is_known_is_not_measured_again(fake_device, won):
    fused, x = rk.fuse(small_model()), images()
    first = rk.tune(fused, x, progress=False)
    assert len(won) == len(first) > 3
    second = rk.tune(fused, x, progress=False)
    assert len(won) == len(first) and second.layers == first.layers and second.known == len(first)
    assert f"0 problems measured, {len(first)} known already" in str(second)
    rk.tune(fused, images(3), progress=False)  # another batch is another question
    assert len(won) == 2 * len(first) and {problem.batch for problem in won} == {2, 3}


def test_explain_says_what_a_table_decides(fake_device, won, write):
    fused = rk.fuse(small_model())
    assert not any(row.table for row in rk.explain(fused))
    rk.tune(fused, images(), progress=False)
    assert not any(row.table for row in rk.fuse_(small_model()))  # whoever fuses has not asked
    rows = rk.explain(fused)
    assert {row.path: row.table for row in rows} == {
        "0": "1 of 1 convolution, from 8x8",
        "1.0": "2 of 2 convolutions, from 2x2",
        "2.0": "3 of 3 convolutions, from 2x2",
    }
    assert "[by a measured table: 2 of 2 convolutions, from 2x2]" in str(rows) and json.loads(rows.to_json())
    # Another backend, or dtype, or a fused copy in train() mode, has asked nothing.
    assert not any(row.table for row in rk.explain(rk.fuse(small_model(), backend="eager")))
    assert not any(row.table for row in rk.explain(rk.fuse(small_model().bfloat16())))
    assert not any(row.table for row in rk.explain(rk.fuse(small_model().train())))
    write(table(record("training x", "triton")))
    assert all(row.table == "trains on own kernels" for row in rk.explain(rk.fuse(small_model().train())))


def test_plans_and_captured_graphs_of_another_table_are_made_anew(write):
    write(table(record("something else", "eager")))
    fused, x = rk.fuse(small_model()), images()

    def plans():
        states = [module.__dict__["_rk_state"] for module in fused.modules() if "_rk_state" in module.__dict__]
        return [plan for state in states for plan in state.plans.values()]

    with torch.no_grad():
        fused(x)
        kept, watch = plans(), Watch(fused)
        fused(x)
        assert all(map(operator.is_, plans(), kept)) and watch.is_current()
        tuned_table.forget()
        assert not watch.is_current()
        fused(x)
    assert len(plans()) == 2 * len(kept) > 0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval(), "no block of this model is fused"),
        (small_model, "no block of this model is fused"),
        (lambda: rk.fuse(small_model(), backend="eager"), 'fused for backend="eager", and only "auto" asks a table'),
        (lambda: rk.fuse(small_model()), "oneDNN's is the only kernel of convolutions here"),
    ],
    ids=("no blocks", "not fused", "another backend", "on a CPU without our kernels"),
)
def test_nothing_to_tune(make, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(library, "library_or_none", lambda: None)
    monkeypatch.setenv(tuned_table.CACHE_VARIABLE, str(tmp_path))
    model, x = make(), images()
    before, generation = everything(model), tuned_table.generation()
    result = rk.tune(model, x, seconds=1)
    assert str(result).startswith("nothing to tune: ") and reason in str(result)
    assert capsys.readouterr().err.strip() == str(result)
    assert not result.layers and result.path is None and not list(tmp_path.iterdir())
    assert tuned_table.generation() == generation
    assert_untouched(model, before)
    rk.tune(model, x, progress=False)
    assert not capsys.readouterr().err


def test_nothing_to_tune_in_fp64(fake_device):
    result = rk.tune(rk.fuse(small_model().double()), images(dtype=torch.float64), progress=False)
    assert "nothing to tune: in torch.float64 no layer of this model has a choice" in str(result)
    assert not list((fake_device / "cache").iterdir())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model, x: rk.tune(model), TypeError, "missing 1 required positional argument: 'x'"),
        (
            lambda model, x: rk.tune(model, None),
            TypeError,
            "x must be a tensor of images like those to come, got NoneType",
        ),
        (lambda model, x: rk.tune("resnet50", x), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda model, x: rk.tune(model, x[0]), ValueError, r"x must be a batch of images, .* got shape \(3, 8, 8\)"),
        (
            lambda model, x: rk.tune(model, x[:0]),
            ValueError,
            r"x must be a batch of images, .* got shape \(0, 3, 8, 8\)",
        ),
        (
            lambda model, x: rk.tune(model, x, seconds=0),
            ValueError,
            "seconds must be more than 0, or None for 2 a .* got 0",
        ),
        (lambda model, x: rk.tune(model, x, seconds=-1.5), ValueError, "seconds must be more than 0, .* got -1.5"),
        (
            lambda model, x: rk.tune(model, x, seconds=float("nan")),
            ValueError,
            "seconds must be more than 0, .* got nan",
        ),
        (
            lambda model, x: rk.tune(model.train(), x),
            ValueError,
            r"model is in train\(\) mode: call model.eval\(\) first, or",
        ),
        (lambda model, x: rk.tune(model, x.to("meta")), ValueError, "x is on meta and the model on cpu: move one"),
    ],
)
def test_errors(call, error, message, fake_device):
    with pytest.raises(error, match=message):
        call(rk.fuse(small_model()), images())
    assert not list((fake_device / "cache").iterdir())


def test_not_inside_a_capture(fake_device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="tune can't run while a CUDA graph is captured"):
        rk.tune(rk.fuse(small_model()), images())


def test_not_where_the_environment_decides(fake_device, monkeypatch):
    monkeypatch.setenv("RESNET_KERNELS_BACKEND", "eager")
    with pytest.raises(ValueError, match="RESNET_KERNELS_BACKEND must not be set"):
        rk.tune(rk.fuse(small_model()), images())


def test_a_file_that_is_no_table_of_this_device_stays(fake_device, won):
    path = fake_device / "cache" / KEY.file_name
    for text in ("damaged", table(device={"name": "Other", "capability": "9.0"})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"can't be added to: it.*; move it away"):
            rk.tune(rk.fuse(small_model()), images(), progress=False)
        assert path.read_text() == text and not won


def test_nowhere_to_put_the_table(fake_device, won, monkeypatch):
    monkeypatch.setattr(tuned_table, "cache_directory", lambda: None)
    with pytest.raises(ValueError, match="there is no home directory to put the table in: set RESNET_KERNELS_CACHE"):
        rk.tune(rk.fuse(small_model()), images(), progress=False)
    assert not won


def test_progress_without_tqdm_is_a_line_a_layer(fake_device, won, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    result = rk.tune(rk.fuse(small_model()), images())
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert [line.split(", batch")[0] for line in lines] == [
        f"tune [{i + 1}/{len(result)}] {row.layer}" for i, row in enumerate(result)
    ]
    assert not said.out


def test_progress_with_tqdm_is_a_bar(fake_device, won, capsys):
    pytest.importorskip("tqdm", reason="needs tqdm")
    result = rk.tune(rk.fuse(small_model()), images())
    said = capsys.readouterr()
    assert f"{len(result)}/{len(result)}" in said.err and "tune: 100%" in said.err and not said.out


def test_what_the_time_did_not_suffice_for_is_left(fake_device, won, monkeypatch):
    fused, x = rk.fuse(small_model()), images()
    clock = [0.0]
    monkeypatch.setattr(tune_model.time, "perf_counter", lambda: clock[0])
    original, shares = autotuner.measure, []

    def slow(problem, seconds, samples=False):
        shares.append(seconds)
        clock[0] += 4.0
        return original(problem, seconds, samples)

    monkeypatch.setattr(autotuner, "measure", slow)
    result = rk.tune(fused, x, seconds=10, progress=False)
    total = len(result) + result.left
    assert len(result) == 3 and f"{total - 3} were left when the time was up: tuning again goes on" in str(result)
    # Half of an equal share of what is left, as compiling comes on top; never more than a layer gets without a limit.
    assert shares == pytest.approx(
        [min(2.0, left / n / 2) for left, n in ((10, total), (6, total - 1), (2, total - 2))]
    )
    result = rk.tune(fused, x, progress=False)
    assert (len(result), result.left, result.known) == (total, 0, 3) and shares[3:] == [2.0] * (total - 3)


@pytest.mark.parametrize(
    "what", (KeyboardInterrupt(), autotuner.DeviceLost("tile x: illegal address", record("lost", None)))
)
def test_whoever_stops_it_keeps_what_was_measured(what, fake_device, won, monkeypatch):
    fused, x, original = rk.fuse(small_model()), images(), autotuner.measure

    def stopped(problem, seconds, samples=False):
        if len(won) == 2:
            raise what
        return original(problem, seconds, samples)

    monkeypatch.setattr(autotuner, "measure", stopped)
    before = everything(fused)
    lost = isinstance(what, autotuner.DeviceLost)
    with pytest.raises(
        RuntimeError if lost else KeyboardInterrupt, match="it is noted in .*passed over" if lost else None
    ):
        rk.tune(fused, x, progress=False)
    assert_untouched(fused, before)
    assert len(written(fake_device)["records"]) == 2 + lost
    assert tuned_table.choice(won[0].key, 2, torch.float32, CPU) == list(won[0].candidates)[-1]


def test_training(fake_device, won):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.dropout = small_model(), nn.Dropout()

        def forward(self, x):
            return self.dropout(self.net(x))

    model = Net().train()
    model.net[1][0].bn1.eval()  # frozen, as a detection model's may be
    fused, x = rk.fuse(model), images(3, 16)
    before = everything(fused)
    result = rk.tune(fused, x, training=True, progress=False)
    assert_untouched(fused, before)
    assert all(row.layer.startswith("norm ") and row.layer.endswith(" training") for row in result)
    # The frozen one is no training step's.
    assert sum(problem.calls for problem in won) == sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) - 1
    (whole,) = (r for r in written(fake_device)["records"] if r["key"].startswith("training "))
    size = sum(p.numel() for p in model.parameters())
    assert whole["key"] == f"training Net of {size} parameters 3x16x16" and whole["winner"] == "triton"
    assert eligibility.trains_on("auto", x)
    # An eval-mode model may be tuned for training, too, and stays in eval mode.
    rk.tune(fused.eval(), x, training=True, progress=False)
    assert not any(m.training for m in fused.modules())


def test_it_measures_the_dtype_that_is_computed_in(fake_device, won):
    fused = rk.fuse(small_model())
    with torch.autocast("cpu", torch.bfloat16):
        rk.tune(fused, images(), progress=False)
    assert {problem.dtype for problem in won} == {torch.bfloat16}
    won.clear()
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    rk.tune(fused, images(), progress=False)
    assert {r["dtype"] for r in written(fake_device)["records"]} == {"bf16", "tf32"}
    won.clear()
    normalized = rk.fuse(small_model().bfloat16(), normalize=([0.5] * 3, [0.2] * 3))
    rk.tune(normalized, (images(5) * 50).clamp(0, 255).to(torch.uint8), progress=False)
    assert {problem.dtype for problem in won} == {torch.bfloat16}


@pytest.mark.parametrize("mode", (torch.inference_mode, torch.enable_grad))
def test_in_any_grad_mode_and_compiled(mode, fake_device, won):
    fused, x = rk.fuse(small_model()), images()
    with mode():
        result = rk.tune(torch.compile(fused, backend="aot_eager"), x.clone(), progress=False)
        expected = rk.tune(fused, x, progress=False)
    assert result.layers == expected.layers and len(won) == len(result)


# The last one is an earlier version's.
@pytest.mark.parametrize("winner", ("warp drive", "tma 1x2x3", "cudnn+add_relu"))
def test_an_unknown_candidate_is_ignored_with_one_warning(winner, write):
    other = CONV._replace(residual=True)
    write(table(record(CONV, winner, 256), record(other, winner, 256)))

    def ask(problem, batch=3):
        return tuned_table.choice(problem, batch, torch.float32, CPU, conv_candidates._can_run)

    with pytest.warns(RuntimeWarning, match=f"names '{re.escape(winner)}' for \"conv 8x6x5.*can't run here") as warned:
        assert ask(CONV) is None and ask(other) is None and ask(CONV, 256) is None
    assert len(warned) == 1


def test_a_winner_of_another_batch_that_does_not_fit_here_is_no_warning(write):
    write(table(record(CONV, "split", 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned_table.choice(CONV, 7, torch.float32, CPU, lambda name, problem, batch, *_: batch == 1) is None


def test_names_of_links():
    asked = multi_layer.LinkProblem(CONV, None, CONV, False, CONV)
    names = ("apart", "conv2+conv3", "conv2+conv3+conv1", "shortcut+conv3", "conv2+conv1", "conv9", "")
    assert [multi_layer._is_known(name, asked) for name in names] == [True, True, True, False, False, False, False]
    stem = multi_layer.StemProblem(CONV, (3, 2, 1, 1, False))
    assert [multi_layer._is_known(name, stem) for name in ("apart", "conv+pool", "pool")] == [True, True, False]
