"""ops/tuned_table.py and what asks it: tables are found, merged, distrusted, obeyed. The CPU plays a device with tables."""

import json
import os
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import resnet_kernels as rk
from helpers.oracle import assert_within_budget, skip_unless_runnable
from helpers.tiny import tiny
from helpers.tuned_tables import CONV, CPU, KEY, ran, record, small_model, table
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.kernels.operands import ConvOperands
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import backends, conv_candidates, reference, tuned_table
from resnet_kernels.ops.batch_norm_act import NormProblem
from resnet_kernels.runtime import eligibility
from resnet_kernels.runtime.gpu.multi_layer import APART, ROLES, SPECIALIZED


def choose(key="k", batch=256, dtype=torch.float32):
    return tuned_table.choice(key, batch, dtype, CPU)


def test_the_keys_are_readable():
    assert str(CONV) == "conv 8x6x5->16 3x3/1 p1,1,1,1 d1 g1 scale bias relu"
    odd = CONV._replace(geometry=Geometry((2, 1), (0, 1, 2, 3), (1, 2), 4), scale=False, residual=True, activation=None)
    assert str(odd) == "conv 8x6x5->16 3x3/2,1 p0,1,2,3 d1,2 g4 bias residual"
    assert str(NormProblem(64, 7, 5, True, RELU, True)) == "norm 64x7x5 residual relu training"
    assert tuned_table.DeviceKey("NVIDIA H200", "9.0").file_name == "nvidia-h200-sm90.json"


def test_no_table_no_answer(fake_device):
    assert (
        choose() is None and not tuned_table.covers(CPU, torch.float32) and not tuned_table.trains(CPU, torch.float32)
    )
    assert backends.resolve("auto", CPU, torch.float32) == "cpu"


def test_a_device_without_tables_has_no_files_read(monkeypatch):
    tuned_table.forget()
    monkeypatch.setattr(tuned_table, "read", lambda *_: pytest.fail("a file was looked for"))
    assert not tuned_table.covers(CPU, torch.float32)


@pytest.mark.parametrize(
    ("batch", "winner"), [(1, "one"), (5, "one"), (6, "32"), (32, "32"), (90, "32"), (91, "256"), (10**6, "256")]
)
def test_the_nearest_batch_decides(batch, winner, write):
    write(table(record("k", "one", 1), record("k", "32", 32), record("k", "256", 256)))
    assert choose(batch=batch) == winner


def test_problems_of_two_kinds_that_are_equal_do_not_mix(write):
    class Other(NamedTuple):
        channels: int

        def __str__(self):
            return f"other {self.channels}"

    class One(Other):
        def __str__(self):
            return f"one {self.channels}"

    assert One(3) == Other(3)
    write(table(record("one 3", "a"), record("other 3", "b")))
    assert (choose(One(3)), choose(Other(3))) == ("a", "b")


def test_a_fake_tensor_on_a_gpu_that_is_not_here():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    tuned_table.forget()
    assert not tuned_table.covers(torch.device("cuda", 0), torch.float32)


def test_the_tables_are_in_the_package():
    pyprojecttoml = pytest.importorskip("setuptools.config.pyprojecttoml", reason="needs setuptools")
    given = pyprojecttoml.read_configuration(Path(__file__).parents[2] / "pyproject.toml", expand=False)
    assert "tuned/*.json" in given["tool"]["setuptools"]["package-data"]["resnet_kernels"]


def test_of_two_equally_near_the_larger(write):
    write(table(record("k", "one", 1), record("k", "four", 4)))
    assert choose(batch=2) == "four"


def test_the_users_own_records_go_over_the_packages(write):
    write(table(record("k", "package"), record("k", "package", 1), record("other", "package")), "package")
    write(table(record("k", "own")))
    assert (choose(), choose(batch=1), choose("other")) == ("own", "package", "package")


def test_each_dtype_has_its_own_records_and_tf32_is_one(write):
    write(table(record("k", "ieee"), record("k", "rounded", dtype="tf32"), record("k", "half", dtype="bf16")))
    assert (choose(), choose(dtype=torch.bfloat16), choose(dtype=torch.float16)) == ("ieee", "half", None)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert choose() == "rounded"
    assert backends.resolve("auto", CPU, torch.float16) != "tuned"


def test_files_are_read_once(write, monkeypatch):
    write(table(record("k", "own")))
    reads = []
    original = tuned_table.read
    monkeypatch.setattr(tuned_table, "read", lambda *a: (reads.append(a), original(*a))[1])
    assert choose() == choose(batch=3) == "own" and choose("unknown") is None
    assert len(reads) == 2  # the package's and the user's


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is no JSON"),
        (table(record("k", "w"))[:-9], "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "its schema is None"),
        (table(schema=2), "its schema is 2, this version reads 1"),
        (table(device={"name": "Other", "capability": "9.0"}), "it was measured on .*Other"),
        (table(records={}), "its records are damaged"),
        (table("k"), "its records are damaged"),
        (table({"key": "k", "batch": 1, "dtype": "fp32"}), "its records are damaged"),
        (table(record("k", "w", 0)), "its records are damaged"),
        (table(record("k", "w", True)), "its records are damaged"),
        (table(record("k", 3)), "its records are damaged"),
        (table(record("k", "w", 10**400)), "its records are damaged"),
        (table(record("k", "w") | {"measured": [1]}), "its records are damaged"),
        (table(record("k", "w") | {"default": None}), "its records are damaged"),
        (table(record("k", "w") | {"candidates": ["w"]}), "its records are damaged"),
        (table(record("k", "w") | {"candidates": {"w": "fast"}}), "its records are damaged"),
        (table(record("k", "w") | {"candidates": {"w": {"call": {"median": 10**400}}}}), "its records are damaged"),
        (table(record("k", "w") | {"candidates": {"w": {"graph": {"p20": 1.0}}}}), "its records are damaged"),
    ],
)
def test_a_bad_table_is_ignored_with_one_warning(text, reason, write):
    write(table(record("k", "package")), "package")
    write(text)
    with pytest.warns(RuntimeWarning, match=f"cache.*is ignored: {reason}") as warned:
        assert choose() == "package"
        assert choose("other") is None and tuned_table.covers(CPU, torch.float32)
    assert len(warned) == 1


def test_no_text_at_all(fake_device):
    (fake_device / "cache" / KEY.file_name).write_bytes(b"\xff\xfe\x00")
    with pytest.warns(RuntimeWarning, match="it can't be read"):
        assert choose() is None


def test_a_pipe_in_a_tables_place_was_waited_for(fake_device):
    os.mkfifo(fake_device / "cache" / KEY.file_name)
    with pytest.warns(RuntimeWarning, match="is ignored: it is no file"):
        assert choose() is None


def test_a_directory_in_a_tables_place(fake_device):
    (fake_device / "cache" / KEY.file_name).mkdir()
    with pytest.warns(RuntimeWarning, match="it can't be read"):
        assert choose() is None


@pytest.mark.parametrize("place", ["missing", "a file", "read-only"])
def test_any_cache_directory_will_do(place, fake_device, monkeypatch):
    directory = fake_device / "other"
    if place == "a file":
        directory.write_text("")
    elif place == "read-only":
        directory.mkdir()
        directory.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv(tuned_table.CACHE_VARIABLE, str(directory))
    tuned_table.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() is None


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv(tuned_table.CACHE_VARIABLE, "given")
    assert str(tuned_table.cache_directory()) == "given"
    monkeypatch.delenv(tuned_table.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert str(tuned_table.cache_directory()) == os.path.join("xdg", "resnet_kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tuned_table.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert tuned_table.cache_directory() is None


def test_tuned_is_no_name_for_a_user():
    x, weight = torch.ones(1, 4, 4, 4), torch.ones(4, 4, 1, 1)
    for call in (
        lambda: rk.ops.conv_bias_act(x, weight, backend="tuned"),
        lambda: rk.ops.add_relu(x, x, backend="tuned"),
        lambda: rk.fuse(tiny(10, 3), backend="tuned"),
    ):
        with pytest.raises(ValueError, match=r"backend must be one of auto, .* got 'tuned'"):
            call()


def test_candidates_have_names_of_their_own():
    pytest.importorskip("triton", reason="needs triton")
    from resnet_kernels.kernels import conv_bias_act, target
    from resnet_kernels.kernels.sm90 import conv_tiles, specialized_layout, tap_sharing

    tiles = conv_candidates.tiles()
    specialized = specialized_layout.CONFIGS if target.has_gluon() else ()
    assert len(tiles) == sum(map(len, (conv_bias_act.CONFIGS, conv_tiles.CONFIGS, tap_sharing.CONFIGS, specialized)))
    assert {"pointer 128x64x64 w4 s3", "tma 128x128x64 w8 s3 p4"} <= tiles.keys()


SHIPPED = sorted(tuned_table.PACKAGE_DIRECTORY.glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_winners_are_candidates_of_this_version(path):
    """A renamed tile or role would turn the records that name it off, with no more than a warning."""
    pytest.importorskip("triton", reason="needs triton")
    key = tuned_table.DeviceKey(**json.loads(path.read_text())["device"])
    assert key.file_name == path.name
    known = {
        "conv": {"cudnn", "cudnn+epilogue", *conv_candidates.tiles()},
        "norm": {"eager", "triton"},
        tuned_table.TRAINING: {"eager", "triton"},
        "stem": {APART, "conv+pool", "conv+pool" + SPECIALIZED},
    }
    records = tuned_table.read(path, key)
    for entry in records:
        kind, rest = entry["key"].split(" ", 1)
        if kind == "link" and entry["winner"] != APART:
            roles = {layer.split()[0] for layer in rest.split("; ")}
            named = {*entry["winner"].removesuffix(SPECIALIZED).split("+")}
            assert roles <= {*ROLES} and {"conv3"} <= named <= roles, entry["key"]
        else:
            assert entry["winner"] in known.get(kind, {APART}), entry["key"]
    assert {"conv", "norm", "link"} <= {entry["key"].split()[0] for entry in records}


def test_hopper_is_offered_what_fits(monkeypatch):
    pytest.importorskip("triton", reason="needs triton")
    from resnet_kernels.kernels import target

    monkeypatch.setattr(target, "is_hopper", lambda device: True)
    backends.why_never.cache_clear()
    cuda = torch.device("cuda", 0)
    if backends.why_not("cudnn", "cuda", torch.bfloat16) is None:
        first = ["cudnn", "cudnn+epilogue"]
    else:
        first = ["eager"]  # a PyTorch without cuDNN
    asked = CONV._replace(c_in=96, weight_shape=(64, 96, 3, 3), residual=True, in_h=8, in_w=8)
    names = conv_candidates.candidates(asked, 2, torch.bfloat16, cuda)
    assert names[: len(first)] == first
    tma = [name for name in names if name.startswith("tma")]
    # Fifteen tiles of TMA, five of which start early, three that share taps, and none that gathers with pointers.
    assert len(tma) == 15 and len(names) == len(first) + 15 + 3
    strided = asked._replace(geometry=Geometry((2, 2), (1, 1, 1, 1)))
    tma = [n for n in conv_candidates.candidates(strided, 2, torch.bfloat16, cuda) if n.startswith("tma")]
    assert len(tma) == 7 and not any(" k" in name for name in tma)  # 64 does not divide 96: four loops
    many = [n for n in conv_candidates.candidates(asked, 4096, torch.bfloat16, cuda) if " k" in n]
    assert not many
    assert not [n for n in conv_candidates.candidates(asked, 2, torch.float32, cuda) if n.startswith("tma")]


def test_blackwell_is_offered_hoppers_tiles_beside_the_portable_ones(monkeypatch):
    """Only by name: nothing of it has run there, so "triton" stays the portable kernel."""
    pytest.importorskip("triton", reason="needs triton")
    from resnet_kernels.kernels import conv_bias_act, target

    monkeypatch.setattr(target, "_capability", lambda device: (10, 0))
    backends.why_never.cache_clear()
    cuda = torch.device("cuda", 0)
    asked = CONV._replace(c_in=64, weight_shape=(64, 64, 3, 3), in_h=8, in_w=8)
    names = conv_candidates.candidates(asked, 2, torch.bfloat16, cuda)
    kinds = [name.split()[0] for name in names if " " in name]
    assert kinds.count("pointer") == len(conv_bias_act.CONFIGS)
    assert kinds.count("tma") > 10 and {*kinds} == {"pointer", "tma"}
    shapes = (asked.x_shape(2), asked.weight_shape, asked.geometry)
    assert conv_candidates._by_triton(shapes, torch.bfloat16, cuda) == "pointer auto"


def operands(residual=False):
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 8, 6, 5, generator=draw), torch.randn(16, 8, 3, 3, generator=draw)
    vectors = [torch.rand(16, generator=draw) for _ in range(2)]
    added = torch.randn(2, 16, 6, 5, generator=draw).to(memory_format=torch.channels_last) if residual else None
    return x, weight, vectors[0], added, vectors[1], Geometry((1, 1), (1, 1, 1, 1)), True


@pytest.mark.filterwarnings("ignore:.*which can't run here")
@pytest.mark.parametrize(
    ("winner", "runs"),
    [
        ("eager", "eager"),
        ("pointer 64x16x16 w2 s3", "pointer 64x16x16 w2 s3"),
        (None, "cpu"),
        ("cudnn", "cpu"),
        ("tma 128x128x64 w8 s3 p4", "cpu"),
        ("cudnn+add_relu", "cpu"),  # of a table that an earlier version measured
        ("warp drive", "cpu"),
    ],
)
def test_the_winner_runs_and_what_cannot_run_does_not(winner, runs, write, monkeypatch, device):
    if device.type != "cpu":
        pytest.skip("the fake device is the CPU")
    if runs.startswith("pointer"):
        skip_unless_runnable("triton", device, torch.float32)
    write(table(record(CONV, winner)))
    x, weight, bias, _, scale, geometry, _ = operands()
    with ran(monkeypatch) as names:
        y = rk.ops.conv_bias_act(x, weight, bias, scale=scale, padding=1)
    assert names == [runs]
    wide = reference.conv_bias_act(*(t.double() for t in (x, weight, bias)), None, scale.double(), geometry)
    assert_within_budget(y, reference.conv_bias_act(x, weight, bias, None, scale, geometry), wide)


def test_the_environment_goes_over_the_table(write, monkeypatch):
    write(table(record(CONV, "cpu")))
    monkeypatch.setenv("RESNET_KERNELS_BACKEND", "eager")
    x, weight, bias, _, scale, _, _ = operands()
    with ran(monkeypatch) as names:
        rk.ops.conv_bias_act(x, weight, bias, scale=scale, padding=1)
    assert names == ["eager"]


def test_cudnn_and_a_pass_after_it(device):
    """The candidates' own arithmetic; nothing in it needs cuDNN but its speed."""
    skip_unless_runnable("triton", device, torch.float32)
    *tensors, geometry, _ = operands(residual=True)
    tensors = [t.to(device) for t in tensors]
    x, weight, bias, residual, scale = tensors
    calls = [ConvOperands(x, weight, bias, residual, scale, geometry, last) for last in (RELU, None)]
    calls.append(ConvOperands(x, weight, bias, geometry=geometry, activation=None))
    calls += [ConvOperands(x, weight, geometry=geometry, activation=last) for last in (RELU, None)]
    before = [t.clone() for t in tensors]
    for call in calls:
        y = conv_candidates.run("cudnn+epilogue", call)
        wide = [None if t is None else t.double() for t in call[:5]]
        expected = reference.conv_bias_act(*call)
        assert_within_budget(y, expected, reference.conv_bias_act(*wide, *call[5:]))
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert all(map(torch.equal, before, tensors))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_fused_model_asks_the_table(compiled, write, monkeypatch):
    write(table(record("something else", "eager")))
    model, x = small_model(), torch.randn(2, 3, 32, 32)
    fused = rk.fuse(model)
    with torch.no_grad(), ran(monkeypatch) as names:
        y = (torch.compile(fused, backend="aot_eager") if compiled else fused)(x)
        expected = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    # On the CPU torch.compile takes the model's own code.
    assert names == ([] if compiled else ["cpu"] * len(names)) and (compiled or len(names) > 4)
    assert rk.verify(model, fused, x)


def test_preactivation_and_plain_adds_go_along(write):
    write(table(record("something else", "eager")))
    torch.manual_seed(0)
    block = rk.models.resnet_v2.PreactBottleneck(16, 32, 8)
    model, x = randomise_batch_norms_(torch.nn.Sequential(block)).eval(), torch.randn(2, 16, 8, 8)
    assert rk.verify(model, rk.fuse(model), x)

    class AddRelu(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
            self.pool = torch.nn.AvgPool2d(3, 1, 1)

        def forward(self, x):
            return torch.relu(self.pool(self.bn(self.conv(x))) + x)

    model = randomise_batch_norms_(AddRelu()).eval()
    fused, x = rk.fuse(model), torch.randn(2, 8, 6, 6)
    assert "add_relu" in str(rk.explain(fused)) and rk.verify(model, fused, x)


def test_a_norm_runs_on_our_kernel_where_it_won(write, monkeypatch, device):
    skip_unless_runnable("triton", device, torch.float32)
    if device.type != "cpu":
        pytest.skip("the fake device is the CPU")
    from resnet_kernels.kernels import batch_norm_act as kernel

    launches, original = [], kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda *a: (launches.append(a), original(*a))[1])
    x, vectors = torch.randn(2, 4, 3, 3), [torch.rand(4) + 0.5 for _ in range(4)]
    for winner in ("triton", "eager"):
        write(table(record(NormProblem(4, 3, 3, False, RELU, False), winner)))
        rk.ops.batch_norm_act(x, None, *vectors, training=False, momentum=0.1, eps=1e-5)
        assert len(launches) == 1


@pytest.mark.slow(unless=lambda training, dynamic: training and not dynamic)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_ops_compile_under_a_table(training, dynamic, write, device):
    skip_unless_runnable("triton", device, torch.float32)
    if device.type != "cpu":
        pytest.skip("the fake device is the CPU")
    norms = [record(NormProblem(4, 6, 6, False, RELU, learns), "triton", 2) for learns in (False, True)]
    write(table(*norms, record("k", "w")))
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)
    leaves = [(torch.rand(4) + 0.5).requires_grad_(training) for _ in range(2)]
    mean, var = torch.rand(4), torch.rand(4) + 0.5

    def run(x):
        y = rk.ops.conv_bias_act(x, weight, padding=1)
        stats = (mean.clone(), var.clone())
        return rk.ops.batch_norm_act(y, None, *leaves, *stats, training=training, momentum=0.1, eps=1e-5)

    compiled = torch.compile(run, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    for batch in (2, 3):
        data = torch.cat([x, x])[:batch]
        torch.testing.assert_close(compiled(data), run(data), rtol=1e-4, atol=1e-4)


TRAINED = "training tiny 3x16x16"


@pytest.mark.parametrize(
    ("winners", "wins"),
    [(["triton"], True), (["eager"], False), ([None], False), (["triton", "eager"], False), ([], False)],
)
def test_auto_trains_where_all_measurements_say_so(winners, wins, write):
    write(table(record("k", "triton"), *(record(f"{TRAINED} {i}", winner) for i, winner in enumerate(winners))))
    x = torch.randn(2, 3, 16, 16)
    assert tuned_table.trains(CPU, torch.float32) is wins and not tuned_table.trains(CPU, torch.bfloat16)
    assert eligibility.trains_on("auto", x) is wins
    assert (
        eligibility.trains_on("triton", None)
        and not eligibility.trains_on("cpu", x)
        and not eligibility.trains_on("auto", None)
    )


def test_training_on_a_table_is_eagers(write, monkeypatch, device):
    """Own code without a win; with one our kernels, for the layers that won, and the same numbers."""
    skip_unless_runnable("triton", device, torch.float32)
    if device.type != "cpu":
        pytest.skip("the fake device is the CPU")
    from resnet_kernels.kernels import batch_norm_act as kernel

    launches, original = [], kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda *a: (launches.append(a[0].shape[1:]), original(*a))[1])
    plain, x = small_model().train(), torch.randn(2, 3, 16, 16)
    fused = rk.fuse(plain)
    upstream = torch.randn(2, 10)

    def step(net):
        net.zero_grad()
        net(x).backward(upstream)
        return [p.grad.clone() for p in net.parameters()]

    own = step(fused)
    expected = step(plain)
    assert not launches
    write(table(record(TRAINED, "triton"), record(NormProblem(8, 4, 4, True, RELU, True), "triton")))
    state = {name: value.clone() for name, value in fused.state_dict().items()}
    tabled = step(fused)
    assert launches and set(launches) == {(8, 4, 4)}
    for mine, before, theirs in zip(tabled, own, expected):
        torch.testing.assert_close(before, theirs)
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item() + 1e-5)
    assert any(not torch.equal(value, fused.state_dict()[name]) for name, value in state.items() if "running" in name)
    assert all(row.fused and not row.reason for row in rk.explain(fused))


def test_noting(fake_device):
    with tuned_table.noting() as noted:
        assert backends.resolve("auto", CPU, torch.float32) == "tuned" and eligibility.trains_on("auto", torch.ones(1))
        assert choose("k", 2) is None and choose("k", 2) is None and choose("other", 2) is None
    assert noted == [("k", 2), ("k", 2), ("other", 2)]
    assert backends.resolve("auto", CPU, torch.float32) == "cpu"
