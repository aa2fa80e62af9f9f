"""Capture of a model's inference as a CUDA graph, so that a call costs one launch and not fifty.

    run = capture(model, x)
    y = run(x)               copies x into the graph's input, replays, copies the result out

What a replay sees. A graph is a list of kernels with the addresses of their operands. The weights' addresses are the model's
own, and tensors derived from weights (BN's scale and shift, a weight in another layout, autocast's casts) are computed by
kernels in the graph. So a replay sees values that were edited in place, in any way. With freeze=True the derived tensors were
made before the capture, and a thaw leads to a new capture. A graph can't see changes in Python: another tensor in the place
of a parameter, another module, mode, hook, attribute or setting. Each call looks for these (model_snapshot.py) while the GPU
is at work on the replay, and captures again if it finds one.

Memory. A graph keeps the memory that its kernels write. All graphs of a model share one pool. That is safe because they never
run at the same time and a result is copied out before the next replay. A second shape costs little more than its input and
output.

Refusals. A replay fires no hook and updates no statistics, so `capture` refuses models with forward hooks or in train() mode.

Source: PyTorch's notes on CUDA graphs; torch.cuda.graph, make_graphed_callables (PyTorch 2.11 to 2.13).
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..models.checks import at_least_one
from .live_modules import has_global_hooks
from .model_snapshot import Watch
from .state import tables_of

# The number of torch.cuda.make_graphed_callables. In the first, Triton compiles and cuDNN searches, which no capture may do.
_WARM_UPS = 3

# PyTorch allows one capture at a time in a process.
_one_capture = threading.Lock()


def capture(model: nn.Module, x: Tensor, *, copy: bool = True, max_graphs: int = 8) -> Callable[[Tensor], Any]:
    """Captures a model's inference on x in a CUDA graph; on the CPU, which has none, returns the model itself.

    Gradients are never recorded, as under torch.no_grad(). Values of weights and buffers may be edited in place at any time,
    unless the model was fused with freeze=True.

    Args:
        model: any module of one tensor, in eval mode, fused or not; all of it on x's device.
        x: an input like those to come. Another shape, dtype or layout is captured when it first comes.
        copy: whether a call copies its result. If not, the result is the graph's own memory: it is valid until the next call,
            whatever that call's shape.
        max_graphs: number of graphs to keep, at least 1; beyond that the least recently used one is dropped.

    Returns:
        A CapturedModel: call it with a tensor. It returns the model's output: a tensor, or dicts, lists and tuples of
        them.

    Raises:
        TypeError: an argument of the wrong type. ValueError: max_graphs below 1.
        RuntimeError: if the model can't be captured: in train() mode, with hooks, on another device than x, or because its
            forward waits for the GPU (.item(), .cpu(), a shape or a branch that depends on values). Calls raise it, too.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_input(x)
    at_least_one(max_graphs=max_graphs)
    if x.device.type == "cpu" and _why_elsewhere(model, x.device) is None:
        return model
    captured = CapturedModel(model, copy=copy, max_graphs=max_graphs)
    captured(x)
    return captured


class CapturedModel:
    """A model whose calls replay CUDA graphs; see `capture`. Its `model` is the live one, not a copy.

    Calls from several threads take turns. A copied or unpickled CapturedModel has its own model and no graphs yet; its first
    call captures.
    """

    def __init__(self, model: nn.Module, *, copy: bool, max_graphs: int):
        self.model, self.copy, self.max_graphs = model, copy, max_graphs
        self._lock = threading.RLock()
        self._recorder: _Recorder | None = None
        self.reset()

    def __call__(self, x: Tensor) -> Any:
        """Returns the model's output for x. Arguments and errors are those of `capture`."""
        if torch.compiler.is_compiling() or _Recorder.is_recording():
            return self.model(x)
        _check_input(x)
        with self._lock, torch.no_grad():
            key = _key(x)
            graph = self._graphs.get(key)
            y = None if graph is None else self._run(graph, x)
            # After the launch: the check takes the host as long as a small batch takes the GPU. A replay in vain is harmless:
            # Watch keeps the memory that it reads, and it writes only the graph's own.
            if self._watch is not None and not self._watch.is_current():
                self.reset()
                graph = None
            if graph is None:
                graph = self._record(key, x)
                y = self._run(graph, x)
            self._graphs.move_to_end(key)
            return y

    def reset(self) -> None:
        """Drops the graphs and their memory; the next call captures anew."""
        if self._recorder is not None:
            self._recorder.finish()
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._watch: Watch | None = None
        self._recorder = None

    def _run(self, graph: _Graph, x: Tensor) -> Any:
        y = graph(x)
        if not self.copy:
            return y
        # pytree makes a function in each call.
        return y.clone() if isinstance(y, Tensor) else pytree.tree_map_only(Tensor, Tensor.clone, y)

    def _record(self, key: tuple, x: Tensor) -> _Graph:
        reason = _why_elsewhere(self.model, x.device) or _Recorder.why_not(x.device) or _why_not_now(self.model)
        if reason is not None:
            raise RuntimeError(f"model can't be captured: {reason}")
        recorder = self._recorder or _Recorder(x.device)
        self._graphs[key] = graph = _Graph(self.model, x, recorder)
        # Keep the recorder only once a graph exists: its memory pool lives only as long as its graphs.
        self._recorder = recorder
        if len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
        if self._watch is None:
            self._watch = Watch(self.model)  # after the forward, which may set attributes of its modules
        return graph

    def __getstate__(self) -> dict:
        return {"model": self.model, "copy": self.copy, "max_graphs": self.max_graphs}

    def __setstate__(self, state: dict) -> None:
        CapturedModel.__init__(self, state["model"], copy=state["copy"], max_graphs=state["max_graphs"])

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(key[0])) for key in self._graphs) or "none yet"
        return f"CapturedModel({type(self.model).__name__}, inputs: {shapes})"


class _Graph:
    """Recorded call with its own input and output tensors."""

    def __init__(self, model: nn.Module, x: Tensor, recorder: _Recorder):
        self._recorder = recorder
        # Ordinary tensors even in inference mode, because the next call may be outside of it.
        with torch.inference_mode(False), torch.no_grad(), _uncached_autocast(x.device):
            self._x = torch.empty_like(x).copy_(x)
            self._replay, self._y = recorder.record(lambda: model(self._x))
        # Kept, because calls of the model itself may drop or remake its plan while replays still read this plan's tables.
        self._tables = tables_of(model)
        for leaf in pytree.tree_leaves(self._y):
            if not (leaf is None or isinstance(leaf, (Tensor, int, float, str))):
                raise RuntimeError(
                    f"model can't be captured: it returns a {type(leaf).__name__}, whose tensors can't be found: return "
                    "tensors, or dicts, lists and tuples of tensors"
                )

    def __call__(self, x: Tensor) -> Any:
        self._recorder.take_turns()
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                self._x.copy_(x)
        else:
            self._x.copy_(x)  # the caller has no_grad already
        self._replay()
        return self._y


class _Recorder:
    """Recorder of CUDA graphs on one device, with its own stream and one memory pool."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._last_user: torch.cuda.Stream | None = None

    @staticmethod
    def is_recording() -> bool:
        """Whether a capture is underway on the current stream."""
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """The reason why a device has no graphs, as the end of a sentence; None if it has."""
        return None if device.type == "cuda" else f"x is on {device}, and graphs are CUDA's"

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Returns (replay, result of `call`); each replay() computes the result anew, in the same memory."""
        graph = torch.cuda.CUDAGraph()
        with _one_capture, torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            self._stream.wait_stream(before)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(_WARM_UPS):
                        call()
                before.wait_stream(self._stream)
                # thread_local, so that other threads' CUDA calls, such as pinning memory, are no error here.
                context = torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                )
                y = _explained(context, call)
            except RuntimeError:
                torch.cuda.set_stream(before)
                with contextlib.suppress(RuntimeError):  # the one that is under way says more
                    _let_draw(torch.cuda.default_generators[self._device.index], self._device)
                raise
            finally:
                # torch.cuda.graph leaves its own stream behind when a capture fails.
                torch.cuda.set_stream(before)
        return graph.replay, y

    def take_turns(self) -> None:
        """Makes this stream wait for the last call's stream: graphs that share memory can't overlap."""
        # Not torch.cuda.current_stream, which makes an object in each call.
        address = torch._C._cuda_getCurrentRawStream(self._device.index)
        if self._last_user is not None and self._last_user.cuda_stream == address:
            return
        stream = torch.cuda.current_stream(self._device)
        if self._last_user is not None:
            stream.wait_stream(self._last_user)
        self._last_user = stream

    def finish(self) -> None:
        """Waits until no recorded graph runs any more."""
        torch.cuda.synchronize(self._device)


def _let_draw(generator: torch.Generator, device: torch.device) -> None:
    """Lets a generator draw again after a capture that failed.

    Up to PyTorch 2.11 it goes on believing in the capture, and whatever draws from it raises ("Offset increment outside graph
    capture encountered unexpectedly": CUDAGraph::capture_end). A copy of its state does not believe that.
    """
    offset = generator.get_offset()
    try:
        torch.empty(1, device=device).uniform_(generator=generator)
    except RuntimeError:
        generator.graphsafe_set_state(generator.clone_state())
    generator.set_offset(offset)


def _explained(context: Any, call: Callable[[], Any]) -> Any:
    """Runs the call inside a capture, and explains an error there."""
    cause = None
    try:
        with context:
            try:
                return call()
            except RuntimeError as error:
                cause = error
                raise
    except RuntimeError as error:
        cause = cause or error  # the error of ending a capture only follows from the first error inside
        raise RuntimeError(
            "model can't be captured: its forward did something that a CUDA graph can't hold: most often it waits for the "
            "GPU (.item(), .cpu(), .tolist(), print, a mask as an index, an `if` on a tensor) or copies from pageable memory. "
            f"Call the model itself, or capture the part without it. CUDA said: {str(cause).partition(chr(10))[0]}"
        ) from cause


def _key(x: Tensor) -> tuple:
    """Key of a graph: shape, layout, dtype and device of x, and the current autocast."""
    kind = x.device.type
    # Only other devices have to be asked whether they know autocast at all.
    autocast = (kind in ("cuda", "cpu") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)
    return x.shape, x.stride(), x.dtype, x.device, autocast and torch.get_autocast_dtype(kind)


def _uncached_autocast(device: torch.device) -> torch.autocast:
    """The current autocast without its cache: no replay would renew a cast that was made before the capture."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


def _check_input(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "x requires a gradient, and a captured model has none to give: pass x.detach(), or call the model itself"
        )


def _why_elsewhere(model: nn.Module, device: torch.device) -> str | None:
    """Error text if a parameter or buffer is not on x's device, with the remedy; else None."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.device != device:
            return f"x is on {device} and its {name} on {tensor.device}: move one to the other's device"
    return None


def _why_not_now(model: nn.Module) -> str | None:
    if has_global_hooks():
        return "a global module hook is registered, and no replay would fire it: remove it"
    for name, module in model.named_modules():
        named = f"its {name}" if name else "it"
        if module.training:
            return f"{named} is in train() mode, and a replay is inference alone: call model.eval()"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{named} has a hook, and no replay would fire it: remove it, or call the model itself"
    return None
