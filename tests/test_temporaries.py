"""Launchers keep what they copy: a descriptor holds an address, and a freed copy's memory goes to whoever asks next."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from resnet_kernels.ops.geometry import Geometry

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_kernels.kernels import chain_tma, conv_bias_act_tma, stem, stem_plan, tap_sharing_tma
from resnet_kernels.kernels.conv_bias_act_tma_tiles import CONFIGS

FP16 = torch.float16
SAME = Geometry(padding=(1, 1, 1, 1))
POINTWISE = Geometry(padding=(0, 0, 0, 0))
KERNELS = {
    conv_bias_act_tma: "_conv_bias_act_tma_kernel",
    chain_tma: "_chain_tma_kernel",
    stem: "_stem_kernel",
    tap_sharing_tma: "_tap_sharing_tma_kernel",
}


def copied(*shape: int) -> torch.Tensor:
    """A tensor that no kernel reads as it is: every second element of a larger one."""
    return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=FP16)[..., ::2]


def vector(count: int) -> torch.Tensor:
    return torch.zeros(count, 2)[:, 0]


def convolution(residual: bool, split: int = 1, projection: bool = False) -> None:
    config = next(c for c in CONFIGS if c.split_k == split)
    shortcut = None
    if projection:
        shortcut = conv_bias_act_tma.Shortcut(
            copied(2, 64, 8, 8), copied(64, 64, 1, 1), vector(64), vector(64), POINTWISE
        )
    conv_bias_act_tma.launch(
        copied(2, 128, 8, 8), copied(64, 128, 3, 3), vector(64), copied(2, 64, 8, 8) if residual else None, vector(64),
        SAME, True, config, shortcut,
    )  # fmt: skip


def shared_taps() -> None:
    tap_sharing_tma.launch(
        copied(2, 64, 8, 8), copied(64, 64, 3, 3), vector(64), copied(2, 64, 8, 8), vector(64), SAME, True
    )


def chained(projection: bool) -> None:
    layer = lambda *shape, relu=True: chain_tma.Layer(copied(*shape), vector(shape[0]), vector(shape[0]), relu)  # noqa: E731
    residual = copied(2, 256, 8, 8)
    if projection:
        residual = chain_tma.Shortcut(copied(2, 64, 8, 8), layer(256, 64, 1, 1, relu=False), POINTWISE)
    chain_tma.launch(
        copied(2, 64, 8, 8), layer(64, 64, 3, 3), SAME, layer(256, 64, 1, 1), residual,
        (vector(256), vector(256)), layer(64, 256, 1, 1),
    )  # fmt: skip


def stem_and_pool() -> None:
    config = next(c for c in stem_plan.CONFIGS if c.descriptor)
    stem.launch(copied(2, 3, 32, 32), copied(64, 3, 7, 7), vector(64), vector(64), config=config)


LAUNCHES = {
    "convolution with a residual": lambda: convolution(True),
    "split convolution with a residual": lambda: convolution(True, split=4),
    "convolution with a projection": lambda: convolution(False, projection=True),
    "convolution with a projection and a residual": lambda: convolution(True, projection=True),
    "shared taps": shared_taps,
    "chain": lambda: chained(False),
    "chain with a projection": lambda: chained(True),
    "stem": stem_and_pool,
}


class Launched:
    """Stands in for a kernel; at its launch every storage that was described or is passed on must be alive."""

    def __init__(self, described: list[StorageWeakRef]):
        self.described, self.count = described, 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        self.count += 1
        assert not any(storage.expired() for storage in self.described), "a copy was freed before the launch"


@pytest.mark.parametrize("name", LAUNCHES)
def test_copies_outlive_the_launch(name, monkeypatch):
    described = []
    kernel = Launched(described)

    def describe(tensor, view, actual=conv_bias_act_tma.described):
        described.append(StorageWeakRef(tensor.untyped_storage()))
        return actual(tensor, view)

    for module, attribute in KERNELS.items():
        # As on a GPU, where a descriptor is made of an address.
        monkeypatch.setattr(module, "is_interpreted", lambda: False)
        monkeypatch.setattr(module, "described", describe)
        monkeypatch.setattr(module, attribute, kernel)
    monkeypatch.setattr(stem, "_pack_kernel", kernel)
    LAUNCHES[name]()
    assert kernel.count == (2 if name == "stem" else 1) and described
