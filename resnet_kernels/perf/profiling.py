"""Profile of a model, by module and by kernel, from torch.profiler.

    times = profile(lambda: model(x), model)       seconds and module of each kernel (on the CPU: of each operation)
    rows = by_range(times, network.trace(model, x), itemsize)    the kernels by module, beside its roofline's least work

Every module's call runs inside a profiler range named by its path, and so does each step of a fused block
(profiler_ranges.py). A kernel belongs to the innermost range around it. A backward's kernel belongs to the range of the
forward operation whose gradient it computes.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from ..kernels.activations import KINDS as ACTIVATIONS
from ..models.checks import at_least_one
from ..runtime import profiler_ranges
from ..runtime.state import state_of
from .roofline import bounds, kernel_groups
from .roofline.bounds import Kernel
from .roofline.network import Network, Operation

KINDS = ("conv", "bn", "rest")

_STEP = "resnet_kernels.profile step"
_BACKWARD = "autograd::engine::evaluate_function: "
_PATTERNS = {
    "conv": re.compile(r"conv(?!ert)", re.I),
    "bn": re.compile(r"batch_?norm|(^|_)bn_|_epilogue_|_fold_weights_", re.I),
}


@dataclass(frozen=True)
class KernelTime:
    """Mean time of one kernel (on the CPU: of one operation with all that it calls) in one call of its module.

    range: the profiler's range that it ran in: a module's path in the model, "layer1.0.conv1", or a fused step's,
        "layer1.0.conv1+bn1+relu"; "" outside of all modules.
    call: the number of the range's call in a step, from 0: a block may call one ReLU three times.
    name: the CUDA kernel's name; on the CPU the operation's ("aten::conv2d", "ConvolutionBackward0").
    kind: "conv", "bn" or "rest", by the operation. A kernel that fuses them is a "conv".
    backward: whether it ran in the backward of that range.
    seconds: time on the device, per step.
    """

    range: str
    call: int
    name: str
    kind: str
    backward: bool
    seconds: float


@dataclass(frozen=True)
class RangeTime:
    """One call of a range, forward or backward: its kernels, and the least that it has to compute and move.

    layer: its layer, a convolution with its BN, add and ReLU, fused or not: "layer1.0.conv1+bn1+relu", the same for an eager
        and a fused model. "" if it belongs to no layer (a check of ours), or to several (a block's own adds).
    least: FLOPs and bytes (see roofline/), with the step's own fusion; None for a backward, and if unknown.
    """

    range: str
    call: int
    backward: bool
    kernels: tuple[KernelTime, ...]
    layer: str = ""
    least: Kernel | None = None

    @property
    def seconds(self) -> float:
        """Total seconds of the range's kernels."""
        return sum(kernel.seconds for kernel in self.kernels)

    @property
    def kind(self) -> str:
        """Kind of kernel that takes most of the range's time."""
        return max(KINDS, key=lambda kind: sum(k.seconds for k in self.kernels if k.kind == kind))


def profile(
    call: Callable[[], object],
    model: nn.Module | None = None,
    *,
    device: torch.device | str = "cpu",
    steps: int = 5,
    warm_up: int = 2,
    trace: str | os.PathLike | None = None,
) -> list[KernelTime]:
    """Runs a step several times under torch.profiler; returns its kernels, in the order of their first launch.

    Meanwhile nn.Module.__call__ is replaced for all threads, so nothing else may run models. Errors of `call` are passed on.

    Args:
        call: one step, called without arguments: a forward, or a forward and a backward.
        model: the model, plain or fused, whose paths name the ranges. None makes no ranges: for a compiled model, whose
            modules are not called, or a captured one.
        device: where the work is done, CPU or CUDA. Seconds are those of kernels on CUDA, of operations on the CPU.
        steps: Number of steps to average over, at least 1.
        warm_up: Number of steps before them, at least 1.
        trace: file for a Chrome trace (chrome://tracing, ui.perfetto.dev) of these steps.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A number is out of range, the device is another one, or the model is compiled.
        RuntimeError: A profiler is on already.
    """
    if not callable(call):
        raise TypeError(f"call must be callable, got {type(call).__name__}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    at_least_one(steps=steps, warm_up=warm_up)
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or CUDA device, got {device}")
    for _ in range(warm_up):
        call()
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with _named_calls(model), torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(_STEP):
                call()
        if on_cuda:
            torch.cuda.synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(os.fspath(trace))
    return _kernel_times(profiler.events(), on_cuda, steps)


@contextlib.contextmanager
def _named_calls(model: nn.Module | None) -> Iterator[None]:
    """Makes each call of a module run inside a range with its path.

    It patches nn.Module.__call__, as torch.fx does: with a hook or an own forward a fused module would run eager.
    """
    if model is None:
        yield
        return
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        paths[id(module)] = path
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError("model must not be compiled: the modules inside are not called (model=None profiles it)")
        if (state := state_of(module)) is not None:
            state.path = path
    original = nn.Module.__call__

    def named_call(self, *args, **kwargs):
        path = paths.get(id(self))
        with record_function(profiler_ranges.PREFIX + path) if path else contextlib.nullcontext():
            return original(self, *args, **kwargs)

    nn.Module.__call__ = named_call  # type: ignore[method-assign]  # patched on purpose
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]  # patched on purpose


class _Place(NamedTuple):
    """Place of an event. operation: the outermost one inside the range; "" if the event is in none."""

    range: str = ""
    call: int = 0
    backward: bool = False
    operation: str = ""
    kind: str = "rest"


def _kernel_times(events: Iterable[Any], on_cuda: bool, steps: int) -> list[KernelTime]:
    """Adds up torch.profiler's events, which come in the order of their starts, each with its parent."""
    seconds: dict[KernelTime, float] = defaultdict(float)
    places: dict[int, _Place] = {}
    forward_of: dict[tuple[int, int], _Place] = {}
    calls: Counter[str] = Counter()
    homeless: Counter[str] = Counter()  # device time of kernels that no operation launched, in us
    annotations: set[str] = set()
    for event in events:
        if event.device_type != DeviceType.CPU:
            homeless[event.name] += event.time_range.elapsed_us()
            continue
        if event.is_user_annotation:
            annotations.add(event.name)
        around = places.get(id(event.cpu_parent), _Place())
        if event.name == _STEP:
            calls.clear()
            places[id(event)] = _Place()
            continue
        if event.name.startswith(profiler_ranges.PREFIX):
            range_ = event.name.removeprefix(profiler_ranges.PREFIX)
            if range_ == around.range:  # a step that is a module's call
                places[id(event)] = around._replace(operation="")
            else:
                places[id(event)] = _Place(range_, calls[range_], around.backward)
                calls[range_] += 1
            continue
        place = around if around.operation else _enter(event, around, forward_of)
        # A range that is not ours is no operation, but a compiled model's kernels may run inside it.
        places[id(event)] = place._replace(operation="") if event.is_user_annotation else place
        if not place.backward:
            # The last operation to begin with a sequence number is the one whose gradient has that number.
            forward_of[event.thread, event.sequence_nr] = place
        if on_cuda and not event.is_user_annotation:
            for kernel in event.kernels:
                homeless[kernel.name] -= kernel.duration
                kind = _kind(kernel.name) if place.kind == "rest" else place.kind
                seconds[_key(place, kernel.name, kind)] += kernel.duration / 1e6
        elif not on_cuda:
            seconds[_key(place, place.operation, place.kind)] += event.self_cpu_time_total / 1e6
    for name, microseconds in homeless.items():
        # Leave out annotations: a range is also an event on the device, from its first kernel to its last.
        if on_cuda and name not in annotations and microseconds > 1e-3:
            seconds[_key(_Place(), name, _kind(name))] += microseconds / 1e6
    return [KernelTime(**{**vars(key), "seconds": total / steps}) for key, total in seconds.items()]


def _enter(event: Any, around: _Place, forward_of: dict[tuple[int, int], _Place]) -> _Place:
    """Place of an operation that is the outermost in its range."""
    name = event.name.removeprefix(_BACKWARD)
    if name != event.name:
        forward = forward_of.get((event.fwd_thread, event.sequence_nr), _Place())
        around = forward._replace(backward=True)
    return around._replace(operation=name, kind=_kind(name))


def _key(place: _Place, name: str, kind: str) -> KernelTime:
    return KernelTime(place.range, place.call, name, kind, place.backward, 0.0)


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(name)), "rest")


def by_range(times: Sequence[KernelTime], net: Network, itemsize: int) -> list[RangeTime]:
    """Groups kernels by the call of a range in which they ran, and finds the network's operations of each call.

    Args:
        times: the result of `profile` for a model.
        net: network.trace of the same model, fused or not, on an input of the same shape.
        itemsize: bytes of an element.
    """
    kernels: dict[tuple[str, int, bool], list[KernelTime]] = defaultdict(list)
    for time in times:
        kernels[time.range, time.call, time.backward].append(time)
    n_calls = Counter(range_ for range_, _, backward in kernels if not backward)
    layers = kernel_groups.layers(net)
    layer_of = {operation: layer for layer in layers for operation in layer.operations}
    least = dict(zip(net.operations, bounds.eager(net, itemsize)))
    least_of_layer = dict(zip(layers, bounds.per_layer(net, itemsize)))
    # Training calls a step's convolution, among others, as a module; the rest of the step runs fused after it.
    steps = [range_ for range_ in n_calls if "+" in range_ and _path(range_) not in n_calls]
    firsts = {range_: [_operations(net, range_, call, n_calls) for call in range(n_calls[range_])] for range_ in steps}
    swallowed = {o for calls in firsts.values() for own in calls if own for o in layer_of[own[0]].operations}
    rows = []
    for (range_, call, backward), inside in kernels.items():
        own = _operations(net, range_, call, n_calls)
        if range_ not in firsts:
            own = [operation for operation in own if operation not in swallowed]
        here = {layer_of[operation] for operation in own}
        layer = here.pop() if len(here) == 1 else None
        bound = None
        if not backward and layer is not None and range_ in firsts:
            bound = least_of_layer[layer]
        elif not backward and own and "+" not in range_:
            bound = _sum(range_, [least[operation] for operation in own])
        rows.append(RangeTime(range_, call, backward, tuple(inside), layer.name if layer else "", bound))
    return rows


def _path(range_: str) -> str:
    """Path of the module that a range begins with; an add with an activation behind it, "add_silu", counts as an add."""
    path = range_.split("+")[0].split("(")[0]
    around, _, name = path.rpartition(".")
    if name.startswith("add_") and name.removeprefix("add_") in ACTIVATIONS:
        return f"{around}.add".lstrip(".")
    return path


def _operations(net: Network, range_: str, call: int, n_calls: Mapping[str, int]) -> list[Operation]:
    """Operation that a fused step begins with, or all operations of a module's call except its children's."""
    path = _path(range_)
    own = [
        operation
        for operation in net.operations
        if operation.name == path or (operation.name == f"{path}.{operation.kind}" and operation.name not in n_calls)
    ]
    share, rest = divmod(len(own), max(n_calls.get(range_, 0), 1))
    return [] if rest else own[call * share : (call + 1) * share]


def _sum(name: str, kernels: Sequence[Kernel]) -> Kernel:
    parts = ((k.flops, k.hbm_bytes, k.l2_bytes) for k in kernels)
    return Kernel(name, *map(sum, zip(*parts)))
