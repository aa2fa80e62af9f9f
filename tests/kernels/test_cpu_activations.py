"""Activations behind our CPU kernels: every one behind every kernel, with ragged channels, on special values; against fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helpers.activations import EACH, assert_activated, special
from helpers.own_kernels import bind, group_sizes, skip_unless_compiled
from resnet_kernels.kernels.activations import KINDS, RELU
from resnet_kernels.kernels.cpu import convolution
from resnet_kernels.kernels.cpu.library import ISA_VARIABLE, ISAS
from resnet_kernels.kernels.cpu.plans import Pool
from resnet_kernels.kernels.cpu.program import Layer, Memories, Program, Slice
from resnet_kernels.kernels.geometry import normalize

CHANNELS_LAST = torch.channels_last
# Fewer than a vector of any instruction set, a panel and some, several panels and one.
CHANNELS = (1, 3, 5, 17, 33, 67)


def elementwise(x, scale, shift, residual, activation):
    kernel = convolution.elementwise(tuple(x.shape), scale, shift, activation, 1)
    layers = [Layer(kernel, Slice(0), None, Slice(1))]
    if residual is not None:
        copy = convolution.elementwise(tuple(x.shape), None, None, None, 1)
        layers = [Layer(copy, Slice(0), None, Slice(2)), Layer(kernel, Slice(2), Slice(0), Slice(1))]
    program = Program(layers, tuple(x.shape), {1: tuple(x.shape)}, 1)
    return program(x, Memories().of(program.floats), None)[0]


@pytest.mark.parametrize("activation", EACH, ids=str)
def test_as_a_layer_of_its_own(activation):
    skip_unless_compiled()
    for channels in CHANNELS:
        x = special(2, channels, 9, 7).contiguous(memory_format=CHANNELS_LAST)
        scale, shift = torch.rand(channels) + 0.5, torch.randn(channels)
        for with_affine in (False, True):
            vectors = (scale, shift) if with_affine else (None, None)
            for residual in (None, x):
                z = elementwise(x, *vectors, residual, None)
                assert_activated(elementwise(x, *vectors, residual, activation), activation, z)


def cases():
    """(kernel, c_in, c_out, kernel size, groups, copies, pool) for each kernel and each kind of tail."""
    for c_out in CHANNELS:
        yield "winograd", 6, c_out, 3, 1, None, None
        yield "direct", 5, c_out, 1, 1, False, None
        yield "direct", 4, c_out, 3, 1, True, None
        yield "direct", 3, c_out, 3, 1, True, Pool(3, 2, (1, 1, 1, 1))
    for size in group_sizes():
        for groups in (3, 5):
            yield "grouped", size * groups, size * groups, 3, groups, True, None


@pytest.mark.parametrize("activation", EACH, ids=str)
def test_behind_every_convolution(activation):
    """What is special comes from the residual; a sum that is the same without an activation shows what was activated."""
    skip_unless_compiled()
    for name, c_in, c_out, size, groups, copies, pool in cases():
        x = torch.randn(2, c_in, 7, 6).contiguous(memory_format=CHANNELS_LAST)
        weight = torch.randn(c_out, c_in // groups, size, size) / (c_in // groups * size * size) ** 0.5
        scale, bias = torch.rand(c_out) + 0.5, torch.randn(c_out)
        geometry = normalize(1, size // 2, 1, groups)
        if pool is not None:
            run = bind(name, x, weight, geometry, scale, bias, copies=copies)
            pooled = bind(name, x, weight, geometry, scale, bias, pool=pool, copies=copies)
            expected = F.max_pool2d(run(x, None, activation), 3, 2, 1)
            assert torch.equal(pooled(x, None, activation), expected)
            continue
        run = bind(name, x, weight, geometry, scale, bias, copies=copies)
        residual = special(2, c_out, 7, 6).contiguous(memory_format=CHANNELS_LAST)
        for added in (None, residual):
            z, y = run(x, added, None), run(x, added, activation)
            assert_activated(y, activation, z)
            assert torch.equal(run(x, added, RELU).nan_to_num(), torch.relu(z).nan_to_num())
        again = run(x, residual.clone(memory_format=torch.preserve_format), activation, overwrite_residual=True)
        assert torch.equal(again.nan_to_num(), y.nan_to_num()) and torch.equal(again.isnan(), y.isnan())


def test_winograd_where_a_tile_is_not_finite():
    """Such a tile is computed once more, as a direct sum."""
    skip_unless_compiled()
    x = torch.randn(1, 8, 8, 8)
    x[0, 3, 2, 5], x[0, 1, 6, 1] = float("inf"), float("nan")
    x = x.contiguous(memory_format=CHANNELS_LAST)
    for c_out in (7, 40):
        run = bind("winograd", x, torch.randn(c_out, 8, 3, 3), normalize(1, 1, 1, 1))
        z = run(x, None, None)
        assert z.isnan().any() and z.isinf().any()
        for activation in EACH:
            assert_activated(run(x, None, activation), activation, z)


def test_the_library_counts_activations_as_python_does():
    text = (Path(convolution.__file__).parent / "convolution.h").read_text()
    (names,) = [line for line in text.splitlines() if line.startswith("enum { NO_ACTIVATION")]
    assert [name.strip(" {};") for name in names.removeprefix("enum").split(",")] == [
        "NO_ACTIVATION", *(kind.upper() for kind in KINDS), "SIGMOID", "HARDSIGMOID", "PRELU"
    ]  # fmt: skip
    assert convolution.GATES == {"mul": 0, "sigmoid_mul": 1 + len(KINDS), "hardsigmoid_mul": 2 + len(KINDS)}
    assert convolution._PRELU == 3 + len(KINDS)


@pytest.mark.slow(unless=lambda isa: isa == "avx2")  # which nearly every machine has
@pytest.mark.parametrize("isa", ISAS)
def test_on_every_instruction_set(isa):
    found = skip_unless_compiled()
    if ISA_VARIABLE in os.environ:
        pytest.skip("runs inside itself")
    if not found.calls.rk_panel(ISAS.index(isa)):
        pytest.skip(f"this processor lacks {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, ISA_VARIABLE: isa}, timeout=300)
    assert done.returncode == 0, done.stdout
