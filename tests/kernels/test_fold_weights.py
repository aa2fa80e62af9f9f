"""Folded weights and biases of many layers in one launch: exact, channels_last, nothing beyond its own."""

import itertools

import pytest
import torch
from helpers.oracle import DTYPES, skip_unless_runnable

CHANNELS_LAST = torch.channels_last
# Ragged in output channels and in taps x channels, several tiles of both, one channel, one tap.
SHAPES = ((16, 32, 3, 3), (9, 5, 3, 3), (24, 48, 1, 1), (7, 300, 1, 1), (3, 1, 5, 4), (1, 3, 7, 7), (8, 2, 1, 3))


@pytest.fixture
def kernel(device):
    skip_unless_runnable("triton", device, torch.float32)
    from resnet_kernels.kernels import fold_weights

    return fold_weights


def integers(shape, dtype, device, most=4):
    return torch.randint(-most, most + 1, shape).to(device, dtype)


def layers(kernel, shapes, dtype, layout, device):
    """Layers with scale and bias, without, and with a second shift, in turns; and all scales and shifts."""
    found, start = [], 0
    for i, shape in enumerate(shapes):
        weight = integers(shape, dtype, device).contiguous(memory_format=layout)
        places = ((start, start, None), (None, None, None), (start, start, start + shape[0]))[i % 3]
        found.append(kernel.Layer(weight, *places))
        start += 2 * shape[0]
    return found, integers((start,), torch.float32, device), integers((start,), torch.float32, device)


def is_exact(kernel, device, dtypes=((torch.float32, torch.float32),), shapes=SHAPES, layouts=(None,)) -> bool:
    """Whether all copies are the definition's integers; test_planted_bugs.py asks, too."""
    for (source, dtype), layout in itertools.product(dtypes, layouts):
        for i, some in enumerate((shapes, shapes[::-1], ((16, 16, 3, 3), (32, 32, 1, 1)))):
            some_layout = layout or (CHANNELS_LAST, torch.contiguous_format)[i % 2]
            given, scale, shift = layers(kernel, some, source, some_layout, device)
            for layer, (weight, bias) in zip(given, kernel.Table(given, dtype).launch(scale, shift)):
                width = layer.weight.shape[0]
                expected = layer.weight.double()
                if layer.scale is not None:
                    expected = expected * scale[layer.scale :][:width].double()[:, None, None, None]
                right = torch.equal(weight.double(), expected) and weight.dtype == dtype
                if not (
                    right
                    and weight.is_contiguous(memory_format=CHANNELS_LAST)
                    and (bias is None) == (layer.shift is None)
                ):
                    return False
                if bias is None:
                    continue
                expected = shift[layer.shift :][:width]
                expected = expected if layer.more is None else expected + shift[layer.more :][:width]
                if not (torch.equal(bias.float(), expected) and bias.dtype == dtype):
                    return False
    return True


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
