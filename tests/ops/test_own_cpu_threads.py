"""Our CPU kernels on threads: even shares, the same results, PyTorch's setting, Python's threads and forked processes."""

from __future__ import annotations

import concurrent.futures
import ctypes
import heapq
import os
import subprocess
import sys

import pytest
import torch

import resnet_kernels as rk
from helpers.own_kernels import bind, skip_unless_compiled
from helpers.small_resnet import small_resnet
from helpers.tiny import ENVIRONMENT
from resnet_kernels.kernels.cpu import convolution, library, plans
from resnet_kernels.kernels.cpu.plans import KERNELS
from resnet_kernels.kernels.cpu.program import Program
from resnet_kernels.kernels.geometry import Geometry, normalize
from resnet_kernels.ops import cpu_candidates

CHANNELS_LAST = torch.channels_last
SAME_3X3 = normalize(1, 1, 1, 1)


@pytest.fixture(autouse=True)
def _wherever_they_can(threads_as_before, monkeypatch):
    """Without an instruction set that is asked for, our kernels leave some convolutions to oneDNN on some processors."""
    monkeypatch.setenv(library.ISA_VARIABLE, skip_unless_compiled().isa)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", ((1, 40, 14, 14), (3, 300, 7, 7), (2, 3, 33, 20)), ids=str)
def test_a_result_depended_on_the_number_of_threads(name, shape):
    weight, geometry = torch.randn(70, shape[1], 3, 3), SAME_3X3
    if name == "grouped":
        weight, geometry = torch.randn(4 * shape[1], 4, 3, 3), normalize(1, 1, 1, shape[1])
        shape = (shape[0], 4 * shape[1], *shape[2:])
    if name == "depthwise":
        weight, geometry = torch.randn(shape[1], 1, 3, 3), normalize(1, 1, 1, shape[1])
    x, results = torch.randn(shape).contiguous(memory_format=CHANNELS_LAST), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(bind(name, x, weight, geometry)(x, activation=None))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_set_num_threads_was_not_obeyed(monkeypatch):
    """A stand-in for GOMP_parallel that notes the threads; tasks are taken from one counter, so one caller is enough."""
    asked = []

    @ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(function, argument, threads, flags):
        asked.append(threads)
        function(argument)

    found = library.find()._replace(parallel=ctypes.cast(parallel, ctypes.c_void_p).value)
    monkeypatch.setattr(library, "find", lambda: found)
    x, weight = torch.randn(2, 16, 20, 20), torch.randn(2 * library.find().panel, 16, 3, 3)
    x = x.contiguous(memory_format=CHANNELS_LAST)
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        asked.clear()
        run = bind("winograd", x, weight, SAME_3X3)
        asked_to_pack, asked[:] = [*asked], []
        assert torch.equal(run(x), run(x))
        assert asked == ([threads] * 2 if threads > 1 else [])
        assert asked_to_pack == ([min(threads, 2)] if threads > 1 else [])  # a panel is a task


@pytest.fixture(scope="module")
def layers():
    """Convolutions: x's shape, weight's shape, geometry.

    All that differ in ResNet-18, ResNet-50 and ResNeXt-50 on 224x224, and four of MobileNets' depthwise ones.
    """
    found = {}

    def note(conv, inputs):
        shape = tuple(inputs[0].shape)
        found[shape, tuple(conv.weight.shape), Geometry.of_module(conv, shape[2:])] = None

    for make in (rk.models.resnet18, rk.models.resnet50, rk.models.resnext50_32x4d):
        with torch.device("meta"):
            net = make()
            for conv in net.modules():
                if isinstance(conv, torch.nn.Conv2d):
                    conv.register_forward_pre_hook(note)
            net(torch.empty(2, 3, 224, 224))
    for channels, size, kernel, stride in ((32, 112, 3, 1), (96, 112, 3, 2), (240, 28, 5, 1), (480, 14, 5, 1)):
        geometry = normalize(stride, kernel // 2, 1, channels)
        found[(2, channels, size, size), (channels, 1, kernel, kernel), geometry] = None
    return [*found]


@pytest.mark.parametrize("threads", (2, 4))
def test_a_stems_tasks_are_shared_evenly(threads):
    skip_unless_compiled()
    stem = plans.Shapes((1, 3, 224, 224), (64, 3, 7, 7), normalize(2, 3, 1, 1), True, plans.Pool(3, 2, (1, 1, 1, 1)))
    assert plans.plan_for("direct", stem, threads).tasks % threads == 0


def _busiest(name, shapes, threads):
    """The largest share of a thread over the mean, if threads take tasks one by one; in steps of the micro-kernel."""
    found, plan = library.find(), plans.plan_for(name, shapes, threads)
    n, c_out, out_h, out_w = shapes.out
    if shapes.copies or name == "depthwise":
        blocks = [min(plan.block, out_h - row) * out_w for _ in range(n) for row in range(0, out_h, plan.block)]
    else:
        units = n * -(-out_h // 2) * -(-out_w // 2) if name == "winograd" else n * out_h * out_w
        blocks = [min(plan.block, units - first) for first in range(0, units, plan.block)]
    panels = -(-c_out // found.panel)
    columns = [min(plan.panels, panels - first) for first in range(0, panels, plan.panels)]
    # A task also brings its weights from the L2 cache, and `direct` finds each pixel's taps.
    costs = plans._COSTS_OF.get(found.isa, plans._COSTS)
    pixels = 0 if name == "winograd" else costs.pointers
    groups = {rows: -(-rows // found.rows) for rows in blocks}
    each_row = {rows: most if costs.whole_steps else max(rows / found.rows, most / 2) for rows, most in groups.items()}
    depth = shapes.weight[1] * shapes.weight[2] * shapes.weight[3]

    def of_copies(rows):
        if name != "grouped":
            return 0
        return (plans._copied_pixels(shapes, rows // out_w) * costs.copies + rows * costs.ends) / depth

    steps = [
        (each_row[rows] + costs.weights + of_copies(rows)) * each + pixels * rows for rows in blocks for each in columns
    ]
    if name == "depthwise":
        taps, turns = shapes.weight[2] * shapes.weight[3], -(-out_w // 8)
        steps = [
            rows * each * (taps + costs.depthwise) / found.rows + rows // out_w * turns * costs.turns
            for rows in blocks
            for each in columns
        ]
    arguments = convolution._sized(name, shapes, threads)[1].arguments
    counted = found.calls.rk_tasks(found.number, convolution.KINDS.index(name), ctypes.byref(arguments))
    assert len(steps) == plan.tasks == counted
    loads = [0] * threads
    for step in steps:
        heapq.heapreplace(loads, loads[0] + step)
    return max(loads) * threads / sum(loads)


@pytest.mark.slow(unless=lambda batch: batch == 1)
@pytest.mark.parametrize("batch", (1, 8))
def test_threads_were_left_without_work(batch, layers):
    assert len(layers) > 25
    found = library.find()
    alone = plans._COSTS_OF.get(found.isa, plans._COSTS).alone
    served = dict.fromkeys(range(1, 65), 0)
    for threads in served:
        for shape, weight_shape, geometry in layers:
            shapes = cpu_candidates.own_shapes((batch, *shape[1:]), weight_shape, geometry)
            for name in KERNELS:
                reason = plans.why_not(name, shapes, torch.float32, threads)
                if reason is None and plans.plan_for(name, shapes, threads).cost > alone:
                    assert _busiest(name, shapes, threads) < 1.25 + 1e-9, (name, shapes, threads)
                served[threads] += name != "winograd" and reason is None
                expected = {
                    "winograd": ("3x3", "without groups"),
                    "direct": ("without groups",),
                    "grouped": ("with groups", "runs groups of 2"),
                    "depthwise": ("with groups", "groups of one channel"),
                }
                assert reason is None or any(text in reason for text in ("too few tasks", *expected[name])), reason
    assert served[1] == served[2] == len(layers), served


def test_a_fused_model_kept_the_number_of_threads(monkeypatch):
    seen, original, run = [], convolution._convolve, Program._run

    def spy(found, winograd, threads, *rest):
        seen.append(threads)
        original(found, winograd, threads, *rest)

    def spy_on_program(program, *rest):
        seen.extend([program.threads] * len(program.layers))
        run(program, *rest)

    monkeypatch.setattr(convolution, "_convolve", spy)
    monkeypatch.setattr(Program, "_run", spy_on_program)
    fused, x = rk.fuse(small_resnet()), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            seen.clear()
            fused(x)
            assert len(seen) > 5 and {*seen} == {threads}


def test_python_threads_shared_a_calls_memory():
    """One fused model, images of three sizes that are new to it."""
    model, threads = small_resnet(), 2
    images = [torch.randn(1 + i % 2, 3, 32 + 16 * (i % 3), 48) for i in range(12)]

    def run(fused, x):
        with torch.no_grad():
            return [fused(x) for _ in range(3)]

    torch.set_num_threads(threads)
    alone = rk.fuse(model)
    expected = [run(alone, x) for x in images]
    fused = rk.fuse(model)
    # The number of threads decides on kernels, and each of Python's threads has its own.
    with concurrent.futures.ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        results = [*pool.map(lambda x: run(fused, x), images)]
    assert all(torch.equal(y, y_alone) for ys, ys_alone in zip(results, expected) for y, y_alone in zip(ys, ys_alone))


FORK = """
import os, sys
import torch
import resnet_kernels as rk
from resnet_kernels.kernels.cpu.program import Program

torch.manual_seed(0)
model = rk.models.d2l_resnet18(3, 10, width=16).eval()
x, seen, original = torch.randn(2, 3, 64, 64), [], Program._run
Program._run = lambda program, *arguments: seen.extend(program.layers) or original(program, *arguments)
with torch.no_grad():
    fused = rk.fuse(model)
    torch.set_num_threads(2)
    fused(x)  # starts the pool that a child does not have
    torch.set_num_threads(1)
    expected = fused(x)
    torch.set_num_threads(2)
    fused(x)
    if not (child := os.fork()):
        status = 1
        try:
            torch.set_num_threads(1)
            seen.clear()
            same = torch.equal(fused(x), expected) and torch.equal(rk.fuse(model)(x), expected)
            status = 0 if same and len(seen) > 10 else 2
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    fused(x)
sys.exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_hung_or_was_wrong():
    environment = {**ENVIRONMENT, library.ISA_VARIABLE: library.find().isa}
    done = subprocess.run(
        [sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
