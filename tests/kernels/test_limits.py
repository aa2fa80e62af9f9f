"""Sizes beyond 32 bits: they are computed right or refused before a launch, and never read or write memory of others."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
from resnet_kernels.kernels import add_relu, batch_norm_act, batch_norm_tiles, epilogue, limits
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.geometry import Geometry

# A process of its own: an offset that wraps around kills it. Only the middle tap sees the image.
SCRIPT = """
import os, sys
import torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import resnet_kernels as rk

channels, far = map(int, sys.argv[1:])
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randint(-3, 4, (1, channels, 16, 16), device=device).float()
weight = torch.randint(-3, 4, (8, channels, 3, 3), device=device).float()
for stride in (1, 2):
    y = rk.ops.conv_bias_act(x, weight, padding=far, dilation=far, stride=stride, backend="triton")
    assert torch.equal(y, torch.relu(torch.conv2d(x, weight[:, :, 1:2, 1:2], stride=stride))), stride
"""


def run(channels, far):
    script = [sys.executable, "-c", SCRIPT, str(channels), str(far)]
    return subprocess.run(script, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "channels, far, computed",
    [
        (3, 2_100_000, True),
        (64, 2_100_000, False),
        *(
            pytest.param(channels, far, False, marks=pytest.mark.slow)
            for channels in (3, 64)
            for far in (2**29 + 5, 2**30 - 9)
        ),
    ],
)
def test_a_far_tap_killed_the_process(channels, far, computed):
    """A tap within int32 is computed; 64-bit offsets would spill registers (Triton 3.6, sm_80), so others are refused."""
    done = run(channels, far)
    assert done.returncode == (0 if computed else 1), done.stderr[-2000:]
    assert computed or 'backend="triton" takes at most' in done.stderr


@pytest.mark.parametrize("far", (2**30, *(pytest.param(far, marks=pytest.mark.slow) for far in (2**31 + 3, 2**40))))
def test_a_tap_beyond_int32_is_refused(far):
    done = run(64, far)
    assert (
        done.returncode == 1 and f'backend="triton" takes at most {limits.MOST} rows of the padded image' in done.stderr
    )


SHAPES = {
    "padded": ((1, 8, 4, 4), (8, 8, 3, 3), Geometry(padding=(2**30, 2**30, 0, 0), dilation=(2**30, 1)), "rows of"),
    "wide": ((1, 8, 4, 4), (8, 8, 3, 3), Geometry(padding=(0, 0, 2**31, 0), dilation=(1, 2**30)), "columns of"),
    "pixels": ((1, 1, 2**16, 2**15), (1, 1, 1, 1), Geometry(), "output pixels of an image"),
    "filter": ((1, 2**29, 2, 2), (1, 2**29, 2, 2), Geometry(), "elements of a filter"),
    "groups": ((1, 2**16, 2, 2), (2**16, 1, 1, 1), Geometry(groups=2**16), "groups"),
    "channels": ((1, 1, 1, 1), (2**31, 1, 1, 1), Geometry(), "channels"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_shapes_that_the_portable_kernel_cannot_count(what):
    x_shape, weight_shape, geometry, said = SHAPES[what]
    assert f" {said}" in limits.why_not_convolution(x_shape, weight_shape, geometry)


def test_a_large_batch_is_no_limit():
    assert limits.why_not_convolution((2**24, 64, 56, 56), (64, 64, 3, 3), Geometry(padding=(1,) * 4)) is None


PASSES = {
    "add": (lambda: add_relu._launcher(2**41 - 2048), lambda: add_relu._launcher(2**41)),
    "epilogue, rows": (lambda: epilogue._launcher(2**30, 64, 4, RELU), lambda: epilogue._launcher(2**31, 64, 4, RELU)),
    "epilogue, channels": (
        lambda: epilogue._launcher(1, 2**26, 4, RELU),
        lambda: epilogue._launcher(1, 2**28, 4, RELU),
    ),
    "norm, rows": (
        lambda: batch_norm_act._forward(2**30, 64, 4, 1e-5, RELU, False),
        lambda: batch_norm_act._forward(2**31, 64, 4, 1e-5, RELU, False),
    ),
    "norm, channels": (
        lambda: batch_norm_tiles.choose_split(9, 2**16 * 63, 4),
        lambda: batch_norm_tiles.choose_split(9, 2**16 * 64, 4),
    ),
    "statistics": (
        lambda: batch_norm_act._statistics_of(2**30, 64, 4, 0.1, 1e-5),
        lambda: batch_norm_act._statistics_of(2**31 - 8, 64, 4, 0.1, 1e-5),
    ),
}


@pytest.mark.parametrize("what", PASSES)
def test_passes_refuse_what_they_cannot_count(what):
    within, beyond = PASSES[what]
    within()
    with pytest.raises(ValueError, match='backend="triton" takes at most'):
        beyond()


def test_far_elements_of_an_image_are_copied():
    near, apart = (torch.empty_strided((2, 3, 4, 4), (1, stride, 8, 2), device="meta") for stride in (32, 2**30 + 8))
    assert limits.with_near_elements(near, 1) is near
    assert limits.with_near_elements(apart, 1).is_contiguous()
