"""Programs of our CPU kernels: their plans, results on any number of threads, threads that come late, and calls at once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
from collections.abc import Callable

import pytest
import torch

from helpers.cpu_programs import call, example, is_right, problems
from helpers.own_kernels import skip_unless_compiled
from resnet_kernels.kernels.cpu import convolution
from resnet_kernels.kernels.cpu import program as planner
from resnet_kernels.kernels.cpu.plans import Pool
from resnet_kernels.kernels.cpu.program import Layer, Memories, Program, Slice

THREADS = (1, 2, 3, 8)
CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _compiled():
    skip_unless_compiled()


def _check(seeds: range) -> None:
    for seed in seeds:
        of_seed = example(seed)
        for threads in THREADS:
            program = of_seed.program(threads)
            assert not problems(program), f"seed {seed}"
            assert is_right(call(program, of_seed.x), of_seed), f"seed {seed} on {threads} threads"


def test_random_programs():
    _check(range(80))


@pytest.mark.slow
def test_more_random_programs():
    _check(range(80, 1500))


def test_layers_one_by_one_for_a_profiler():
    for seed in range(10):
        of_seed, seen = example(seed), []
        around = lambda i: contextlib.nullcontext(seen.append(i))  # noqa: B023, E731
        assert is_right(call(of_seed.program(3), of_seed.x, around), of_seed)
        assert seen == [*range(len(of_seed.layers))]


def test_two_calls_at_once_mixed_their_values():
    """The same program, each with memory of its own; a second input tells whose results they are."""
    of_seed = next(e for e in map(example, range(100)) if len(e.layers) > 8 and e.x.numel() > 2000)
    program = of_seed.program(3)
    other = -of_seed.x
    expected = call(of_seed.program(1), other)
    assert not all(torch.equal(a, b.float()) for a, b in zip(expected, of_seed.truth))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        calls = [[pool.submit(call, program, x) for x in (of_seed.x, other)] for _ in range(100)]
    for first, second in calls:
        assert is_right(first.result(), of_seed)
        assert all(map(torch.equal, second.result(), expected))


def test_memory_of_a_thread_is_kept():
    memories = Memories()
    kept = memories.of(1000)
    assert memories.of(500) is kept and memories.of(2000).numel() >= 2000
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(memories.of, 500).result() is not memories.of(500)


def _chain(shape: tuple[int, ...], count: int, threads: int, adds: bool = False) -> Program:
    """y = -x, `count` times; `adds` adds the value before the last, which dies of it."""
    scale = torch.full(shape[1:2], -1.0)
    kernel = convolution.elementwise(shape, scale, None, None, threads)
    layers = [Layer(kernel, Slice(i), Slice(i - 1) if adds and i > 1 else None, Slice(i + 1)) for i in range(count)]
    return Program(layers, shape, {count: shape}, threads)


@pytest.mark.parametrize("adds, values", ((False, 2), (True, 2)), ids=("chain", "residuals"))
def test_values_of_a_deep_chain_shared_no_memory(adds, values):
    shape = (2, 16, 16, 16)
    program = _chain(shape, 20, 2, adds)
    assert not problems(program)
    assert program.floats - program._workspace_at == values * torch.Size(shape).numel()


def _slow() -> tuple[Program, torch.Tensor]:
    """A single task that takes milliseconds, quick ones for the other thread, and a layer that reads the slow one's result."""
    shape = (1, 64, 400, 400)
    mean, pool = (
        convolution.pooling("average_pool", shape, Pool(400, 1, (0, 0, 0, 0)), 2),
        convolution.pooling("max_pool", shape, Pool(1, 100, (0, 0, 0, 0)), 2),
    )
    copy = convolution.elementwise(mean.out_shape, None, None, None, 2)
    assert mean.tasks == 1 and pool.tasks > 1
    kernels = ((mean, 0, 1), (pool, 0, 2), (copy, 1, 3))
    layers = [Layer(kernel, Slice(x), None, Slice(y)) for kernel, x, y in kernels]
    x = torch.full(shape, 3.0).contiguous(memory_format=CHANNELS_LAST)
    return Program(layers, shape, {2: pool.out_shape, 3: copy.out_shape}, 2), x


def _is_slow_right(program: Program, x: torch.Tensor) -> bool:
    return all(bool((result == 3).all()) for result in call(program, x))


def test_nobody_waited_for_a_slow_task():
    program, x = _slow()
    assert program._layers[2].needs == 1
    assert all(_is_slow_right(program, x) for _ in range(5))


def test_a_planted_need_is_caught():
    """A layer that needs nothing reads NaN, unless the second thread comes too late for that."""
    program, x = _slow()
    if program._found.parallel is None:
        pytest.skip("needs PyTorch's OpenMP runtime: on one thread nobody waits")
    program._layers[2].needs = 0
    assert problems(program) == ["layer 2 does not wait for layer 0"]
    # With other processes on all cores the second thread comes too late for hundreds of calls.
    assert not all(_is_slow_right(program, x) for _ in range(2000))


BUGS = {
    "a place that is taken": ("_free", lambda size, taken: 0),
    "over the last value": ("_free", lambda size, taken: _FREE(size, taken[:-1])),
    "over a residual that lives on": (
        "_over_residual",
        lambda values, layer, i: values[layer.residual.value].at if layer.residual is not None else -1,
    ),
}
_FREE = planner._free


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_plan_is_caught(bug, monkeypatch):
    """By the look at plans, and by wrong results on one thread."""
    monkeypatch.setattr(planner, *BUGS[bug])
    examples = [example(seed) for seed in range(15)]
    programs = [of_seed.program(1) for of_seed in examples]
    assert any(problems(program) for program in programs)
    # Over an input or a result, whose place is 0 as well, some plans leave their memory: those don't run.
    inside = [
        (program, of_seed) for program, of_seed in zip(programs, examples) if "leaves" not in str(problems(program))
    ]
    assert not all(is_right(call(program, of_seed.x), of_seed) for program, of_seed in inside)


def test_a_planted_lack_of_needs_is_caught():
    """One less of a need; only plans with slices wait for more layers than they have to."""
    caught = 0
    for program in (example(seed).program(1) for seed in range(80)):
        is_sliced = len({layer.out.value for layer in program.layers}) < len(program.layers)
        for i, structure in enumerate(program._layers):
            if structure.needs and not is_sliced:
                structure.needs -= 1
                assert f"layer {i} does not wait for layer {structure.needs}" in problems(program)
                structure.needs += 1
                caught += 1
    assert caught > 50


def _with_threads(program: Program, run: Callable[[Callable[[], None], int], None]) -> object:
    """Lets `run` be GOMP_parallel for a program: it is given what each thread calls, and their number.

    Returns what has to live as long as the program is called.
    """
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(function, argument, threads, flags):
        run(lambda: kind(function)(argument), threads)

    program._found = program._found._replace(parallel=ctypes.cast(parallel, ctypes.c_void_p).value)
    return parallel


@pytest.mark.parametrize("times", (1, 2, 3))
def test_a_late_thread_was_waited_for(times):
    """Once: the others never come. More often: they come one after the other, when all is done."""
    asked = []

    def run(take_part, threads):
        asked.append(threads)
        for _ in range(times):
            take_part()

    for seed in range(30):
        of_seed = example(seed)
        program = of_seed.program(3)
        alive = _with_threads(program, run)
        assert is_right(call(program, of_seed.x), of_seed), f"seed {seed}"
        del alive
    assert {*asked} <= {2, 3} and 3 in asked


def test_a_thread_came_in_the_middle():
    """Both take part from threads of Python's, of which the second starts at any time."""

    def run(take_part, threads):
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(take_part) for _ in range(threads)]:
                done.result()

    for seed in range(20):
        of_seed = example(seed)
        program = of_seed.program(3)
        alive = _with_threads(program, run)
        assert is_right(call(program, of_seed.x), of_seed), f"seed {seed}"
        del alive


def test_a_second_call_took_threads_that_are_in_use():
    """While a call has two of three threads, another one runs on the third alone; then all are free again."""
    shape, asked = (2, 16, 16, 16), []
    inner, outer = _chain(shape, 3, 3), _chain(shape, 3, 2)
    x = torch.ones(shape).contiguous(memory_format=CHANNELS_LAST)

    def run_inner(take_part, threads):
        asked.append(("inner", threads))
        take_part()

    def run_outer(take_part, threads):
        asked.append(("outer", threads))
        assert torch.equal(call(inner, x)[0], -x)
        take_part()

    alive = _with_threads(inner, run_inner), _with_threads(outer, run_outer)
    for _ in range(2):
        assert torch.equal(call(outer, x)[0], -x)
        assert torch.equal(call(inner, x)[0], -x)
    assert asked == [("outer", 2), ("inner", 3)] * 2
    assert alive
