"""Operands of a stem whose sums are exact, and its result in fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FP16 = torch.float16
# (N, H, W, C_out): even and odd sizes, several strips (of 31 and of 63 columns).
SIZES = ((1, 16, 20, 64), (2, 11, 13, 16), (1, 6, 259, 32), (1, 1, 1, 16), (3, 4, 7, 48), (1, 2, 125, 16))


def integers(n, h, w, c_out, device, dtype=FP16, most=3):
    """Operands whose sums are exact: (x, weight, scale, shift), the scale of both signs."""
    x = torch.randint(-most, most + 1, (n, 3, h, w), device=device).float()
    weight = torch.randint(-2, 3, (c_out, 3, 7, 7), device=device).to(dtype)
    scale, shift = torch.randint(-2, 3, (c_out,), device=device), torch.randint(-8, 9, (c_out,), device=device)
    return x, weight, scale.float(), shift.float()


def truth(x, weight, scale, shift):
    """The definition by PyTorch, in fp64."""
    z = F.conv2d(x.double().cpu(), weight.double().cpu(), None, 2, 3)
    z = z if scale is None else z * scale.double().cpu()[:, None, None]
    z = z if shift is None else z + shift.double().cpu()[:, None, None]
    return F.max_pool2d(torch.relu(z), 3, 2, 1)


def reals(n, h, w, device):
    """Operands as a network has them, (x, weight, scale, shift), and eager's result."""
    x, weight = torch.randn(n, 3, h, w, device=device).half(), torch.randn(64, 3, 7, 7, device=device).half() / 12
    scale, shift = torch.randn(64, device=device), torch.randn(64, device=device)
    z = F.conv2d(x, weight, None, 2, 3)
    # Variance and eps add up to 1: some versions of PyTorch refuse an eps of 0.
    z = F.batch_norm(z, torch.zeros_like(scale), torch.full_like(scale, 0.5), scale, shift, eps=0.5)
    return (x, weight, scale, shift), F.max_pool2d(torch.relu(z), 3, 2, 1)


def with_value(value, h, w, device):
    """Operands with NaN or inf at one pixel, in which no sum of two infinities is NaN; and the result in fp64."""
    x, weight, scale, shift = integers(1, 20, 20, 16, device)
    weight = weight.abs() + 1
    scale[scale == 0] = 1
    x[0, 1, h, w] = value
    operands = (x, weight, scale, shift)
    expected = truth(*operands)
    assert 0 < expected.isfinite().sum() < expected.numel()
    return operands, expected
