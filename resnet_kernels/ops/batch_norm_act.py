"""act(BN(x) + residual), training and eval, forward and backward. kernels/batch_norm_act.py has formulas and cost.

The op writes the running statistics, so its autograd is registered by hand: PyTorch registers formulas for functional ops
only. On all backends but Triton PyTorch's own BN, add and activation run, with PyTorch's own autograd.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import activations
from ..kernels.activations import RELU, Activation, Last, PReLU
from . import backends, reference, tuned_table
from .library import LIBRARY, is_watched

LIBRARY.define(
    "batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, float eps, str? activation, float slope, "
    "str backend, Tensor? slopes=None) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "batch_norm_act_backward(Tensor dy, Tensor x, Tensor? kept, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "bool training, float eps, str? activation, float slope, bool[5] needs, Tensor? slopes=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _nothing(x: Tensor) -> Tensor:
    """An empty tensor in the place of a result that nobody needs: a schema has no optional returns."""
    return torch.empty(0, dtype=torch.float32, device=x.device)


class NormProblem(NamedTuple):
    """A BN, residual add and activation without tensors and batch. `str` is the key in a table.

    Attributes:
        training: forward and backward, with batch statistics; else a forward on the running ones.
    """

    channels: int
    height: int
    width: int
    residual: bool
    activation: Activation | None
    training: bool

    def __str__(self) -> str:
        what = ("residual" * self.residual, str(self.activation or ""), "training" * self.training)
        return " ".join((f"norm {self.channels}x{self.height}x{self.width}", *filter(None, what)))


def _can_run(name: str, problem: NormProblem, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    return name in ("triton", "eager") and backends.why_not_on(name, device, dtype) is None


def untuned(problem: NormProblem, dtype: torch.dtype, device: torch.device) -> str:
    """Returns "triton" or "eager", for a problem without a table: in inference one pass replaces PyTorch's two or three."""
    return "eager" if problem.training or not backends.passes_on_triton("tuned", device, dtype) else "triton"


def _is_ours(x: Tensor, residual: Tensor | None, activation: Last, backend: str, learns: bool) -> bool:
    return _runs_ours(x, residual, activation, backends.resolve(backend, x.device, x.dtype), learns)


def _runs_ours(x: Tensor, residual: Tensor | None, activation: Last, backend: str, learns: bool) -> bool:
    """Whether a resolved backend means our kernels."""
    if backend == "tuned" and all(type(size) is int for size in x.shape):
        # While torch.compile traces, sizes may be symbols, which no table has: PyTorch runs those.
        batch, channels, height, width = x.shape
        last = activations.without_slopes(activation)
        problem = NormProblem(channels, height, width, residual is not None, last, learns)
        found = tuned_table.choice(problem, batch, x.dtype, x.device, _can_run)
        backend = found or untuned(problem, x.dtype, x.device)
    return backend == "triton" and x.numel() > 0


def _by_pytorch(x, residual, weight, bias, running_mean, running_var, training, momentum, eps, activation):
    y = reference.batch_norm_act(
        x, residual, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps,
        activation=activation,
    )  # fmt: skip
    return y.contiguous(memory_format=torch.channels_last), _nothing(x), _nothing(x)


def _batch_norm_act(
    x, residual, weight, bias, running_mean, running_var, training, momentum, eps, kind, slope, backend, slopes=None
):  # fmt: skip
    activation = activations.from_arguments(kind, slope, slopes)
    arguments = (x, residual, weight, bias, running_mean, running_var, training, momentum, eps, activation)
    if not _is_ours(x, residual, activation, backend, training):
        return _by_pytorch(*arguments)
    from ..kernels import batch_norm_act as kernel

    y, mean, rstd = kernel.launch(*arguments)
    return (y, mean, rstd) if training else (y, _nothing(x), _nothing(x))


def _fake(
    x, residual, weight, bias, running_mean, running_var, training, momentum, eps, kind, slope, backend, slopes=None
):  # fmt: skip
    activation = activations.from_arguments(kind, slope, slopes)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if not (training and _is_ours(x, residual, activation, backend, training)):
        return y, _nothing(x), _nothing(x)
    return y, *(torch.empty(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))


class _Function(torch.autograd.Function):
    """Our kernels' autograd. It saves y only where a ReLU came after a residual: elsewhere x gives the ReLU's mask.

    What another activation has read is computed again, from x and from the residual, which is saved.
    """

    @staticmethod
    def forward(
        ctx, x, residual, weight, bias, slopes, running_mean, running_var, training, momentum, eps, activation, backend
    ):  # fmt: skip
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, rstd = torch.ops.resnet_kernels.batch_norm_act.default(
                x, residual, weight, bias, running_mean, running_var, training, momentum, eps,
                *activations.as_arguments(activation), backend, slopes,
            )  # fmt: skip
        ctx.mark_non_differentiable(mean, rstd)
        statistics = (mean, rstd) if training else (running_mean, running_var)
        _keep(ctx, x, residual, weight, bias, slopes, y, statistics, (training, eps, activation))
        return y, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        return *_gradients(ctx, dy, _backward_op), *(None,) * 7


class _Direct(torch.autograd.Function):
    """`_Function` for `undispatched`: y alone, without the dispatcher's way into Python and back."""

    @staticmethod
    def forward(
        ctx, x, residual, weight, bias, slopes, running_mean, running_var, training, momentum, eps, activation
    ):  # fmt: skip
        from ..kernels import batch_norm_act as kernel

        last = activation if slopes is None else PReLU(slopes)
        y, mean, rstd = kernel.launch(
            x, residual, weight, bias, running_mean, running_var, training, momentum, eps, last
        )
        statistics = (mean, rstd) if training else (running_mean, running_var)
        _keep(ctx, x, residual, weight, bias, slopes, y, statistics, (training, eps, activation))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        from ..kernels import batch_norm_act_backward as kernel

        return *_gradients(ctx, dy, _backward_op if is_watched() else kernel.launch), *(None,) * 6


def _keep(ctx, x, residual, weight, bias, slopes, y, statistics, settings) -> None:
    """Saves what backward reads and nothing else: autograd forbids in-place changes to saved tensors.

    settings: training, eps, and the activation without its slopes.
    """
    *_, activation = settings
    ctx.set_materialize_grads(False)
    ctx.settings = settings
    ctx.bias_dtype = None if bias is None else bias.dtype
    kept = None if activation is None or residual is None else y if activation == RELU else residual
    # y alone gives ReLU's mask; all else is computed again.
    kept_bias = None if activation is None or kept is y else bias
    ctx.save_for_backward(x, kept, weight, kept_bias, *statistics, slopes)


def _backward_op(dy, x, kept, weight, bias, mean, rstd, training, eps, activation, needs):
    return torch.ops.resnet_kernels.batch_norm_act_backward.default(
        dy, x, kept, weight, bias, mean, rstd, training, eps, *activations.as_arguments(activation), needs,
        activations.slopes_of(activation),
    )  # fmt: skip


def _gradients(ctx, dy, backward) -> tuple[Tensor | None, ...]:
    """The gradients of x, residual, weight, bias and slopes. backward: our kernels', by the op or by themselves."""
    if dy is None:
        return (None,) * 5
    training, eps, activation = ctx.settings
    needs_x, needs_residual, needs_weight, needs_bias, needs_slopes = ctx.needs_input_grad[:5]
    needs = (needs_x, needs_residual and activation is not None, needs_weight, needs_bias, needs_slopes)
    *saved, slopes = ctx.saved_tensors
    last = activation if slopes is None else PReLU(slopes)
    gradients = backward(dy, *saved, training, eps, last, needs)
    dx, dresidual, dweight, dbias, dslopes = (g if needed else None for g, needed in zip(gradients, needs))
    if needs_residual and activation is None:
        dresidual = dy
    if dbias is not None and dbias.dtype != ctx.bias_dtype:
        dbias = dbias.to(ctx.bias_dtype)
    return dx, dresidual, dweight, dbias, dslopes


def _backward(dy, x, kept, weight, bias, mean, rstd, training, eps, kind, slope, needs, slopes=None):
    from ..kernels import batch_norm_act_backward as kernel

    activation = activations.from_arguments(kind, slope, slopes)
    gradients = kernel.launch(dy, x, kept, weight, bias, mean, rstd, training, eps, activation, needs)
    return tuple(_nothing(x) if gradient is None else gradient for gradient in gradients)


def _backward_fake(dy, x, kept, weight, bias, mean, rstd, training, eps, kind, slope, needs, slopes=None):
    data = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    vector = torch.empty(x.shape[1], dtype=torch.float32 if weight is None else weight.dtype, device=x.device)
    whole = (data, data.clone(), vector, vector.clone(), vector if slopes is None else torch.empty_like(slopes))
    return tuple(value if needed else _nothing(x) for value, needed in zip(whole, needs))


def _wants_gradients(tensors) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _autograd(
    x, residual, weight, bias, running_mean, running_var, training, momentum, eps, kind, slope, backend, slopes=None
):  # fmt: skip
    settings = (running_mean, running_var, training, momentum, eps)
    if _wants_gradients((x, residual, weight, bias, running_mean, running_var, slopes)):
        last = activations.from_arguments(kind, slope, slopes)
        if not _is_ours(x, residual, last, backend, learns=True):
            return _by_pytorch(x, residual, weight, bias, *settings, last)
        # By name: below autograd the op can't see that gradients are wanted, and would decide anew.
        activation = activations.without_slopes(last)
        return _Function.apply(x, residual, weight, bias, slopes, *settings, activation, "triton")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.resnet_kernels.batch_norm_act.default(
            x, residual, weight, bias, *settings, kind, slope, backend, slopes
        )


def undispatched(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: Last,
    backend: str,
) -> Tensor:
    """The op's y for a caller who has checked the operands and resolved the backend.

    In training our kernels are called past PyTorch's dispatcher, unless somebody would see the operation there: on its way
    through Python and back a BN's forward and backward take the host a third longer.
    """
    slopes = activations.slopes_of(activation)
    settings = (running_mean, running_var, training, momentum, eps)
    tensors = (x, residual, weight, bias, running_mean, running_var, slopes)
    direct = _wants_gradients(tensors) and not is_watched() and type(x) is Tensor
    if direct and _runs_ours(x, residual, activation, backend, learns=True):
        return _Direct.apply(x, residual, weight, bias, slopes, *settings, activations.without_slopes(activation))
    return _op(x, residual, weight, bias, *settings, activation, backend)


def _op(*arguments) -> Tensor:
    """The op's y. arguments: as `undispatched` has them."""
    *operands, activation, backend = arguments
    op = torch.ops.resnet_kernels.batch_norm_act.default
    return op(*operands, *activations.as_arguments(activation), backend, activations.slopes_of(activation))[0]


LIBRARY.impl("batch_norm_act", _batch_norm_act, "CompositeExplicitAutograd")
LIBRARY.impl("batch_norm_act", _autograd, "Autograd")
LIBRARY.impl("batch_norm_act_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("resnet_kernels::batch_norm_act", _fake, lib=LIBRARY)
torch.library.register_fake("resnet_kernels::batch_norm_act_backward", _backward_fake, lib=LIBRARY)


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool = True,
    activation: str | Activation | PReLU | None = None,
    backend: str = "auto",
) -> Tensor:
    """Returns act(BN(x) + residual), differentiable in x, residual, weight, bias and PReLU's slopes.

    Args:
        x: (N, C, H, W), float16, bfloat16, float32, or float64 (eager only). channels_last is read as it is, any other
            layout is converted.
        residual: x's shape, dtype and device, added before the activation; or None.
        weight: (C,), float32 or x's dtype; None for ones (affine=False).
        bias: (C,), float32 or x's dtype; None for zeros.
        running_mean: (C,), float32 or x's dtype. Eval mode normalizes by it; training updates it in place, and None keeps
            none (track_running_stats=False).
        running_var: as `running_mean`. Training updates it with the unbiased variance.
        training: True normalizes by the batch's own statistics, computed in fp32.
        momentum: share of the new statistics in the running ones, from 0 to 1. (nn.BatchNorm2d's momentum=None is
            1 / num_batches_tracked, which is the module's to count.)
        eps: added to the variance; above 0 in training, at least 0 else.
        relu: False leaves the ReLU away, which comes last by default.
        activation: what comes last in the place of the ReLU, whatever `relu` says: "relu", "relu6", "leaky_relu", "silu",
            "gelu", "gelu_tanh" or "hardswish"; an Activation, such as Activation("leaky_relu", 0.1); or PReLU(slopes).
        backend: "triton" runs two passes over data forward and two backward; so does "auto" where a measured table shows
            that they win. Else PyTorch's own BN, add and activation run. RESNET_KERNELS_BACKEND overrides the argument.

    Returns:
        x's shape and dtype, channels_last.

    Raises:
        TypeError: an argument is no tensor, or x not floating point; an activation of another type than these.
        ValueError: a shape, dtype, device, range, activation or backend name that doesn't fit; one value per channel in
            training.
        RuntimeError: an explicit backend can't run here.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithms 1 and 2; He et al. 2016 (arXiv:1512.03385), figure 2.
    """
    last = activations.chosen(relu, activation)
    backends.check_name(backend)
    _check(x, residual, weight, bias, running_mean, running_var, training, momentum, eps)
    activations.check_slopes(last, x, x.shape[1])
    arguments = (x, residual, weight, bias, running_mean, running_var, bool(training), momentum, eps, last)
    if is_watched():
        return _op(*arguments, backend)
    return undispatched(*arguments, backends.resolve(backend, x.device, x.dtype))


def _check(x, residual, weight, bias, running_mean, running_var, training, momentum, eps) -> None:
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, value in {"x": x, "residual": residual, **vectors}.items():
        if not isinstance(value, Tensor) and (name == "x" or value is not None):
            accepted = "a torch.Tensor" if name == "x" else "a torch.Tensor or None"
            raise TypeError(f"{name} must be {accepted}, got {type(value).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}")
    for name, value in {"residual": residual, **vectors}.items():
        if value is None:
            continue
        shape = tuple(x.shape) if name == "residual" else (x.shape[1],)
        dtypes = (x.dtype,) if name == "residual" or x.dtype == torch.float64 else (x.dtype, torch.float32)
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        if value.dtype not in dtypes:
            accepted = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
            raise ValueError(f"{name} must be of dtype {accepted}, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be from 0 to 1, got {momentum}")
    if not (0 <= eps < math.inf and (eps > 0 or not training)):
        raise ValueError(f"eps must be finite and {'above' if training else 'at least'} 0, got {eps}")
    if not training and (running_mean is None or running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing} must be given in eval mode, got None")
    if (running_mean is None) != (running_var is None):
        missing, there = ("running_mean", "running_var") if running_mean is None else ("running_var", "running_mean")
        raise ValueError(
            f"running_mean and running_var must both be given, or both be None, got {there} alone, without {missing}"
        )
    if training and x.numel() == x.shape[1] and x.numel():
        # In torch.nn.functional.batch_norm's words.
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
