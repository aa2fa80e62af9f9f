"""Cases of the benchmarks as data: subjects (an op, a block, a stage, a model), each in two directions, on each platform.

The four systems are torchvision's ResNet, TF-slim's ResNet v2, and d2l's ResNet in its PyTorch and its Keras text. The
shapes of ops, blocks and stages come from real layers of theirs, mostly at 224x224. The CPU's default batches and images
are small, so that a whole run takes minutes on two cores. `--full` adds whole networks at their real size, by batch, and
bfloat16 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from resnet_kernels.ops.dtypes import short_name

DIRECTIONS = ("forward", "forward-backward")
TORCHVISION, SLIM, D2L, D2L_KERAS = "torchvision", "slim", "d2l", "d2l-keras"


@dataclass(frozen=True)
class Conv:
    """rk.ops.conv_bias_act on one layer.

    size: height and width of the input. padding: (height, width), or all sides as in rk.ops; None keeps the size at stride 1.
    residual: whether a second input, of the output's shape, is added before the ReLU.
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
    padding: tuple | None = None
    relu: bool = True
    system: str = TORCHVISION


@dataclass(frozen=True)
class AddRelu:
    """rk.ops.add_relu on two tensors of (batch, c_in, size, size)."""

    group: ClassVar[str] = "op"
    name: str
    c_in: int
    size: int
    batch: int = 1
    system: str = TORCHVISION


@dataclass(frozen=True)
class BatchNormAct:
    """rk.ops.batch_norm_act with batch statistics on (batch, c_in, size, size), with or without a residual."""

    group: ClassVar[str] = "op"
    name: str
    c_in: int
    size: int
    residual: bool = False
    batch: int = 1
    system: str = TORCHVISION


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
    system: str = TORCHVISION


@dataclass(frozen=True)
class Stage:
    """A stage: the submodule at `path` of a model of rk.models."""

    group: ClassVar[str] = "stage"
    model: str
    path: str
    c_in: int
    size: int
    batch: int = 1
    system: str = TORCHVISION

    @property
    def name(self) -> str:
        return f"{self.model}.{self.path}"


@dataclass(frozen=True)
class Model:
    """A whole model, named by its function in rk.models."""

    group: ClassVar[str] = "model"
    name: str
    size: int
    c_in: int = 3
    batch: int = 1
    system: str = TORCHVISION


Subject = Conv | AddRelu | BatchNormAct | Block | Stage | Model


@dataclass(frozen=True)
class Platform:
    """Device and dtype. batch: factor on a subject's batch, because the CPU's batches leave a GPU idle."""

    device: str
    dtype: torch.dtype
    batch: int = 1


@dataclass(frozen=True)
class Case:
    """A subject in one direction on a platform."""

    subject: Subject
    direction: str
    platform: Platform

    @property
    def level(self) -> str:
        return self.subject.group

    @property
    def device(self) -> str:
        return self.platform.device

    @property
    def batch(self) -> int:
        return self.subject.batch * self.platform.batch

    @property
    def backward(self) -> bool:
        return self.direction == "forward-backward"

    def __str__(self) -> str:
        """The case's name, from level, direction, subject and platform; unique among the cases."""
        sizes = f"{self.subject.size}px-b{self.batch}"
        dtype = short_name(self.platform.dtype)
        return "-".join((self.level, self.direction, self.subject.name, sizes, dtype, self.device))


OPS = (
    Conv("stem_7x7s2", 3, 64, 224, kernel=7, stride=2),
    Conv("stem_7x7s2_same", 1, 64, 28, kernel=7, stride=2, batch=16, padding=((2, 3), (2, 3)), system=D2L_KERAS),
    Conv("3x3_64", 64, 64, 56, kernel=3),
    Conv("3x3_64_add", 64, 64, 56, kernel=3, residual=True),
    Conv("3x3s2_128", 128, 128, 56, kernel=3, stride=2),
    Conv("1x1_1024_256", 1024, 256, 14, kernel=1),
    Conv("1x1_64_256_add", 64, 256, 56, kernel=1, residual=True),
    Conv("1x1_64_256_add_linear", 64, 256, 56, kernel=1, residual=True, relu=False, system=SLIM),
    Conv("1x1s2_64_128_linear", 64, 128, 56, kernel=1, stride=2, padding=(0, 0), relu=False, system=D2L),
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
    Block("residual_64", "Residual", 64, 64, 56, system=D2L),
    Block("residual_128s2", "Residual", 64, 128, 56, stride=2, system=D2L),
    Block("residual_keras_128s2", "Residual", 64, 128, 56, stride=2, system=D2L_KERAS),
    Block("preact_256", "PreactBottleneck", 256, 256, 56, system=SLIM),
    Block("preact_512", "PreactBottleneck", 256, 512, 28, system=SLIM),
)

STAGES = (
    Stage("resnet18", "layer2", 64, 56),
    Stage("resnet50", "layer3", 512, 28),
    Stage("resnet_v2_50", "block2", 256, 28, system=SLIM),
    Stage("d2l_resnet18", "2", 64, 56, system=D2L),
    Stage("d2l_resnet18_keras", "2", 64, 56, system=D2L_KERAS),
)

MODELS = (
    Model("resnet18", 64, batch=2),
    Model("resnet50", 64, batch=2),
    Model("resnet_v2_50", 64, batch=2, system=SLIM),
    Model("d2l_resnet18", 28, c_in=1, batch=16, system=D2L),
    Model("d2l_resnet18_keras", 28, c_in=1, batch=16, system=D2L_KERAS),
)

# Image sizes of the systems' own texts.
FULL_MODELS = (
    Model("resnet18", 224),
    Model("resnet34", 224),
    Model("resnet50", 224),
    Model("resnet101", 224),
    Model("resnet152", 224),
    Model("resnext50_32x4d", 224),
    Model("resnet_v2_50", 224, system=SLIM),
    Model("d2l_resnet18", 96, c_in=1, system=D2L),
    Model("d2l_resnet18_keras", 28, c_in=1, system=D2L_KERAS),
)
FULL_BATCHES = {"cpu": (1, 8, 32), "cuda": (1, 8, 32, 256)}

PLATFORMS = (
    Platform("cpu", torch.float32),
    Platform("cuda", torch.float32, batch=16),
    Platform("cuda", torch.bfloat16, batch=16),
    Platform("cuda", torch.float16, batch=16),
)
FULL_PLATFORMS = (*PLATFORMS, Platform("cpu", torch.bfloat16))


def cases(full: bool = False) -> list[Case]:
    """Returns the cases of a run; `full` adds whole networks at real sizes, by batch, and bfloat16 on the CPU."""
    subjects = (*OPS, *BLOCKS, *STAGES, *MODELS)
    found = [
        Case(subject, direction, platform)
        for platform in (FULL_PLATFORMS if full else PLATFORMS)
        for subject in subjects
        for direction in DIRECTIONS
    ]
    if full:
        found += [
            Case(model, direction, replace(platform, batch=batch))
            for platform in FULL_PLATFORMS
            for model in FULL_MODELS
            for batch in FULL_BATCHES[platform.device]
            for direction in DIRECTIONS
            # BN has no statistics over one image of one pixel, which d2l's 28x28 shrink to.
            if batch > 1 or direction == "forward"
        ]
    # The dict drops repeats: d2l's Keras model at a GPU's default batch is also one of the FULL_MODELS cases.
    return list({str(case): case for case in found}.values())
