"""What is measured, as data: subjects (an op, a block, a model), each in two directions, on each platform.

The shapes of ops and blocks are those of real layers, of ResNet-18, ResNet-50 and d2l's ResNet-18 at 224x224; the CPU's
default batches and images are small, so that a whole run takes minutes on two cores. `--full` adds ResNet-50 at 224x224.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

DIRECTIONS = ("forward", "forward-backward")


@dataclass(frozen=True)
class Conv:
    """rk.ops.conv_bias_act on one layer.

    size: height and width of the input. residual: a second input, of the output's shape, is added before the ReLU.
    """

    group: ClassVar[str] = "op"
    name: str
    c_in: int
    c_out: int
    size: int
    kernel: int
    stride: int = 1
    residual: bool = False
    batch: int = 1


@dataclass(frozen=True)
class AddRelu:
    """rk.ops.add_relu on two tensors of (batch, c_in, size, size)."""

    group: ClassVar[str] = "op"
    name: str
    c_in: int
    size: int
    batch: int = 1


@dataclass(frozen=True)
class BatchNormAct:
    """rk.ops.batch_norm_act with batch statistics on (batch, c_in, size, size), with or without a residual."""

    group: ClassVar[str] = "op"
    name: str
    c_in: int
    size: int
    residual: bool = False
    batch: int = 1


@dataclass(frozen=True)
class Block:
    """A residual block; `kind` is BasicBlock, Bottleneck, Residual or PreactBottleneck. c_out: channels of its output."""

    group: ClassVar[str] = "block"
    name: str
    kind: str
    c_in: int
    c_out: int
    size: int
    stride: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Model:
    """A model of rk.models, by its function's name."""

    group: ClassVar[str] = "model"
    name: str
    size: int
    c_in: int = 3
    batch: int = 1


@dataclass(frozen=True)
class Platform:
    """Where, and in what dtype. batch: what a subject's batch is multiplied by: the CPU's leave a GPU idle."""

    device: str
    dtype: torch.dtype
    batch: int = 1


@dataclass(frozen=True)
class Case:
    subject: Conv | AddRelu | BatchNormAct | Block | Model
    direction: str
    platform: Platform

    @property
    def batch(self) -> int:
        return self.subject.batch * self.platform.batch

    @property
    def backward(self) -> bool:
        return self.direction == "forward-backward"

    def __str__(self) -> str:
        """The group, direction, subject and platform; unique among the cases."""
        dtype = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.platform.dtype]
        sizes = f"{self.subject.size}px-b{self.batch}"
        return "-".join((self.subject.group, self.direction, self.subject.name, sizes, dtype, self.platform.device))


OPS = (
    Conv("stem_7x7s2", 3, 64, 224, kernel=7, stride=2),
    Conv("3x3_64", 64, 64, 56, kernel=3),
    Conv("3x3_64_add", 64, 64, 56, kernel=3, residual=True),
    Conv("3x3s2_128", 128, 128, 56, kernel=3, stride=2),
    Conv("1x1_1024_256", 1024, 256, 14, kernel=1),
    Conv("1x1_64_256_add", 64, 256, 56, kernel=1, residual=True),
    AddRelu("add_relu_256", 256, 56),
    BatchNormAct("batch_norm_relu_64", 64, 112, batch=2),
    BatchNormAct("batch_norm_add_relu_256", 256, 56, residual=True, batch=2),
    BatchNormAct("batch_norm_add_relu_2048", 2048, 7, residual=True, batch=8),
)

BLOCKS = (
    Block("basic_64", "BasicBlock", 64, 64, 56),
    Block("basic_128s2", "BasicBlock", 64, 128, 56, stride=2),
    Block("bottleneck_256", "Bottleneck", 256, 256, 56),
    Block("bottleneck_512s2", "Bottleneck", 256, 512, 56, stride=2),
    Block("residual_64", "Residual", 64, 64, 56),
    Block("residual_128s2", "Residual", 64, 128, 56, stride=2),
    Block("preact_256", "PreactBottleneck", 256, 256, 56),
    Block("preact_512", "PreactBottleneck", 256, 512, 28),
)

MODELS = (
    Model("resnet18", 64, batch=2),
    Model("resnet50", 64, batch=2),
    Model("resnet_v2_50", 64, batch=2),
    Model("d2l_resnet18", 28, c_in=1, batch=16),
    Model("d2l_resnet18_keras", 28, c_in=1, batch=16),
)

RESNET_50 = Model("resnet50", 224)

PLATFORMS = (
    Platform("cpu", torch.float32),
    Platform("cuda", torch.float32, batch=16),
    Platform("cuda", torch.bfloat16, batch=16),
    Platform("cuda", torch.float16, batch=16),
)


def cases(full: bool = False) -> list[Case]:
    """Returns the cases of a run; `full` adds ResNet-50 at 224x224 at batch 1 and 8, and 256 on GPUs."""
    found = [
        Case(subject, direction, platform)
        for platform in PLATFORMS
        for subject in (*OPS, *BLOCKS, *MODELS)
        for direction in DIRECTIONS
    ]
    if full:
        found += [
            Case(RESNET_50, direction, replace(platform, batch=batch))
            for platform in PLATFORMS
            for batch in ((1, 8) if platform.device == "cpu" else (1, 8, 256))
            for direction in DIRECTIONS
        ]
    return found


def contenders(case: Case, full: bool = False) -> tuple[str, ...]:
    """Returns the names of what a case compares.

    "triton" is fused with that backend, on GPUs: "auto" has none of its kernels until a table shows that they win. `full`
    adds torch.compile for models: with freezing in inference; in training only where its compilation is worth waiting for.
    """
    on_gpu = case.platform.device == "cuda"
    compiled = full and case.subject.group == "model" and (on_gpu or not case.backward)
    return ("eager", "fused", *(["triton"] if on_gpu else []), *(["compile"] if compiled else []))
