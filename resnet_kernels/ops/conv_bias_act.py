"""act(conv(x, weight) * scale + bias + residual): the op that every residual block is made of.

Three steps lead to a kernel: the op, `conv_candidates`, which picks one, and a launcher: kernels/conv_bias_act.py (formula,
cost, tiles), kernels/sm90/, ops/cudnn.py, ops/onednn.py or ops/reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import activations
from ..kernels.activations import RELU, Activation, Last, PReLU
from ..kernels.geometry import Geometry, IntOrPair, Padding, check_operands, normalize
from ..kernels.operands import ConvOperands
from . import backends, conv_candidates, onednn, reference
from .dtypes import autocast_dtype
from .library import LIBRARY

LIBRARY.define(
    "conv_bias_act(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? scale, SymInt[2] stride, "
    "SymInt[4] padding, SymInt[2] dilation, SymInt groups, str? activation, float slope, str backend, "
    "Tensor? slopes=None) -> Tensor"
)


def _conv_bias_act(
    x, weight, bias, residual, scale, stride, padding, dilation, groups, activation, slope, backend, slopes=None
):  # fmt: skip
    # The backend is resolved inside the op, so torch.compile sees one op on every machine.
    name = backends.resolve(backend, x.device, x.dtype)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    last = activations.from_arguments(activation, slope, slopes)
    operands = ConvOperands(x, weight, bias, residual, scale, geometry, last)
    return conv_candidates.run(conv_candidates.winner(operands) if name == "tuned" else name, operands)


def _fake(
    x, weight, bias, residual, scale, stride, padding, dilation, groups, activation, slope, backend, slopes=None
):  # fmt: skip
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    shape = geometry.out_shape(x.shape, weight.shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, scale, stride, padding, dilation, groups, activation, *_ = inputs
    if activation not in (None, "relu"):
        raise NotImplementedError(
            f"conv_bias_act has no gradient through {activation}: call rk.ops.conv_bias_act, which has"
        )
    ctx.geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    ctx.bias_dtype = None if bias is None else bias.dtype
    # ReLU's backward needs only y's sign. Keeping y costs nothing: it is the next layer's input.
    ctx.save_for_backward(x, weight, scale, output if activation else None)


def _backward(ctx, grad_y):
    x, weight, scale, y = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_residual, needs_scale = ctx.needs_input_grad[:5]
    if y is not None:
        grad_y = torch.ops.aten.threshold_backward(grad_y, y, 0)
    grad_x = grad_weight = grad_bias = grad_scale = None
    wide = grad_y if grad_y.dtype == torch.float64 else grad_y.float()
    if needs_bias:
        grad_bias = wide.sum((0, 2, 3)).to(ctx.bias_dtype)
    if needs_scale:
        # Only frozen BN with a trained weight comes here. Nothing stored the convolution's output: it is computed again.
        z = reference.conv_bias_act(x, weight, geometry=ctx.geometry, activation=None)
        grad_scale = (wide * z).sum((0, 2, 3)).to(scale.dtype)
    if needs_x or needs_weight:
        grad_z = grad_y if scale is None else (wide * scale[:, None, None]).to(x.dtype)
        padded, weight = onednn.for_gradient(reference.pad_if_asymmetric(x, ctx.geometry), weight, ctx.geometry.stride)
        stride, _, dilation, groups = ctx.geometry
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_z, padded, weight, None, stride, ctx.geometry.conv2d_padding, dilation, False, [0, 0], groups,
            [needs_x, needs_weight, False],
        )  # fmt: skip
        if needs_x and not ctx.geometry.symmetric:
            top, _, left, _ = ctx.geometry.padding
            grad_x = grad_x[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    grad_residual = grad_y if needs_residual else None
    return grad_x, grad_weight, grad_bias, grad_residual, grad_scale, *(None,) * 8


LIBRARY.impl("conv_bias_act", _conv_bias_act, "CompositeExplicitAutograd")
torch.library.register_fake("resnet_kernels::conv_bias_act", _fake, lib=LIBRARY)
torch.library.register_autograd(
    "resnet_kernels::conv_bias_act", _backward, setup_context=_setup_context, lib=LIBRARY
)  # fmt: skip


def run_checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    geometry: Geometry,
    activation: Last,
    backend: str,
) -> Tensor:
    """The op for a caller who has checked the operands, with gradients through any activation.

    ReLU's backward needs only the sign of the output. That of other activations needs what they have read, which the op
    doesn't store: where gradients are wanted they are PyTorch's own, behind the op.
    """
    after: Last = None
    if activation is not None and activation != RELU and torch.is_grad_enabled():
        tensors = (x, weight, bias, residual, scale, activations.slopes_of(activation))
        if any(tensor is not None and tensor.requires_grad for tensor in tensors):
            activation, after = None, activation
    y = torch.ops.resnet_kernels.conv_bias_act.default(
        x, weight, bias, residual, scale, *geometry, *activations.as_arguments(activation), backend,
        activations.slopes_of(activation),
    )  # fmt: skip
    return activations.apply(after, y)


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: Padding = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    relu: bool = True,
    activation: str | Activation | PReLU | None = None,
    backend: str = "auto",
) -> Tensor:
    """Returns act(conv(x, weight) * scale + bias + residual), differentiable in all five tensors, and in PReLU's slopes.

    Args:
        x: (N, C_in, H, W), float16, bfloat16, float32, or float64 (eager only). channels_last is read as it is, any other
            layout is converted.
        weight: (C_out, C_in / groups, kernel_h, kernel_w), x's dtype. channels_last is read as it is.
        bias: (C_out,), float32 or x's dtype. With BN behind the convolution: BN's shift.
        residual: the output's shape and x's dtype; added before the activation.
        scale: (C_out,), float32 or x's dtype; multiplies the convolution before the bias. BN without folding.
        stride: int or (h, w).
        padding: zeros around the image: int, (h, w) or ((top, bottom), (left, right)).
        dilation: int or (h, w).
        groups: divides C_in and C_out.
        relu: False leaves the ReLU away, which comes last by default.
        activation: what comes last in the place of the ReLU, whatever `relu` says: "relu", "relu6", "leaky_relu", "silu",
            "gelu", "gelu_tanh" or "hardswish"; an Activation, such as Activation("leaky_relu", 0.1); or PReLU(slopes).
        backend: "auto", "triton", "cudnn", "cpu" or "eager"; the environment's RESNET_KERNELS_BACKEND overrides it.

    Returns:
        (N, C_out, out_h, out_w), x's dtype (autocast's under autocast), channels_last.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that doesn't fit; an activation of another type than these.
        ValueError: a shape, device, range, activation or backend name that doesn't fit.
        RuntimeError: an explicit backend can't run here.

    Source: He et al. 2016 (arXiv:1512.03385), figure 2 and 5; BN as a scale and a shift: Ioffe and Szegedy 2015.
    """
    geometry = normalize(stride, padding, dilation, groups)
    last = activations.chosen(relu, activation)
    backends.check_name(backend)
    if isinstance(x, Tensor) and (dtype := autocast_dtype(x)) is not None:
        x, weight = (t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (x, weight))
        if isinstance(residual, Tensor) and residual.is_floating_point():
            residual = residual.to(dtype)
        # Vectors may be fp32 or in x's dtype: one in the dtype that x had before becomes fp32.
        bias, scale = (v.float() if isinstance(v, Tensor) and v.dtype != dtype else v for v in (bias, scale))
    check_operands(x, weight, bias, residual, scale, geometry)
    activations.check_slopes(last, x, weight.shape[0])
    return run_checked(x, weight, bias, residual, scale, geometry, last, backend)
