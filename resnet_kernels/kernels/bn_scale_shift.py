"""BN in eval mode as one scale and one shift per channel, from the live tensors, in one small launch.

    scale = weight / sqrt(running_var + eps)
    shift = bias + (conv_bias - running_mean) * scale

In fp32 whatever the dtypes are. A few microseconds a layer: PyTorch needs four launches for the same, and a folded copy of
the convolution's weight would have to be watched for changes that leave no trace (fused optimizers, p.data).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZE = 512
NUM_WARPS = 4


@triton.jit
def _bn_scale_shift_kernel(
    weight_ptr,  # all (n_channels,); weight, bias and conv_bias may be None
    bias_ptr,
    mean_ptr,
    var_ptr,
    conv_bias_ptr,
    scale_ptr,
    shift_ptr,
    eps,
    n_channels,
    BLOCK_SIZE: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < n_channels
    variance = tl.load(var_ptr + offs, mask=mask, other=1.0).to(tl.float32)
    # Correctly rounded root and division: the approximate ones err by 2 ulp for a whole channel at once.
    scale = tl.div_rn(tl.full((BLOCK_SIZE,), 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    centre = tl.load(mean_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if conv_bias_ptr is not None:
        centre -= tl.load(conv_bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    shift = -centre * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(scale_ptr + offs, scale, mask=mask)
    tl.store(shift_ptr + offs, shift, mask=mask)


def launch(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, conv_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns (scale, shift), both (C,) fp32; all vectors contiguous, any floating dtype but fp64."""
    scale, shift = torch.empty((2, mean.numel()), dtype=torch.float32, device=mean.device).unbind()
    # Programs: blocks of BLOCK_SIZE channels.
    grid = (triton.cdiv(mean.numel(), BLOCK_SIZE),)
    with torch.cuda.device_of(mean):
        _bn_scale_shift_kernel[grid](
            weight, bias, mean, var, conv_bias, scale, shift, eps, mean.numel(),
            BLOCK_SIZE=BLOCK_SIZE, num_warps=NUM_WARPS,
        )  # fmt: skip
    return scale, shift
