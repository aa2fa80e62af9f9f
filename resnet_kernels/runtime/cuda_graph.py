"""capture: a model's inference as a CUDA graph, so that a call costs one launch and not fifty.

    run = capture(model, x)
    y = run(x)               copies x into the graph's input, replays, copies the result out

What a replay sees. A graph is a list of kernels with the addresses that they had. Those of the weights are the model's own:
what is derived from them (BN's scale and shift, a weight in another layout, autocast's casts) was computed by kernels, too,
so a replay computes it anew. Hence values that were edited in place, in any way, are seen; of a model that was fused with
freeze=True it was computed before the capture, and a thaw has it captured again. What a graph can't see is Python:
another tensor in the place of a parameter, another module, mode, hook, attribute or setting. Each call looks for these
(model_snapshot.py), while the GPU is at work on the replay, and where it finds one it captures again.

Memory. A graph keeps what its kernels write. All graphs of a model share one pool, which is safe as they never run at the same
time and as a result is copied out before the next replay: a second shape costs little more than its input and output.

What is refused. A replay fires no hook and updates no statistics, so a model with forward hooks or in train() mode is.

Source: PyTorch's notes on CUDA graphs; torch.cuda.graph, make_graphed_callables (PyTorch 2.11 to 2.13).
"""

from __future__ import annotations

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

# As many as torch.cuda.make_graphed_callables does. In the first, Triton compiles and cuDNN chooses, which no capture may do.
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
        copy: whether a call returns tensors of its own. If not, what it returns is the graph's own memory: it is valid until
            the next call, whatever that call's shape.
        max_graphs: how many to keep, at least 1; beyond that the one that was not used for longest goes.

    Returns:
        A CapturedModel: call it with a tensor. It returns what the model returns: a tensor, or dicts, lists and tuples of
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

    Calls from several threads take turns. A copy or an unpickled one has its own model and no graphs yet: its first call
    captures.
    """

    def __init__(self, model: nn.Module, *, copy: bool, max_graphs: int):
        self.model, self.copy, self.max_graphs = model, copy, max_graphs
        self._lock = threading.RLock()
        self._recorder: _Recorder | None = None
        self.reset()

    def __call__(self, x: Tensor) -> Any:
        """The model's output for x; arguments and errors as `capture`."""
        if torch.compiler.is_compiling() or _Recorder.is_recording():
            return self.model(x)
        _check_input(x)
        with self._lock, torch.no_grad():
            key = _key(x)
            graph = self._graphs.get(key)
            y = None if graph is None else self._run(graph, x)
            # After the launch: the check takes the host as long as a small batch takes the GPU. What a replay in vain reads
            # is still there, as Watch holds it, and what it writes is the graph's own.
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
        return pytree.tree_map_only(Tensor, Tensor.clone, y) if self.copy else y

    def _record(self, key: tuple, x: Tensor) -> _Graph:
        reason = _why_elsewhere(self.model, x.device) or _Recorder.why_not(x.device) or _why_not_now(self.model)
        if reason is not None:
            raise RuntimeError(f"model can't be captured: {reason}")
        recorder = self._recorder or _Recorder(x.device)
        self._graphs[key] = graph = _Graph(self.model, x, recorder)
        # Not before: a pool ends with its last graph. And only now that there is a graph may the next one ask for the pool.
        self._recorder = recorder
        if len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
        if self._watch is None:
            self._watch = Watch(self.model)  # afterwards: a forward may keep something on its modules
        return graph

    def __getstate__(self) -> dict:
        return {"model": self.model, "copy": self.copy, "max_graphs": self.max_graphs}

    def __setstate__(self, state: dict) -> None:
        CapturedModel.__init__(self, state["model"], copy=state["copy"], max_graphs=state["max_graphs"])

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(key[0])) for key in self._graphs) or "none yet"
        return f"CapturedModel({type(self.model).__name__}, inputs: {shapes})"


class _Graph:
    """One recorded call: an input of its own, an output of its own, and what is between."""

    def __init__(self, model: nn.Module, x: Tensor, recorder: _Recorder):
        self._recorder = recorder
        # Ordinary tensors, even if the call is in inference mode: the next one need not be.
        with torch.inference_mode(False), torch.no_grad(), _uncached_autocast(x.device):
            self._x = torch.empty_like(x).copy_(x)
            self._replay, self._y = recorder.record(lambda: model(self._x))
        # A plan may be dropped or made anew by calls of the model itself; replays go on reading the tables of this one.
        self._tables = tables_of(model)
        for leaf in pytree.tree_leaves(self._y):
            if not (leaf is None or isinstance(leaf, (Tensor, int, float, str))):
                raise RuntimeError(
                    f"model can't be captured: it returns a {type(leaf).__name__}, whose tensors can't be found: return "
                    "tensors, or dicts, lists and tuples of tensors"
                )

    def __call__(self, x: Tensor) -> Any:
        self._recorder.take_turns()
        with torch.inference_mode(False), torch.no_grad():
            self._x.copy_(x)
        self._replay()
        return self._y


class _Recorder:
    """Records CUDA graphs of one device, on a stream of its own, into one memory pool."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._last_user: torch.cuda.Stream | None = None

    @staticmethod
    def is_recording() -> bool:
        """Whether somebody's capture is underway on this stream."""
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    @staticmethod
    def why_not(device: torch.device) -> str | None:
        """Why a device has no graphs, as the end of a sentence; None if it has."""
        return None if device.type == "cuda" else f"x is on {device}, and graphs are CUDA's"

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Returns (replay, what `call` returned): each replay() computes that anew, in the same memory."""
        graph = torch.cuda.CUDAGraph()
        with _one_capture, torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            self._stream.wait_stream(before)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(_WARM_UPS):
                        call()
                before.wait_stream(self._stream)
                # thread_local: what other threads do meanwhile, pinning memory say, is no error here.
                context = torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                )
                y = _explained(context, call)
            finally:
                # torch.cuda.graph leaves its own stream behind when a capture fails.
                torch.cuda.set_stream(before)
        return graph.replay, y

    def take_turns(self) -> None:
        """Has this stream wait for the one that the last call was on: graphs that share memory can't overlap."""
        stream = torch.cuda.current_stream(self._device)
        if self._last_user is not None and self._last_user != stream:
            stream.wait_stream(self._last_user)
        self._last_user = stream

    def finish(self) -> None:
        """Waits until nothing that was recorded runs any more."""
        torch.cuda.synchronize(self._device)


def _explained(context: Any, call: Callable[[], Any]) -> Any:
    """Runs the call inside a capture; an error there says what it means."""
    cause = None
    try:
        with context:
            try:
                return call()
            except RuntimeError as error:
                cause = error
                raise
    except RuntimeError as error:
        cause = cause or error  # what ending the capture says only follows from the first error inside
        raise RuntimeError(
            "model can't be captured: its forward did something that a CUDA graph can't hold: most often it waits for the "
            "GPU (.item(), .cpu(), .tolist(), print, a mask as an index, an `if` on a tensor) or copies from pageable memory. "
            f"Call the model itself, or capture the part without it. CUDA said: {str(cause).partition(chr(10))[0]}"
        ) from cause


def _key(x: Tensor) -> tuple:
    """What a graph is good for: an input like x under the autocast that is on."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.shape, x.stride(), x.dtype, x.device, autocast and torch.get_autocast_dtype(kind)


def _uncached_autocast(device: torch.device) -> torch.autocast:
    """The autocast that is on, without its cache: a cast made before the capture would be a copy that no replay renews."""
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
    """The first parameter or buffer that is not on x's device, and what to do."""
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
