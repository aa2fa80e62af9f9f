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
