"""The interpreter's shortcuts leave a kernel's results as they are."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled")


@triton.jit
def _twice_and_more(x, n: tl.constexpr):
    return 2 * x + n


@triton.jit
def _kernel(x_ptr, y_ptr, sum_ptr, n: tl.constexpr):
    offsets = tl.arange(0, 8)
    y = _twice_and_more(tl.load(x_ptr + offsets), n)
    tl.store(y_ptr + offsets, y)
    # A function of Triton's own, of another module: patched while the launch is under way.
    tl.store(sum_ptr + tl.program_id(0), tl.sum(y.to(tl.float32), 0).to(tl.bfloat16))


@triton.jit
def _fails(x_ptr):
    tl.static_assert(tl.load(x_ptr) == 0)


def test_sums_wrap_around_and_functions_are_called():
    x = torch.arange(8, dtype=torch.int32) + 2**30 - 4
    y, total = torch.empty_like(x), torch.zeros(2, dtype=torch.bfloat16)
    _kernel[(2,)](x, y, total, 5)
    expected = 2 * x + 5
    assert expected.min() < 0 < expected.max()
    assert torch.equal(y, expected) and total.tolist() == [expected.float().sum().bfloat16()] * 2


def test_the_language_is_its_own_again_behind_a_launch():
    load = tl.load
    x = torch.ones(8, dtype=torch.int32)
    with pytest.raises(Exception, match="AssertionError"):
        _fails[(1,)](x)
    assert tl.load is load
    _kernel[(1,)](x, torch.empty_like(x), torch.zeros(1, dtype=torch.bfloat16), 1)
    assert tl.load is load
