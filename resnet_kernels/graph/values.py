"""The values of a trace: they stand for tensors, and record what forward does with them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch.fx
from torch import Tensor

from .reads import NOT_EMPTY, WITHOUT_GRADIENTS
from .recipe import CannotRead

if TYPE_CHECKING:
    from .tracing import Tracer


class Value(torch.fx.Proxy):
    """A tensor of a trace. Attributes of a real tensor that forward would set (requires_grad) can't be fused."""

    tracer: Tracer

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise CannotRead(f"its forward sets the attribute {name} of a tensor")
        super().__setattr__(name, value)

    @property  # type: ignore[misc]  # in the place of an attribute
    def __class__(self) -> type[Value]:
        # isinstance asks here before it says no.
        if self.tracer.observer is not None:
            self.tracer.observer.on_class_asked()
        return Value

    @property
    def requires_grad(self) -> bool:
        """False: checkpointed blocks ask. A call with gradients runs the module's own code."""
        self.tracer.assume(WITHOUT_GRADIENTS)
        return False

    @property
    def ndim(self) -> Any:
        """4 for the input: fused calls take images."""
        return self.dim()

    def dim(self) -> Any:
        """See `ndim`."""
        if self.node.op == "placeholder":
            return 4
        return self.tracer.create_proxy("call_method", "dim", (self,), {})

    def numel(self) -> Numel:
        """The number of elements, which may be compared with zero."""
        return Numel(self.tracer.create_node("call_method", "numel", (self.node,), {}), self.tracer)


class Numel(Value):
    """The number of elements of a tensor: not zero. A call with an empty tensor runs the module's own code."""

    def __eq__(self, other: object) -> Any:
        if type(other) is not int or other != 0:
            return self.tracer.create_proxy("call_function", operator.eq, (self, other), {})
        self.tracer.assume(NOT_EMPTY)
        return False

    def __hash__(self) -> int:
        return id(self)

    def __gt__(self, other: object) -> Any:
        if type(other) is not int or other != 0:
            return self.tracer.create_proxy("call_function", operator.gt, (self, other), {})
        self.tracer.assume(NOT_EMPTY)
        return True


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imod)
# torch.fx takes `x += y` for `x + y`, although it writes over x.
for _function in IN_PLACE:
    setattr(Value, f"__{_function.__name__}__", _in_place(_function))


class Tensors(dict[str, Any]):
    """A registry of parameters or buffers that gives a value of the trace in the place of each tensor."""

    def __init__(self, registry: Mapping[str, Tensor | None], path: str, tracer: Tracer):
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
