"""Device functions on single elements. They keep a NaN as PyTorch does; Triton's plain maximum returns the other operand."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def maximum(a, b):
    """The larger of a and b; NaN if one of them is NaN, as in torch.max_pool2d."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN, as in torch.relu."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without an overflow on the way; NaN stays NaN."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def sigmoid_slope(x):
    """The derivative of `sigmoid`, s * (1 - s): the difference would cancel where s is near one."""
    e = tl.exp(-tl.abs(x))
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit
def normal_cdf(x):
    """The standard normal distribution's share below x, as in torch's GELU."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _tanh_argument(x):
    """Twice the argument of tanh in torch's GELU of tanh: 0.5 * (1 + tanh(u)) is sigmoid(2 * u)."""
    return x * (1.5957691216057308 + 0.07135481627159626 * x * x)


@triton.jit
def slope_of(slopes_ptr, SLOPE: tl.constexpr, offs_c, mask_c):
    """The slope of the negative side: PReLU's of each channel, for tiles of (pixels, channels); else SLOPE, Leaky ReLU's."""
    if slopes_ptr is not None:
        return tl.load(slopes_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    else:
        return SLOPE


@triton.jit
def activate(x, ACT: tl.constexpr, slope):
    """An activation of fp32 x: ACT is "prelu" or one of activations.KINDS, or None for x itself; slope is of `slope_of`."""
    if ACT == "relu":
        x = relu(x)
    elif ACT == "relu6":
        x = tl.where(x > 6.0, 6.0, relu(x))
    elif ACT == "leaky_relu" or ACT == "prelu":
        x = tl.where(x > 0, x, x * slope)
    elif ACT == "silu":
        x = x * sigmoid(x)
    elif ACT == "gelu":
        x = x * normal_cdf(x)
    elif ACT == "gelu_tanh":
        x = x * sigmoid(_tanh_argument(x))
    elif ACT == "hardswish":
        x = x * (tl.where(x > 3.0, 6.0, relu(x + 3.0)) / 6.0)
    else:
        tl.static_assert(ACT is None, "ACT must be one of activations.KINDS, prelu or None")
    return x


@triton.jit
def activation_gradient(x, dy, ACT: tl.constexpr, slope):
    """The gradient of `activate`'s x from that of its result, with torch's own choices at the kinks; `relu` is not here.

    A NaN in x lets the gradient through where torch does.
    """
    if ACT == "relu6":
        dy = tl.where((x <= 0) | (x >= 6.0), 0.0, dy)
    elif ACT == "leaky_relu" or ACT == "prelu":
        dy = tl.where(x > 0, dy, dy * slope)
    elif ACT == "silu":
        dy = dy * (sigmoid(x) + x * sigmoid_slope(x))
    elif ACT == "gelu":
        dy = dy * (normal_cdf(x) + x * (0.3989422804014327 * tl.exp(-0.5 * x * x)))
    elif ACT == "gelu_tanh":
        u = _tanh_argument(x)
        inner = x * (1.5957691216057308 + 0.2140644488147888 * x * x)
        # Far from zero the second term is none; its factors would give inf * 0.
        dy = dy * (sigmoid(u) + tl.where(tl.abs(x) > 20.0, 0.0, sigmoid_slope(u) * inner))
    elif ACT == "hardswish":
        dy = tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, dy * (x / 3.0 + 0.5), dy))
    else:
        tl.static_assert(ACT is None, "ACT must be one of activations.KINDS but relu, prelu or None")
    return dy


@triton.jit
def to_tf32(x):
    """fp32 rounded to TF32's ten bits, ties away from zero; inf and NaN stay.

    A tensor core cuts the other bits off, which makes each product smaller, by 0.1% on average, layer after layer. An H100
    gave a ResNet of 17 convolutions an error of 6.2e-3 that way, where 1.5e-3 was allowed.
    """
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)
