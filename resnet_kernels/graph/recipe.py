"""What reading a module gives, as data: the steps of a block, and the runs of a container.

A recipe holds paths, no module and no tensor. Each call of a fused module looks its live children up by them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..kernels.activations import RELU, Activation

if TYPE_CHECKING:
    from torch import nn

    from .reads import Reads


class PReLUAt(NamedTuple):
    """PReLU at the end of a step. module: its path; each call reads its slopes."""

    module: str

    def __str__(self) -> str:
        return self.module

    @property
    def gain(self) -> float:
        """As `Activation.gain`: slopes may be anything."""
        return math.inf


class CannotRead(Exception):
    """A module cannot be fused; the message is the reason that the report shows."""


@dataclass(frozen=True)
class ConvStep:
    """act(bn(conv(values[x])) + values[residual]) -> values[out]: a convolution and what one kernel does after it.

    overwrites_residual: the sum may be written over the residual, because a convolution of ours made it and no later step
    reads it. frees: the values that no later step reads.
    """

    conv: str
    bn: str | None
    activation: Activation | PReLUAt | None
    x: int
    out: int
    residual: int | None = None
    overwrites_residual: bool = False
    frees: tuple[int, ...] = ()

    @property
    def inputs(self) -> tuple[int, ...]:
        """The numbers of the values that the step reads."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    def __str__(self) -> str:
        # A convolution with code of its own may be the module that is fused.
        return _joined(self.conv or "conv", self.bn, self.residual is not None and "add", self.activation)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(_with_activation(state))


@dataclass(frozen=True)
class NormStep:
    """act(bn(values[x]) + values[residual]) -> values[out]: a BN that comes before its convolution."""

    bn: str
    activation: Activation | PReLUAt | None
    x: int
    out: int
    residual: int | None = None
    frees: tuple[int, ...] = ()

    @property
    def inputs(self) -> tuple[int, ...]:
        """The numbers of the values that the step reads."""
        return (self.x,) if self.residual is None else (self.x, self.residual)

    def __str__(self) -> str:
        return _joined(self.bn, self.residual is not None and "add", self.activation)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(_with_activation(state))


@dataclass(frozen=True)
class CallStep:
    """values[out] = what(*values[inputs]): a child module by its path, an add, an activation or both, an average or a gate.

    what: the path, or a name such as "add", "silu", "add_relu"; "mean", of whole images; "mul", "sigmoid_mul" or
    "hardsigmoid_mul", which multiply them. activation: comes last; None for a module, and for an add.
    """

    what: str
    is_module: bool
    inputs: tuple[int, ...]
    out: int
    frees: tuple[int, ...] = ()
    activation: Activation | None = None

    def __str__(self) -> str:
        return self.what

    def __setstate__(self, state: dict[str, Any]) -> None:
        older = {"relu": not state["is_module"] and state["what"] in ("relu", "add_relu")}
        self.__dict__.update(_with_activation(state if "activation" in state else state | older))


def _joined(*names: str | bool | Activation | PReLUAt | None) -> str:
    return "+".join(str(name) for name in names if name)


def _with_activation(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a step, of a pickle too whose version knew no activation but ReLU: `relu` said whether there is one."""
    if "activation" in state:
        return state
    return {name: value for name, value in state.items() if name != "relu"} | {
        "activation": RELU if state["relu"] else None
    }


Step = ConvStep | NormStep | CallStep


@dataclass(frozen=True)
class Recipe:
    """The forward of a block, or a run of a container, as steps in order.

    values[0] is the input. `result` is the number of the output.

    modules: the paths of all child modules that eager would call, for hooks and train() to be looked up.
    signature: names and types of the modules that the recipe was read from; with another signature it does not hold.
    whole: it is a block's whole forward, and not a run.
    trains: the forward is the same in train() mode.
    reads: what the forward reads besides; with other values the recipe does not hold. None in a run: the container has them.
    """

    steps: tuple[Step, ...]
    result: int
    modules: tuple[str, ...]
    signature: tuple[Any, ...]
    whole: bool = True
    trains: bool = True
    reads: Reads | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return " -> ".join(str(step) for step in self.steps)

    @property
    def convolutions(self) -> int:
        """The number of its convolutions."""
        return sum(isinstance(step, ConvStep) for step in self.steps)

    @property
    def fuses(self) -> bool:
        """Whether a step does more than one of eager's own calls does."""
        return any(map(_does_more, self.steps))


def _does_more(step: Step) -> bool:
    if isinstance(step, CallStep):
        return step.activation is not None and len(step.inputs) == 2
    has_bn = isinstance(step, ConvStep) and step.bn is not None
    return step.activation is not None or step.residual is not None or has_bn


class ChainPart(NamedTuple):
    """A recipe in a chain.

    path: of the fused module that it is of, "" for the container. run: its name there; None for the module as a whole.
    """

    path: str
    run: str | None


class Head(NamedTuple):
    """What follows the last block of a classifier: a global average, and a linear layer.

    first: the path of nn.AdaptiveAvgPool2d, or, if `is_norm`, of a BN whose ReLU and average the forward computes by itself.
    flatten: the path of nn.Flatten; None where the forward flattens by itself.
    linear: the path of nn.Linear, or, if `is_norm`, of a 1x1 convolution.
    """

    first: str
    flatten: str | None
    linear: str
    is_norm: bool = False


class Chain(NamedTuple):
    """Modules that a container's forward calls one after the other, each on what only the one before it has made.

    members: the paths of what the forward calls. parts: all recipes in them, in order. head: what follows them; its pool or
    BN, and its linear layer, are members, too. around: the nn.Sequentials around its parts, whose forwards don't run, with the
    names of their children: with others, something else runs between its parts.
    """

    members: tuple[str, ...]
    parts: tuple[ChainPart, ...]
    head: Head | None = None
    around: tuple[tuple[str, tuple[str, ...]], ...] = ()


class Slot(NamedTuple):
    """A value of a container's forward, by its number, among an instruction's arguments."""

    value: int


class Instruction(NamedTuple):
    """An operation of a container's forward.

    kind: "run" (a run of the plan), "module", "function", "method", "attribute" (a parameter or a buffer) or "add" (the sum of
    two values, and the activation that follows it).
    target: the run's name, the module's path, the name of a function (pure_operations.FUNCTIONS) or of a method, the
    attribute's path, "add" or a name such as "add_relu".
    args, kwargs: with a Slot for each value; tuples, lists, dicts and slices may hold them.
    out: the number of the value that it makes.
    sees_layout: it may compute something else, or fail, if its input lies in memory in another order than in eager.
    frees: the values that no later instruction reads.
    apart: of a run, its operations one by one.
    """

    kind: str
    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    out: int
    sees_layout: bool = False
    frees: tuple[int, ...] = ()
    apart: tuple[Instruction, ...] = ()


class Watched(NamedTuple):
    """A module that was looked into, or that does nothing in eval mode.

    cls, signature: as they were. inlined: its forward does not run, and no hook fires. has_mode: it may compute something else
    in the mode that the container is not in.
    """

    path: str
    cls: type[nn.Module]
    signature: tuple[Any, ...]
    inlined: bool
    has_mode: bool = True


@dataclass(frozen=True)
class ContainerPlan:
    """What can be fused in a container.

    runs: a short recipe by the path of its convolution. absorbed: the BNs, ReLUs and max-pools that a run stands for.
    names: the names of the container's children; with other children its forward may be another.
    entry: the run that is the only reader of the container's input. trains: the forward is the same in train() mode.
    reads: what the forward reads besides its input and its modules; with other values the plan does not hold.
    called: the paths of the modules that the forward calls, down to fused ones. seen: those whose output is read by code
    that sees its layout; "" for the container's input. apart: those whose input comes from such code. outputs: for each tensor
    that it returns, whether it has our layout (see layouts.py).
    quiet: nothing that the forward runs can change a fused block, so that all may be checked before it runs.
    chains: the fused modules and runs that may run as one.
    instructions: the whole forward, which runs in its place; empty where the forward's Python code runs. Value 0 is the input,
    and `result` is what it returns, with a Slot for each value. watched: the modules whose forwards the instructions rest on.
    """

    runs: dict[str, Recipe]
    absorbed: tuple[str, ...]
    names: tuple[str, ...]
    entry: str | None = None
    trains: bool = True
    called: tuple[str, ...] = ()
    seen: tuple[str, ...] = ("",)
    apart: tuple[str, ...] = ()
    outputs: tuple[bool, ...] = ()
    quiet: bool = False
    chains: tuple[Chain, ...] = ()
    reads: Reads | None = field(default=None, compare=False)
    instructions: tuple[Instruction, ...] = ()
    result: Any = None
    watched: tuple[Watched, ...] = ()

    @property
    def convolutions(self) -> int:
        """The number of convolutions in its runs."""
        return sum(recipe.convolutions for recipe in self.runs.values())
