"""Launchers copy what no kernel reads as it is, and hand the copies on: a freed one's memory goes to whoever asks next."""

import pytest
import torch

from resnet_kernels.ops.library import is_dense

pytest.importorskip("triton", reason="Triton is not installed")

from helpers.copied_operands import LAUNCHES
from resnet_kernels.kernels import launching


@pytest.mark.parametrize("name", LAUNCHES)
def test_copies_outlive_the_launch(name, monkeypatch):
    """What is launched gets tensors, which hold their memory, in a layout that the kernel reads."""
    launched = []

    def launch(kernel, grid, device, tensors, fixed, prepared, views=None, **options):
        launched.append(kernel.__name__)
        there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        assert all(isinstance(tensor, torch.Tensor) for tensor in there.values())
        for name in views or ():
            if name in there:
                tensor, view = there[name], views[name]
                last = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides)) + view.offset
                assert tensor.data_ptr() % 16 == 0 and is_dense(tensor)
                assert last < tensor.numel(), f"{name}'s view leaves its tensor"

    monkeypatch.setattr(launching, "launch", launch)
    LAUNCHES[name]()
    assert len(launched) == (2 if "stem" in name else 1)
