"""Launches of the kernel that folds weights, on integers, held to the definition."""

from __future__ import annotations

import itertools

import torch

CHANNELS_LAST = torch.channels_last


# Ragged in output channels and in taps x channels, several tiles of both, one channel, one tap.
SHAPES = ((16, 32, 3, 3), (9, 5, 3, 3), (24, 48, 1, 1), (7, 300, 1, 1), (3, 1, 5, 4), (1, 3, 7, 7), (8, 2, 1, 3))


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
    """Whether all copies are the definition's integers."""
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
