"""Scale and shift of BNs in eval mode, from the live tensors, all layers in one launch.

    scale = weight / sqrt(running_var + eps)
    shift = bias + (conv_bias - running_mean) * scale

The kernel computes in fp32, whatever the dtypes are. A folded copy of the convolution's weight would have to be watched for
changes that leave no trace (fused optimizers, p.data). Scale and shift are computed anew in each call instead. The kernel
takes a table of addresses, which is copied to the device only when it changes. One launch serves all layers, because a launch
costs about as much as a convolution at batch 1, and a ResNet-50 has 53.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Launcher

BLOCK_SIZE = 512
NUM_WARPS = 4
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# A layer's (weight, bias, running_mean, running_var, conv_bias), each (C,) or None. With a BN it has running statistics.
# Without one it has only the convolution's bias, and with an eps of 0 its scale is 1.
Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def _load(pointers_ptr, layer, offs, n_channels, which: tl.constexpr, other: tl.constexpr, DTYPE: tl.constexpr):
    """Elements of a layer's vector by its number, in fp32; `other` if there is none."""
    address = tl.load(pointers_ptr + 5 * layer + which)
    # A vector that is None has the address 0 and no elements.
    mask = offs < tl.where(address == 0, 0, n_channels)
    return tl.load(address.to(tl.pointer_type(DTYPE)) + offs, mask=mask, other=other).to(tl.float32)


@triton.jit
def _bn_scale_shift_kernel(
    pointers_ptr,  # (n_layers, 5) int64: addresses of weight, bias, running_mean, running_var, conv_bias
    starts_ptr,  # (n_layers + 1,) int64: a layer's first channel in scale and shift
    eps_ptr,  # (n_layers,) fp32
    scale_ptr,  # (all channels,) fp32
    shift_ptr,
    DTYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    layer = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    start = tl.load(starts_ptr + layer)
    n_channels = tl.load(starts_ptr + layer + 1) - start
    weight = _load(pointers_ptr, layer, offs, n_channels, which=0, other=1.0, DTYPE=DTYPE)
    bias = _load(pointers_ptr, layer, offs, n_channels, which=1, other=0.0, DTYPE=DTYPE)
    mean = _load(pointers_ptr, layer, offs, n_channels, which=2, other=0.0, DTYPE=DTYPE)
    variance = _load(pointers_ptr, layer, offs, n_channels, which=3, other=1.0, DTYPE=DTYPE)
    conv_bias = _load(pointers_ptr, layer, offs, n_channels, which=4, other=0.0, DTYPE=DTYPE)
    # Root and division round correctly: the approximate ones err by 2 ulp, for a whole channel at once.
    rstd = tl.div_rn(tl.full((BLOCK_SIZE,), 1.0, tl.float32), tl.sqrt_rn(variance + tl.load(eps_ptr + layer)))
    scale = rstd * weight
    mask = offs < n_channels
    tl.store(scale_ptr + start + offs, scale, mask=mask)
    tl.store(shift_ptr + start + offs, bias - (mean - conv_bias) * scale, mask=mask)


class Layers:
    """Table of the addresses of BNs' vectors on the device, and the kernel's launcher. It keeps no vector alive.

    Args:
        vectors: each layer's, as `takes` accepts them: contiguous, on one device, of one dtype (fp32, fp16, bf16).
        eps: each layer's.
    """

    def __init__(self, vectors: Sequence[Vectors], eps: tuple[float, ...]):
        first = _one_of(vectors[0])
        self.dtype, self.device = first.dtype, first.device
        self.sizes = [_one_of(layer).numel() for layer in vectors]
        self.addresses = _addresses([tensor for layer in vectors for tensor in layer])
        self.eps = eps
        self.starts = [sum(self.sizes[:i]) for i in range(len(vectors) + 1)]
        self._pointers, self._starts = (
            torch.tensor(t, dtype=torch.int64, device=self.device) for t in (self.addresses, self.starts)
        )
        self._eps = torch.tensor(self.eps, dtype=torch.float32, device=self.device)
        # Programs: layers x the widest layer's blocks of BLOCK_SIZE channels.
        grid = (len(self.sizes), triton.cdiv(max(self.sizes), BLOCK_SIZE))
        fixed = dict(DTYPE=DTYPES[self.dtype], BLOCK_SIZE=BLOCK_SIZE)
        self._launcher = Launcher(_bn_scale_shift_kernel, grid, fixed, NUM_WARPS)

    def are(self, tensors: Sequence[Tensor | None], eps: tuple[float, ...]) -> bool:
        """Whether the table holds these vectors (all layers', one after the other) and eps."""
        return self.eps == eps and self.addresses == _addresses(tensors)

    def launch(self) -> tuple[Tensor, Tensor]:
        """Returns scale and shift, each (all channels,) fp32, layer after layer; `split` cuts them."""
        scale, shift = (torch.empty(self.starts[-1], dtype=torch.float32, device=self.device) for _ in range(2))
        self._launcher(
            self.device, pointers_ptr=self._pointers, starts_ptr=self._starts, eps_ptr=self._eps,
            scale_ptr=scale, shift_ptr=shift,
        )  # fmt: skip
        return scale, shift

    def split(self, scale: Tensor, shift: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns each layer's (scale, shift), as views."""
        return list(zip(scale.split_with_sizes(self.sizes), shift.split_with_sizes(self.sizes)))


def takes(vectors: Sequence[Vectors]) -> bool:
    """Whether a table can hold these vectors: contiguous, of one dtype that the kernel reads, one length a layer."""
    tensors = [(tensor, _one_of(layer)) for layer in vectors for tensor in layer if tensor is not None]
    first = _one_of(vectors[0])
    return first.dtype in DTYPES and all(
        t.dtype == first.dtype and t.device == first.device and t.shape == one.shape and t.is_contiguous()
        for t, one in tensors
    )


def _one_of(layer: Vectors) -> Tensor:
    """Returns a vector that is not None: the mean, or without a BN the convolution's bias."""
    return next(vector for vector in (layer[2], layer[4]) if vector is not None)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Returns each vector's address, 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
