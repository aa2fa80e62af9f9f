"""The stem with specialized warps: exact on integers, without races, and ending, in an interpreter of Gluon.

On a Hopper GPU the same tests run the compiled kernel.
"""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from helpers import gluon_interpreter
from helpers.oracle import assert_within_budget
from helpers.planted import planted
from helpers.stems import FP16, SIZES, integers, reals, truth, with_value

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from resnet_kernels.kernels.sm90 import specialized_stem as kernel
from resnet_kernels.kernels.sm90 import stem
from resnet_kernels.kernels.sm90.specialized_layout import MOST_SHARED, plan_stem

pytestmark = pytest.mark.usefixtures("hopper_with_nan_outputs")

BF16 = torch.bfloat16


def interpret(monkeypatch: pytest.MonkeyPatch, device, seed: int = 0, multiprocessors: int = 1) -> None:
    """On a CPU: the kernel's source, and few multiprocessors, so that a consumer has several strips."""
    if device.type == "cpu":
        monkeypatch.setattr(kernel, "launching", SimpleNamespace(launch=partial(gluon_interpreter.launch, seed=seed)))
        monkeypatch.setattr(kernel, "multiprocessors", lambda device: multiprocessors)


def wrong(operands) -> bool:
    """Whether the result differs from the exact one."""
    expected = truth(*operands)
    assert 0 < expected.max() <= 2048, "the test's own sums must be exact"
    return not torch.equal(kernel.launch(*operands).double().cpu(), expected)


@pytest.mark.slow(unless=lambda size, seed: seed == 0 and size[0] == 1)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_exact_on_integers(size, seed, device, monkeypatch):
    interpret(monkeypatch, device, seed)
    operands = integers(*size, device)
    assert not wrong(operands)
    y = kernel.launch(*operands)
    assert y.dtype == FP16 and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow(unless=lambda multiprocessors: multiprocessors == 3)
@pytest.mark.parametrize("multiprocessors", (1, 3, 100))
def test_segments_of_rows_are_exact(multiprocessors, device, monkeypatch):
    """As on a machine with more processors than strips: the row above a segment is computed again."""
    interpret(monkeypatch, device, multiprocessors=multiprocessors)
    for height in (19, 33):
        assert not wrong(integers(1, height, 12, 16, device))


def test_without_scale_or_shift_and_with_half_ones(device, monkeypatch):
    interpret(monkeypatch, device)
    x, weight, scale, shift = integers(1, 9, 8, 16, device)
    for use in itertools.product((scale, None), (shift, None)):
        assert torch.equal(kernel.launch(x, weight, *use).double().cpu(), truth(x, weight, *use))
    assert torch.equal(kernel.launch(x, weight, scale.half(), shift.half()), kernel.launch(x, weight, scale, shift))


def test_bfloat16_and_a_normalized_image_are_exact(device, monkeypatch):
    interpret(monkeypatch, device)
    x, weight, scale, shift = integers(1, 10, 12, 16, device, BF16, most=1)
    expected = truth(x, weight, scale.sign(), shift)
    assert expected.max() <= 256, "the test's own sums must be exact"
    y = kernel.launch(x, weight, scale.sign(), shift)
    assert y.dtype == BF16 and torch.equal(y.double().cpu(), expected)
    mean, std = (0.5, 0.0, 1.0), (0.5, 1.0, 0.25)
    expected = stem.launch(x, weight, scale.sign(), shift, mean, std)
    assert torch.equal(kernel.launch(x, weight, scale.sign(), shift, mean, std), expected)


@pytest.mark.slow(unless=lambda value: value == float("inf"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_nan_and_inf_spread_as_in_eager_and_no_further(value, device, monkeypatch):
    """Each column parity and both edges: the eighth pixel of a window has no say, zero weight or not."""
    interpret(monkeypatch, device)
    for h, w in ((7, 0), (8, 7), (9, 8), (0, 10), (10, 19), (19, 18)):
        operands, expected = with_value(value, h, w, device)
        y = kernel.launch(*operands)
        torch.testing.assert_close(y.double().cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_as_accurate_as_eager(device, monkeypatch):
    interpret(monkeypatch, device)
    operands, eager = reals(2, 18, 22, device)
    assert_within_budget(kernel.launch(*operands), eager, truth(*operands))


@pytest.mark.slow(unless=lambda batch: batch == 1)
@pytest.mark.parametrize("batch", (1, 256))
def test_stems_of_224_pixels_end(batch, monkeypatch):
    """No deadlock: the first and the last program on 132 multiprocessors, without numbers."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(kernel, "pack", lambda x, w, mean, std, todo: (x, w))
    programs = plan_stem((batch, 3, 224, 224), 64, 132).programs
    launch = partial(gluon_interpreter.launch, programs={0, programs - 1})
    monkeypatch.setattr(kernel, "launching", SimpleNamespace(launch=launch))
    meta = partial(torch.empty, dtype=FP16, device=gluon_interpreter.META)
    assert kernel.launch(meta(batch, 3, 224, 224), meta(64, 3, 7, 7), None, None).shape == (batch, 64, 56, 56)


def test_the_plan_of_a_224_image():
    todo = plan_stem((256, 3, 224, 224), 64, 132)
    assert todo.programs == 132 and (todo.integers["items"], todo.integers["rows"]) == (256, 56)
    # Every box that a kernel may load lies in memory that is allocated, or outside of the view.
    for name in ("rows_desc", "last_desc"):
        view = todo.views[name]
        last = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides))
        assert last < 256 * 229 * 230 * 4 + todo.packing.tail
    rings, weights, results = 2 * 9 * 128 * 32, 64 * 224, 2 * 128 * 64
    # The gather has 8 KiB of its own for each consumer.
    assert 2 * (rings + weights + results) + 2 * 8192 <= MOST_SHARED


STEM = "sm90.specialized_stem"
BUGS = {
    "rows that have not come": ("if r >= _TAPS - 2:", "if r >= _TAPS - 1:"),
    "a strip's first rows not waited for": ("            mbarrier.wait(full.index(WHICH * ROWS + (use + r) % ROWS), "
                                            "(use + r) // ROWS & 1)\n        highest", "            pass\n        highest"),
    "a row that is still read is overwritten": ("mbarrier.wait(empty.index(slot), (use // ROWS & 1) ^ 1)", "pass"),
    "a row given away too early": ("empty.index(WHICH * ROWS + (use + r) % ROWS))\n    return row",
                                   "empty.index(WHICH * ROWS + (use + r + 2) % ROWS))\n    return row"),
    "the last rows of a strip kept": ("        use += _TAPS - 2\n", ""),
    "weights that have not come": ("    mbarrier.wait(ws_full, 0)\n", ""),
    "the other consumer's ring": ("slot = WHICH * ROWS + (use + r)", "slot = (1 - WHICH) * ROWS + (use + r)"),
    "copies that are not shifted": ("at = (cell + copy) * _CELL", "at = cell * _CELL"),
    "an eighth pixel with a say": ("for copy in gl.static_range(_COPIES - 1)", "for copy in gl.static_range(_COPIES)"),
    "a box too far to the left": ("at % _BOX]", "at % (_BOX // 2)]"),
    "strips that do not overlap": ("cell = tile * (_COLUMNS - 2)", "cell = tile * _COLUMNS"),
    "the first lane of a later strip is stored": ("lane >= gl.minimum(tile, 1)", "lane >= 0"),
    "no left neighbor": ("left = gl.gather(odd, left_lane, 0)", "left = odd"),
    "an odd column behind the last": ("odd = gl.where(has_odd, odd, float(\"-inf\")).to(DTYPE)", "pass"),
    "the row above forgotten": ("highest = row\n", "highest = highest * 0\n"),
    "a window that is never ended": ("| (h == bottom - 1)", "| (h < 0)"),
    "the row above a segment is stored": ("(h >= 2 * first) &", "(h >= 0) &"),
    "the row above a segment is left out": ("gl.maximum(2 * first - 1, 0)", "2 * first"),
    "the scale left out": ("row * scale[:, None]", "row"),
    "the wrong image": ("gl.cast(n, gl.int64)", "gl.cast(0, gl.int64)"),
}  # fmt: skip


def is_wrong(device, monkeypatch) -> bool:
    """Whether one of several launches ends in a race, in a deadlock, or with other numbers."""
    for seed, (size, multiprocessors) in enumerate((((3, 13, 13, 16), 1), ((1, 5, 262, 16), 1), ((1, 33, 9, 16), 3))):
        for offset in range(2):
            interpret(monkeypatch, device, 10 * seed + offset, multiprocessors)
            try:
                if wrong(integers(*size, device)):
                    return True
            except AssertionError:  # a race, a deadlock, a stage that is not there
                return True
    # An eighth pixel shows as NaN alone.
    x, weight, scale, shift = integers(1, 9, 9, 16, device)
    x[0, 0, 5, 5] = float("inf")
    return kernel.launch(x, weight.abs() + 1, scale * 0 + 1, shift).isnan().any().item()


@pytest.mark.slow(unless=lambda name: name in [*BUGS][::5])
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name, tmp_path, device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("a bug in the schedule may hang a GPU")
    module = planted(STEM, tmp_path, *BUGS[name])
    for what, function in vars(module).items():
        if hasattr(function, "fn") and function.fn.__module__ == module.__name__:
            monkeypatch.setattr(kernel, what, function)
    assert is_wrong(device, monkeypatch)


@pytest.mark.slow
def test_nothing_planted_nothing_caught(device, monkeypatch):
    assert not is_wrong(device, monkeypatch)
