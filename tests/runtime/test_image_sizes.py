"""Many image sizes in one process on the CPU: packed once for each layout that oneDNN wants, whatever size came first."""

import copy
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import assert_within_budget, skip_unless_runnable
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import onednn
from resnet_kernels.runtime.cpu import packed_conv, program

# What oneDNN runs in the second call at each size, which is where a weight in the wrong layout is reordered again.
LOGGED = """
import sys, torch
from torch import nn
import resnet_kernels as rk
from resnet_kernels.ops import onednn

if "planted" in sys.argv:
    onednn.layout = lambda packed: b"one for all"
stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()
blocks = rk.models.resnet_v1.BasicBlock(64, 64), rk.models.d2l.Residual(64, 128, True, 2, tf_padding=True)
fused = rk.fuse(nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks).eval(), backend="cpu")
inputs = [torch.randn(shape) for shape in [
    (1, 3, 224, 224), (1, 3, 192, 192), (2, 3, 97, 161), (1, 3, 64, 64), (2, 3, 224, 320), (2, 3, 192, 192)]]
with torch.inference_mode():
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for x in inputs:
            fused(x)
        for x in reversed(inputs):
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                fused(x)
"""


def _executed(isa: str, *arguments: str) -> list[list[str]]:
    """(primitive, implementation) of all that oneDNN ran where it was asked to log."""
    environment = {**os.environ, "PYTHONPATH": str(Path(rk.__file__).parents[1]), "RESNET_KERNELS_CPU_ISA": "none"}
    environment.update({"ONEDNN_MAX_CPU_ISA": isa} if isa else {})
    run = subprocess.run(
        [sys.executable, "-c", LOGGED, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    lines = [
        line.split(",") for line in run.stdout.splitlines() if line.startswith("onednn_verbose") and ",exec," in line
    ]
    return [line[line.index("exec") + 2 :][:2] for line in lines]


@pytest.mark.slow(unless=lambda isa: not isa)
@pytest.mark.parametrize("isa", ("", "AVX2"), ids=("this CPU", "AVX2"))
def test_no_reorder_and_no_reference_kernel_at_any_size(isa):
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    executed = _executed(isa)
    assert sum(primitive == "convolution" for primitive, _ in executed) > 50, "or nothing was logged"
    assert {primitive for primitive, _ in executed} == {"convolution"}
    assert not [name for _, name in executed if name.startswith(("ref", "simple"))]


@pytest.mark.slow
def test_planted_bug_layouts_taken_for_the_same_are_seen_as_reorders():
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    assert any(primitive == "reorder" for primitive, _ in _executed("AVX2", "planted"))


SIZES = [(1, 64, 64), (2, 56, 56), (1, 48, 48), (1, 9, 7), (2, 33, 65), (1, 30, 30)]


def _net():
    """Widths at which oneDNN changes the layout with the size; TensorFlow's padding changes with it, too."""
    block = rk.models.resnet_v1.BasicBlock
    tf = rk.models.d2l.Residual(64, 64, use_1x1conv=True, strides=2, tf_padding=True)
    return randomise_batch_norms_(nn.Sequential(block(64, 64), tf, block(64, 64))).eval()


def _inputs():
    return [torch.randn(batch, 64, height, width) for batch, height, width in SIZES]


def _packs(fused):
    states = [module.__dict__["_rk_state"] for module in fused.modules() if "_rk_state" in module.__dict__]
    return [pack for state in states for pack in state.copies.packs.values()]


def _assert_eagers(fused, model, inputs):
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def _kept():
    gc.collect()
    return sum(type(thing) is torch.Tensor and thing.is_mkldnn for thing in gc.get_objects())


def test_sizes_in_turns_pack_nothing_anew(monkeypatch):
    """Small images, which are ATen's to run, and another padding included."""
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    model, inputs = _net(), _inputs()
    fused = rk.fuse(model, backend="cpu")
    _assert_eagers(fused, model, inputs)
    _assert_eagers(fused, model, inputs)  # programs are made in a size's second call

    def refuse(*arguments):
        raise AssertionError("something was packed or planned again")

    for module, name in (
        (onednn, "pack_weight"), (packed_conv.PackedConv, "__init__"), (packed_conv.PackedConv, "_folded"),
        (program.PackedProgram, "__init__"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    _assert_eagers(fused, model, inputs + inputs[::-1])


def test_sizes_of_one_layout_share_a_copy():
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    model, inputs = _net(), _inputs()
    fused = rk.fuse(model, backend="cpu")
    _assert_eagers(fused, model, inputs)
    for pack in _packs(fused):
        weights = {id(sized.weight) for sized in pack._sizes.values()}
        assert len(pack._sizes) == len(inputs) and len(weights) == len(pack._weights) <= packed_conv._MOST_LAYOUTS
        layouts = [onednn.layout(weight) for weight in pack._weights.values() if weight.is_mkldnn]
        assert len(set(layouts)) == len(layouts) < len(inputs)


def test_a_layout_is_told_by_its_bytes():
    """The same for each weight of one problem, although a descriptor has bytes in it that were never written."""
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    found = {}
    for size in (*range(8, 64, 3), *range(8, 64, 3)):
        weight, shape = torch.randn(64, 64, 3, 3), torch.Size((1, 64, size, size))
        packed = onednn.pack_weight(weight, Geometry(padding=(1, 1, 1, 1)), shape)
        assert torch.equal(packed.to_dense(), weight)
        # One weight, so one layout has one order of bytes.
        ones = onednn.pack_weight(torch.arange(weight.numel()).view_as(weight).float(), Geometry(
            padding=(1, 1, 1, 1)), shape)  # fmt: skip
        raw = _bytes(ones)
        assert found.setdefault(onednn.layout(packed), raw) == raw
    assert len(set(found.values())) == len(found)


def _bytes(packed):
    import ctypes

    return ctypes.string_at(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))


@pytest.mark.slow(unless=lambda most: most == "_MOST_LAYOUTS")
@pytest.mark.parametrize("most", ("_MOST_LAYOUTS", "_MOST_SIZES", "_MOST_PROGRAMS"))
def test_what_is_kept_is_bounded(most, monkeypatch):
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    monkeypatch.setattr(program if most == "_MOST_PROGRAMS" else packed_conv, most, 1)
    model, inputs = _net(), _inputs()
    fused = rk.fuse(model, backend="cpu")
    before = _kept()
    for _ in range(3):
        _assert_eagers(fused, model, inputs)
    packs = _packs(fused)
    if most == "_MOST_LAYOUTS":
        assert all(len(pack._weights) == 1 for pack in packs)
        assert _kept() - before <= len(packs), "a program holds on to what was dropped"
    elif most == "_MOST_SIZES":
        assert all(len(pack._sizes) == 1 for pack in packs)
    else:
        states = [module.__dict__["_rk_state"] for module in fused.modules() if "_rk_state" in module.__dict__]
        assert {len(state.copies.programs) for state in states} <= {0, 1}


def _scale_behind_pytorch(model):
    model[2].conv1.weight.data.mul_(3)


def _bn_statistics(model):
    model[0].bn2.running_mean.numpy()[5] += 2.0


def _eps(model):
    model[2].bn1.eps = 1.0


@pytest.mark.parametrize("edit", (_scale_behind_pytorch, _bn_statistics, _eps), ids=lambda f: f.__name__.strip("_"))
def test_an_edit_is_seen_at_every_size(edit):
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    model, inputs = _net(), _inputs()
    fused = rk.fuse_(model) and model
    with torch.no_grad():
        for x in inputs + inputs:
            fused(x)
        before = [fused(x) for x in inputs]
        edit(fused)
        after = [fused(x) for x in inputs[::-1]][::-1]
        plain = rk.fuse(fused, backend="eager")
        for x, old, new in zip(inputs, before, after):
            assert not torch.allclose(old, new), "the edit must matter"
            torch.testing.assert_close(new, plain(x), rtol=1e-4, atol=1e-4)


def test_sizes_packed_in_either_mode():
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    model, inputs = _net(), _inputs()
    fused = rk.fuse(model, backend="cpu")
    for mode, other in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        rk.refresh(fused)
        for i, x in enumerate(inputs + inputs):
            with (mode if i % 2 else other)():
                torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_another_number_of_threads_is_another_problem():
    threads = torch.get_num_threads()
    geometry, shape = Geometry(), torch.Size((1, 64, 56, 56))
    try:
        torch.set_num_threads(1)
        one = onednn.problem(torch.Size((64, 64, 1, 1)), torch.float32, geometry, shape)
        torch.set_num_threads(2)
        assert onednn.problem(torch.Size((64, 64, 1, 1)), torch.float32, geometry, shape) != one
    finally:
        torch.set_num_threads(threads)


def test_threads_with_a_size_each():
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    model, inputs = _net(), _inputs()
    fused = rk.fuse(model, backend="cpu")
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    failures = []

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                if not torch.allclose(fused(inputs[i]), expected[i], rtol=1e-4, atol=1e-4):
                    failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for _ in range(10):
        rk.refresh(fused)
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("seen", (False, True))
@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (1, 4, 3, 3), (2, 4, 0, 7), (2, 4, 3, 40)], ids=str)
def test_an_image_too_small_for_the_kernel_raises_eagers_error(shape, seen):
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    model = nn.Sequential(nn.Conv2d(4, 8, 5, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    fused, x = rk.fuse(model, backend="cpu"), torch.randn(shape)
    with torch.no_grad():
        if seen:
            fused(torch.randn(2, 4, 40, 40))
        with pytest.raises(RuntimeError) as expected:
            model(x)
        with pytest.raises(RuntimeError) as raised:
            fused(x)
        assert str(raised.value) == str(expected.value)
        assert fused(torch.randn(2, 4, 40, 40)).shape == (2, 8, 36, 36)


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("groups", (1, 2, 32))
def test_images_are_atens_where_eager_leaves_them_to_it(batch, groups):
    """PyTorch is asked for its own choice. On one thread: test_conv_bias_act.py."""
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for kernel in ((1, 1), (3, 3), (7, 7), (5, 3), (3, 5), (1, 7)):
            for size in (7, 17, 18, 40):
                x, weight = torch.empty(batch, 64, size, size), torch.empty(64, 64 // groups, *kernel)
                backend = torch._C._select_conv_backend(
                    x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], groups
                )  # fmt: skip
                assert onednn.is_for_aten(x.shape, x.dtype, weight.shape, (1, 1)) == ("Mkldnn" not in str(backend))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kernel, groups", [(7, 1), (3, 32), (3, 1)])
def test_small_images_are_as_accurate_as_eager(kernel, groups):
    model = nn.Sequential(nn.Conv2d(64, 64, kernel, padding=kernel // 2, groups=groups), nn.BatchNorm2d(64), nn.ReLU())
    model = randomise_batch_norms_(model).eval()
    fused = rk.fuse(model)
    with torch.no_grad():
        for size in (40, 12, 7):
            x = torch.randn(1, 64, size, size)
            assert_within_budget(fused(x), model(x), copy.deepcopy(model).double()(x.double()))


def test_no_call_copies_a_weight_for_pytorchs_gemm():
    """It reads x and weight in one layout: a contiguous weight beside a channels_last x took longer to copy than to use."""
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    model = randomise_batch_norms_(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())).eval()
    fused, x = rk.fuse(model), torch.randn(1, 64, 12, 12)

    def weights_copied(call) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as events:
            call()
        return sum(e.name == "aten::copy_" and [64, 64, 3, 3] in e.input_shapes for e in events.events())

    with torch.no_grad():
        fused(x)
        assert onednn.is_for_aten(x.shape, x.dtype, model[0].weight.shape, (1, 1))
        assert weights_copied(lambda: fused(x)) == 0
        assert weights_copied(lambda: model(x.to(memory_format=torch.channels_last))) == 1
