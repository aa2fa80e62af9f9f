"""A module's own forward as an fx graph, whose leaves are the modules that can be fused."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from .fusible import is_plain_sequential, is_wrapper, original_class
from .recipe import CannotRead

_RELU_FUNCTIONS = (torch.relu, torch.relu_, F.relu, F.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)


class _Tracer(torch.fx.Tracer):
    """Looks into plain Sequentials, and into wrappers if asked to; every other child is a leaf."""

    def __init__(self, into_wrappers: bool):
        super().__init__()
        self.into_wrappers = into_wrappers

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return not (is_plain_sequential(module) or (self.into_wrappers and is_wrapper(module)))

    def call_module(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.is_leaf_module(module, ""):
            return super().call_module(module, forward, args, kwargs)
        # Without its hooks: they are the user's, and would see proxies.
        return original_class(module).forward(module, *args, **kwargs)


def trace(module: nn.Module, training: bool, into_wrappers: bool) -> torch.fx.Graph:
    """The graph of module.forward(x) in eval or train() mode, with all other arguments at their defaults.

    Raises:
        CannotRead: with the reason.
    """
    cls = original_class(module)
    if "forward" in module.__dict__:
        raise CannotRead("its forward was set on the instance")
    if isinstance(module, torch.jit.ScriptModule):
        raise CannotRead("it is compiled by TorchScript")
    if any(getattr(cls, name) is not getattr(object, name) for name in ("__reduce__", "__reduce_ex__")):
        raise CannotRead(f"{cls.__name__} has a way of pickling of its own")
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in kinds:
        raise CannotRead("its forward takes no positional argument")
    defaults = {}
    for parameter in parameters[1:]:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise CannotRead(f"its forward takes *{parameter.name}")
        if parameter.default is inspect.Parameter.empty:
            raise CannotRead("its forward takes more than one argument")
        defaults[parameter.name] = parameter.default
    # A shallow copy: what forward may write to `self` (a counter, a kept activation) does not reach the user's module.
    clone: nn.Module = object.__new__(cls)  # a class's own __new__ may run its constructor, as FSDP's does
    clone.__dict__.update(module.__dict__, training=training)
    for registry in ("_modules", "_parameters", "_buffers"):
        clone.__dict__[registry] = copy.copy(module.__dict__[registry])
    before = dict(clone.__dict__)
    try:
        graph = _Tracer(into_wrappers).trace(clone, concrete_args=defaults or None)
    except CannotRead:
        raise
    except Exception as error:  # forward is the user's code: it may raise anything
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CannotRead(f"its forward can't be traced ({first_line})") from error
    if clone.__dict__.keys() != before.keys() or any(clone.__dict__[k] is not v for k, v in before.items()):
        raise CannotRead("its forward sets attributes")
    return graph


def mutates(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node writes over its first input."""
    name = str(node.target)
    if node.op == "call_module":
        return bool(getattr(modules[name], "inplace", False))
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return (
        node.target in (operator.iadd, torch.relu_, F.relu_)
        or bool(node.kwargs.get("inplace", False))
        or (node.target is F.relu and len(node.args) > 1 and bool(node.args[1]))
    )


def is_relu_function(node: torch.fx.Node) -> bool:
    """Whether a node calls a ReLU that is no module."""
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    return node.op == "call_method" and node.target in ("relu", "relu_")


def is_add(node: torch.fx.Node) -> bool:
    """Whether a node adds two tensors."""
    if node.op == "call_function":
        tensors = sum(isinstance(a, torch.fx.Node) for a in node.args)
        return node.target in _ADD_FUNCTIONS and tensors == 2
    return node.op == "call_method" and node.target in ("add", "add_") and len(node.args) == 2
