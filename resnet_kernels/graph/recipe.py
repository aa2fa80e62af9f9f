"""What reader.py finds, as data: the steps of a block, and the runs of a module around blocks.

Neither holds a module or a tensor, only paths: a fused module looks its live children up.
"""

from __future__ import annotations

from dataclasses import dataclass


class CannotRead(Exception):
    """A module that can't be fused; the message is the reason that the report shows."""


@dataclass(frozen=True)
class ConvStep:
    """relu(bn(conv(values[x])) + values[residual]) -> values[out]; one kernel."""

    conv: str
    bn: str | None
    relu: bool
    x: int
    out: int
    residual: int | None = None
    overwrites_residual: bool = False  # nobody needs the residual afterwards, and a convolution of ours made it
    frees: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [self.conv, self.bn, "add" if self.residual is not None else None, "relu" if self.relu else None]
        return "+".join(part for part in parts if part)


@dataclass(frozen=True)
class NormStep:
    """relu(bn(values[x]) + values[residual]) -> values[out]; one pass over data. A BN that comes before its convolution."""

    bn: str
    relu: bool
    x: int
    out: int
    residual: int | None = None
    frees: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [self.bn, "add" if self.residual is not None else None, "relu" if self.relu else None]
        return "+".join(part for part in parts if part)


@dataclass(frozen=True)
class CallStep:
    """values[out] = what(*values[inputs]): a child module by its path, or "add", "relu", "add_relu"."""

    what: str
    is_module: bool
    inputs: tuple[int, ...]
    out: int
    frees: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True)
class Recipe:
    """What a block computes. values[0] is its input; `result` is the index of its output."""

    steps: tuple[ConvStep | NormStep | CallStep, ...]
    result: int
    modules: tuple[str, ...]  # every child module that eager would call, for hooks and train() to be looked up
    signature: tuple  # names and types of what it was read from; another signature means another recipe
    whole: bool = True  # a block's whole forward, and not one of a container's runs
    trains: bool = True  # its forward is the same in train() mode

    def __str__(self) -> str:
        return " -> ".join(str(step) for step in self.steps)

    @property
    def fuses(self) -> bool:
        """Whether a step does more than eager's own calls would."""
        return any(
            step.what == "add_relu"
            if isinstance(step, CallStep)
            else step.relu or step.residual is not None or (isinstance(step, ConvStep) and step.bn is not None)
            for step in self.steps
        )


@dataclass(frozen=True)
class ContainerPlan:
    """What a module that is no block lets us fuse: by the convolution's name, a short recipe, and who it stands for."""

    runs: dict[str, Recipe]
    absorbed: tuple[str, ...]  # BNs, ReLUs and max-pools that a run already did
    names: tuple[str, ...]  # the container's children; with others, its forward may be another
    entry: str | None = None  # the run that is the only reader of the container's input
    trains: bool = True  # its forward is the same in train() mode
