"""Copies that a fused module keeps on the CPU: packed weights, and recipes as flat lists of calls on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...graph import fusible
from ...graph.fusible import BatchNorm
from ...graph.recipe import ConvStep, PReLUAt, Recipe
from ...kernels.activations import RELU
from ...kernels.cpu.program import Memories
from ...ops import onednn, tuned_table
from .. import profiler_ranges
from ..parts import PackName
from .packed_conv import PackedConv
from .packed_linear import PackedLinear
from .packed_norm import PackedNorm

if TYPE_CHECKING:
    from .compiled_program import CompiledProgram

# Of a copy: its name, and what it is of.
PackedParts = Sequence[tuple[PackName, nn.Conv2d | None, BatchNorm | None]]

# Most programs of a module; detection models see many image sizes.
_MOST_PROGRAMS = 256


class Copies:
    """Copies made from a fused module's weights. They are dropped as a whole, so identity shows whether they hold.

    packs: packed weights and BNs that come before one, by `parts.pack_name`. linears: of heads, by path.
    programs: by a recipe's modules, the input's shape and dtype, the number of threads and the tables' generation. compiled:
    the programs of its chains, or of itself; compiled_program.find. memories: for these. All are for the CPU. On other devices
    a frozen module's copies are reached by `first`.
    """

    def __init__(self) -> None:
        self.packs: dict[PackName, PackedConv | PackedNorm] = {}
        self.programs: dict[tuple[Any, ...], PackedProgram] = {}
        self.linears: dict[str, PackedLinear] = {}
        self.compiled: dict[Any, CompiledProgram] = {}
        self.memories = Memories()
        self._first: dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]] = {}

    def first(self, key: tuple[Any, ...], sources: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """First result of `make` for this key and these source objects, whatever their present values."""
        found = self._first.get(key)
        if found is None or any(a is not b for a, b in zip(found[0], sources)):
            found = self._first[key] = sources, make()
        return found[1]

    def pack(self, name: PackName, pack: PackedConv | PackedNorm) -> None:
        """Replaces an older pack, and drops the programs that use it."""
        self.packs[name] = pack
        # A new dict: another thread that is making a program of the old pack puts it into the old dict.
        self.programs = {}

    def are_of(self, dtype: torch.dtype, parts: PackedParts) -> bool:
        """Whether all packed weights are of a dtype; `parts` are `LiveModules.packed_parts`."""
        packs = (self.packs.get(name) for name, conv, _ in parts if conv is not None)
        return all(pack is not None and pack.dtype == dtype for pack in packs)

    def program(self, recipe: Recipe, x: Tensor) -> PackedProgram | None:
        """Program for x, if there is one."""
        return self.programs.get(_program_key(recipe, x))

    def make_program(self, recipe: Recipe, x: Tensor) -> PackedProgram | None:
        """Makes the program for x; None if a pack that it needs is missing, or is of another dtype."""
        programs, packs = self.programs, self.packs
        steps = [step for step in recipe.steps if isinstance(step, ConvStep)]
        if any((pack := packs.get((step.conv, step.bn))) is None or pack.dtype != x.dtype for step in steps):
            return None
        if len(programs) >= _MOST_PROGRAMS:
            programs.clear()
        program = programs[_program_key(recipe, x)] = PackedProgram(recipe, packs, x)
        return program


def pack_again(copies: Copies, holds: Callable[..., bool], parts: PackedParts, dtype: torch.dtype) -> None:
    """Packs what has no copy, or one that does not stand for its modules as they are now.

    Args:
        copies: of a fused module.
        holds: whether a copy stands for a convolution and a BN.
        parts: `LiveModules.packed_parts`.
        dtype: of the computation.
    """
    for name, conv, bn in parts:
        pack = copies.packs.get(name)
        if conv is not None:
            if not isinstance(pack, PackedConv) or pack.dtype != dtype or not holds(pack, conv, bn):
                copies.pack(name, PackedConv(conv, bn, dtype))
        elif bn is not None and fusible.is_frozen(bn) and not (isinstance(pack, PackedNorm) and holds(pack, None, bn)):
            copies.pack(name, PackedNorm(bn))


def _program_key(recipe: Recipe, x: Tensor) -> tuple[Any, ...]:
    return recipe.modules, x.shape, x.dtype, torch.get_num_threads(), tuned_table.generation()


class PackedProgram:
    """Recipe as a flat list of calls for one input size: the least work for a call if nothing changed.

    Under interval arithmetic (onednn.py) the bounds on all values are linear in the input's, so one comparison shows that
    oneDNN's own ReLU is safe in all steps; our kernels need no bounds. `entries` is empty if a step needs more than one call.
    """

    def __init__(self, recipe: Recipe, packs: dict[PackName, Any], x: Tensor):
        self._result = recipe.result
        self._is_ours = False
        self.entries: list[
            list[tuple[Any, ...]]
        ] = []  # for an input that must not be overwritten, and for one that may
        shapes, sized = {0: x.shape}, {}
        steps = [step for step in recipe.steps if isinstance(step, ConvStep)]
        if len(steps) < len(recipe.steps):
            return
        for step in steps:
            conv = packs[step.conv, step.bn].at(shapes[step.x])
            if conv is None or not conv.is_one_call or (conv.own is None and step.activation not in (None, RELU)):
                return
            if isinstance(step.activation, PReLUAt):
                return  # its slopes may be others in each call
            sized[step.out] = conv
            shapes[step.out] = packs[step.conv, step.bn].out_shape(shapes[step.x])
            if step.residual is not None and shapes[step.residual] != shapes[step.out]:
                return  # an add that broadcasts
        self.entries = [
            [
                (
                    step,
                    *packs[step.conv, step.bn].call(
                        sized[step.out], step.residual, step.activation, self._overwrites(step, owned)
                    ),
                )
                for step in steps
            ]
            for owned in (False, True)
        ]
        self._is_ours = all(conv.own is not None for conv in sized.values())
        bounds = {0: (1.0, 0.0)}
        for step in steps:
            pack, (slope, constant) = packs[step.conv, step.bn], bounds[step.x]
            more = (0.0, 0.0) if step.residual is None else bounds[step.residual]
            gain = 1.0 if step.activation is None else step.activation.gain
            bounds[step.out] = (gain * (pack.bound(slope, 0.0) + more[0]), gain * (pack.bound(constant) + more[1]))
        self._bound = bounds[recipe.result]
        self._largest = (max(slope for slope, _ in bounds.values()), max(constant for _, constant in bounds.values()))

    @staticmethod
    def _overwrites(step: ConvStep, owned: bool) -> bool:
        return step.overwrites_residual and (step.residual != 0 or owned)

    def run_if_safe(
        self, x: Tensor, x_bound: float | None, owned: bool, path: str
    ) -> tuple[Tensor, float | None] | None:
        """Runs all calls on x if no step can overflow in oneDNN.

        Args:
            x: of the size that it was made for.
            x_bound: a bound on the magnitude of x's values; None if unknown.
            owned: whether x may be overwritten.
            path: the module's path, for profilers.

        Returns:
            The output and a bound on it, None if unknown; None if a step needs more than one call, or could overflow.
        """
        if not self.entries:
            return None
        if self._is_ours:
            return self(x, owned, path), None
        bound = onednn.bound(x, x_bound)
        if not onednn.is_safe(self._largest[0] * bound + self._largest[1]):
            return None
        return self(x, owned, path), self._bound[0] * bound + self._bound[1]

    def __call__(self, x: Tensor, owned: bool, path: str) -> Tensor:
        """Runs all calls on x. owned: whether it may be overwritten. path: the module's path, for profilers."""
        values = {0: x}
        del x
        for step, function, swapped, arguments in profiler_ranges.around(self.entries[owned], path):
            if step.residual is None:
                values[step.out] = function(values[step.x], *arguments)
            elif swapped:
                values[step.out] = function(values[step.residual], values[step.x], *arguments)
            else:
                values[step.out] = function(values[step.x], values[step.residual], *arguments)
            for dead in step.frees:
                del values[dead]
        return values[self._result]
