"""A program run twice: a world with plain PyTorch, and a world with the fused model, each with globals and classes of its own.

`World.look` flattens all that a program can be seen to change into one dictionary: the model's tensors, attributes and modes,
class attributes, globals, closures, the generators' states, and what was printed.
"""

from __future__ import annotations

import contextlib
import copy
import io
import linecache
import pickle
import random
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import resnet_kernels as rk
from helpers import block_step_names
from helpers.block_edits import Call
from helpers.block_grammar import Program

# A flat view of a program's state: leaves by their path. Tensors are copies.
Leaves = dict[str, Any]

_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = [name for name in nn.Module().__dict__ if name.endswith("_hooks")]


@dataclass
class Outcome:
    """All that a step showed: leaves, or an exception; warnings besides."""

    leaves: Leaves = field(default_factory=dict)
    error: BaseException | None = None
    warned: list[str] = field(default_factory=list)
    # What the package said of itself.
    said: list[str] = field(default_factory=list)


def _gradient_corrupts_memory(model: nn.Module) -> bool:
    """Whether plain PyTorch may write past the gradient of a strided 1x1 weight, on channels_last data (oneDNN #6035)."""
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        stride = conv.stride if isinstance(conv.stride, (tuple, list)) else (conv.stride,)
        weight = conv._parameters.get("weight", conv.__dict__.get("weight"))
        if weight is None or (tuple(weight.shape[2:]) == (1, 1) and weight.shape[1] < 16 and max(stride) > 1):
            return True
    return False


class World:
    """A program's module, its model, and what runs steps on it.

    name: of the Python module. double: everything is computed in fp64, as the oracle. seed: of all weights and images.
    """

    def __init__(self, program: Program, name: str, backend: str = "", double: bool = False, seed: int = 0):
        self.double, self.backend, self.dtype, self.seed = double, backend, torch.float32, seed
        source = program.source()
        file = f"<blocks {name}>"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        self.module = types.ModuleType(name)
        sys.modules[name] = self.module
        self.names: dict[str, Any] = self.module.__dict__
        exec(compile(source, file, "exec"), self.names)
        self.own = [key for key in self.names if not key.startswith("__")]
        self.takes = program.takes
        self.reseed()
        self.names.update((key, value) for key, value in vars(block_step_names).items() if not key.startswith("_"))
        self.names.update(
            copy=copy, pickle=pickle, np=np, handles=[], seen=[], at=lambda path: self.model.get_submodule(path),
            image=self.image, cast=self.cast, explain=self.explain, fuse=self.fuse, unfuse=self.unfuse,
        )  # fmt: skip
        self.model = self.names["make"]().eval()
        block_step_names.settle(self.model)
        if double:
            self.model.double()
        self.kept: list[tuple[Tensor, Tensor]] = []
        # The process has one set of global hooks; each world brings its own.
        self.global_hooks: dict[int, Any] = {}

    @property
    def model(self) -> nn.Module:
        return self.names["model"]

    @model.setter
    def model(self, value: nn.Module) -> None:
        self.names["model"] = value

    def reseed(self, number: int = 0) -> None:
        """Seeds all generators. number: of the step."""
        seed = 1000 * self.seed + number
        torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for all devices, which takes 2 ms
        random.seed(seed)
        np.random.seed(seed)

    # What steps call.

    def image(self, n: int) -> Tensor:
        x = torch.randn(n, *self.takes).to(self.dtype)
        return x.double() if self.double else x

    def cast(self, dtype: torch.dtype, module: nn.Module | None = None) -> None:
        if module is None:
            self.dtype = dtype
        (module or self.model).to(dtype)
        if self.double:
            (module or self.model).double()

    def explain(self) -> None:
        if self.backend:
            rk.explain(self.model)

    def fuse(self) -> None:
        if self.backend:
            rk.fuse_(self.model, backend=self.backend)

    def unfuse(self) -> None:
        if self.backend:
            rk.unfuse_(self.model)

    # Steps.

    def edit(self, line: str, number: int) -> Exception | None:
        self.reseed(number)
        try:
            with self._global_hooks(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(line, self.names)
        except Exception as error:  # the line may not fit this model
            return error
        return None

    def call(self, call: Call, number: int) -> Outcome:
        self.reseed(number)
        outcome, printed = Outcome(), io.StringIO()
        self.names["model"].zero_grad()
        x = eval(call.image, self.names)
        result = None
        with self._global_hooks(), warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
            warnings.simplefilter("always")
            try:
                with contextlib.ExitStack() as stack:
                    for expression in call.context:
                        stack.enter_context(eval(expression, self.names))
                    result = self.model(x)
                reached = [t for t in tensors_in(result) if t.requires_grad and t.grad_fn is not None]
                if reached and not _gradient_corrupts_memory(self.model):
                    grads = [torch.randn(t.shape).to(t.dtype) for t in reached]
                    torch.autograd.backward(reached, grads)
            except Exception as error:
                outcome.error = error
        for warning in caught:
            text = str(warning.message)
            (outcome.said if text.startswith("resnet_kernels:") else outcome.warned).append(text)
        outcome.leaves = self.look(printed.getvalue())
        flatten(result, "result", outcome.leaves, self)
        for i, t in enumerate(tensors_in(result)):
            outcome.leaves[f"result shares memory with the input {i}"] = shares(t, x)
            self.kept.append((t, t.detach().clone()))
        flatten(x.detach(), "input", outcome.leaves, self)
        if x.grad is not None:
            flatten(x.grad, "gradient of the input", outcome.leaves, self)
        return outcome

    @contextlib.contextmanager
    def _global_hooks(self) -> Iterator[None]:
        hooks = nn.modules.module._global_forward_hooks
        hooks.update(self.global_hooks)
        try:
            yield
        finally:
            self.global_hooks = dict(hooks)
            hooks.clear()

    def overwritten(self) -> int:
        """How many of the latest results are no longer as they were returned."""
        changed = sum(
            not torch.equal(t.detach().nan_to_num(), before.nan_to_num()) for t, before in self.kept if t.numel()
        )
        self.kept = [(t, t.detach().clone()) for t, _ in self.kept[-8:]]
        return changed

    def look(self, printed: str = "") -> Leaves:
        """All that can be seen to change."""
        leaves: Leaves = {"printed": printed}
        leaves["rng torch"] = hash(torch.get_rng_state().numpy().tobytes())
        leaves["rng python"] = hash(random.getstate())
        leaves["rng numpy"] = hash(pickle.dumps(np.random.get_state()))
        leaves["grad mode"], leaves["default dtype"] = torch.is_grad_enabled(), torch.get_default_dtype()
        for name in self.own:
            value = self.names[name]
            if isinstance(value, type):
                attributes = {k: v for k, v in vars(value).items() if not k.startswith("__") and not callable(v)}
                flatten(attributes, f"class {name}", leaves, self)
            elif name.startswith("peek_"):
                flatten(value(), f"closure {name}", leaves, self)
            elif not callable(value) and not isinstance(value, types.ModuleType):
                flatten(value, f"global {name}", leaves, self)
        flatten(self.names["seen"], "hooks saw", leaves, self)
        for path, module in self.model.named_modules(remove_duplicate=False):
            self._look_at(module, f"module {path}", leaves)
        return leaves

    def _look_at(self, module: nn.Module, path: str, leaves: Leaves) -> None:
        leaves[f"{path} class"] = type(module).__qualname__
        for name, value in vars(module).items():
            if name == "_rk_state" or (
                name in _MODULE_INTERNALS and name not in ("_parameters", "_buffers", "_modules")
            ):
                continue
            if name == "_modules":
                leaves[f"{path} children"] = tuple(value)
            elif name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    flatten(tensor, f"{path} {name[1:]} {key}", leaves, self)
                    if tensor is not None and tensor.grad is not None:
                        flatten(tensor.grad, f"{path} gradient {key}", leaves, self)
            elif not isinstance(value, types.FunctionType | types.MethodType):
                flatten(value, f"{path} attribute {name}", leaves, self)
        for name in _HOOKS:
            leaves[f"{path} {name}"] = len(getattr(module, name) or ())


def flatten(value: Any, path: str, leaves: Leaves, world: World, depth: int = 0) -> None:
    """Notes a value's leaves: tensors as detached copies that keep their strides, with their other properties besides."""
    if isinstance(value, Tensor):
        leaves[f"{path} is"] = (
            type(value).__name__,
            tuple(value.shape),
            value.dtype,
            value.requires_grad,
            value.is_inference(),
        )
        leaves[f"{path} strides"] = (
            tuple(s for s, n in zip(value.stride(), value.shape) if n > 1) if value.numel() else ()
        )
        try:
            leaves[path] = value.detach().as_subclass(Tensor).clone()
        except RuntimeError as error:  # its storage is gone
            leaves[path] = type(error).__name__
    elif isinstance(value, nn.Module):
        leaves[path] = f"module {type(value).__qualname__}"
    elif isinstance(value, Mapping):
        leaves[f"{path} is"] = (type(value).__name__, tuple(map(str, value)))
        for key, item in value.items():
            flatten(item, f"{path}[{key!r}]", leaves, world, depth + 1)
    elif isinstance(value, tuple | list):
        leaves[f"{path} is"] = (type(value).__name__, len(value))
        for i, item in enumerate(value):
            flatten(item, f"{path}[{i}]", leaves, world, depth + 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value) and depth < 4:
        leaves[f"{path} is"] = type(value).__name__
        flatten(vars(value), path, leaves, world, depth + 1)
    elif isinstance(value, float):
        leaves[path] = torch.tensor(value, dtype=torch.float64)
    else:
        leaves[path] = value if isinstance(value, int | str | bool | None | torch.dtype) else type(value).__name__


def tensors_in(value: Any) -> list[Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0
