"""Checks of whole networks on a GPU, for checks.py.

python -m benchmarks.gpu.networks chain|split|stem launches one kernel a few times, for compute-sanitizer.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import resnet_kernels as rk
from resnet_kernels.models import by_name
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import error_budget

Result = dict[str, Any]
# From the environment, not from CUDA, which the parent must not initialize before it forks.
DEVICE = "cpu" if os.environ.get("RESNET_KERNELS_DRY_RUN") else "cuda"
BF16 = torch.bfloat16


def random_model(name: str, batch: int, size: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = randomise_batch_norms_(by_name.build(name)).to(DEVICE, dtype)
    model = model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # PyTorch's types lack memory_format
    return model, by_name.image_batch(model, batch, size)


def judge(y: Tensor, model: nn.Module, x: Tensor) -> Result:
    """Returns the errors, and "refused" if y exceeds the budget: twice eager's error plus one rounding."""
    truth = copy.deepcopy(model).double()(x.double())
    eager, ours = error_budget.relative_error(model(x), truth), error_budget.relative_error(y, truth)
    row: Result = {"error": ours, "eager": eager}
    if not ours <= error_budget.budget(eager, y.dtype, y.device):
        row["refused"] = f"errs by {ours:.2e}, eager by {eager:.2e}"
    return row


def edit_weights(*modules: nn.Module) -> None:
    """Multiplies all parameters by the same number through .data, which autograd's version counters don't see."""
    for module in modules:
        for parameter in module.parameters():
            parameter.data.mul_(1.01)


@torch.no_grad()
def inference(name: str, batch: int, size: int, backend: str, dtype: torch.dtype = BF16) -> Result:
    model, x = random_model(name, batch, size, dtype)
    fused = rk.fuse(model, backend=backend)
    row = judge(fused(x), model, x)
    if not torch.equal(fused(x), fused(x)):
        row["refused"] = f"two calls differ; {row}"
    return row


@torch.no_grad()
def frozen(name: str, batch: int, size: int, backend: str) -> Result:
    """Checks that a frozen network keeps the budget, that its graph gives its bits, and that refresh takes new weights."""
    model, x = random_model(name, batch, size, BF16)
    fused = rk.fuse(model, backend=backend, freeze=True)
    row = judge(fused(x), model, x)
    run = rk.capture(fused, x)
    if not torch.equal(fused(x), fused(x)) or not torch.equal(run(x), fused(x)):
        row["refused"] = f"two calls, or a call and a replay, differ; {row}"
    edit_weights(model, fused)
    rk.refresh(fused)
    if "refused" in row:
        return row
    for y in (fused(x), run(x)):
        row = judge(y, model, x)
        if "refused" in row:
            row["refused"] += ", after new weights and refresh"
            break
    return row


@torch.no_grad()
def captured(name: str, batch: int, size: int, backend: str) -> Result:
    model, x = random_model(name, batch, size, BF16)
    fused = rk.fuse(model, backend=backend)
    run = rk.capture(fused, x)
    if not torch.equal(run(x), fused(x)):
        return {"refused": "a replay differs from a call"}
    other = torch.randn_like(x)
    edit_weights(model, fused)
    if not torch.equal(run(other), fused(other)):
        return {"refused": "after an edit of the weights a replay differs from a call"}
    return judge(run(other), model, other)


@torch.no_grad()
def two_streams(name: str, size: int) -> Result:
    """Checks two graphs of split-K layers, replayed side by side on two streams."""
    model, x = random_model(name, 1, size, BF16)
    runs = [rk.capture(rk.fuse(model, backend="triton"), x, copy=False) for _ in range(2)]
    inputs = [x, torch.randn_like(x)]
    expected = [run(x).clone() for run, x in zip(runs, inputs)]
    streams = [torch.cuda.Stream() for _ in runs]
    for _ in range(50):
        torch.cuda.synchronize()
        got = []
        for stream, run, own in zip(streams, runs, inputs):
            with torch.cuda.stream(stream):
                got.append(run(own))
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(got, expected)):
            return {"refused": "graphs on two streams disturb each other"}
    return {}


@torch.no_grad()
def compiled(name: str, backend: str) -> Result:
    model, x = random_model(name, 4, 64, BF16)
    return judge(torch.compile(rk.fuse(model, backend=backend), fullgraph=True)(x), model, x)


def training(name: str, backend: str, autocast: bool) -> Result:
    """Compares all gradients of a step, as one vector, and the running statistics with fp64."""
    model, x = random_model(name, 16, 64, torch.float32)
    model.train()
    weights = torch.randn(16, 1000 if "d2l" not in name else 10, device=DEVICE)

    def step(module: nn.Module, x: Tensor, enabled: bool) -> tuple[Tensor, Tensor]:
        module = copy.deepcopy(module)
        with torch.autocast(DEVICE, BF16, enabled=enabled):
            y = module(x)
        (y.double() * weights.double()).sum().backward()
        gradients = torch.cat([p.grad.double().flatten() for p in module.parameters() if p.grad is not None])
        return gradients, torch.cat([b.double().flatten() for b in module.buffers()])

    truths = step(copy.deepcopy(model).double(), x.double(), False)
    eager = [error_budget.relative_error(a, b) for a, b in zip(step(model, x, autocast), truths)]
    ours = [
        error_budget.relative_error(a, b) for a, b in zip(step(rk.fuse(model, backend=backend), x, autocast), truths)
    ]
    row: Result = {"error": ours, "eager": eager}
    if not all(a <= 2 * b + 6e-8 for a, b in zip(ours, eager)):
        row["refused"] = f"errs by {ours}, eager by {eager}"
    return row


# (batch, image size)
SIZES = ((8, 224), (1, 224), (3, 75))
# Of other libraries: mixed forwards, gates, depthwise convolutions, other activations.
OTHERS = (
    "torchvision:densenet121", "torchvision:efficientnet_b0", "torchvision:mobilenet_v3_large", "timm:seresnet50",
    "timm:darknet53", "timm:cspresnet50", "timm:res2net50_26w_4s", "timm:dla34",
)  # fmt: skip


def jobs() -> Iterator[tuple[str, list[Any]]]:
    from .runner import Check

    def job(*checks: tuple[str, Callable[[], Result]]):
        return checks[0][0], [Check(name, run) for name, run in checks]

    for name in ("resnet50", "resnet18", "resnet_v2_50"):
        for backend in ("triton", "auto"):
            checks = [(f"{name} {backend} {b}x{s}", partial(inference, name, b, s, backend)) for b, s in SIZES]
            yield job(checks[0])
            yield job(checks[1], (f"{name} {backend} captured", partial(captured, name, 1, 224, backend)))
            yield job(checks[2], (f"{name} {backend} frozen", partial(frozen, name, 2, 224, backend)))
    yield job(
        *(
            (f"{name} {backend} {str(dtype)[6:]}", partial(inference, name, 4, size, backend, dtype))
            for name, size in (
                ("resnet50", 64),
                ("d2l_resnet18", 96),
                ("d2l_resnet18_keras", 28),
                ("resnext50_32x4d", 64),
            )
            for backend in ("triton", "auto", "cudnn")
            for dtype in (torch.float32, torch.float16)
        )
    )
    for name in OTHERS:
        yield job(
            *((f"{name} {backend} 4x128", partial(inference, name, 4, 128, backend)) for backend in ("triton", "auto")),
            (f"{name} auto captured", partial(captured, name, 2, 128, "auto")),
            (f"{name} triton training", partial(training, name, "triton", False)),
        )
    yield job(("resnet50 two streams", partial(two_streams, "resnet50", 128)))
    yield job(*((f"resnet50 {b} compiled", partial(compiled, "resnet50", b)) for b in ("auto", "triton")))
    for name in ("resnet18", "resnet_v2_50", "d2l_resnet18"):
        yield job(
            *(
                (f"{name} {b} training{' in bf16' * a}", partial(training, name, b, a))
                for b in ("triton", "auto")
                for a in (False, True)
            )
        )


@torch.no_grad()
def _launch(what: str) -> None:
    """Launches one kernel, without a reference: under compute-sanitizer everything is slow."""
    from resnet_kernels.kernels.geometry import Geometry
    from resnet_kernels.kernels.operands import ConvOperands
    from resnet_kernels.kernels.sm90 import chain, conv, conv_tiles, specialized_stem, stem

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(DEVICE, BF16, memory_format=torch.channels_last)

    padded = Geometry(padding=(1, 1, 1, 1))
    for _ in range(2):
        if what == "split":
            for config in conv_tiles.CONFIGS:
                if config.split_k > 1:
                    conv.launch(ConvOperands(draw(2, 512, 7, 7), draw(512, 512, 3, 3), geometry=padded), config)
        elif what == "stem":
            for config in stem_configs():
                stem.launch(torch.randn(2, 3, 75, 75, device=DEVICE), draw(64, 3, 7, 7), None, None, config=config)
            specialized_stem.launch(torch.randn(2, 3, 75, 75, device=DEVICE), draw(64, 3, 7, 7), None, None)
        else:
            layers = [
                chain.Layer(draw(*shape), None, None, True)
                for shape in ((64, 64, 3, 3), (256, 64, 1, 1), (64, 256, 1, 1))
            ]
            chain.launch(draw(3, 64, 13, 13), layers[0], padded, layers[1], draw(3, 256, 13, 13), None, layers[2])
        torch.cuda.synchronize()
    print(f"{what}: done")


def stem_configs():
    from resnet_kernels.kernels.sm90 import stem_layout

    return stem_layout.CONFIGS


if __name__ == "__main__":
    _launch(sys.argv[1])
