"""The live modules behind a recipe: their identity now, and what about them keeps a call from being fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from ..graph import fusible
from ..graph.fusible import BatchNorm
from ..graph.layouts import prefixes
from ..graph.reads import LiveReads, Reads
from ..graph.recipe import CallStep, ConvStep, PReLUAt, Recipe, Step
from .parts import CallPart, ConvPart, NormPart, PackName, Part, bn_tensors, pack_name


def child_at(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, the module itself at ""; None if it is gone."""
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = None if found is None else found._modules.get(name)
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether eager's call of this module would run a hook."""
    d = module.__dict__
    return bool(d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"])


def has_global_hooks() -> bool:
    """Whether a hook on all modules is registered."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


class LiveModules:
    """The modules that a recipe's paths lead to: looked up once, and checked by identity in each call, list against list."""

    __slots__ = (
        "_readers",
        "children",
        "classes",
        "convs",
        "dicts",
        "names",
        "others",
        "packed_parts",
        "parts",
        "reads",
        "registries",
        "statistics",
        "with_modes",
    )  # fmt: skip

    def __init__(self, module: nn.Module, recipe: Recipe):
        members = _members(module, recipe)
        self.names = [name for name, _ in members]
        self.children = [child for _, child in members]
        above = {path for name in recipe.modules for path in prefixes(name)[:-1]} if not recipe.whole else ()
        around = (child_at(module, path) for path in sorted(above))
        owners = [module, *(child for child in self.children if recipe.whole and child._modules)]
        owners += [owner for owner in around if owner is not None]
        self.registries = [(owner._modules, [*owner._modules.values()]) for owner in owners]
        self.classes = [*map(type, self.children)]
        self.dicts = [child.__dict__ for child in self.children]
        self.with_modes = [
            c for c in self.children if fusible.is_batch_norm(c) or (fusible.is_quiet(c) and type(c) is not nn.Identity)
        ]
        # Modules whose own code ran when the forward was read, so that their mode may matter.
        self.others = [c for c in self.children if c._modules or not fusible.is_known(c)]
        self.parts = [_part(module, step) for step in recipe.steps]
        norms = [part.bn for part in self.parts if not isinstance(part, CallPart) and part.bn is not None]
        self.statistics = [bn._buffers for bn in norms if "running_mean" in bn._buffers]
        self.reads = None if torch.compiler.is_compiling() else live_reads(module, recipe.reads)
        self.convs = [part.conv for part in self.parts if isinstance(part, ConvPart)]
        # What the CPU keeps copies of, by the paths of a convolution and its BN, or of a BN before one.
        self.packed_parts: list[tuple[PackName, nn.Conv2d | None, BatchNorm | None]] = [
            (pack_name(part), part.conv if isinstance(part, ConvPart) else None, part.bn)
            for part in self.parts
            if not isinstance(part, CallPart)
        ]
        self._readers = [_reader(part) for part in self.parts if not isinstance(part, CallPart) and part.step.x == 0]

    @property
    def widths(self) -> set[int]:
        """Channels that the block's input has to have: with others, eager has its own error to raise.

        Eager reads them from the tensors. A pruned convolution's `in_channels` may be out of date.
        """
        return {
            tensor.shape[dim] * (1 if conv is None else conv.groups)
            for registry, name, dim, conv in self._readers
            if (tensor := registry.get(name)) is not None
        }

    def is_of(self, module: nn.Module) -> bool:
        """Whether these are the children of this very module, and not those of the one that it is a replica of."""
        return self.registries[0][0] is module._modules

    def is_current(self, module: nn.Module) -> bool:
        """Whether every module is still in its place, under its class, and what the forward reads is as it was."""
        # Comparing lists of modules compares identities: nn.Module has no __eq__.
        return (
            [*map(type, self.children)] == self.classes
            and all([*registry.values()] == children for registry, children in self.registries)
            and (self.reads is None or self.reads.changed(module) is None)
            and not any(r.get("running_mean") is None or r.get("running_var") is None for r in self.statistics)
        )

    def why_not_now(self) -> str | None:
        """The reason why the modules do not run fused in inference now: a hook, a forward of their own, train()."""
        mode = self.in_training()
        return self.why_not_at_all() or (f"{mode} is in train() mode" if mode else None)

    def why_not_at_all(self) -> str | None:
        """The reason why they run fused neither in inference nor in training: a hook, a forward of their own."""
        for i, d in enumerate(self.dicts):
            if d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]:
                return f"a hook on {self.names[i]} has to fire"
            if "forward" in d or "_conv_forward" in d or "_compiled_call_impl" in d:
                return f"{self.names[i]} got a forward of its own"
        return None

    def runs_other_code(self, recipe: Recipe) -> bool:
        """Whether a module in train() mode has a forward there that isn't the recipe's."""
        return not recipe.trains and any(child.training for child in self.others)

    def in_training(self) -> str | None:
        """The name of the first BN or dropout that train() mode makes another function; None if there is none."""
        for child in self.with_modes:
            if child.training and not (fusible.is_batch_norm(child) and fusible.is_frozen(child)):
                return self.names[self.children.index(child)]
        return None

    def why_not_trained(self) -> str | None:
        """The module in train() mode that has no kernel for it: a BN over several processes, or dropout."""
        for child in self.with_modes:
            if child.training and type(child) is nn.SyncBatchNorm:
                return f"{self.names[self.children.index(child)]} is a SyncBatchNorm, whose statistics are of all processes"
            if child.training and fusible.is_quiet(child):
                return f"{self.names[self.children.index(child)]} is a {type(child).__name__} in train() mode"
        return None

    def needs_gradients(self) -> bool:
        """Whether a weight or a bias that the steps read wants a gradient."""
        return any(needs_gradient(module) for part in self.parts for module in part if isinstance(module, nn.Module))

    def is_refused(self, dtype: torch.dtype) -> bool:
        """Whether eager refuses to compute with the steps' tensors on an input of `dtype`: one is missing, or dtypes mix."""
        wide = {dtype, torch.float32} if dtype in (torch.float16, torch.bfloat16) else {dtype}
        for part in self.parts:
            if isinstance(part, ConvPart):
                bias = part.conv.bias
                if (
                    part.conv.weight is None
                    or part.conv.weight.dtype != dtype
                    or (bias is not None and bias.dtype != dtype)
                ):
                    return True
            if not isinstance(part, CallPart) and part.prelu is not None and _refuses(part, dtype):
                return True
            if not isinstance(part, CallPart) and part.bn is not None:
                tensors = bn_tensors(part.bn)
                dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
                is_lax = isinstance(part.bn, nn.modules.batchnorm._BatchNorm)  # a frozen BN has no affine=False
                if len(dtypes) > 1 or not dtypes <= wide or (not is_lax and any(tensor is None for tensor in tensors)):
                    return True
        return False

    def norms_need_gradients(self) -> bool:
        """Whether a BN's weight or bias wants a gradient."""
        return any(not isinstance(part, CallPart) and needs_gradient(part.bn) for part in self.parts)


def needs_gradient(child: nn.Module | None) -> bool:
    """Whether a module's weight or bias wants a gradient."""
    # As attributes and not as parameters: in a replica (nn.DataParallel) they are plain tensors.
    return any(
        tensor is not None and tensor.requires_grad
        for tensor in (getattr(child, "weight", None), getattr(child, "bias", None))
    )


def _refuses(part: ConvPart | NormPart, dtype: torch.dtype) -> bool:
    """Whether eager's PReLU refuses what a part makes, or takes slopes in a form that our kernels don't."""
    assert part.prelu is not None
    slopes = part.prelu.weight
    made_by = part.conv.weight if isinstance(part, ConvPart) else part.bn.running_mean
    channels = None if made_by is None else made_by.shape[0]
    return slopes is None or slopes.dtype != dtype or slopes.dim() != 1 or slopes.shape[0] not in (1, channels)


def _part(module: nn.Module, step: Step) -> Part:
    # What is at a path is of the class that `wire` compared.
    if isinstance(step, CallStep):
        return CallPart(step, child_at(module, step.what) if step.is_module else None)
    bn: Any = None if step.bn is None else child_at(module, step.bn)
    prelu: Any = child_at(module, step.activation.module) if isinstance(step.activation, PReLUAt) else None
    if isinstance(step, ConvStep):
        conv: Any = child_at(module, step.conv)
        return ConvPart(step, conv, bn, prelu=prelu)
    return NormPart(step, bn, prelu=prelu)


def _reader(part: ConvPart | NormPart) -> tuple[dict[str, Any], str, int, nn.Conv2d | None]:
    """Registry, name and dimension of a tensor that tells the channels of a part's input, and its convolution."""
    if isinstance(part, NormPart):
        return part.bn._buffers, "running_mean", 0, None
    # In a replica (nn.DataParallel) parameters are attributes.
    registry = part.conv._parameters if "weight" in part.conv._parameters else part.conv.__dict__
    return registry, "weight", 1, part.conv


def _members(module: nn.Module, recipe: Recipe) -> list[tuple[str, nn.Module]]:
    """(name, child) of everything that a recipe depends on: all of a block, but only its members for a run."""
    if not recipe.whole:
        return [(name, child) for name in recipe.modules if (child := child_at(module, name)) is not None]
    members = []
    for name, child in module._modules.items():
        if child is not None:
            members.append((name, child))
            if child._modules:
                members.extend(_members(child, recipe))
    return members


def live_reads(module: nn.Module, reads: Reads | None) -> LiveReads | None:
    """What a module's forward reads, bound to this very module."""
    if reads is None:
        return None
    owners = {path: module if not path else child_at(module, path) for path in {read.path for read in reads.inside}}
    return LiveReads(module, {path: owner for path, owner in owners.items() if owner is not None}, reads)


def why_changed(name: str) -> str:
    """The reason that a report shows for an attribute or a flag that changed."""
    return f"{name}, which its forward depends on, changed after it was fused: call fuse_ again"


def wire(module: nn.Module, recipe: Recipe) -> LiveModules | str:
    """Looks a recipe's modules up; returns a reason if they no longer are what the recipe was read from."""
    if recipe.whole:
        same = fusible.signature(module) == recipe.signature
    else:
        children = [(name, child_at(module, name)) for name in recipe.modules]
        same = recipe.signature == tuple(
            (name, type(None) if child is None else fusible.original_class(child)) for name, child in children
        )
    if not same:
        return "its submodules changed after it was fused: call fuse_ again"
    for step in recipe.steps:
        if isinstance(step, CallStep):
            continue
        if step.bn is not None and (bn := child_at(module, step.bn)) is not None and (reason := fusible.why_not_bn(bn)):
            return f"{step.bn} {reason}"
    live = LiveModules(module, recipe)
    return live if live.reads is None or (name := live.reads.changed(module)) is None else why_changed(name)
