"""What `tune` measures about layers that could share a launch, and what a table's answer does."""

import copy

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers import gluon_interpreter
from helpers.oracle import assert_within_budget
from helpers.stages import Net, bottlenecks, image, preacts, prepared, run
from helpers.tuned_tables import record, table
from resnet_kernels.kernels import target
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.kernels.sm90 import stem_layout
from resnet_kernels.ops.conv_problem import ConvProblem
from resnet_kernels.perf.tuning import autotuner, multi_layer_problems, problems
from resnet_kernels.runtime.gpu import launches
from resnet_kernels.runtime.gpu.multi_layer import LinkProblem, StemProblem

FP16 = torch.float16


@pytest.fixture
def links_of(hopper, device):
    """The questions that a model asks about links."""

    def ask(make):
        stage, x = prepared(make, device)
        noted = problems.note(stage, x)
        return [asked for asked, _ in noted if isinstance(asked, LinkProblem)]

    return ask


def test_a_stage_asks_about_each_of_its_links(links_of):
    first, second, last = links_of(bottlenecks)
    assert str(last) == (
        "link conv2 32x4x4->32 3x3/1 p1,1,1,1 d1 g1 scale bias relu; "
        "conv3 32x4x4->128 1x1/1 p0,0,0,0 d1 g1 scale bias residual relu"
    )
    assert str(second).endswith("; conv1 128x4x4->32 1x1/1 p0,0,0,0 d1 g1 scale bias relu")
    assert "; shortcut 64x8x8->128 1x1/2 p0,0,0,0 d1 g1 scale bias; conv3 " in str(first)
    assert "; norm; conv1 " in str(links_of(preacts)[0])


@pytest.mark.parametrize("make", (bottlenecks, preacts), ids=lambda f: f.__name__)
def test_candidates_agree_with_fp64(links_of, make, device):
    for asked in links_of(make):
        problem = multi_layer_problems.link_problem(asked, 3, FP16, device)
        operands = problem.operands()
        assert problem.default in problem.candidates and len(problem.candidates) > 1
        eager, truth = problem.eager(*operands), problem.reference(*operands)
        assert len(truth) == 1 + (asked.conv1 is not None) and all(t.dtype == torch.float64 for t in truth)
        for name, candidate in problem.candidates.items():
            for y, *others in zip(candidate(*operands), eager, truth, strict=True):
                assert_within_budget(y, *others, f"{name} of {problem}")


@pytest.mark.slow
def test_a_stem(hopper, device):
    net, x = prepared(lambda device: (Net(nn.MaxPool2d(3, 2, 1)), image(device)), device)
    (asked,) = (asked for asked, _ in problems.note(net, x) if isinstance(asked, StemProblem))
    assert str(asked) == "stem 3x18x20->16 7x7/2 p3,3,3,3 d1 g1 scale bias relu; max-pool 3 2 1 1 False"
    problem = multi_layer_problems.stem_problem(asked, 2, FP16, device)
    if target.has_gluon():
        assert list(problem.candidates) == ["apart", "conv+pool", "conv+pool specialized"]
    else:
        assert list(problem.candidates) == ["apart", "conv+pool"]
    assert not any("refused" in row for row in autotuner.measure(problem, 0.01)["candidates"].values())


def test_a_wrong_launch_can_not_win(links_of, device, monkeypatch):
    asked = links_of(bottlenecks)[-1]
    problem = multi_layer_problems.link_problem(asked, 2, FP16, device)
    result = autotuner.measure(problem, 0.01)
    assert result["winner"] in problem.candidates and not any("refused" in r for r in result["candidates"].values())
    original = launches.chain

    def wrong(link, values, *rest):
        original(link, values, *rest)
        values[link.conv3.step.out] *= 1.01

    monkeypatch.setattr(launches, "chain", wrong)
    result = autotuner.measure(problem, 0.01)
    assert result["winner"] == "apart" and "errs by" in result["candidates"]["conv2+conv3"]["refused"]


@pytest.mark.filterwarnings("ignore:.*which can't run here")
def test_a_table_decides_how_much_is_one_launch(links_of, write, device, ran):
    stage, x = prepared(bottlenecks, device)
    first, second, last = links_of(bottlenecks)
    expected = copy.deepcopy(stage).double()(x.double())
    answers = [
        (None, "conv2+conv3+conv1", "conv2+conv3"),
        ("shortcut+conv3", "conv2+conv3", "apart"),
        ("conv2+shortcut+conv3+conv1", "conv2+conv3+conv1", "a name of another version"),
    ]
    fused, arrows = rk.fuse(stage), []
    for winners in answers:
        rows = [record(asked, w, 2, "fp16") for asked, w in zip((first, second, last), winners) if w]
        write(table(*rows, record("conv any", "eager", dtype="fp16")))
        ran.clear()
        assert_within_budget(run(fused, x), run(stage, x), expected)
        arrows.append([name.count("->") for name in ran])
    assert arrows == [
        [0, 0, 0, 0, 0, 2, 1],
        [0, 0, 1, 0, 1, 0, 0, 0],
        [0, 3, 2, 0, 0],
    ]


def layer(
    c_in: int, size: int, c_out: int, kernel: int = 1, stride: int = 1, residual: bool = False, relu: bool = True
):
    pad = kernel // 2
    geometry = Geometry((stride, stride), (pad,) * 4)
    weight = c_out, c_in, kernel, kernel
    return ConvProblem(c_in, size, size, weight, geometry, True, True, residual, RELU if relu else None)


SPECIALIZED = {
    "conv2+conv3+conv1 specialized": LinkProblem(
        layer(64, 6, 64, 3), None, layer(64, 6, 256, residual=True), False, layer(256, 6, 64)
    ),
    "conv2+conv3+conv1 specialized, 128 channels": LinkProblem(
        layer(128, 6, 128, 3), None, layer(128, 6, 512, residual=True), False, layer(512, 6, 128)
    ),
    "conv2+conv3 specialized": LinkProblem(layer(64, 6, 64, 3), None, layer(64, 6, 256, residual=True), False, None),
    "conv2+shortcut+conv3 specialized": LinkProblem(
        layer(64, 6, 64, 3), layer(64, 6, 256, relu=False), layer(64, 6, 256, residual=True), False, layer(256, 6, 64)
    ),
    "shortcut+conv3 specialized": LinkProblem(
        layer(128, 6, 128, 3), layer(256, 6, 512, relu=False), layer(128, 6, 512, residual=True), False, None
    ),
    "conv+pool specialized": StemProblem(
        ConvProblem(3, 18, 20, (16, 3, 7, 7), stem_layout.GEOMETRY, True, True, False, RELU), (3, 2, 1, 1, False)
    ),
}


def problem_of(asked, device):
    make = multi_layer_problems.link_problem
    return (multi_layer_problems.stem_problem if isinstance(asked, StemProblem) else make)(asked, 2, FP16, device)


@pytest.mark.slow(unless=lambda name: name == next(iter(SPECIALIZED)))
@pytest.mark.filterwarnings("ignore:.*which can't run here")
@pytest.mark.parametrize("name", SPECIALIZED)
def test_specialized_kernels_are_candidates(name, hopper, device, monkeypatch):
    """On a GPU as they are; on a CPU in an interpreter of Gluon."""
    pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")
    from resnet_kernels.kernels.sm90 import specialized_chain, specialized_conv, specialized_stem

    if device.type == "cpu":
        monkeypatch.setattr(target, "has_gluon", lambda: True)
        for module in (specialized_chain, specialized_conv, specialized_stem):
            monkeypatch.setattr(module, "launching", gluon_interpreter)
    problem = problem_of(SPECIALIZED[name], device)
    operands = problem.operands()
    for y, *others in zip(
        problem.candidates[name.split(",")[0]](*operands),
        problem.eager(*operands),
        problem.reference(*operands),
        strict=True,
    ):
        assert_within_budget(y, *others, name)


def test_without_gluon_there_are_no_specialized_candidates(hopper, device, monkeypatch):
    monkeypatch.setattr(target, "has_gluon", lambda: False)
    for asked in SPECIALIZED.values():
        problem = problem_of(asked, device)
        assert not any("specialized" in name for name in problem.candidates)


@pytest.mark.filterwarnings("ignore:.*which can't run here")
def test_a_table_names_the_specialized_kernel(monkeypatch, hopper, write, device):
    pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")
    from resnet_kernels.kernels.sm90 import specialized_chain

    launched = []
    blocks = nn.Sequential(*(rk.models.resnet_v1.Bottleneck(256, 64) for _ in range(2)))
    stage, x = prepared(lambda device: (blocks, torch.randn(2, 256, 6, 6, device=device)), device)
    if device.type == "cpu":
        monkeypatch.setattr(target, "has_gluon", lambda: True)
        monkeypatch.setattr(specialized_chain, "launching", gluon_interpreter)
    actual = specialized_chain.launch
    monkeypatch.setattr(specialized_chain, "launch", lambda *given: launched.append(None) or actual(*given))
    first, *_ = (asked for asked, _ in problems.note(stage, x) if isinstance(asked, LinkProblem))
    fused, expected = rk.fuse(stage), copy.deepcopy(stage).double()(x.double())
    for winner, count in (
        ("conv2+conv3+conv1 specialized", 1),
        ("conv2+conv3+conv1", 0),
        ("conv2+conv9 specialized", 0),
    ):
        write(table(record(first, winner, 2, "fp16"), record("conv any", "eager", dtype="fp16")))
        launched.clear()
        assert_within_budget(run(fused, x), run(stage, x), expected)
        assert len(launched) == count, winner


@pytest.mark.filterwarnings("ignore:.*which can't run here")
def test_a_table_names_the_specialized_stem(monkeypatch, hopper, write, device):
    """It takes images as they come, as the other stem does."""
    pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")
    from resnet_kernels.kernels.sm90 import specialized_stem

    launched = []
    net, x = prepared(lambda device: (Net(nn.MaxPool2d(3, 2, 1)), image(device)), device)
    if device.type == "cpu":
        monkeypatch.setattr(target, "has_gluon", lambda: True)
        monkeypatch.setattr(specialized_stem, "launching", gluon_interpreter)
    actual = specialized_stem.launch
    monkeypatch.setattr(specialized_stem, "launch", lambda *given: launched.append(given[0]) or actual(*given))
    (asked,) = (asked for asked, _ in problems.note(net, x) if isinstance(asked, StemProblem))
    fused, expected = rk.fuse(net), copy.deepcopy(net).double()(x.double())
    for winner, count in (("conv+pool specialized", 1), ("conv+pool", 0), ("conv+pool of another kind", 0)):
        write(table(record(asked, winner, 2, "fp16"), record("conv any", "eager", dtype="fp16")))
        launched.clear()
        assert_within_budget(run(fused, x), run(net, x), expected)
        assert len(launched) == count, winner
        assert all(images is x for images in launched)
