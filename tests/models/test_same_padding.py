"""same_padding.py: TensorFlow's SAME, against windows counted out one by one."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import resnet_kernels as rk
from helpers.oracle import skip_unless_runnable
from resnet_kernels.models import Conv2dSame, MaxPool2dSame
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.models.same_padding import same_padding

# Even kernels at stride 1 are those whose odd row ceil_mode would not add.
CASES = [
    (7, 2, 1),
    (3, 2, 1),
    (3, 1, 1),
    (1, 2, 1),
    (2, 1, 1),
    (4, 1, 1),
    (2, 3, 1),
    (3, 3, 1),
    (5, 4, 1),
    (3, 2, 2),
    (2, 1, 3),
]
SIZES = [(8, 8), (7, 7), (8, 7), (9, 10), (5, 12)]


def windows(size: int, kernel_size: int, stride: int, dilation: int) -> list[list[int]]:
    """For each output place the input places that it sees, None for those outside."""
    extent = dilation * (kernel_size - 1) + 1
    count = math.ceil(size / stride)
    missing = max(0, (count - 1) * stride + extent - size)
    starts = [i * stride - missing // 2 for i in range(count)]
    return [[p if 0 <= p < size else None for p in range(s, s + extent, dilation)] for s in starts]


def gather(x, kernel_size, stride, dilation, outside):
    """(N, C, H, W) -> (N, C, out_h, out_w, kernel_size, kernel_size), tap by tap."""
    rows = windows(x.shape[2], kernel_size, stride, dilation)
    columns = windows(x.shape[3], kernel_size, stride, dilation)
    taps = x.new_full((*x.shape[:2], len(rows), len(columns), kernel_size, kernel_size), outside)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            for a, h in enumerate(row):
                for b, w in enumerate(column):
                    if h is not None and w is not None:
                        taps[:, :, i, j, a, b] = x[:, :, h, w]
    return taps


def test_the_pads_of_the_texts():
    assert (same_padding(224, 7, 2), same_padding(225, 7, 2)) == ((2, 3), (3, 3))
    assert (same_padding(56, 3, 2), same_padding(57, 3, 2)) == ((0, 1), (1, 1))
    assert same_padding(56, 1, 2) == same_padding(57, 1, 2) == (0, 0)
    assert same_padding(56, 3, 1) == same_padding(57, 3, 1) == (1, 1)
    conv = Conv2dSame(1, 1, (7, 3), (2, 1))
    assert conv.same_padding(8, 9) == (2, 3, 1, 1)
    assert MaxPool2dSame(3, 2).same_padding(8, 9) == (0, 1, 1, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel_size, stride, dilation", CASES)
def test_convolution_is_exact_on_integers(kernel_size, stride, dilation, size):
    conv = Conv2dSame(2, 3, kernel_size, stride, dilation)
    with torch.no_grad():
        for p in conv.parameters():
            p.copy_(torch.randint(-3, 4, p.shape))
    x = torch.randint(-3, 4, (2, 2, *size)).float()
    taps = gather(x, kernel_size, stride, dilation, 0.0)
    expected = torch.einsum("nchwab,ocab->nohw", taps, conv.weight) + conv.bias[:, None, None]
    assert torch.equal(conv(x), expected)
    assert conv(x).shape[2:] == tuple(math.ceil(n / stride) for n in size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel_size, stride, dilation", [case for case in CASES if case[2] == 1])
def test_max_pool_pads_with_minus_infinity(kernel_size, stride, dilation, size):
    x = -torch.rand(2, 2, *size) - 1  # a pad of zeros would win everywhere at the edge
    expected = gather(x, kernel_size, stride, dilation, -math.inf).amax((4, 5))
    assert torch.equal(MaxPool2dSame(kernel_size, stride)(x), expected)


def test_max_pool_keeps_nan_and_minus_infinity():
    x = torch.full((1, 1, 4, 4), -math.inf)
    x[0, 0, 3, 3] = math.nan
    y = MaxPool2dSame(3, 2)(x)
    assert y[0, 0, 1, 1].isnan() and (y.isneginf().sum() == 3)


def test_they_stand_in_for_the_plain_modules():
    plain = nn.Conv2d(4, 6, 3, 2, groups=2, bias=False)
    same = Conv2dSame(4, 6, 3, 2, groups=2, bias=False)
    same.load_state_dict(plain.state_dict())
    x = torch.randn(1, 4, 8, 8)
    # An even size lacks a row at the bottom and a column at the right.
    torch.testing.assert_close(same(x), plain(F.pad(x, (0, 1, 0, 1))), rtol=0, atol=0)
    assert MaxPool2dSame(3).stride == 3  # as nn.MaxPool2d's


def test_gradients_reach_input_and_weight():
    conv, x = Conv2dSame(2, 2, 3, 2).double(), torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: MaxPool2dSame(3, 2)(conv(v)), (x,))


@pytest.mark.slow(unless=lambda backend: backend != "triton")
@pytest.mark.parametrize("backend", ("auto", "triton"))
def test_fused_for_each_size_anew(backend, device):
    """The padding depends on the input: what was packed for an even size is wrong for an odd one."""
    skip_unless_runnable("triton", device, torch.float32)
    net = nn.Sequential(Conv2dSame(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), MaxPool2dSame(3, 2)).to(device)
    net = randomise_batch_norms_(net).eval()
    fused = rk.fuse(net, backend=backend)
    assert str(rk.explain(fused).rows[0].steps) == "0+1+relu -> 3"
    for size in (32, 33, 32, 31, 33):
        assert rk.verify(net, fused, torch.randn(4, 3, size, size + 1, device=device))
