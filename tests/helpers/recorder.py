"""A stand-in for CUDA graphs on the CPU: it records ATen operations, and replays them on the same memory."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

capture = importlib.import_module("resnet_kernels.runtime.cuda_graph")


class Recorder:
    """Records ATen operations, and replays them on the same memory."""

    recordings = 0
    inside_another = False

    def __init__(self, device):
        self.graphs = []

    @classmethod
    def is_recording(cls):
        return cls.inside_another

    @staticmethod
    def why_not(device):
        return None

    def record(self, call):
        Recorder.recordings += 1
        with _Log() as log:
            y = call()
        return log.replay, y

    def take_turns(self):
        pass

    def finish(self):
        pass


class _Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.entries = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")
        out = func(*args, **(kwargs or {}))
        # Aliases: `parameter.data = other` changes the parameter, and not the memory that a kernel was given.
        self.entries.append((func, *pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, out))))
        return out

    def replay(self):
        for func, args, kwargs, out in self.entries:
            new = func(*args, **kwargs)
            for there, now in zip(pytree.tree_leaves(out), pytree.tree_leaves(new)):
                if there.data_ptr() != now.data_ptr():
                    there.copy_(now)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(capture, "_Recorder", Recorder)
    monkeypatch.setattr(Recorder, "recordings", 0)
    return Recorder
