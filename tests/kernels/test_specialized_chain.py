"""The chain with specialized warps: exact on integers, without races, and ending, in an interpreter of Gluon.

On a Hopper GPU the same tests run the compiled kernel.
"""

import inspect
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from helpers import gluon_interpreter
from helpers.chains import CASES, FP16, SUBSAMPLED, Case, chain, reference, shapes
from helpers.oracle import assert_within_budget
from helpers.planted import planted
from resnet_kernels.kernels.geometry import Geometry

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from resnet_kernels.kernels.sm90 import specialized_chain as kernel
from resnet_kernels.kernels.sm90 import specialized_chain_device
from resnet_kernels.kernels.sm90 import specialized_chain_ring as ring_kernel
from resnet_kernels.kernels.sm90.chain_layout import ShortcutShape, kind_of
from resnet_kernels.kernels.sm90.specialized_layout import MOST_SHARED, plan_chain, why_not_chain

pytestmark = pytest.mark.usefixtures("hopper_with_nan_outputs")

ABLE = [case for case in CASES if why_not_chain(*shapes(chain(case, torch.device("cpu")))) is None]
ABLE += (
    Case("several boxes a consumer", 3, 64, 12, 8, 64, 256, 64),
    Case("several boxes, z of 128 channels", 2, 64, 12, 16, 48, 128, 72),
    Case("stage 1, first block without the next", 2, 64, 6, 6, 64, 256, 0, shortcut=64),
    Case("several boxes, a projection", 3, 64, 12, 8, 64, 256, 0, shortcut=64),
    Case("several boxes, little beside the projection", 3, 64, 12, 8, 48, 64, 64, shortcut=40, preact=True),
    Case(
        "several boxes, subsampled",
        3,
        64,
        24,
        16,
        64,
        128,
        40,
        shortcut=SUBSAMPLED,
        stride=2,
        preact=True,
        keep_sum=False,
    ),
    Case("one box", 1, 64, 8, 8, 40, 64, 0),
    Case("wide, several pairs of boxes", 5, 128, 12, 8, 128, 256, 128),
    Case("wide, an odd number of boxes", 3, 64, 8, 8, 96, 128, 72),
    Case("wide, v2, several pairs", 4, 128, 12, 8, 128, 128, 128, preact=True),
    Case(
        "wide, subsampled, without a sum", 3, 64, 16, 16, 128, 192, 40, shortcut=SUBSAMPLED, stride=2, preact=True,
        keep_sum=False,
    ),
    Case("wide, without the next", 3, 128, 9, 7, 128, 256, 0),
    Case("ring, a projection and z", 5, 64, 12, 8, 64, 256, 64, shortcut=64),
    Case("ring, v2, a projection and z, stride 2", 3, 64, 16, 16, 64, 256, 40, shortcut=40, stride=2, preact=True),
    Case("ring, 128 input channels", 3, 128, 8, 8, 64, 320, 64),
)  # fmt: skip


def interpret(monkeypatch: pytest.MonkeyPatch, device, seed: int = 0, multiprocessors: int = 1) -> None:
    """On a CPU: the kernel's source, and few multiprocessors, so that a program has several boxes."""
    if device.type == "cpu":
        monkeypatch.setattr(kernel, "launching", SimpleNamespace(launch=partial(gluon_interpreter.launch, seed=seed)))
        monkeypatch.setattr(kernel, "multiprocessors", lambda device: multiprocessors)


def run(call: dict):
    assert why_not_chain(*shapes(call)) is None
    return kernel.launch(**call)


def wrong(call: dict) -> bool:
    """Whether y or z differ from the exact ones."""
    expected, outputs = reference(call), run(call)
    assert all(e is None or 0 < e.abs().max() <= 2048 for e in expected), "the test's own sums must be exact"
    return any(
        (a is None) != (e is None) or (a is not None and not torch.equal(a.double().cpu(), e))
        for a, e in zip(outputs, expected)
    )


def test_the_chains_of_stages_1_and_2_are_among_them():
    names = {case.name for case in ABLE}
    assert {"stage 1", "stage 1, last block", "stage 1 to 2", "v2", "v2, last unit", "stage 2"} <= names
    # A next block of 256 channels, and a projection beside 128.
    assert not {"stage 2 to 3", "stage 2, first block"} & names


@pytest.mark.slow(unless=lambda case: case in ABLE[::3])
@pytest.mark.parametrize("case", ABLE, ids=str)
def test_exact_on_integers(case, device, monkeypatch):
    call = chain(case, device)
    for seed in range(2):
        interpret(monkeypatch, device, seed, multiprocessors=1 + seed % 2)
        assert not wrong(call)
    y, z = run(call)
    assert all(t is None or (t.dtype == FP16 and t.is_contiguous(memory_format=torch.channels_last)) for t in (y, z))
    assert not wrong(chain(case, device, norm=False))


def test_every_relu_may_be_left_out(device, monkeypatch):
    interpret(monkeypatch, device)
    call = chain(ABLE[0], device)
    for layer in ("conv2", "conv3", "next_conv1"):
        assert not wrong(call | {layer: call[layer]._replace(relu=not call[layer].relu, shift=None)})


@pytest.mark.slow(unless=lambda case: case is ABLE[0])
@pytest.mark.parametrize("case", (ABLE[0], ABLE[3], ABLE[-3]), ids=str)
def test_as_accurate_as_eager(case, device, monkeypatch):
    interpret(monkeypatch, device)
    call = chain(case, device, real=True)
    eager = reference(call, number=lambda t: t.to(FP16))
    for name, y, own, oracle in zip("yz", run(call), eager, reference(call)):
        if y is not None:
            assert_within_budget(y, own, oracle, name)


def test_bf16(device, monkeypatch):
    interpret(monkeypatch, device)
    call = chain(replace(ABLE[0], n=1), device, torch.bfloat16)
    expected = reference(call)
    assert expected[0].abs().max() <= 256, "y must be exact in bfloat16, so that z alone is rounded"
    for out, exact in zip(run(call), expected):
        assert torch.equal(out.cpu(), exact.to(torch.bfloat16))


def test_nan_stays_nan(device, monkeypatch):
    interpret(monkeypatch, device)
    case = replace(ABLE[0], n=1, h=12, w=12)
    call = chain(case, device, real=True)
    call["residual"][0, 3, 1, 1], call["x"][0, 5, 8, 8] = float("nan"), float("nan")
    y, z = run(call)
    # A channel of one pixel by the residual; nine pixels, all channels, by the 3x3.
    assert y.isnan().sum() == 1 + 9 * case.c_out and y[0, :, 7:10, 7:10].isnan().all() and y[0, 3, 1, 1].isnan()
    assert z.isnan().sum() == 10 * case.next_width and z[0, :, 1, 1].isnan().all() and z[0, :, 7:10, 7:10].isnan().all()


PAD = (1, 1, 1, 1)
GIVEN = dict(
    x_shape=(2, 64, 8, 8), conv2_shape=(64, 64, 3, 3), geometry=Geometry(padding=PAD), conv3_shape=(256, 64, 1, 1), dtype=FP16,
    shortcut=None, next_shape=(64, 256, 1, 1),
)  # fmt: skip
WIDE = dict(x_shape=(2, 128, 8, 8), conv2_shape=(128, 128, 3, 3), conv3_shape=(512, 128, 1, 1), next_shape=None)
REASONS = {
    "nothing": ({}, None),
    "what chain.py refuses": (dict(dtype=torch.float32), "conv2: dtype must be float16 or bfloat16, got torch.float32"),
    "128 channels": (WIDE, None),
    "256 channels": (
        dict(x_shape=(2, 256, 8, 8), conv2_shape=(256, 256, 3, 3), conv3_shape=(1024, 256, 1, 1), next_shape=None),
        "conv2 must have at most 128 output channels, got 256",
    ),
    "a projection beside 128 channels": (
        WIDE | dict(shortcut=ShortcutShape((2, 64, 8, 8), (512, 64, 1, 1), Geometry())),
        "beside a projection conv2 must have at most 64 output channels, got 128",
    ),
    "128 channels, and 256 of the next block": (
        WIDE | dict(next_shape=(256, 512, 1, 1)), "so the next conv1 must have at most 128 channels, got 256"
    ),
    "half a step": (dict(x_shape=(2, 96, 8, 8), conv2_shape=(64, 96, 3, 3)), "conv2: C_in must be a multiple of 64, got 96"),
    "half a block": (dict(conv3_shape=(96, 64, 1, 1), next_shape=None), "conv3: C_out must be a multiple of 64, got 96"),
    "a wide projection": (
        dict(shortcut=ShortcutShape((2, 256, 8, 8), (256, 256, 1, 1), Geometry())),
        "shortcut: C_in must be at most 64, got 256",
    ),
    "weights": (
        dict(x_shape=(2, 128, 8, 8), conv2_shape=(64, 128, 3, 3), next_shape=(128, 256, 1, 1)),
        "don't fit into shared memory, so the next conv1 must have at most 64 channels, got 128",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_the_predicate_says_why_not(name):
    change, reason = REASONS[name]
    said = why_not_chain(**GIVEN | change)
    assert said is None if reason is None else reason in said


@pytest.mark.slow(unless=lambda batch, what: batch == 1 and "projection" not in what)
@pytest.mark.parametrize("batch", (1, 256))
@pytest.mark.parametrize("what", ("stage 1", "a projection", "a projection and z", "stage 2"))
def test_the_chains_of_resnet50_end(batch, what, monkeypatch):
    """No deadlock: the first and the last program on 132 multiprocessors, without numbers."""
    meta = partial(torch.empty, dtype=FP16, device=gluon_interpreter.META)
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 132 if batch == 1 else 8 * 132)
    case, size = replace(CASES[0], n=1), 56
    if what == "a projection":
        case = replace(CASES[3], n=1, next_width=0)
    elif what == "a projection and z":
        case = replace(CASES[3], n=1)
    elif what == "stage 2":
        case, size = replace(CASES[4], n=1), 28
    call = chain(case, torch.device("cpu"))

    def without_numbers(value):
        if isinstance(value, torch.Tensor):
            return meta(
                (batch, value.shape[1], size, size) if value.dim() == 4 and value.shape[-1] > 3 else value.shape
            )
        return (
            value._make(map(without_numbers, value)) if isinstance(value, tuple) and hasattr(value, "_make") else value
        )

    call = {name: without_numbers(value) for name, value in call.items()}
    boxes = -(-(size**2) // 64) * batch
    in_ring = what in ("a projection and z", "stage 2")
    programs = min(-(-boxes // 2) if in_ring else boxes, kernel.multiprocessors(None))
    launch = partial(gluon_interpreter.launch, programs={0, programs - 1})
    monkeypatch.setattr(kernel, "launching", SimpleNamespace(launch=launch))
    y, z = run(call)
    assert y.shape == (batch, case.c_out, size, size)
    assert z is None if what == "a projection" else z.shape == (batch, case.next_width, size, size)


BUGS = {
    "no turns": ("mbarrier.wait(turns.index(WHICH), (i & 1) ^ (WHICH == 0))", "pass"),
    "both consumers take the same steps": ("        step += STEPS\n", ""),
    "weights that have not come": ("    mbarrier.wait(ws_full, 0)\n", ""),
    "fewer bytes of weights": ("ws_full, STEPS * w2_desc", "ws_full, (STEPS - 1) * w2_desc"),
    "weights of the next block": ("async_load(w3_desc, [j * _BLOCK, 0]", "async_load(w3_desc, [j * _BLOCK + 8, 0]"),
    "a residual that has not come": ("mbarrier.wait(loaded.index(WHICH * BUFFERS + use % BUFFERS), use // BUFFERS & 1)\n"
                                     "                out", "out"),
    "a residual over a result that is not stored": ("(use // BUFFERS & 1) ^ 1)\n            if j", "1)\n            if j"),
    "a buffer given away too early": ("(use + 1) % BUFFERS), pred=use >= BUFFERS - 1", "use % BUFFERS)"),
    "a result over one that is not stored": ("    store_wait(BUFFERS - 1)\n", ""),
    "h without a fence": ("        left.store(hidden.to(DTYPE))\n        fence_async_shared()\n",
                          "        left.store(hidden.to(DTYPE))\n"),
    "the other consumer's h": ("left = hs.index(WHICH)", "left = hs.index(0)"),
    "no fence before the store": ("    fence_async_shared()\n    async_store(desc", "    async_store(desc"),
    "z's buffers forgotten": ("RESULTS: gl.constexpr = 0 if HAS_PROJECTION or w1_desc is None else BLOCK_NEXT // _BLOCK",
                              "RESULTS: gl.constexpr = 0"),
    "a projection's input given away too early": ("mbarrier.wait(loaded.index(WHICH), i & 1)",
                                                  "mbarrier.arrive(stored.index(WHICH))\n"
                                                  "            mbarrier.wait(loaded.index(WHICH), i & 1)"),
    "the first block's vectors": ("shift3_ptr, channel, C_OUT)", "shift3_ptr, 0, C_OUT)"),
    "h without its shift": ("affine(hidden, scale2_ptr, shift2_ptr", "affine(hidden, scale2_ptr, None"),
    "z of the sum, not of p": ("gl.convert_layout(p, gl.Dot", "gl.convert_layout(y, gl.Dot"),
    "the halves of z swapped": ("n, h, w, half * _BLOCK", "n, h, w, (1 - half) * _BLOCK"),
    "a dropped ReLU": ("            if RELU_3:\n                y = relu(y)\n", ""),
    "the residual of the box before": ("box_of(tile + OFFSET", "box_of(tile"),
}  # fmt: skip
# Of the chain whose weights pass through a ring.
RING_BUGS = {
    "a stage empty for one consumer": ("mbarrier.init(empty.index(i), count=2)", "mbarrier.init(empty.index(i), count=1)"),
    "a stage given away while conv1's product may read it": (
        "mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=j > 0)", "mbarrier.arrive(empty.index(stage))"
    ),
    "the last stage of a box kept": (
        "        if NEXT_WIDTH > 0:\n            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))\n",
        "        if NEXT_WIDTH > 0:\n",
    ),
    "the other consumer's pixels": ("xs.index(2 * stage + WHICH)", "xs.index(2 * stage + 1 - WHICH)"),
    "the other consumer's h": ("hs.index(HALVES * WHICH + half)", "hs.index(half)"),
    "h's right half twice": ("hs.index(2 * WHICH).store(left)", "hs.index(2 * WHICH).store(right)"),
    "h without a fence": ("        fence_async_shared()\n        zeros", "        zeros"),
    "fewer bytes than come": ("2 * x_desc.block_type.nbytes + w2", "x_desc.block_type.nbytes + w2"),
    "one half of conv3's weight": ("[j * _BLOCK, half * _BLOCK]", "[j * _BLOCK, 0]"),
    "both boxes at the same place": ("box_of(tile + 1,", "box_of(tile,"),
    "the first block's vectors": ("shift3_ptr, channel, C_OUT)", "shift3_ptr, 0, C_OUT)"),
    "z of the sum, not of p": ("gl.convert_layout(p, gl.Dot", "gl.convert_layout(y, gl.Dot"),
    "a tap too far": ("r = k // (KERNEL_W * N_CHUNKS)", "r = k // (KERNEL_W * N_CHUNKS) + 1"),
    "half of the input channels": ("c = k % N_CHUNKS * _BLOCK", "c = 0"),
    "a residual that has not come": (
        "mbarrier.wait(loaded.index(WHICH * BUFFERS + use % BUFFERS), use // BUFFERS & 1)\n                out", "out"
    ),
    "a projection's input that has not come": ("mbarrier.wait(loaded.index(WHICH), i & 1)", "pass"),
    "a projection's input kept": ("mbarrier.arrive(stored.index(WHICH))", "pass"),
    "the projection's bytes forgotten": ("w3_desc.block_type.nbytes + WS_BYTES", "w3_desc.block_type.nbytes"),
    "the projection's first vectors": ("shortcut_shift_ptr, channel, C_OUT)", "shortcut_shift_ptr, 0, C_OUT)"),
}  # fmt: skip


def is_wrong(device, monkeypatch, in_ring: bool = False) -> bool:
    """Whether one of several launches ends in a race, in a deadlock, or with other numbers."""
    names = ("wide", "ring") if in_ring else ("several boxes", "v2", "wide, several")
    for seed, case in enumerate(case for case in ABLE if case.name.startswith(names) and case.name[:3] != "v2,"):
        for offset in range(3):
            interpret(monkeypatch, device, 10 * seed + offset)
            try:
                if wrong(chain(case, device)):
                    return True
            except AssertionError:  # a race, a deadlock, a stage that is not there
                return True
    return False


def plant(name: str, old: str, new: str, tmp_path, monkeypatch) -> None:
    """Puts a changed module's functions in the place of those that the kernels use."""
    module = planted(f"sm90.{name}", tmp_path, old, new)
    for what, function in vars(module).items():
        if hasattr(function, "fn") and function.fn.__module__ == module.__name__:
            for user in (kernel, ring_kernel):
                if user.__name__.endswith(f".{name}") or (hasattr(user, what) and not what.startswith("_")):
                    monkeypatch.setattr(user, what, function)


@pytest.mark.slow(unless=lambda name: name in [*BUGS][::6])
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name, tmp_path, device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("a bug in the schedule may hang a GPU")
    old, new = BUGS[name]
    shared = inspect.getsource(specialized_chain_device)
    plant("specialized_chain_device" if old in shared else "specialized_chain", old, new, tmp_path, monkeypatch)
    assert is_wrong(device, monkeypatch)


@pytest.mark.slow(unless=lambda name: name in [*RING_BUGS][::7])
@pytest.mark.parametrize("name", RING_BUGS)
def test_planted_bug_in_the_ring_is_caught(name, tmp_path, device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("a bug in the schedule may hang a GPU")
    plant("specialized_chain_ring", *RING_BUGS[name], tmp_path, monkeypatch)
    monkeypatch.setattr(kernel, "ring_chain_kernel", ring_kernel.ring_chain_kernel)
    assert is_wrong(device, monkeypatch, in_ring=True)


@pytest.mark.slow
@pytest.mark.parametrize("in_ring", (False, True))
def test_nothing_planted_nothing_caught(in_ring, device, monkeypatch):
    assert not is_wrong(device, monkeypatch, in_ring)


def test_layouts_and_addresses_do_not_matter(device, monkeypatch):
    interpret(monkeypatch, device)
    call = chain(ABLE[0], device)
    assert not wrong(call | dict(x=call["x"].contiguous(), residual=call["residual"].contiguous()))


def test_plans_fit_into_shared_memory():
    for case in ABLE:
        call = chain(case, torch.device("cpu"))
        x, conv2, geometry, conv3, _, shortcut, following = shapes(call)
        todo = plan_chain(tuple(x), tuple(conv2), geometry, conv3[0], shortcut, following and tuple(following))
        kind = kind_of(conv2, shortcut, following)
        if todo.in_ring:
            width = kind.width // 64
            pieces = (2 + width) * todo.constants["STAGES"] + 2 * width + 2 * todo.constants["BUFFERS"]
            assert 2 * 64 * 64 * (pieces + 2 * bool(kind.shortcut_in)) <= MOST_SHARED
            continue
        weights = 64 * conv2[1:].numel() + conv3[0] * (64 + kind.next_width + kind.shortcut_in)
        tiles = todo.constants["STAGES"] + 2 * todo.constants["BUFFERS"] + 2 + 2 * bool(kind.shortcut_in)
        assert 2 * (weights + 64 * 64 * tiles) <= 227 * 1024 - 512
