"""A module's own forward as an fx graph, whose leaves are the modules that can be fused.

The forward runs once, on copies of the module and of all modules in it, with a torch.fx.Proxy as its input. Copies share
tensors and settings with the user's modules, but no registry, list or dict: what forward writes there stays in the copy.
Each copy's `_compiled_call_impl`, which nn.Module.__call__ asks first, records the call. torch.fx.Tracer.trace patches
nn.Module instead, which other threads would see: they may call and trace the same modules meanwhile.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.proxy import GraphAppendingTracer

from .fusible import is_plain_sequential, is_wrapper, original_class
from .observer import Observer
from .reads import INTERNAL, Reads, is_plain
from .recipe import CannotRead

_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)


# A registry of hooks in a copy: calls don't reach it, and nothing can be registered there.
_NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class Traced(NamedTuple):
    """A forward as a graph, and what it read besides its input and its modules."""

    graph: torch.fx.Graph
    reads: Reads


class _Value(torch.fx.Proxy):
    """A tensor of a trace. Attributes of a real tensor that forward would set (requires_grad) can't be fused."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise CannotRead(f"its forward sets the attribute {name} of a tensor")
        super().__setattr__(name, value)


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imod)
# torch.fx takes `x += y` for `x + y`, although it writes over x.
for _function in _IN_PLACE:
    setattr(_Value, f"__{_function.__name__}__", _in_place(_function))


class _Tensors(dict[str, Any]):
    """A registry of parameters or buffers that gives a value of the trace in the place of each tensor."""

    def __init__(self, registry: Mapping[str, Tensor | None], path: str, tracer: _Tracer):
        super().__init__(registry)
        self._path, self._tracer = path, tracer

    def __getitem__(self, name: str) -> Any:
        tensor = super().__getitem__(name)
        return None if tensor is None else self._tracer.attribute(f"{self._path}.{name}".lstrip("."))

    def __setitem__(self, name: str, value: Any) -> None:
        raise CannotRead(f"its forward sets {f'{self._path}.{name}'.lstrip('.')}")

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a tensor."""
        return self[name] if name in self else default

    def values(self) -> Any:
        """The values of all tensors."""
        return [self[name] for name in self]

    def items(self) -> Any:
        """All tensors' names and values."""
        return [(name, self[name]) for name in self]


class _Tracer(GraphAppendingTracer):
    """Records calls of modules and functions. Looks into plain Sequentials, and into wrappers if asked to."""

    def __init__(self, into_wrappers: bool):
        super().__init__(torch.fx.Graph())
        self.into_wrappers = into_wrappers
        self.observer: Observer | None = None

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        """The value of a node."""
        return _Value(node, self)

    def attribute(self, path: str) -> Any:
        """The value of a parameter or a buffer."""
        return self.create_proxy("get_attr", path, (), {})

    def create_arg(self, a: Any) -> Any:
        """An argument as a part of the graph; tensors that are no parameters are constants."""
        if isinstance(a, Tensor):
            return self.create_node("get_attr", "a tensor of its own", (), {})
        return super().create_arg(a)

    def call(self, path: str, clone: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A call of a module by the forward."""
        if not path:
            raise CannotRead("its forward calls itself")
        if is_plain_sequential(clone) or (self.into_wrappers and is_wrapper(clone)):
            if self.observer is not None:
                self.observer.ran_into.add(path)
            # Without its hooks: they are the user's, and would see proxies.
            return type(clone).forward(clone, *args, **kwargs)
        return self.create_proxy("call_module", path, args, kwargs)

    def clone(self, module: nn.Module, training: bool) -> dict[str, nn.Module]:
        """Copies of a module and of all modules in it, by path; the module's own is at ""."""
        clones: dict[int, nn.Module] = {}
        paths: dict[str, nn.Module] = {}
        for path, child in module.named_modules():
            # No constructor and no __new__ runs: both are the user's.
            clones[id(child)] = paths[path] = object.__new__(original_class(child))
        for path, child in module.named_modules():
            clone = paths[path]
            state = clone.__dict__
            for name, value in child.__dict__.items():
                if name not in INTERNAL:
                    state[name] = _rebound(value, clones)
                elif isinstance(value, (dict, set)):
                    state[name] = _NOTHING  # hooks, which a forward may not add to
                else:
                    state[name] = value
            state["_modules"] = {n: None if m is None else clones[id(m)] for n, m in child._modules.items()}
            for name in ("_parameters", "_buffers"):
                state[name] = _Tensors(child.__dict__[name], path, self)
            state.update(training=training, _compiled_call_impl=functools.partial(self.call, path, clone))
            state.pop("_rk_state", None)
        return paths


def _rebound(value: Any, clones: Mapping[int, nn.Module]) -> Any:
    """A copy of an attribute in which modules are replaced by their clones: of containers, and of methods of the module."""
    if is_plain(value):
        return value
    if type(value) in (list, tuple, set):
        return type(value)(_rebound(v, clones) for v in value)
    if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        copy = value.copy()
        copy.update((key, _rebound(v, clones)) for key, v in value.items())
        return copy
    if isinstance(value, nn.Module):
        return clones.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in clones:
        return types.MethodType(value.__func__, clones[id(value.__self__)])
    return value


def trace(module: nn.Module, training: bool, into_wrappers: bool) -> Traced:
    """The graph of module.forward(x) in eval or train() mode, with all other arguments at their defaults.

    Neither the module nor anything else that its code can reach changes.

    Raises:
        CannotRead: with the reason.
    """
    cls = original_class(module)
    if "forward" in module.__dict__:
        raise CannotRead("its forward was set on the instance")
    if isinstance(module, torch.jit.ScriptModule):
        raise CannotRead("it is compiled by TorchScript")
    if cls.__call__ is not nn.Module.__call__:
        raise CannotRead(f"{cls.__name__} has a __call__ of its own")
    name = _input_name(cls.forward)
    tracer = _Tracer(into_wrappers)
    clones: dict[str, nn.Module] = {}
    x = tracer.create_proxy("placeholder", name, (), {})
    try:
        clones = tracer.clone(module, training)
        observer = tracer.observer = Observer([*clones.items()], cls.forward)
        with observer.running():
            result = cls.forward(clones[""], x)
        tracer.create_node("output", "output", (tracer.create_arg(result),), {})
        _check_written(tracer.graph, clones)
        return Traced(tracer.graph, observer.reads())
    except CannotRead:
        raise
    except Exception as error:  # forward is the user's code: it may raise anything
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CannotRead(f"its forward can't be traced ({first_line})") from error
    finally:
        # They refer to each other, and would hold the user's tensors until the garbage collector comes.
        tracer.observer = None
        for clone in clones.values():
            clone.__dict__.clear()


def _check_written(graph: torch.fx.Graph, clones: dict[str, nn.Module]) -> None:
    """Refuses a forward that writes to parameters or buffers, and drops those from the graph that it only looked at."""
    for node in reversed(graph.nodes):
        if mutates(node, clones) and (written := _attribute_behind(node.args[0])) is not None:
            raise CannotRead(f"its forward writes to {written}")
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _input_name(forward: Callable[..., Any]) -> str:
    """The name of a forward's input; all its other arguments have defaults."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in kinds:
        raise CannotRead("its forward takes no positional argument")
    for parameter in parameters[1:]:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise CannotRead(f"its forward takes *{parameter.name}")
        if parameter.default is inspect.Parameter.empty:
            raise CannotRead("its forward takes more than one argument")
    return parameters[0].name


def _attribute_behind(value: Any) -> str | None:
    """The parameter or buffer that a value is, or is a view of; None if it is another value."""
    while isinstance(value, torch.fx.Node) and value.op in ("call_method", "call_function") and value.args:
        value = value.args[0]
    return str(value.target) if isinstance(value, torch.fx.Node) and value.op == "get_attr" else None


def mutates(node: torch.fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node writes over its first input."""
    if not node.args:
        return False
    name = str(node.target)
    if node.op == "call_module":
        return bool(getattr(modules[name], "inplace", False))
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    return (
        node.target in _IN_PLACE
        or getattr(node.target, "__name__", "").endswith("_")
        or bool(node.kwargs.get("inplace", False))
        or (node.target is F.relu and len(node.args) > 1 and bool(node.args[1]))
    )


def is_add(node: torch.fx.Node) -> bool:
    """Whether a node adds two tensors."""
    if node.op == "call_function":
        tensors = sum(isinstance(a, torch.fx.Node) for a in node.args)
        return node.target in _ADD_FUNCTIONS and tensors == 2
    return node.op == "call_method" and node.target in ("add", "add_") and len(node.args) == 2
