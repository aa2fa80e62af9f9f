"""Constants: the tensors that a plan's launches read besides activations. They are scales, shifts and copied weights.

Each call makes them from the live tensors, so that nothing can go stale. That takes two launches for any network: one writes
all scales and shifts (kernels/bn_scale_shift.py), the other all weights that are folded, or whose dtype or layout cuDNN cannot
read (kernels/fold_weights.py). Both work in a CUDA graph. Where a kernel cannot take a tensor, PyTorch's operations do the
same.

The constants of frozen modules are made once and kept: frozen_constants.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...graph import fusible
from ...ops import backends
from ..parts import ConvPart, NormPart, scale_shift
from .forms import Form, needs_copy

# A layer that has constants: a convolution, or a BN in a link.
Layer = ConvPart | NormPart


class Constants(NamedTuple):
    """A layer's scale and shift, (C,), and its weight. None stands for the module's own weight, in the dtype of the call.

    Without a BN the shift is the convolution's bias. If the scale is folded into the weight, `scale` is None and the shift has
    the weight's dtype.
    """

    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None = None


class LiveConstants:
    """Constants of a plan's layers, made in each call.

    Args:
        layers: convolutions, and BNs that are part of a link.
        in_form: the forms of convolutions (forms.py), by the value that each makes.
        dtype: of the call.
    """

    def __init__(self, layers: list[Layer], in_form: dict[int, Form], dtype: torch.dtype):
        self.layers, self.dtype, self.forms = layers, dtype, in_form
        # A projection's bias is added to another layer's, so it has to be among the shifts.
        added = {form.adds for form in in_form.values() if form.folds}
        self._bare = [
            part
            for part in layers
            if isinstance(part, ConvPart) and part.bn is None and not _shift_is_read(part, in_form, added)
        ]
        self._parts = [part for part in layers if part.bn is not None or _shift_is_read(part, in_form, added)]
        self._on_cudnn = [
            part for part in layers if isinstance(part, ConvPart) and _on_cudnn(in_form.get(part.step.out))
        ]
        # Looked up in each call from the registries: nn.Module's own lookup takes ten times as long.
        self._sources = [source for part in self._parts for source in _sources(part)]
        self.norms: Any = None
        self.weights: Any = None
        self._copied: list[ConvPart] = []

    def has_vectors(self, part: Layer) -> bool:
        """Whether a scale or a shift is made for a part; if not, a kernel reads the convolution's own bias."""
        return part not in self._bare

    @property
    def tables(self) -> tuple[Any, ...]:
        """Tables that the launches read besides the model's tensors. They must live as long as a graph that replays them."""
        return self.norms, self.weights

    def read(self) -> dict[int, Constants]:
        """Makes all constants anew, by the value that each layer makes."""
        found, flat = self.vectors()
        if self._on_cudnn:
            self._copy_weights(found, flat)
        return found

    def vectors(self) -> tuple[dict[int, Constants], tuple[Tensor, Tensor] | None]:
        """All constants except weights, and the scales and shifts of all layers as two tensors if one launch wrote them."""
        found = {part.step.out: Constants(None, part.conv.bias) for part in self._bare}
        flat = None
        if self._parts:
            flat, vectors = self._scales_and_shifts()
            found.update((part.step.out, Constants(*pair)) for part, pair in zip(self._parts, vectors))
        return found, flat

    def _scales_and_shifts(self) -> tuple[tuple[Tensor, Tensor] | None, list[tuple[Tensor | None, Tensor | None]]]:
        """Scales and shifts of all parts: as two flat tensors if one launch wrote them, else None, and by part."""
        tensors = [registry[name] for registry, name in self._sources]
        eps = tuple([0.0 if part.bn is None else fusible.eps_of(part.bn) for part in self._parts])
        if self.norms is None or not self.norms.are(tensors, eps):
            before, self.norms = self.norms, None
            # The cudnn backend uses the kernel, too, if Triton is installed: PyTorch takes six launches per layer.
            if _on_triton(next(tensor for tensor in tensors if tensor is not None).device):
                from ...kernels import bn_scale_shift

                vectors = [tuple(tensors[i : i + 5]) for i in range(0, len(tensors), 5)]
                self.norms = bn_scale_shift.Layers(vectors, eps) if bn_scale_shift.takes(vectors) else None
            # New tables are needed, because vectors start elsewhere now.
            self.weights = self.weights if self.norms is before else None
        if self.norms is not None:
            flat = self.norms.launch()
            return flat, self.norms.split(*flat)
        return None, [_by_pytorch(part) for part in self._parts]

    def _copy_weights(self, found: dict[int, Constants], flat: tuple[Tensor, Tensor] | None) -> None:
        """Puts the weights that are folded, cast or laid out anew into `found`, in one launch where it takes them all."""
        if self.weights is None or not self.weights.is_of([part.conv.weight for part in self._copied]):
            self.weights, self._copied = self._table_of_weights(flat is not None)
        # A copy, because two layers read a projection's shift.
        before = dict(found)
        if self.weights is not None:
            for part, (weight, bias) in zip(self._copied, self.weights.launch(*(flat or (None, None)))):
                scale, shift, _ = before[part.step.out]
                folds = self.forms[part.step.out].folds
                found[part.step.out] = Constants(None, bias, weight) if folds else Constants(scale, shift, weight)
        for part in self._on_cudnn:
            form = self.forms[part.step.out]
            if form.folds and part not in self._copied:
                weight = scaled_weight(part.conv.weight, before[part.step.out].scale, self.dtype)
                found[part.step.out] = Constants(None, folded_bias(part, form, before, self.dtype), weight)

    def _table_of_weights(self, by_kernel: bool) -> tuple[Any, list[ConvPart]]:
        """The table of the weights that are copied, and their parts; (None, []) if there are none."""
        if not _on_triton(self._on_cudnn[0].conv.weight.device):
            return None, []
        from ...kernels import fold_weights

        starts = dict(zip((part.step.out for part in self._parts), self.norms.starts)) if by_kernel else {}
        layers: list[fold_weights.Layer] = []
        copied: list[ConvPart] = []
        for part in self._on_cudnn:
            form, weight = self.forms[part.step.out], part.conv.weight
            folds = form.folds and by_kernel
            if not (folds or (needs_copy(weight, self.dtype) and not form.folds)):
                continue
            if not fold_weights.takes(weight) or (layers and weight.dtype != layers[0].weight.dtype):
                continue
            at = starts.get(part.step.out) if folds else None
            has_scale = folds and part.bn is not None
            layers.append(
                fold_weights.Layer(
                    weight.detach(), at if has_scale else None, None if form.bare else at,
                    starts.get(form.adds) if folds and form.adds is not None else None,
                )
            )  # fmt: skip
            copied.append(part)
        return (fold_weights.Table(layers, self.dtype) if layers else None), copied


def _on_cudnn(form: Form | None) -> bool:
    return form is not None and form.on_cudnn


def _shift_is_read(part: Layer, in_form: dict[int, Form], added: set[int | None]) -> bool:
    """Whether a convolution without a BN has a bias that is added to a folded bias, its own or the adding convolution's."""
    form = in_form.get(part.step.out)
    folds = form is not None and form.folds
    return part.bn is None and bias_of(part) is not None and (part.step.out in added or folds)


def _sources(part: Layer) -> list[tuple[dict[str, Any], str]]:
    """Registry and name of a part's weight, bias, running_mean, running_var and conv_bias."""
    bn_places = [(part.bn, name) for name in ("weight", "bias", "running_mean", "running_var")]
    places = [*bn_places, (part.conv if isinstance(part, ConvPart) else None, "bias")]
    return [_NOTHING if module is None else (_registry(module, name), name) for module, name in places]


_NOTHING: tuple[dict[str, Any], str] = ({"nothing": None}, "nothing")


def _registry(module: nn.Module, name: str) -> dict[str, Any]:
    # In a replica (nn.DataParallel) parameters are attributes.
    registries = (module._parameters, module._buffers, module.__dict__)
    return next(registry for registry in registries if name in registry)


def bias_of(part: Layer) -> Tensor | None:
    """The bias of a layer's convolution."""
    return part.conv.bias if isinstance(part, ConvPart) else None


def _on_triton(device: torch.device) -> bool:
    return backends.why_not_on("triton", device, torch.float32) is None


def _by_pytorch(part: Layer) -> tuple[Tensor | None, Tensor | None]:
    return scale_shift(bias_of(part), part.bn)


def scaled_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weight with its scale folded in, in the layout of kernels and cuDNN; the weight's own memory if it needs no change."""
    weight = weight.detach()
    weight = weight if scale is None else weight * scale[:, None, None, None]
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    # A TMA descriptor needs an address that is a multiple of 16 bytes; a slice's need not be one.
    return weight if weight.data_ptr() % 16 == 0 else weight.clone(memory_format=torch.channels_last)


def folded_bias(part: ConvPart, form: Form, found: dict[int, Constants], dtype: torch.dtype) -> Tensor | None:
    """Bias of a convolution with a folded weight: its shift plus the shift of the projection that it adds."""
    shift = found[part.step.out].shift
    if form.adds is not None and (more := found[form.adds].shift) is not None:
        shift = more if shift is None else shift + more
    return None if form.bare or shift is None else shift.to(dtype)
