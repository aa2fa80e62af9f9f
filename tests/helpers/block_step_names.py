"""What steps call besides the model's own methods."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook as register_module_forward_hook


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def settle(model: nn.Module) -> None:
    """Gives norms the statistics of a trained model."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("running_var", "running_mean")):
            nn.init.uniform_(tensor, 0.5, 2)


def like(t: Tensor) -> Tensor:
    """New values: positive where variances have to be."""
    return torch.rand(t.shape).to(t.dtype) + 0.1


def resize(t: Tensor) -> None:
    """Frees a tensor's storage and brings it back, as sharded training does."""
    kept, storage = t.detach().clone(), t.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    with torch.no_grad():
        t.copy_(kept)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def sgd(t: Tensor) -> None:
    t.grad = torch.ones_like(t)
    torch.optim.SGD([t], 0.1).step()


def step(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), 0.1).step()


def patch_class(module: nn.Module) -> None:
    """Gives a module a class of its own whose forward does more."""
    cls = type(module)
    module.__class__ = type("Patched", (cls,), {"forward": lambda self, x: cls.forward(self, x) + 1})


class Picture(torch.Tensor):
    """A user's subclass of Tensor that changes nothing."""
