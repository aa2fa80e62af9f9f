"""A module's own forward as an fx graph, whose leaves are the modules that can be fused.

The forward runs once, on copies of the module and of all modules in it, with a torch.fx.Proxy as its input. Copies share
tensors and settings with the user's modules, but no registry, list or dict: what forward writes there stays in the copy.
Each copy's `_compiled_call_impl`, which nn.Module.__call__ asks first, records the call. torch.fx.Tracer.trace patches
nn.Module instead, which other threads would see: they may call and trace the same modules meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import threading
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.proxy import GraphAppendingTracer

from .fusible import has_own_call, is_known, is_plain_sequential, is_wrapper, original_class
from .observer import Observer
from .own_conv import is_own_conv, own_conv_path
from .reads import INTERNAL, Reads, is_plain
from .recipe import CannotRead
from .values import IN_PLACE, Tensors, Value

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)


# A registry of hooks in a copy: calls don't reach it, and nothing can be registered there.
_NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class Traced(NamedTuple):
    """A forward as a graph, and what it read besides its input and its modules.

    ran_into: the paths of the modules whose own forward ran; "" is the traced one.
    """

    graph: torch.fx.Graph
    reads: Reads
    ran_into: frozenset[str]


class Tracer(GraphAppendingTracer):
    """Records calls of modules and functions.

    It looks into plain Sequentials and convolutions with code of their own, and if asked to into wrappers and into modules
    that are called with anything but one tensor.

    Args:
        into: what else to look into.
        convs: paths of convolutions with code of their own that can be read.
    """

    def __init__(self, into: Into, convs: Collection[str]):
        super().__init__(torch.fx.Graph())
        self._into, self._convs = into, convs
        self.observer: Observer | None = None
        self.assumptions: set[str] = set()

    def assume(self, what: str) -> None:
        """Notes what a call has to be like for the trace to stand for it."""
        self.assumptions.add(what)

    def proxy(self, node: Node) -> torch.fx.Proxy:
        """The value of a node."""
        return Value(node, self)

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
        is_asked_for = path in self._convs or path in self._into.gates
        if is_plain_sequential(clone) or is_asked_for or self._looks_into(clone, args, kwargs):
            if self.observer is not None:
                self.observer.ran_into.add(path)
            # Without its hooks: they are the user's, and would see proxies.
            return type(clone).forward(clone, *args, **kwargs)
        return self.create_proxy("call_module", path, args, kwargs)

    def _looks_into(self, clone: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if self._into.wrappers and is_wrapper(clone):
            return True
        takes_one = len(args) == 1 and not kwargs and isinstance(args[0], torch.fx.Proxy)
        return self._into.lists and not takes_one and not is_known(clone) and "forward" not in clone.__dict__

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
                state[name] = Tensors(child.__dict__[name], path, self)
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


class Into(NamedTuple):
    """Modules that a trace looks into.

    wrappers: see fusible.is_wrapper. lists: those called with anything but one tensor. gates: the paths of those that are
    squeeze-and-excitations (gates.py).
    """

    wrappers: bool = False
    lists: bool = False
    gates: frozenset[str] = frozenset()


_memory = threading.local()


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Spans the reading of a model that nobody changes meanwhile: a module is traced once, however often it is asked for."""
    before = getattr(_memory, "traces", None)
    _memory.traces = {} if before is None else before
    try:
        yield
    finally:
        _memory.traces = before


def trace(module: nn.Module, training: bool, into: Into = Into()) -> Traced:
    """The graph of module.forward(x) in eval or train() mode, with all other arguments at their defaults.

    Neither the module nor anything else that its code can reach changes.

    Raises:
        CannotRead: with the reason.
    """
    traces = getattr(_memory, "traces", None)
    if traces is None:
        return _trace(module, training, into)
    key = id(module), training, into
    if key not in traces:
        try:
            traces[key] = _trace(module, training, into)
        except CannotRead as error:
            traces[key] = str(error)
    if isinstance(traces[key], str):
        raise CannotRead(traces[key])
    found: Traced = traces[key]
    return found


def _trace(module: nn.Module, training: bool, into: Into) -> Traced:
    cls = original_class(module)
    if "forward" in module.__dict__:
        raise CannotRead("its forward was set on the instance")
    if isinstance(module, torch.jit.ScriptModule):
        raise CannotRead("it is compiled by TorchScript")
    if has_own_call(cls):
        raise CannotRead(f"{cls.__name__} has a __call__ of its own")
    name = _input_name(cls.forward)
    convs = [path for path, child in module.named_modules() if path and is_readable_conv(child, training)]
    tracer = Tracer(into, convs)
    clones: dict[str, nn.Module] = {}
    x = tracer.create_proxy("placeholder", name, (), {})
    try:
        clones = tracer.clone(module, training)
        observer = tracer.observer = Observer([*clones.items()], cls.forward)
        with observer.running():
            result = cls.forward(clones[""], x)
        tracer.create_node("output", "output", (tracer.create_arg(result),), {})
        _check_written(tracer.graph, clones)
        reads = replace(observer.reads(), assumes=frozenset(tracer.assumptions))
        return Traced(tracer.graph, reads, frozenset(observer.ran_into))
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


def is_readable_conv(module: nn.Module, training: bool) -> bool:
    """Whether a module is a Conv2d of a user's class that can be read: its own convolution, and what it calls behind it."""
    if not isinstance(module, nn.Conv2d) or is_known(module) or "forward" in module.__dict__:
        return False
    try:
        graph = trace(module, training).graph
    except CannotRead:
        return False
    convs = [node for node in graph.nodes if is_own_conv(node)]
    return len(convs) == 1 and own_conv_path(convs[0], {"": module}) == ""


def _check_written(graph: torch.fx.Graph, clones: dict[str, nn.Module]) -> None:
    """Refuses a forward that writes to parameters or buffers, and drops what it only looked at from the graph."""
    for node in reversed(graph.nodes):
        if mutates(node, clones) and (written := _attribute_behind(node.args[0])) is not None:
            raise CannotRead(f"its forward writes to {written}")
        if (node.op == "get_attr" or node.target == "numel") and not node.users:
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
    while isinstance(value, Node) and value.op in ("call_method", "call_function") and value.args:
        value = value.args[0]
    return str(value.target) if isinstance(value, Node) and value.op == "get_attr" else None


def mutates(node: Node, modules: Mapping[str, nn.Module]) -> bool:
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
        node.target in IN_PLACE
        or getattr(node.target, "__name__", "").endswith("_")
        or bool(node.kwargs.get("inplace", False))
        or (node.target is F.relu and len(node.args) > 1 and bool(node.args[1]))
    )


def is_identity(node: Node) -> bool:
    """Whether a node gives its input's values: a clone, or dropout that is off."""
    if node.op == "call_method" or node.target is torch.clone:
        return str(node.target) == "clone" or node.target is torch.clone
    if node.op != "call_function" or node.target not in _DROPOUTS:
        return False
    given = dict(zip(("input", "p", "training"), node.args)) | node.kwargs
    return given.get("training", True) is False


def is_add(node: Node) -> bool:
    """Whether a node adds two tensors."""
    if node.op == "call_function":
        tensors = sum(isinstance(a, Node) for a in node.args)
        return node.target in _ADD_FUNCTIONS and tensors == 2
    return node.op == "call_method" and node.target in ("add", "add_") and len(node.args) == 2
