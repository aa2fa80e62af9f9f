"""Folded weights and biases of many layers in one launch: exact, channels_last, nothing beyond its own."""

import pytest
import torch

from helpers.folded_weights import is_exact
from helpers.oracle import DTYPES, skip_unless_runnable

CHANNELS_LAST = torch.channels_last


@pytest.fixture
def kernel(device):
    skip_unless_runnable("triton", device, torch.float32)
    from resnet_kernels.kernels import fold_weights

    return fold_weights


@pytest.mark.parametrize("layout", (CHANNELS_LAST, torch.contiguous_format), ids=("channels_last", "contiguous"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_on_integers(kernel, dtype, layout, device):
    assert is_exact(kernel, device, ((dtype, dtype), (torch.float32, dtype)), layouts=(layout,))


def test_one_rounding_nan_and_what_is_live(kernel, device):
    # The interpreter cuts fp32 to bf16 and doesn't round.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    weight = torch.randn(8, 16, 1, 1, device=device)
    weight[1, 2] = float("nan")
    layer = kernel.Layer(weight, 0, 0)
    table, scale, shift = (
        kernel.Table([layer], dtype),
        torch.rand(8, device=device) + 0.5,
        torch.randn(8, device=device),
    )
    for _ in range(2):
        folded, bias = table.launch(scale, shift)[0]
        expected = (weight * scale[:, None, None, None]).to(dtype)
        torch.testing.assert_close(folded, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(bias, shift.to(dtype))
        weight.data.mul_(2)  # leaves no trace; the table reads what is there
    assert table.is_of([weight]) and not table.is_of([weight.clone()])


def test_what_it_takes(kernel):
    weight = torch.ones(4, 6, 3, 3)
    assert kernel.takes(weight) and kernel.takes(weight.to(memory_format=CHANNELS_LAST)) and kernel.takes(weight.half())
    assert not kernel.takes(weight[:, ::2]) and not kernel.takes(weight.double()) and not kernel.takes(weight[:0])
    assert not kernel.takes(weight.permute(1, 0, 2, 3))
