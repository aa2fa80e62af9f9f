"""BN as a scale and a shift, and the packed weights that oneDNN wants, with what makes them stale.

On a GPU nothing folded is kept: launches.py reads the live tensors in each call. oneDNN has no per-channel scale, so on
the CPU the scale is folded into a packed copy of the weight, and `PackedConv.is_unchanged` has to notice every change of its
sources. A version counter is not enough: fused optimizers, BN's own running statistics, `p.data.mul_()` and NumPy write
under the same `_version` and `data_ptr` (PyTorch 2.13). So besides identity, address and version, BN's vectors and the
bias are compared in full, and the weight at 16 samples. Only single weights edited behind PyTorch's back can slip through;
`resnet_kernels.refresh` is for that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import ranges, reference
from .ops import onednn
from .ops.geometry import Geometry
from .ops.library import is_dense
from .recipe import ConvStep, Recipe

# Each sample is a cache miss, and 16 of them see every change of a whole tensor.
_SAMPLES = 16


def scale_shift(conv_bias: Tensor | None, bn: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns (scale, shift), (C_out,) in fp32 each, from the live tensors; without a BN (None, the convolution's bias)."""
    return (None, conv_bias) if bn is None else reference.bn_scale_shift(*bn_tensors(bn), conv_bias, bn.eps)


def bn_tensors(bn: nn.Module | None) -> tuple[Tensor | None, ...]:
    """A BN's (weight, bias, running_mean, running_var); four times None for no BN."""
    return (None,) * 4 if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var)


class PackedConv:
    """A convolution's weight and bias with BN folded in, in oneDNN's blocked layout: one copy of the weight.

    Where folding overflows (a huge gamma over tiny weights), the layer runs unfolded.
    """

    __slots__ = (
        "_arguments",
        "_bn",
        "_conv",
        "_dtype",
        "_for_aten",
        "_gain",
        "_offset",
        "_settings",
        "_unfolded",
        "_watched",
        "bias",
        "geometry",
        "weight",
    )

    def __init__(self, conv: nn.Conv2d, bn: nn.Module | None, x: Tensor):
        dtype = x.dtype
        self._conv, self._bn = conv, bn
        self._settings = _settings(conv, bn)
        self._dtype, self._for_aten = dtype, onednn.is_for_aten(x.shape, dtype, conv.weight, conv.stride)
        self._watched = [_watch(conv, "weight", _SAMPLES), _watch(conv, "bias")]
        if bn is not None:
            self._watched += [_watch(bn, name) for name in ("weight", "bias", "running_mean", "running_var")]
        self.geometry = Geometry.of_module(conv, x.shape[2:])
        scale, shift = scale_shift(conv.bias, bn)
        weight = conv.weight.detach()
        if scale is not None:
            weight = weight * scale.detach()[:, None, None, None]
        weight = weight.to(dtype)
        self.bias = onednn.as_bias(shift, dtype)
        self._gain = weight.float().abs().sum((1, 2, 3)).max().item()
        self._offset = 0.0 if shift is None else self.bias.float().abs().max().item()
        self._arguments = onednn.arguments(self.geometry)
        self._unfolded = None
        if not (math.isfinite(self._gain) and math.isfinite(self._offset)):
            self.weight, self._unfolded = None, (conv.weight.detach().to(dtype), shift, scale)
        elif self._for_aten:
            self.weight = weight
        else:
            self.weight = onednn.pack_weight(weight, self.geometry, x.shape)

    def fits(self, x: Tensor) -> bool:
        """Whether the packed copy is of x's dtype and for the convolution that an x of this size goes to."""
        return (
            x.dtype == self._dtype
            and self.goes_where_eager_goes(x.shape)
            and (
                not hasattr(self._conv, "same_padding")
                or self._conv.same_padding(*x.shape[2:]) == self.geometry.padding
            )
        )

    def goes_where_eager_goes(self, x_shape: torch.Size) -> bool:
        """Whether the copy is for the library, oneDNN or PyTorch's own GEMM, that such an x has to go to now."""
        return onednn.is_for_aten(x_shape, self._dtype, self._conv.weight, self._conv.stride) == self._for_aten

    def is_unchanged(self, conv: nn.Conv2d, bn: nn.Module | None) -> bool:
        """Whether the packed copy still is what conv and bn say."""
        if conv is not self._conv or bn is not self._bn or _settings(conv, bn) != self._settings:
            return False
        for registry, name, source, pointer, version, live, then in self._watched:
            if registry.get(name) is not source:
                return False
            if source is not None and (
                live is None
                or source.data_ptr() != pointer
                or (version is not None and source._version != version)
                or live.tobytes() != then
            ):
                return False
        return True

    def bound(self, x_bound: float, offset: float | None = None) -> float:
        """A bound on the magnitude of bn(conv(x)), partial sums included, from one on x's."""
        return self._gain * x_bound + (self._offset if offset is None else offset)

    def out_shape(self, x_shape: torch.Size) -> torch.Size:
        return torch.Size(self.geometry.out_shape(x_shape, self._conv.weight.shape))

    @property
    def is_one_call(self) -> bool:
        """Whether a call is one of oneDNN's ops and nothing else."""
        return self._unfolded is None and not self._for_aten and self.geometry.symmetric

    def call(self, residual: object, relu: bool, overwrite_residual: bool) -> tuple:
        """What `__call__` comes down to where oneDNN's ReLU is safe; see onednn.call."""
        return onednn.call(self.weight, self.bias, residual is not None, self._arguments, relu, overwrite_residual)

    def __call__(
        self, x: Tensor, residual: Tensor | None, relu: bool, bound: float, overwrite_residual: bool
    ) -> Tensor:
        """relu(bn(conv(x)) + residual); x and residual channels_last, `bound` on the sum's magnitude. See onednn.run."""
        if self._unfolded is not None:
            weight, shift, scale = self._unfolded
            return reference.conv_bias_act(x, weight, shift, residual, scale, self.geometry, relu)
        if self._for_aten:
            return reference.conv_bias_act(x, self.weight, self.bias, residual, None, self.geometry, relu)
        x = reference.pad_if_asymmetric(x, self.geometry)
        return onednn.run(x, self.weight, self.bias, residual, self._arguments, relu, bound, overwrite_residual)


class PackedProgram:
    """A recipe on oneDNN as a flat list of calls: what is left of the host's work once nothing has changed.

    Under interval arithmetic (onednn.py) the bounds on all values are linear in the input's, so one comparison shows that
    oneDNN's own ReLU is safe in all steps. Without entries where a step needs more than one call.
    """

    def __init__(self, recipe: Recipe, packs: dict[str, PackedConv], x: Tensor):
        self._key = self._key_of(x)
        self._packs = {step.conv: packs[step.conv] for step in recipe.steps if isinstance(step, ConvStep)}
        self._result = recipe.result
        self.entries: list[list[tuple]] = []  # for an input that is not ours to write over, and for one that is
        if not all(isinstance(step, ConvStep) and packs[step.conv].is_one_call for step in recipe.steps):
            return
        shapes = {0: x.shape}
        for step in recipe.steps:
            if not packs[step.conv].goes_where_eager_goes(shapes[step.x]):
                return  # packed when PyTorch had another number of threads
            shapes[step.out] = packs[step.conv].out_shape(shapes[step.x])
            if step.residual is not None and shapes[step.residual] != shapes[step.out]:
                return  # an add that broadcasts
        self.entries = [
            [
                (step, *packs[step.conv].call(step.residual, step.relu, self._overwrites(step, owned)))
                for step in recipe.steps
            ]
            for owned in (False, True)
        ]
        bounds = {0: (1.0, 0.0)}
        for step in recipe.steps:
            pack, (slope, constant) = packs[step.conv], bounds[step.x]
            more = (0.0, 0.0) if step.residual is None else bounds[step.residual]
            bounds[step.out] = (pack.bound(slope, 0.0) + more[0], pack.bound(constant) + more[1])
        self._bound = bounds[recipe.result]
        self._largest = (max(slope for slope, _ in bounds.values()), max(constant for _, constant in bounds.values()))

    @staticmethod
    def _overwrites(step: ConvStep, owned: bool) -> bool:
        return step.overwrites_residual and (step.residual != 0 or owned)

    def takes(self, x: Tensor) -> bool:
        return self._key_of(x) == self._key

    @staticmethod
    def _key_of(x: Tensor) -> tuple:
        return x.shape, x.dtype, torch.get_num_threads() == 1  # see onednn.is_for_aten

    def has(self, packs: dict[str, PackedConv]) -> bool:
        return all(packs.get(name) is pack for name, pack in self._packs.items())

    def is_safe(self, bound: float) -> bool:
        return onednn.is_safe(self._largest[0] * bound + self._largest[1])

    def result_bound(self, bound: float) -> float:
        return self._bound[0] * bound + self._bound[1]

    def __call__(self, x: Tensor, owned: bool, path: str) -> Tensor:
        values = {0: x}
        del x
        for step, function, swapped, arguments in ranges.around(self.entries[owned], path):
            if step.residual is None:
                values[step.out] = function(values[step.x], *arguments)
            elif swapped:
                values[step.out] = function(values[step.residual], values[step.x], *arguments)
            else:
                values[step.out] = function(values[step.x], values[step.residual], *arguments)
            for dead in step.frees:
                del values[dead]
        return values[self._result]


def _settings(conv: nn.Conv2d, bn: nn.Module | None) -> tuple:
    return conv.stride, conv.padding, conv.dilation, None if bn is None else bn.eps


def _watch(module: nn.Module, name: str, samples: int | None = None) -> tuple:
    """What it takes to notice a change of a parameter or buffer: where it is, its address, version and some values."""
    registry = module._parameters if name in module._parameters else module._buffers
    source = registry.get(name)
    if source is None:
        return registry, name, None, None, None, None, None
    # An inference tensor has no version, and asking for it raises.
    version = None if source.is_inference() else source._version
    live = _memory(source.detach(), samples)
    return registry, name, source, source.data_ptr(), version, live, None if live is None else live.tobytes()


def _memory(tensor: Tensor, samples: int | None) -> memoryview | None:
    """The live bytes of a tensor, or of samples spread over all of it: half a microsecond to compare, NaN included.

    None for a tensor that is not dense (an expanded one): that is packed anew in each call.
    """
    if not is_dense(tensor):
        return None
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    memory = memoryview(tensor.as_strided((tensor.numel(),), (1,)).view(integer).numpy())
    if samples is None or tensor.numel() <= samples:
        return memory
    step = tensor.numel() // samples
    # An odd step: an even one would meet the same tap and channel in every filter.
    return memory[:: step - 1 if step % 2 == 0 else step]
