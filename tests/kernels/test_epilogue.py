"""The pass after a convolution: exact, keeps NaN and inf, writes over x only when told to, one rounding."""

import itertools

import pytest
import torch

from helpers.epilogues import GIVEN, operands, truth
from helpers.oracle import DTYPES, skip_unless_runnable
from resnet_kernels.kernels.activations import RELU

CHANNELS_LAST = torch.channels_last
# Channels that no block divides, wider than a tile, fewer than a vector load; rows that fill no tile, and several tiles.
SHAPES = ((2, 64, 7, 5), (1, 300, 3, 3), (1, 3, 13, 11), (1, 17, 7, 7), (2, 1, 6, 6), (4, 144, 1, 1))


@pytest.fixture
def kernel(device):
    skip_unless_runnable("triton", device, torch.float32)
    from resnet_kernels.kernels import epilogue

    return epilogue


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_on_integers(kernel, shape, dtype, device):
    for given, (relu, overwrite) in itertools.product(GIVEN, ((True, False), (False, True))):
        arguments = operands(shape, given, dtype, device)
        expected, x = truth(*arguments, relu), arguments[0].clone()
        assert expected.abs().max() <= 256, "the test's own sums must be exact"
        y = kernel.launch(*arguments, RELU if relu else None, overwrite=overwrite)
        assert torch.equal(y.double(), expected)
        assert y.dtype == dtype and y.is_contiguous(memory_format=CHANNELS_LAST)
        assert (y.data_ptr() == arguments[0].data_ptr()) == overwrite
        assert overwrite or torch.equal(arguments[0], x)


def test_any_layout_and_vectors_of_x_dtype(kernel, device):
    for dtype in (torch.float16, torch.bfloat16):
        arguments = operands((2, 6, 5, 4), GIVEN[0], dtype, device, vectors=dtype)
        expected = truth(*arguments, True)
        arguments = [t.contiguous() if t.dim() == 4 else torch.stack([t, t], 1)[:, 0] for t in arguments]
        assert torch.equal(kernel.launch(*arguments).double(), expected)
        assert torch.equal(kernel.launch(*arguments, overwrite=True).double(), expected)


def test_nan_and_inf_are_kept(kernel, device):
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0], device=device)
    x, residual = special.view(1, 1, 4, 1).expand(1, 4, 4, 1), special.view(1, 4, 1, 1).expand(1, 4, 4, 1)
    one, minus = torch.ones(4, device=device), -torch.ones(4, device=device)
    for arguments in ((x, one, one, None, None, None), (x, minus, one, residual, one, minus)):
        for relu in (True, False):
            y, expected = kernel.launch(*arguments, RELU if relu else None), truth(*arguments, relu)
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_one_rounding(kernel, dtype, device):
    """x * scale overflows fp16, and x + residual needs more bits than either has: only the sum is rounded."""
    x = torch.full((1, 8, 3, 3), 3.0e4, device=device).to(dtype)
    residual = -x * (1 + 2**-6)
    scale, shift = torch.full((8,), 4.0, device=device), torch.full((8,), 2.0**-9, device=device)
    y = kernel.launch(x, scale, shift, residual, scale, shift, None)
    assert torch.equal(y, truth(x, scale, shift, residual, scale, shift, False).float().to(dtype))


def test_no_pixels_and_no_more_than_there_are(kernel, device):
    x = torch.empty(0, 8, 4, 4, device=device)
    assert kernel.launch(x, None, None).shape == x.shape
    # Pixels past the end are somebody else's memory.
    memory = torch.full((8 * 1024,), float("nan"), device=device)
    x = memory[: 5 * 7].view(1, 5, 1, 7).fill_(1).as_strided((1, 7, 1, 5), (35, 1, 35, 7))
    kernel.launch(x, torch.full((7,), 2.0, device=device), None, overwrite=True)
    assert torch.equal(memory[:35], torch.full((35,), 2.0, device=device)) and memory[35:].isnan().all()


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(kernel, device):
    if torch.cuda.get_device_properties(device).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GiB")
    x = torch.ones((2700, 64, 112, 112), dtype=torch.bfloat16, device=device).to(memory_format=CHANNELS_LAST)
    y = kernel.launch(x, torch.full((64,), 2.0, device=device), None, overwrite=True)
    assert (y[-1] == 2).all() and (y[0] == 2).all()
