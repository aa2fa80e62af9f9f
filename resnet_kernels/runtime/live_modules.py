"""The live modules behind a recipe: which they are now, and what about them keeps a call from being fused."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as nn_module

from ..graph import fusible
from ..graph.recipe import CallStep, ConvStep, NormStep, Recipe


def child_at(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path, None if it is gone."""
    for name in path.split("."):
        module = module._modules.get(name) if module is not None else None
    return module


_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether eager's call of this module would run a hook."""
    return any(module.__dict__[kind] for kind in _HOOK_DICTS)


def has_global_hooks() -> bool:
    """Whether a hook on all modules is registered."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


class Wiring:
    """The live modules behind a recipe's paths: looked up once, checked by identity in each call, list against list."""

    __slots__ = ("children", "classes", "convs", "dicts", "names", "registries", "steps", "widths", "with_modes")

    def __init__(self, module: nn.Module, recipe: Recipe):
        members = _members(module, recipe)
        self.names = [name for name, _ in members]
        self.children = [child for _, child in members]
        owners = [module, *(child for child in self.children if recipe.whole and child._modules)]
        self.registries = [(owner._modules, [*owner._modules.values()]) for owner in owners]
        self.classes = [*map(type, self.children)]
        self.dicts = [child.__dict__ for child in self.children]
        self.with_modes = [
            c for c in self.children if fusible.is_batch_norm(c) or (fusible.is_quiet(c) and type(c) is not nn.Identity)
        ]
        self.steps = [(step, *_modules_of(module, step)) for step in recipe.steps]
        self.convs = [conv for step, conv, _ in self.steps if isinstance(step, ConvStep)]
        # Channels that the block's input has to have: with others, eager has its own error to raise.
        self.widths = {
            conv.in_channels if isinstance(step, ConvStep) else bn.running_mean.numel()
            for step, conv, bn in self.steps
            if not isinstance(step, CallStep) and step.x == 0
        }

    def is_of(self, module: nn.Module) -> bool:
        return self.registries[0][0] is module._modules

    def is_current(self) -> bool:
        # Comparing lists of modules compares identities: nn.Module has no __eq__.
        return [*map(type, self.children)] == self.classes and all(
            [*registry.values()] == children for registry, children in self.registries
        )

    def why_not_now(self) -> str | None:
        """What keeps these modules from being fused in inference at this moment: a hook, a forward of their own, train()."""
        mode = self.in_training()
        return self.why_not_at_all() or (f"{mode} is in train() mode" if mode else None)

    def why_not_at_all(self) -> str | None:
        """What keeps them from it in training as well: a hook, a forward of their own."""
        for i, d in enumerate(self.dicts):
            if d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]:
                return f"a hook on {self.names[i]} has to fire"
            if "forward" in d:
                return f"{self.names[i]} got a forward of its own"
        return None

    def in_training(self) -> str | None:
        """The name of the first BN or dropout that train() mode makes another function; None if there is none."""
        for child in self.with_modes:
            if child.training and not (fusible.is_batch_norm(child) and fusible.is_frozen(child)):
                return self.names[self.children.index(child)]
        return None

    def why_not_trained(self) -> str | None:
        """What is in train() mode and has no kernel for it: statistics of several processes, dropout."""
        for child in self.with_modes:
            if child.training and type(child) is nn.SyncBatchNorm:
                return f"{self.names[self.children.index(child)]} is a SyncBatchNorm, whose statistics are of all processes"
            if child.training and fusible.is_quiet(child):
                return f"{self.names[self.children.index(child)]} is a {type(child).__name__} in train() mode"
        return None

    def needs_gradients(self) -> bool:
        """Whether one of the tensors that the steps read wants a gradient."""
        return any(needs_gradient(child) for _, conv, bn in self.steps for child in (conv, bn))

    def norms_need_gradients(self) -> bool:
        """Whether a BN's weight or bias wants a gradient."""
        return any(needs_gradient(bn) for _, _, bn in self.steps)


def needs_gradient(child: nn.Module | None) -> bool:
    """Whether a module's weight or bias wants a gradient."""
    # As attributes and not as parameters: in a replica (nn.DataParallel) they are plain tensors.
    return any(
        tensor is not None and tensor.requires_grad
        for tensor in (getattr(child, "weight", None), getattr(child, "bias", None))
    )


def _modules_of(module: nn.Module, step: ConvStep | NormStep | CallStep) -> tuple[nn.Module | None, nn.Module | None]:
    """(the convolution, or what a CallStep calls; the BN) of a step."""
    if isinstance(step, CallStep):
        return child_at(module, step.what) if step.is_module else None, None
    conv = child_at(module, step.conv) if isinstance(step, ConvStep) else None
    return conv, None if step.bn is None else child_at(module, step.bn)


def _members(module: nn.Module, recipe: Recipe) -> list[tuple[str, nn.Module]]:
    """(name, child) of everything a recipe depends on: all of a block, but only its own members for a run."""
    if not recipe.whole:
        return [(name, module._modules[name]) for name in recipe.modules]
    members = []
    for name, child in module._modules.items():
        if child is not None:
            members.append((name, child))
            if child._modules:
                members.extend(_members(child, recipe))
    return members


def wire(module: nn.Module, recipe: Recipe) -> Wiring | str:
    """Looks a recipe's modules up; the reason, if they no longer are what the recipe was read from."""
    if recipe.whole:
        same = fusible.signature(module) == recipe.signature
    else:
        children = ((name, module._modules.get(name)) for name in recipe.modules)
        same = tuple((name, fusible.original_class(child)) for name, child in children) == recipe.signature
    return Wiring(module, recipe) if same else "its submodules changed after it was fused: call fuse_ again"
