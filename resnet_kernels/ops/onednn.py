"""oneDNN's fused convolutions on the CPU, through the operations that torch.compile's freezing uses.

These operations are private to PyTorch, so `why_not` probes for them and says what is missing.

oneDNN's ReLU turns NaN into 0 (fp32, fp16 and bf16, PyTorch 2.13), which torch.relu does not. It runs only where interval
arithmetic proves that there is no NaN: x is finite, and |x| times the largest row sum of |weight| can't overflow.
Elsewhere torch.relu_ runs over the output, which takes 4% of ResNet-50's time at batch 8 (docs/decisions.md).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..kernels import activations
from ..kernels.activations import RELU, Last
from ..kernels.geometry import Geometry
from ..kernels.operands import ConvOperands
from . import apart, reference

# Sums below this can't overflow: fp32 and bfloat16 end at 3.4e38, and a decade is left for rounding.
_SAFE = 1e37
# A bound below this is passed on, a larger one is computed anew from the tensor.
_SMALL = 1e18
# Terms above which PyTorch's own GEMM is so much more accurate than oneDNN that eager's choice is followed.
_LONG_SUM = 512

# Layouts that oneDNN has asked for, by problem, a few hundred bytes each. Their number is limited: images may have any size.
_layouts: dict[tuple, bytes] = {}
_MOST_LAYOUTS = 10_000
# Length of a serialized descriptor in 32-bit words, and its words of padding between an int and an int64, with random content.
_DESCRIPTOR_WORDS, _UNUSED_WORDS = 193, [27, 79, 105]


@functools.cache
def why_not(dtype: torch.dtype) -> str | None:
    """Returns why oneDNN's fused convolutions can't run this dtype here, as the end of a sentence; None if they can."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"runs float32 and bfloat16, got {dtype}"
    if not torch.backends.mkldnn.is_available():
        return "needs a PyTorch built with oneDNN"
    try:
        apart.call(lambda: _run_small_convolutions(torch.float32))
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"needs oneDNN's fused convolutions, which this PyTorch {torch.__version__} lacks ({error})"
    if dtype == torch.bfloat16:
        # PyTorch's own probe asks the processor, but ONEDNN_MAX_CPU_ISA may hold oneDNN to less: only a run tells.
        try:
            apart.call(lambda: _run_small_convolutions(dtype))
        except RuntimeError:
            return (
                "needs a CPU with bfloat16 support in oneDNN: AVX-512 or better, not held to less by ONEDNN_MAX_CPU_ISA"
            )
    return None


def _run_small_convolutions(dtype: torch.dtype) -> None:
    """Runs each of oneDNN's operations once, and raises their errors."""
    x, weight, other = (
        torch.zeros(shape, dtype=dtype, device="cpu") for shape in ((1, 2, 4, 4), (3, 2, 3, 3), (1, 3, 2, 2))
    )
    packed = pack_weight(weight, Geometry(), x.shape)
    layout(packed)
    run(x, packed, None, None, arguments(Geometry()), activation=RELU)
    for overwrite in (False, True):
        run(x, packed, None, other, arguments(Geometry()), activation=RELU, overwrite_residual=overwrite)


def is_for_aten(shape: torch.Size, dtype: torch.dtype, weight_shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether eager leaves oneDNN for PyTorch's own GEMM, whose sums are so much more accurate that we have to follow.

    That GEMM sums a long K up to four times as accurately as oneDNN's channels_last kernels. PyTorch 2.13 takes it in fp32 for
    one small image, and on a single thread for 1x1 convolutions of stride 1 on fewer than 16 images. We follow the latter
    above 512 terms only: on AVX2 oneDNN's error is 0.7 of the budget at 512, 0.97 at 1,024 and 1.3 at 2,048. Groups and
    kernels beyond 3x3 stay with oneDNN at any size.
    """
    if dtype != torch.float32 or weight_shape[1] != shape[1]:
        return False
    if shape[0] == 1 and shape.numel() <= 20480 and min(weight_shape[2:]) <= 3:
        return True
    return (
        weight_shape[1] > _LONG_SUM
        and shape[0] < 16
        and tuple(weight_shape[2:]) == (1, 1)
        and tuple(stride) == (1, 1)
        and torch.get_num_threads() == 1
    )


def for_gradient(x: Tensor, weight: Tensor, stride: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns x and weight in the layout in which oneDNN can compute a convolution's gradients on the CPU.

    On channels_last data oneDNN writes the weight's gradient of a strided 1x1 convolution with fewer than 16 channels past its
    buffer (oneDNN issue #6035; PyTorch 2.13, eager too). Such tensors are returned as plain NCHW.
    """
    strided_1x1 = tuple(weight.shape[2:]) == (1, 1) and max(stride) > 1
    if x.device.type != "cpu" or not strided_1x1 or weight.shape[1] >= 16:
        return x, weight
    # clone: contiguous() keeps a 1x1 weight's strides, by which PyTorch would choose channels_last again.
    return x.contiguous(), weight.clone(memory_format=torch.contiguous_format)


def pack_weight(weight: Tensor, geometry: Geometry, input_shape: torch.Size) -> Tensor:
    """Returns a copy of a weight in the blocked layout that oneDNN wants for this input; opaque to other operations."""
    n, c, h, w = input_shape
    if not geometry.symmetric:
        top, bottom, left, right = geometry.padding
        h, w = h + top + bottom, w + left + right
    return torch.ops.mkldnn._reorder_convolution_weight(weight, *arguments(geometry), [n, c, h, w])


def problem(weight_shape: torch.Size, dtype: torch.dtype, geometry: Geometry, input_shape: torch.Size) -> tuple:
    """Returns all that oneDNN's choice of a layout may depend on: the convolution's sizes and the number of threads."""
    return weight_shape, dtype, geometry, input_shape, torch.get_num_threads()


def known_layout(problem: tuple) -> bytes | None:
    """Returns the layout in which oneDNN wants a problem's weight; None before a weight was packed for it."""
    return _layouts.get(problem)


def note_layout(problem: tuple, packed: Tensor) -> bytes:
    """Returns the layout of a weight that was packed for a problem, and keeps it for `known_layout`."""
    if len(_layouts) >= _MOST_LAYOUTS:
        _layouts.clear()
    found = _layouts[problem] = layout(packed)
    return found


def layout(packed: Tensor) -> bytes:
    """Returns a packed weight's layout as bytes: equal for two weights of one shape only if their layouts are."""
    words = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).view(torch.int32)
    if words.numel() == _DESCRIPTOR_WORDS:
        words = words.clone()
        words[_UNUSED_WORDS] = 0
    return words.numpy().tobytes()


def arguments(geometry: Geometry) -> tuple:
    """Returns a geometry as arguments of oneDNN's operations; asymmetric padding has to be done beforehand."""
    return geometry.conv2d_padding, geometry.stride, geometry.dilation, geometry.groups


def conv_bias_act(operands: ConvOperands) -> Tensor:
    """Returns act(conv(x, weight) * scale + bias + residual); channels_last where oneDNN runs it.

    Args:
        operands: in a dtype that `why_not` lets pass. A scale is multiplied into a copy of the weight.
    """
    x, weight, bias, residual, scale, geometry, activation = operands
    if x.shape[0] == 0 or is_for_aten(x.shape, x.dtype, weight.shape, geometry.stride):
        return reference.conv_bias_act(*operands)
    x = reference.pad_if_asymmetric(x, geometry).contiguous(memory_format=torch.channels_last)
    if scale is not None:
        weight = operands.folded().weight
        # A large scale in the weight may overflow, in the weight or in sums of it that cancel, where eager is finite.
        if not is_safe(gain(weight) * bound(x, None)):
            return reference.conv_bias_act(*operands)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    return run(x, weight, as_bias(bias, x.dtype), residual, arguments(geometry), activation)


def as_bias(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns a shift in oneDNN's dtype, contiguous: oneDNN misreads a strided bias without a word (PyTorch 2.13)."""
    return None if vector is None else vector.detach().to(dtype).contiguous()


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    arguments: tuple,
    activation: Last,
    bound: float = math.inf,
    overwrite_residual: bool = False,
) -> Tensor:
    """Returns act(conv(x, weight) + bias + residual), on operands that oneDNN reads as they are.

    Args:
        x: channels_last, padded if the padding is asymmetric.
        weight: plain, or packed by `pack_weight`.
        bias: from `as_bias`.
        residual: channels_last.
        arguments: from `arguments`.
        activation: comes last; None for none. Any but ReLU is PyTorch's own, in a pass over the output.
        bound: on the magnitude of all that is summed up, from `bound`; infinite if unknown.
        overwrite_residual: the result may be written over `residual`. On ResNet-50 at batch 8 that is 12% faster than a
            fresh output on two CPU cores, as no new pages have to be mapped.
    """
    after = None if activation == RELU and is_safe(bound) else activation
    if residual is not None and not overwrite_residual and (residual.shape[1] == 1 or residual.shape[2:].numel() == 1):
        # For single pixels or one channel PyTorch 2.11 "could not create a memory" for the output; in place it can.
        residual, overwrite_residual = residual.clone(), True
    function, swapped, rest = call(
        weight, bias, residual is not None, arguments, activation == RELU and after is None, overwrite_residual
    )  # fmt: skip
    operands = (x,) if residual is None else (residual, x) if swapped else (x, residual)
    y = function(*operands, *rest)
    return activations.apply_over(after, y)


def call(
    weight: Tensor, bias: Tensor | None, has_residual: bool, arguments: tuple, relu: bool, overwrite_residual: bool
) -> tuple:
    """Returns oneDNN's operation, whether the residual comes before x, and the arguments behind x and residual."""
    ops = torch.ops.mkldnn
    unary = "relu" if relu else None
    if not has_residual:
        return ops._convolution_pointwise.default, False, (weight, bias, *arguments, unary or "none", [], "")
    rest = (weight, bias, *arguments, "add", 1.0, unary, [], "")
    if overwrite_residual:
        return ops._convolution_pointwise_.binary, True, rest
    return ops._convolution_pointwise.binary, False, rest


def gain(weight: Tensor) -> float:
    """Returns the largest sum of magnitudes of a filter: how much larger than its input a convolution's sums can be."""
    return weight.float().abs().sum((1, 2, 3)).max().item()


def is_safe(bound: float) -> bool:
    """Whether sums of this magnitude can't overflow, and so bring no NaN, which oneDNN's ReLU would lose."""
    return bound < _SAFE  # False for a bound that is NaN


def bound(x: Tensor, known: float | None) -> float:
    """Returns a bound on the magnitude of x's values, NaN or inf if one of them is; `known` itself while it is small.

    A bound grows by four orders of magnitude a block, so only every few blocks x itself is read.
    """
    if known is not None and known < _SMALL:
        return known
    if x.numel() == 0:
        return 0.0
    if x.dtype == torch.float32:
        # The 2-norm bounds the largest magnitude, and a dot product is four times as fast as a maximum. The factor covers
        # its rounding, and the summand covers values whose squares underflow.
        flat = x.as_strided((x.numel(),), (1,))
        return 1.1 * math.sqrt(torch.dot(flat, flat).item()) + 1e-15
    low, high = torch.aminmax(x)
    return max(abs(low.item()), abs(high.item())) if low == low else math.nan
