"""Hopper's convolution with specialized warps: exact on integers, without races, and ending, in an interpreter of Gluon.

On a Hopper GPU the same tests run the compiled kernel.
"""

import itertools
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from helpers import gluon_interpreter, merged_shortcuts
from helpers.convolutions import Case, operands, truth
from helpers.merged_shortcuts import Merged, merged_operands
from helpers.oracle import assert_within_budget
from helpers.planted import planted
from resnet_kernels.kernels.activations import RELU, PReLU
from resnet_kernels.kernels.geometry import Geometry, normalize
from resnet_kernels.kernels.operands import ConvOperands

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from resnet_kernels.kernels.sm90 import specialized_conv as kernel
from resnet_kernels.kernels.sm90.conv_layout import ConvShape
from resnet_kernels.kernels.sm90.specialized_layout import (
    CONFIGS,
    MERGED,
    MOST_SHARED,
    why_not,
    why_not_merged,
    why_not_tile,
)

pytestmark = pytest.mark.usefixtures("hopper_with_nan_outputs")

FP16 = torch.float16
CASES = (
    Case("3x3, 64 channels", 2, 64, 9, 8, 64),
    Case("3x3, two steps a tap", 1, 128, 7, 7, 128),
    Case("3x3, ragged channels", 3, 64, 5, 7, 72),
    Case("3x3/2", 2, 64, 14, 12, 64, stride=2),
    Case("3x3/2, two steps a tap, uneven padding", 2, 128, 8, 6, 40, stride=2, padding=((3, 0), (2, 1))),
    Case("1x1 up", 2, 64, 9, 9, 256, (1, 1), padding=0),
    Case("1x1 down", 2, 256, 9, 9, 64, (1, 1), padding=0),
    Case("1x1/2, odd size", 3, 64, 7, 7, 64, (1, 1), 2, 0),
    Case("one pixel of 130 images", 130, 64, 3, 2, 64),
    Case("padding wider than the image", 1, 64, 2, 2, 16, padding=3),
    Case("one pixel of 130 images, some without a tap", 130, 64, 1, 1, 16, (1, 1), padding=1),
)


def interpret(monkeypatch: pytest.MonkeyPatch, device, seed: int = 0, multiprocessors: int = 1) -> None:
    """On a CPU: the kernel's source, and few multiprocessors, so that a program has several tiles."""
    if device.type == "cpu":
        launch = partial(gluon_interpreter.launch, seed=seed)
        monkeypatch.setattr(kernel, "launching", SimpleNamespace(launch=launch))
        monkeypatch.setattr(kernel, "multiprocessors", lambda device: multiprocessors)


def shape_of(case: Case) -> ConvShape:
    geometry = normalize(case.stride, case.padding, case.dilation, case.groups)
    return ConvShape((case.n, case.c_in, case.h, case.w), (case.c_out, case.c_in, *case.kernel), geometry)


def run(case, x, weight, bias, residual, scale, activation, config=CONFIGS[-1]):
    shape = shape_of(case)
    assert why_not(*shape, x.dtype) is None and why_not_tile(shape, config) is None
    return kernel.launch(ConvOperands(x, weight, bias, residual, scale, shape.geometry, activation), config)


FITTING = [(case, config) for case in CASES for config in CONFIGS if why_not_tile(shape_of(case), config) is None]


@pytest.mark.slow(unless=lambda case, config: case is CASES[0] or config == CONFIGS[-1])
@pytest.mark.parametrize(("case", "config"), FITTING, ids=str)
def test_exact_on_integers(case, config, device, monkeypatch):
    x, weight, bias, residual, scale = operands(case, FP16, device)
    uses = ((bias, residual, scale, RELU), (None, None, None, None), (bias, None, scale, RELU))
    for seed, use in enumerate(uses):
        interpret(monkeypatch, device, seed)
        expected = truth(case, x, weight, *use[:3], use[3] is not None)
        assert expected.abs().max() <= 2048, "the test's own sums must be exact"
        y = run(case, x, weight, *use, config)
        assert torch.equal(y.double().cpu(), expected)
        assert y.dtype == FP16 and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow(unless=lambda config: config == CONFIGS[0])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_any_order_of_events_gives_the_same(config, device, monkeypatch):
    """Twenty schedules: copies early and late, consumers ahead of each other."""
    case = Case("", 3, 64, 8, 12, config.block_n)
    x, weight, bias, residual, scale = operands(case, FP16, device)
    for seed, use in itertools.product(range(10), (residual, None)):
        interpret(monkeypatch, device, seed, multiprocessors=1 + seed % 2)
        y = run(case, x, weight, bias, use, scale, RELU, config)
        assert torch.equal(y.double().cpu(), truth(case, x, weight, bias, use, scale, True))


def test_bf16(device, monkeypatch):
    interpret(monkeypatch, device)
    case = CASES[0]
    x, weight, bias, residual, scale = operands(case, torch.bfloat16, device)
    y = run(case, x, weight, bias, residual, scale, RELU)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.double().cpu(), truth(case, x, weight, bias, residual, scale, True))


def test_prelu(device, monkeypatch):
    interpret(monkeypatch, device)
    case = CASES[2]
    x, weight, bias, residual, scale = operands(case, FP16, device)
    slopes = torch.randint(-2, 3, (case.c_out,), device=device).float()
    y = run(case, x, weight, bias, residual, scale, PReLU(slopes))
    expected = truth(case, x, weight, bias, residual, scale, False)
    assert torch.equal(y.double().cpu(), torch.nn.functional.prelu(expected, slopes.double().cpu()))


@pytest.mark.parametrize("case", (CASES[1], CASES[3]), ids=str)
def test_as_accurate_as_eager(case, device, monkeypatch):
    interpret(monkeypatch, device)
    x, weight, bias, residual, scale = operands(case, FP16, device, real=True)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    z = torch.conv2d(x, weight, None, case.stride, case.padding)
    eager = torch.relu(torch.batch_norm(z, scale, bias, zero, one, False, 0.0, 0.0, False) + residual)
    y = run(case, x, weight, bias, residual, scale, RELU)
    assert_within_budget(y, eager, truth(case, x, weight, bias, residual, scale, True))


def test_nan_stays_nan_and_an_image_does_not_see_its_neighbors(device, monkeypatch):
    interpret(monkeypatch, device)
    for stride, size in ((1, 6), (1, 7), (2, 6)):
        case = Case("", 3, 64, size, size, 16, stride=stride)
        x = torch.full((3, 64, size, size), float("nan"), device=device, dtype=FP16)
        x[1] = 1.0
        y = run(case, x, torch.ones(16, 64, 3, 3, device=device, dtype=FP16), None, None, None, RELU)
        assert y[1].isfinite().all() and y[[0, 2]].isnan().all()


MERGED_CASES = (
    Merged(Case("Bottleneck", 2, 64, 7, 7, 256, (1, 1), padding=0), 128, 2, (14, 14)),
    Merged(Case("stride 1", 2, 64, 6, 6, 72, (1, 1), padding=0), 128, 1, (6, 6)),
    Merged(Case("BasicBlock", 1, 64, 8, 12, 64), 192, 2, (16, 24)),
    Merged(Case("one pixel of 130 images", 130, 64, 2, 2, 64), 128, 2, (4, 4)),
)


merge = partial(merged_shortcuts.merge, config=MERGED, kernel=kernel, why_not=why_not_merged)


@pytest.mark.parametrize("merged", MERGED_CASES, ids=lambda merged: str(merged.conv))
def test_merged_shortcut_is_exact(merged, device, monkeypatch):
    conv, shortcut = merged_operands(merged, device)
    for seed, zero in enumerate(((), (0,), (0, -1))):
        interpret(monkeypatch, device, seed)
        # A scale of 0 makes its tile park the first sums.
        shortcut[4][list(zero)] = 0.0
        y, expected = merge(merged, conv, shortcut)
        assert expected.abs().max() <= 2048 and torch.equal(y.double().cpu(), expected)
    for use in ((False,) * 4, (True, True, False, True), (False, False, True, True)):
        y, expected = merge(merged, conv, shortcut, use, relu=False, residual=True)
        assert torch.equal(y.double().cpu(), expected)


def test_merged_shortcut_takes_any_scale(device, monkeypatch):
    """Those that can't be factored out, one in a tile and all at once; NaN and inf as PyTorch has them."""
    interpret(monkeypatch, device)
    merged = MERGED_CASES[1]
    (*conv, scale), (*shortcut, scale0) = merged_operands(merged, device)
    awkward = ((1, 0), (0, 1), (0, 0), (-2, 4), (2, -1), (1, 2.0**-60), (2.0**-60, 1), (0, -2), (2.0**60, 2.0**60))
    for first in (*range(len(awkward)), slice(None)):
        values = torch.tensor(awkward[first], device=device).reshape(-1, 2)
        new, new0 = scale.clone(), scale0.clone()
        new[3 : 3 + len(values)], new0[3 : 3 + len(values)] = values.unbind(1)
        y, expected = merge(merged, (*conv, new), (*shortcut, new0), (True, False) * 2, relu=False)
        assert torch.equal(y.cpu(), expected.to(FP16))
    grid = torch.cartesian_prod(*2 * [torch.tensor([float("nan"), float("inf"), 0.0, 1.0], device=device)])
    scale[: len(grid)], scale0[: len(grid)] = grid.unbind(1)
    y, expected = merge(merged, (*conv, scale), (*shortcut, scale0), (True, False) * 2)
    torch.testing.assert_close(y.double().cpu(), expected.relu(), rtol=0, atol=0, equal_nan=True)


def test_the_predicates_say_why_not():
    pad = Geometry(padding=(1,) * 4)
    x, weight = (2, 64, 8, 8), (64, 64, 3, 3)
    for problem, dtype, reason in (
        ((x, weight, pad), FP16, None),
        ((x, weight, pad._replace(stride=(2, 2))), torch.bfloat16, None),
        ((x, weight, pad), torch.float32, "dtype must be float16 or bfloat16, got torch.float32"),
        (((2, 72, 8, 8), (64, 72, 3, 3), pad), FP16, "C_in must be a multiple of 64, got 72"),
        (((2, 64, 7, 8), weight, pad._replace(stride=(2, 2))), FP16, "stride 2 needs even sizes, got 7x8"),
    ):
        assert why_not(*problem, dtype) == reason
    resident, wide = next(c for c in CONFIGS if c.resident), next(c for c in CONFIGS if c.block_n == 256)
    assert why_not_tile(ConvShape(x, weight, pad), resident) is None
    assert "can't stay" in why_not_tile(ConvShape(x, (64, 128, 3, 3), pad), resident)
    assert "can't stay" in why_not_tile(ConvShape(x, (128, 64, 1, 1), Geometry()), resident)
    assert "half empty" in why_not_tile(ConvShape(x, weight, pad), wide)
    shape = ConvShape(x, (64, 64, 1, 1), Geometry())
    for channels, reason in ((8, "the shortcut: C_in"), (64, "at least 128 input channels, got 64")):
        shortcut = ConvShape((2, channels, 8, 8), (64, channels, 1, 1), Geometry())
        assert reason in why_not_merged(shape, shortcut, FP16)


def test_every_tile_fits_into_shared_memory():
    steps = 9 * 64 // 64
    for config in CONFIGS:
        assert config.shared_bytes(steps) <= MOST_SHARED and config.buffers % config.consumers == 0
    assert len({str(config) for config in CONFIGS}) == len(CONFIGS) and not MERGED.resident


@pytest.mark.slow
@pytest.mark.parametrize("batch", (1, 256))
@pytest.mark.parametrize("name", ("resnet18", "resnet50", "resnet_v2_50", "d2l_resnet18"))
def test_every_layer_of_the_networks_ends(name, batch, monkeypatch):
    """No deadlock: the first and the last program of each launch, without numbers, and on few tiles each."""
    from helpers.layers import convolutions_of

    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 132 if batch < 256 else 4 * 132)
    ran = 0
    for number, conv in enumerate(convolutions_of(name, batch)):
        if why_not(*conv, FP16) is not None:
            continue
        able = [config for config in CONFIGS if why_not_tile(conv, config) is None]
        # Half of the tiles for each layer: one layer's are another one's.
        for config in able[number % 2 :: 2] or able:
            bound = kernel.Bound(conv, RELU, FP16, gluon_interpreter.META, config)
            launch = partial(gluon_interpreter.launch, seed=number, programs={0, bound.grid[0] - 1})
            monkeypatch.setattr(kernel, "launching", SimpleNamespace(launch=launch))
            empty = partial(torch.empty, dtype=FP16, device=gluon_interpreter.META)
            vector = empty(conv.weight[0])
            for residual in (empty(bound.todo.y_shape), None):
                bound(empty(conv.x), empty(conv.weight), vector, residual, vector)
            ran += 1
    assert ran > 4


DEVICE, HOST = "sm90.specialized_device", "sm90.specialized_conv"
BUGS = {
    "a stage is filled before it is empty": (DEVICE, "(step // STAGES & 1) ^ 1", "step // STAGES & 1 & 0 ^ 1"),
    "a stage is multiplied before it is full": (DEVICE, "mbarrier.wait(full.index(stage), step // STAGES & 1)",
                                                "mbarrier.wait(full.index(stage), step // STAGES & 1 | 1)"),
    "a stage is empty while it is multiplied": (DEVICE, "empty.index((step + STAGES - 1) % STAGES), pred=k > 0",
                                                "empty.index(step % STAGES), pred=k > 0"),
    "the last stage stays full": (DEVICE, "pred=n_steps > 0", "pred=n_steps < 0"),
    "products add to another tile's sums": (DEVICE, "use_acc=ADDS or k > 0", "use_acc=k > 0 and ADDS"),
    "bytes of x alone": (DEVICE, "x_desc.block_type.nbytes + w_desc.block_type.nbytes", "x_desc.block_type.nbytes"),
    "transposed taps": (DEVICE, "(r * KERNEL_W + s)", "(s * KERNEL_W + r)"),
    "channels of another step": (DEVICE, "c = chunk * BLOCK_K", "c = 0"),
    "no padding": (HOST, "n, h - lead_h, w - lead_w, channel, in_h", "n, h, w, channel, in_h"),
    "two consumers take the same steps": (HOST, "step += SHORTCUT_CHUNKS + N_CHUNKS *", "step += 0 *"),
    "the second consumer begins with the first one's steps": (HOST, "step = SHORTCUT_CHUNKS + N_CHUNKS *", "step = 0 *"),
    "a residual that has not come": (HOST, "mbarrier.wait(loaded.index(buffer), j // BUFFERS & 1)", "pass"),
    "a residual over a result that is not stored": (HOST, "mbarrier.wait(stored.index(buffer), (j // BUFFERS & 1) ^ 1)",
                                                    "pass"),
    "a buffer given away too early": (HOST, "            store_wait(OWN_BUFFERS - 1)\n            mbarrier.arrive",
                                      "            mbarrier.arrive"),
    "a result over one that is not stored": (HOST, "        else:\n            store_wait(OWN_BUFFERS - 1)",
                                             "        else:\n            pass"),
    "no fence before the store": (HOST, "        fence_async_shared()\n", ""),
    "an end before the last store": (HOST, "    store_wait(0)\n", ""),
    "dropped activation": (DEVICE, "elementwise.activate(acc, ACT,", "elementwise.activate(acc, None,"),
    "residual after the activation": (DEVICE, "        if HAS_RESIDUAL:\n            acc +=",
                                      "        if HAS_RESIDUAL:\n            acc = elementwise.relu(acc)\n            acc +="),
    "the vectors of another part": (DEVICE, "channel + FIRST +", "channel +"),
    "the tail of the channels": (DEVICE, "offs < c_out\n        if scale_ptr",
                                 "offs < c_out // 16 * 16\n        if scale_ptr"),
    "rows of another tile": (DEVICE, "h = box // tiles_w % tiles_h", "h = box // tiles_h % tiles_h"),
    "no turns": (HOST, "mbarrier.wait(turns.index(WHICH), (j // CONSUMERS & 1) ^ (WHICH == 0))", "pass"),
    "the weight's stage by the step of the tile": (DEVICE, "k if RESIDENT else stage", "k % STAGES"),
}  # fmt: skip


def is_wrong(device, monkeypatch) -> bool:
    """Whether one of several launches ends in a race, in a deadlock, or with other numbers."""
    for seed, (case, config) in enumerate(
        (
            (Case("", 3, 128, 8, 12, 72), CONFIGS[0]),
            (Case("", 4, 64, 9, 24, 40), CONFIGS[4]),
            (Case("", 9, 64, 8, 12, 128, (1, 1), padding=0), CONFIGS[0]),
            (Case("", 3, 128, 8, 12, 72), CONFIGS[1]),
            (Case("", 130, 64, 3, 2, 72), CONFIGS[0]),
        )
    ):
        x, weight, bias, residual, scale = operands(case, FP16, device)
        for offset, use in itertools.product(range(4), (residual, None)):
            interpret(monkeypatch, device, 10 * seed + offset)
            try:
                y = run(case, x, weight, bias, use, scale, RELU, config)
            except AssertionError:  # a race, a deadlock, a stage that is not there
                return True
            if not torch.equal(y.double().cpu(), truth(case, x, weight, bias, use, scale, True)):
                return True
    return False


@pytest.mark.slow(unless=lambda name: name in [*BUGS][::6])
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name, tmp_path, device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("a bug in the schedule may hang a GPU")
    module, old, new = BUGS[name]
    wrong = planted(module, tmp_path, old, new)
    for name, function in vars(wrong).items():
        if hasattr(function, "fn") and function.fn.__module__ == wrong.__name__:
            monkeypatch.setattr(kernel, name, function, raising=False)
    assert is_wrong(device, monkeypatch)


@pytest.mark.slow
def test_nothing_planted_nothing_caught(device, monkeypatch):
    assert not is_wrong(device, monkeypatch)


def test_the_interpreter_ends_a_deadlock(monkeypatch):
    """Both kinds: a wait for an arrival that never comes, and for bytes that never come."""
    from helpers.gluon_interpreter import Barrier, Barriers, Deadlock, Program

    program = Program(0, 1, random.Random(0))
    barrier = Barriers([Barrier(1)], 0)
    wait = program._names["mbarrier"].wait
    with pytest.raises(Deadlock, match="waits for phase 0 of mbarrier 0"):
        program.specialize([(lambda: wait(barrier, 0), ()), (lambda: None, ())], [1], [24])
    barrier.only.arrive(bytes=16)
    with pytest.raises(Deadlock, match="waits for phase 0 of mbarrier 0"):
        program.specialize([(lambda: wait(barrier, 0), ())], [], [])
    barrier.only.complete(16)
    program.specialize([(lambda: wait(barrier, 0), ())], [], [])
