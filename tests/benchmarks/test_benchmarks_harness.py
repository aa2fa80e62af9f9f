"""benchmarks/: what becomes of a contender that is absent, crashes or is wrong; of an interrupted run; and what a file has."""

import inspect
import json
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

import benchmarks
from benchmarks import cases, extra_info, harness
from benchmarks.cases import AddRelu, BatchNormAct, Block, Case, Conv, Model, Platform
from benchmarks.contenders import foreign, peers
from benchmarks.contenders.base import Contender
from benchmarks.contenders.ours import Eager, Fused, fused_module
from benchmarks.harness import Absent, Measured, in_rotation, measure
from benchmarks.workload import ForeignRunner, ModuleRunner, Operands, Workload, copies_beyond
from resnet_kernels.perf.roofline.bounds import Kernel, Machine
from resnet_kernels.perf.timing import Timing, interleave

ROOT = Path(__file__).parents[2]

CPU = Platform("cpu", torch.float32)
BLOCK = Case(Block("tiny", "BasicBlock", 8, 8, 6), "forward", CPU)
CONV = Conv("tiny", 8, 16, 6, kernel=3, stride=2, residual=True, batch=2)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    # Layers this small gain nothing from a second thread, and wait for it, spinning, on a machine that others use too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # The real ones move gigabytes.
    monkeypatch.setattr(extra_info, "ceilings", lambda device, dtype: Machine(1e12, 1e11))
    # A workload on a GPU sets it.
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    yield
    torch.set_num_threads(threads)


class Peer(Contender):
    """Eager under another name; what a test plants goes over it."""

    name = label = "peer"
    settings = "none"

    def prepare(self, workload):
        return ModuleRunner(workload.eager, workload.case.backward)


def rows(peer: Contender, case: Case = BLOCK, **options) -> dict:
    return measure(case, [Eager(), Fused("fused", "auto"), peer], **{"seconds": 1e-3, "min_rounds": 3, **options})


def assert_others_are_measured(found: dict) -> None:
    for name in ("eager", "fused"):
        assert len(found[name].timing.samples) >= 3 and not found[name].gate.failure


def test_an_absent_peer_costs_its_own_row(monkeypatch):
    monkeypatch.setattr(Peer, "why_absent", lambda self, case: "not installed: peer")
    monkeypatch.setattr(Peer, "prepare", lambda self, workload: pytest.fail("prepared although absent"))
    found = rows(Peer())
    assert found["peer"] == Absent(str(BLOCK), "peer", "not installed: peer")
    assert_others_are_measured(found)


def raising_at(call_number: int):
    """A runner of the eager module whose call raises at its n-th time, from 0."""

    def prepare(self, workload):
        count = iter(range(10**9))

        def call(x):
            if next(count) == call_number:
                raise RuntimeError("boom\nand a long story")
            return workload.eager(x)

        return ForeignRunner(call, lambda x: x, lambda y: y)

    return prepare


@pytest.mark.parametrize("call_number", [0, 1, 2, 4], ids=["gate", "warm-up", "second warm-up", "rounds"])
def test_a_crash_costs_its_own_row(monkeypatch, call_number):
    monkeypatch.setattr(Peer, "prepare", raising_at(call_number))
    found = rows(Peer())
    assert found["peer"] == Absent(str(BLOCK), "peer", "crashed: RuntimeError: boom")
    assert_others_are_measured(found)


def test_a_crash_while_preparing_costs_its_own_row(monkeypatch):
    monkeypatch.setattr(Peer, "prepare", lambda self, workload: 1 / 0)
    found = rows(Peer())
    assert found["peer"].reason == "crashed: ZeroDivisionError: division by zero"
    assert_others_are_measured(found)


def test_a_crash_keeps_its_error_for_ours_to_be_raised(monkeypatch):
    monkeypatch.setattr(Fused, "prepare", raising_at(4))
    monkeypatch.setattr(Fused, "gate", Contender.gate)  # its own looks into a module
    found = rows(Peer())
    assert isinstance(found["fused"].error, RuntimeError)
    assert len(found["eager"].timing.samples) == len(found["peer"].timing.samples) >= 3


def off(self, workload):
    return ForeignRunner(lambda x: workload.eager(x) * (1 + 1e-4), lambda x: x, lambda y: y)


@pytest.mark.parametrize("call_number", [0, 3], ids=["gate", "rounds"])
def test_without_eager_nobody_has_a_time(monkeypatch, call_number):
    monkeypatch.setattr(Eager, "prepare", raising_at(call_number))
    found = rows(Peer())
    assert found["eager"].reason == "crashed: RuntimeError: boom"
    for name in ("fused", "peer"):
        assert found[name].reason == "eager has no time to compare with: crashed: RuntimeError: boom"


def test_a_peer_over_budget_is_timed_and_flagged(monkeypatch):
    monkeypatch.setattr(Peer, "prepare", off)
    found = rows(Peer())
    assert re.match(r"y errs by 1.00e-04, eager by \d", found["peer"].gate.failure)
    assert found["peer"].timing and found["peer"].info.contender.parity_failure == found["peer"].gate.failure
    assert_others_are_measured(found)


def test_ours_over_budget_has_no_time(monkeypatch):
    class Ours(Peer):
        ours = True
        prepare = off

    row = rows(Ours())["peer"]
    assert row.gate.failure and not isinstance(row, Measured)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_over_budget(monkeypatch, bad):
    monkeypatch.setattr(
        Peer,
        "prepare",
        lambda self, workload: ForeignRunner(lambda x: workload.eager(x) * bad, lambda x: x, lambda y: y),
    )
    assert rows(Peer())["peer"].gate.failure


def test_a_wrong_gradient_is_over_budget(monkeypatch):
    class Wrong(ModuleRunner):
        def read(self, operands, returned):
            return [gradient * 1.01 for gradient in super().read(operands, returned)]

    monkeypatch.setattr(Peer, "prepare", lambda self, workload: Wrong(workload.eager, True))
    case = Case(BLOCK.subject, "forward-backward", CPU)
    assert "errs by 1.0" in rows(Peer(), case)["peer"].gate.failure


def test_another_shape_is_over_budget(monkeypatch):
    runner = lambda self, workload: ForeignRunner(lambda x: x[:, :1], lambda x: x, lambda y: y)  # noqa: E731
    monkeypatch.setattr(Peer, "prepare", runner)
    assert "y is of shape (1, 1, 6, 6)" in rows(Peer())["peer"].gate.failure


def test_a_model_is_gated_on_several_images_one_call_after_the_other():
    """Ten probabilities of one image were over budget where eager was lucky with them."""
    case = Case(Model("d2l_resnet18", 28, c_in=1, batch=3, system=cases.D2L), "forward", CPU)
    workload, shapes = Workload(case), []
    late = ForeignRunner(
        lambda x: (shapes.append(tuple(x.shape)), workload.eager(x) * (1 + 1e-3 * (len(shapes) == 3)))[1],
        lambda x: x,
        lambda y: y,
    )
    assert workload.gate(late).failure and shapes == [(3, 1, 28, 28)] * 3
    assert not workload.gate(ModuleRunner(workload.eager, False)).failure


def test_a_wrong_block_fails_ours(monkeypatch):
    def prepare(self, workload):
        module = fused_module(workload, "auto")
        module.bn1.weight.data[0] *= 1.001
        return ModuleRunner(module, False)

    monkeypatch.setattr(Fused, "prepare", prepare)
    assert "PARITY FAILS" in rows(Peer(), seconds=0)["fused"].gate.failure


def test_eager_under_the_name_of_fused_fails(monkeypatch):
    monkeypatch.setattr(harness.Fused, "prepare", lambda self, workload: ModuleRunner(workload.eager, False))
    row = rows(Peer())["fused"]
    assert not isinstance(row, Measured) and "not all of it runs fused" in row.gate.failure


def test_contenders_of_a_case_share_their_rounds():
    found = rows(Peer())
    assert len({len(row.timing.samples) for row in found.values()}) == 1
    peer = found["peer"]
    ratios = [a / b for a, b in zip(peer.timing.samples, found["eager"].timing.samples)]
    assert peer.info.spread.interleaved_ratio_to_eager == pytest.approx(Timing(ratios).median)


def test_without_seconds_nothing_is_timed():
    assert all(not isinstance(row, Measured) and row.gate.budget > 0 for row in rows(Peer(), seconds=0).values())


# ---- what a file has

DOCUMENTED = re.findall(r"^    ([a-z][a-z0-9_, ]*?) {2,}", inspect.getdoc(benchmarks).split("`extra_info`:")[1], re.M)
FIELDS = {name for names in DOCUMENTED for name in names.split(", ")} | {"device_type"}


@pytest.mark.slow(unless=lambda direction: direction == "forward")
@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_fields_are_the_documented_ones(direction):
    case = Case(Model("d2l_resnet18", 28, c_in=1, batch=2, system=cases.D2L), direction, CPU)
    found = rows(Peer(), case, profiled=True)
    optional = {"kernels", "interleaved_ratio_to_eager", "interleaved_ratio_to_fused"}
    for name, missing in (
        ("eager", optional - {"kernels"}),
        ("fused", {"interleaved_ratio_to_fused"}),
        ("peer", {"kernels"}),
    ):
        info = json.loads(json.dumps(found[name].info.to_json()))
        plain = {key for key in info if not re.search("_p(20|80)$", key) or key in ("p20", "p80")}
        assert plain == FIELDS - missing
    info = found["peer"].info.to_json()
    assert info["schema"] == 1 and info["case"] == str(case)
    assert (info["system"], info["level"], info["subject"]) == ("d2l", "model", "d2l_resnet18")
    assert (info["direction"], info["dtype"], info["batch"], info["image_size"]) == (direction, "float32", 2, 28)
    assert (info["saved_mib"] is None) == (direction == "forward")
    assert (info["hbm_gb"] is None) == (direction == "forward-backward")
    rows_of_fused = found["fused"].info.to_json()["kernels"]
    assert {"conv"} <= {row["kind"] for row in rows_of_fused} <= {"conv", "bn", "rest"}
    assert set(rows_of_fused[0]) == set(
        re.findall(r"\w+", re.search(r"step: \{(.*?)\}", inspect.getdoc(benchmarks)).group(1))
    )


def test_every_contender_says_its_settings():
    names = [contender.name for contender in harness.CONTENDERS]
    assert len(set(names)) == len(names) and names[0] == "eager"
    for contender in harness.CONTENDERS:
        assert contender.label and contender.settings and contender.version


def test_figures_of_a_time():
    kernels = [Kernel("a", 4 * 10**9, 10**6, 0), Kernel("b", 0, 2 * 10**8, 0)]
    info = extra_info.of_time(kernels, Machine(1e12, 1e11), images=8, seconds=0.02)
    # 4 ms by FLOPs and 2 ms by bytes.
    assert info.roofline_seconds == pytest.approx(0.006) and info.roofline_share == pytest.approx(0.3)
    assert info.roofline_bound == "FLOP" and info.img_per_s == 400
    assert (info.gflop, info.gflop_per_s, info.tflop_per_s) == (4, 200, 0.2)
    assert info.gb_per_s == pytest.approx(0.201 / 0.02)
    uncounted = extra_info.of_time([Kernel("a", 4 * 10**9, 0, 0)], Machine(1e12, 1e11), images=8, seconds=0.02)
    assert uncounted.gb_per_s is uncounted.hbm_gb is None and uncounted.roofline_bound == "FLOP"


def test_work_of_ops():
    (kernel,) = extra_info.work(Workload(Case(CONV, "forward", CPU)))
    elements = 2 * 8 * 36 + 2 * 2 * 16 * 9 + 16 * 8 * 9  # x; residual and y; weight
    assert (kernel.flops, kernel.hbm_bytes) == (2 * 2 * 9 * 16 * 8 * 9, 4 * elements)
    (backward,) = extra_info.work(Workload(Case(CONV, "forward-backward", CPU)))
    assert (backward.flops, backward.hbm_bytes) == (3 * kernel.flops, 0)
    activation = 4 * 8 * 25
    for subject, passes in (
        (AddRelu("add", 8, 5), (3, 6)),
        (BatchNormAct("bn", 8, 5), (3, 8)),
        (BatchNormAct("bn", 8, 5, residual=True), (4, 11)),
    ):
        for direction, count in zip(cases.DIRECTIONS, passes):
            (kernel,) = extra_info.work(Workload(Case(subject, direction, CPU)))
            assert (kernel.flops, kernel.hbm_bytes) == (0, count * activation)


def test_saved_bytes_are_those_of_new_tensors():
    workload = Workload(Case(AddRelu("add", 8, 5), "forward-backward", CPU))
    # ReLU keeps its output.
    assert ModuleRunner(workload.eager, True).saved_bytes(workload.operands) == 4 * 8 * 25


def test_cases_have_all_systems_at_all_levels():
    found = cases.cases(full=True)
    systems = {cases.TORCHVISION, cases.SLIM, cases.D2L, cases.D2L_KERAS}
    for level in ("op", "block", "stage", "model"):
        assert {case.subject.system for case in found if case.level == level} == systems
    quick = cases.cases()
    assert {str(case) for case in quick} < {str(case) for case in found}
    assert len({str(case) for case in quick}) == len(quick)


@pytest.mark.slow
def test_subjects_build_and_fuse():
    subjects = [subject for subject in (*cases.BLOCKS, *cases.STAGES) if subject.system != cases.TORCHVISION]
    for subject in subjects:
        gate = Fused("fused", "auto")
        workload = Workload(Case(subject, "forward", CPU))
        assert not gate.gate(workload, gate.prepare(workload)).failure


# ---- rotation


def test_rotation_goes_through_the_copies_whoever_calls():
    log = []
    calls = {name: [lambda name=name, i=i: log.append((name, i)) for i in range(3)] for name in "ab"}
    interleave(in_rotation(calls), seconds=0, min_rounds=3)
    assert [name for name, _ in log] == ["a", "b"] * (len(log) // 2)
    assert [copy for _, copy in log] == [turn % 3 for turn in range(len(log))]


def test_a_case_goes_through_its_copies(monkeypatch):
    seen = []

    def prepare(self, workload):
        return ForeignRunner(lambda x: (seen.append(x), workload.eager(x))[1], lambda x: x, lambda y: y)

    monkeypatch.setattr(Peer, "prepare", prepare)
    monkeypatch.setattr(Workload, "copies", property(lambda self: (self.operands, *copies)))
    copies = [Workload(BLOCK).operands.copy() for _ in range(2)]
    found = measure(BLOCK, [Eager(), Peer()], seconds=1e-9, min_rounds=3)
    assert found["eager"].info.conditions.input_copies == 3
    # The gate's, and then those of the second, fourth, sixth ... turn.
    numbers = [
        next((n for n, copy in enumerate(copies, 1) if copy.inputs[0].data_ptr() == x.data_ptr()), 0) for x in seen
    ]
    assert numbers == [0, *((2 * turn + 1) % 3 for turn in range(len(seen) - 1))]


def test_one_copy_is_called_as_it_is():
    call = lambda: None  # noqa: E731
    assert in_rotation({"a": [call]})["a"] is call


@pytest.mark.parametrize("cache, operands, count", [(50, 10, 10), (50, 30, 4), (50, 1000, 2), (50, 0, 100), (0, 10, 2)])
def test_copies_outgrow_the_cache_twice(cache, operands, count):
    assert copies_beyond(cache, operands) == count


def test_a_copy_is_of_its_own_memory_and_gives_the_same():
    workload = Workload(Case(CONV, "forward-backward", CPU))
    assert workload.copies == (workload.operands,)
    copy = workload.operands.copy()
    assert copy.nbytes == workload.operands.nbytes == 4 * (2 * 8 * 36 + 2 * 2 * 16 * 9)
    for mine, theirs in zip((*copy.inputs, copy.grad_y), (*workload.operands.inputs, workload.operands.grad_y)):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr() and mine.stride() == theirs.stride()
        assert mine.requires_grad == theirs.requires_grad
    runner = ModuleRunner(workload.eager, True)
    gradients = [runner.read(some, runner.bind(some)()) for some in (workload.operands, copy)]
    for mine, theirs in zip(*gradients):
        assert torch.equal(mine, theirs)


# ---- the peers that are here

SYSTEMS = [
    Model("resnet18", 32),
    Model("resnet_v2_50", 32, system=cases.SLIM),
    Model("d2l_resnet18", 28, c_in=1, system=cases.D2L),
    Model("d2l_resnet18_keras", 28, c_in=1, batch=2, system=cases.D2L_KERAS),
]


def relative_error(peer: Contender, case: Case) -> float:
    """Against fp64, and never against a budget: a peer may be over it."""
    if reason := peer.why_absent(case):
        pytest.skip(reason)
    workload = Workload(case)
    return workload.gate(peer.prepare(workload)).error


@pytest.mark.parametrize("peer", foreign.FOREIGN, ids=lambda peer: peer.name)
def test_foreign_peers_run_the_same_network(peer):
    assert (
        relative_error(peer, Case(Block("keras", "Residual", 8, 16, 7, 2, system=cases.D2L_KERAS), "forward", CPU))
        < 1e-5
    )


@pytest.mark.slow(unless=lambda peer, subject: peer.name == "jax" or subject.name == "d2l_resnet18_keras")
@pytest.mark.parametrize("subject", SYSTEMS, ids=lambda subject: subject.name)
@pytest.mark.parametrize(
    "peer", [foreign.Ncnn(), foreign.Mnn(), foreign.OpenCv(), foreign.Jax()], ids=lambda peer: peer.name
)
def test_foreign_peers_run_every_system(peer, subject):
    assert relative_error(peer, Case(subject, "forward", CPU)) < 1e-5


@pytest.mark.parametrize("peer", [foreign.Ncnn(), foreign.Mnn(), foreign.OpenCv()], ids=lambda peer: peer.name)
def test_converters_leave_nothing_behind(peer, tmp_path, monkeypatch, capfd):
    """The first layer works in place in ncnn: the input stays as it is all the same."""
    case = Case(Block("preact", "PreactBottleneck", 8, 16, 6, batch=3, system=cases.SLIM), "forward", CPU)
    if reason := peer.why_absent(case):
        pytest.skip(reason)
    workload = Workload(case)
    if peer.name != "ncnn":
        peer.prepare(workload)  # MNN's import prints a line, and torch.onnx's export several.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    capfd.readouterr()
    runner = peer.prepare(workload)
    if peer.name == "ncnn":
        assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    call = runner.bind(workload.operands)
    first, second = (runner.read(workload.operands, call())[0].clone() for _ in range(2))
    assert first.shape == (3, 16, 6, 6) and torch.equal(first, second)


def test_ncnn_says_what_it_lacks():
    peer, x = foreign.Ncnn(), torch.rand(1, 2, 3, 3)
    if reason := peer.why_absent(BLOCK):
        pytest.skip(reason)

    class Erfinv(nn.Module):
        def forward(self, x):
            return torch.erfinv(x)

    workload = SimpleNamespace(eager=Erfinv(), operands=Operands((x,)))
    with pytest.raises(RuntimeError, match="ncnn can't load"):
        peer.prepare(workload)


def test_a_failed_converter_says_why(tmp_path):
    command = [sys.executable, "-c", "import sys; print('out'); sys.exit('first\\nlast')"]
    with pytest.raises(RuntimeError, match=r"returned 1: last$"):
        foreign._converted(command, tmp_path)


def test_foreign_peers_say_what_they_need(monkeypatch):
    monkeypatch.setattr(foreign.importlib.util, "find_spec", lambda name: None)
    reason = "not installed: ncnn, pnnx (pip install 'resnet_kernels[peers]')"
    assert foreign.Ncnn().why_absent(BLOCK) == reason
    monkeypatch.setattr(foreign.importlib.util, "find_spec", lambda name: name)
    bfloat16 = Case(BLOCK.subject, "forward", Platform("cpu", torch.bfloat16))
    for peer in (foreign.OnnxRuntime(), foreign.Ncnn(), foreign.Mnn(), foreign.OpenCv()):
        assert peer.why_absent(BLOCK) is None and "float32 alone" in peer.why_absent(bfloat16)
        assert peer.covers(BLOCK, full=True) and not peer.covers(BLOCK, full=False)
        assert not peer.covers(Case(BLOCK.subject, "forward", Platform("cuda", torch.float32)), full=True)


def test_jax_says_what_it_lacks():
    pytest.importorskip("jax", reason="needs jax")
    from benchmarks.contenders.jax_resnet import _run_module

    with pytest.raises(NotImplementedError, match="no JAX version of GELU"):
        _run_module(nn.GELU(), {}, None)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize("peer", [peers.EagerGraph(), peers.Cudnn()], ids=lambda peer: peer.name)
def test_gpu_peers_are_within_budget(peer, direction):
    case = Case(BLOCK.subject, direction, Platform("cuda", torch.float32, batch=4))
    if not peer.covers(case, True):
        pytest.skip("forward passes alone")
    workload = Workload(case)
    runner = peer.prepare(workload)
    assert not workload.gate(runner).failure
    assert len(workload.copies) > 1 and all(callable(runner.bind(operands)) for operands in workload.copies[:2])
