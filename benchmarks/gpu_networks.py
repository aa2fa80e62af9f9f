"""Whole networks on a GPU, and small questions to its driver and cuDNN: checks of gpu_checks.py.

python -m benchmarks.gpu_networks chain|split|stem launches one kernel a few times, for compute-sanitizer.
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
from resnet_kernels.ops import tuned_table

Result = dict[str, Any]
# Not asked of CUDA: the parent, which forks, must not touch it.
DEVICE = "cpu" if os.environ.get("RESNET_KERNELS_DRY_RUN") else "cuda"
BF16 = torch.bfloat16


def _error(y: Tensor, truth: Tensor) -> float:
    return ((y.double() - truth).norm() / truth.norm()).item()


def _model(name: str, batch: int, size: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = randomise_batch_norms_(by_name.build(name)).to(DEVICE, dtype, memory_format=torch.channels_last).eval()
    return model, by_name.image_batch(model, batch, size)


def _judge(y: Tensor, model: nn.Module, x: Tensor) -> Result:
    """{} if y errs at most twice as much as eager does, plus a rounding."""
    truth = copy.deepcopy(model).double()(x.double())
    eager, ours = _error(model(x), truth), _error(y, truth)
    row = {"error": ours, "eager": eager}
    if not ours <= 2 * eager + tuned_table.rounding(y.dtype, y.device):
        row["refused"] = f"errs by {ours:.2e}, eager by {eager:.2e}"
    return row


@torch.no_grad()
def inference(name: str, batch: int, size: int, backend: str, dtype: torch.dtype = BF16) -> Result:
    model, x = _model(name, batch, size, dtype)
    fused = rk.fuse(model, backend=backend)
    row = _judge(fused(x), model, x)
    if not torch.equal(fused(x), fused(x)):
        row["refused"] = f"two calls differ; {row}"
    return row


@torch.no_grad()
def frozen(name: str, batch: int, size: int, backend: str) -> Result:
    """A frozen network errs as another does; its graph gives its bits; after refresh it runs on new weights."""
    model, x = _model(name, batch, size, BF16)
    fused = rk.fuse(model, backend=backend, freeze=True)
    row = _judge(fused(x), model, x)
    run = rk.capture(fused, x)
    if not torch.equal(fused(x), fused(x)) or not torch.equal(run(x), fused(x)):
        row["refused"] = f"two calls, or a call and a replay, differ; {row}"
    for module in (model, fused):
        for parameter in module.parameters():
            parameter.data.mul_(1.01)
    rk.refresh(fused)
    if "refused" in row:
        return row
    for y in (fused(x), run(x)):
        row = _judge(y, model, x)
        if "refused" in row:
            row["refused"] += ", after new weights and refresh"
            break
    return row


@torch.no_grad()
def captured(name: str, batch: int, size: int, backend: str) -> Result:
    model, x = _model(name, batch, size, BF16)
    fused = rk.fuse(model, backend=backend)
    run = rk.capture(fused, x)
    if not torch.equal(run(x), fused(x)):
        return {"refused": "a replay differs from a call"}
    other = torch.randn_like(x)
    for module in (model, fused):
        for parameter in module.parameters():
            parameter.data.mul_(1.01)
    if not torch.equal(run(other), fused(other)):
        return {"refused": "after an edit of the weights a replay differs from a call"}
    return _judge(run(other), model, other)


@torch.no_grad()
def two_streams(name: str, size: int) -> Result:
    """Two graphs of split-K layers, replayed side by side on two streams."""
    model, x = _model(name, 1, size, BF16)
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
    model, x = _model(name, 4, 64, BF16)
    return _judge(torch.compile(rk.fuse(model, backend=backend), fullgraph=True)(x), model, x)


def training(name: str, backend: str, autocast: bool) -> Result:
    """Gradients of a step, all of them as one vector, and running statistics, against fp64."""
    model, x = _model(name, 16, 64, torch.float32)
    model.train()
    weights = torch.randn(16, 1000 if "d2l" not in name else 10, device=DEVICE)

    def step(module: nn.Module, x: Tensor, enabled: bool) -> tuple[Tensor, Tensor]:
        module = copy.deepcopy(module)
        with torch.autocast(DEVICE, BF16, enabled=enabled):
            y = module(x)
        (y.double() * weights.double()).sum().backward()
        gradients = torch.cat([p.grad.double().flatten() for p in module.parameters()])
        return gradients, torch.cat([b.double().flatten() for b in module.buffers()])

    truths = step(copy.deepcopy(model).double(), x.double(), False)
    eager = [_error(a, b) for a, b in zip(step(model, x, autocast), truths)]
    ours = [_error(a, b) for a, b in zip(step(rk.fuse(model, backend=backend), x, autocast), truths)]
    row = {"error": ours, "eager": eager}
    if not all(a <= 2 * b + 6e-8 for a, b in zip(ours, eager)):
        row["refused"] = f"errs by {ours}, eager by {eager}"
    return row


# (batch, image size)
SIZES = ((8, 224), (1, 224), (3, 75))


def jobs() -> Iterator[tuple[str, list[Any]]]:
    from .gpu_checks import Check

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


def _conv_then_relu(x: Tensor, weight: Tensor, bias: Tensor, *arguments) -> Tensor:
    return torch.relu_(torch.conv2d(x, weight, bias, *arguments))


def _milliseconds(call: Callable[[], object]) -> float:
    """Of one call, the mean of ten."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 10


def z_is_read(dtype: torch.dtype, benchmark: bool) -> Result:
    """Whether NaN in the memory that cudnn_convolution_relu passes as z, with alpha 0, comes through."""
    torch.backends.cudnn.benchmark = benchmark
    rows, leaks = {}, []
    cases = (
        (64, 56, 64, 3, 1, 1),
        (64, 56, 256, 1, 1, 0),
        (3, 224, 64, 7, 2, 3),
        (512, 7, 512, 3, 1, 1),
        (256, 56, 512, 1, 2, 0),
    )
    for c_in, size, c_out, kernel, stride, padding in cases:
        layout = dict(memory_format=torch.channels_last)
        x = torch.randn(8, c_in, size, size, device=DEVICE).to(dtype, **layout)
        weight = torch.randn(c_out, c_in, kernel, kernel, device=DEVICE).to(dtype, **layout)
        bias = torch.randn(c_out, device=DEVICE).to(dtype)
        pair = lambda v: (v, v)  # noqa: E731
        arguments = (pair(stride), pair(padding), pair(1), 1)
        y = torch.relu(torch.conv2d(x, weight, bias, *arguments))
        for _ in range(3):
            poison = torch.full_like(y, float("nan"))
            address = poison.data_ptr()
            del poison
            z = torch.cudnn_convolution_relu(x, weight, bias, *arguments)
            case = f"{c_in}x{size}->{c_out} {kernel}x{kernel}/{stride}"
            rows[case] = {"there": z.data_ptr() == address, "nan": bool(z.isnan().any())}
            if rows[case]["nan"]:
                leaks.append(case)
        rows[case]["difference"] = (z - y).abs().nan_to_num(1e9).max().item()
        fused = partial(torch.cudnn_convolution_relu, x, weight, bias, *arguments)
        apart = partial(_conv_then_relu, x, weight, bias, *arguments)
        times = {"cudnn_convolution_relu": _milliseconds(fused), "conv2d, relu_": _milliseconds(apart)}
        rows[case]["ms beside other processes"] = times
    return {"cases": rows, **({"refused": f"NaN of z comes through: {leaks}"} if leaks else {})}


@torch.no_grad()
def add_relu() -> Result:
    from resnet_kernels.kernels import add_relu as kernel

    for dtype in (torch.float32, torch.float16, BF16):
        for shape in ((3, 7, 5, 3), (16, 256, 56, 56)):
            x, r = (torch.randint(-8, 9, shape, device=DEVICE).to(dtype) for _ in range(2))
            x[0, 0, 0, 0] = float("nan")
            torch.full_like(x, float("nan"))
            if not torch.equal(kernel.launch(x, r).nan_to_num(99), torch.relu(x + r).nan_to_num(99)):
                return {"refused": f"{dtype}, {shape}"}
    return {}


@torch.no_grad()
def bn_scale_shift() -> Result:
    from resnet_kernels.kernels import bn_scale_shift as kernel

    for dtype in (torch.float32, torch.float16, BF16):
        layers = []
        for channels in (7, 64, 2048):
            weight, bias, mean, conv_bias = (torch.randn(channels, device=DEVICE).to(dtype) for _ in range(4))
            layers.append((weight, bias, mean, torch.rand(channels, device=DEVICE).to(dtype) + 0.1, conv_bias))
        layers[1] = (None, None, *layers[1][2:4], None)
        eps = (1e-5, 1e-3, 1e-5)
        table = kernel.Layers(layers, eps)
        pairs = table.split(*table.launch())
        for (weight, bias, mean, var, conv_bias), e, (scale, shift) in zip(layers, eps, pairs):
            one, zero = torch.ones_like(mean), torch.zeros_like(mean)
            weight, bias, conv_bias = one if weight is None else weight, bias if bias is not None else zero, conv_bias
            conv_bias = zero if conv_bias is None else conv_bias
            true_scale = weight.double() / (var.double() + e).sqrt()
            true_shift = bias.double() + (conv_bias.double() - mean.double()) * true_scale
            worst = max(_error(scale, true_scale), _error(shift, true_shift))
            if not worst < 3e-7:
                return {"refused": f"{dtype}: errs by {worst:.1e}"}
    return {}


@torch.no_grad()
def uint8_stem() -> Result:
    model, _ = _model("resnet50", 2, 224, BF16)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = torch.randint(0, 256, (5, 3, 224, 224), dtype=torch.uint8, device=DEVICE)
    fused = rk.fuse(model, backend="triton", normalize=(mean, std))
    vectors = [torch.tensor(v, device=DEVICE).view(3, 1, 1) for v in (mean, std)]
    images = (((x.float() / 255) - vectors[0]) / vectors[1]).to(BF16, memory_format=torch.channels_last)
    return _judge(fused(x), model, images)


def descriptors() -> Result:
    from . import ceilings

    rows = {}
    for name, view in ceilings.VIEWS.items():
        rows[name] = ceilings.read_through(view, torch.device(DEVICE))["right"]
    return {"views": rows, **({} if all(rows.values()) else {"refused": str(rows)})}


def ceilings_run() -> Result:
    from . import ceilings

    found = ceilings.l2(torch.device(DEVICE), 0.2, False)
    return {} if all(row["right"] for row in found.values()) else {"refused": str(found)}


def small_checks() -> dict[str, Callable[[], Result]]:
    if DEVICE == "cpu":
        return {"nothing, dry": dict}
    return {
        "add_relu": add_relu,
        "bn_scale_shift": bn_scale_shift,
        "descriptors": descriptors,
        "l2 kernel": ceilings_run,
        "uint8 stem": uint8_stem,
        **{
            f"z of cudnn_convolution_relu, {str(dtype)[6:]}, benchmark={b}": partial(z_is_read, dtype, b)
            for dtype in (BF16, torch.float16, torch.float32)
            for b in (False, True)
        },
    }


@torch.no_grad()
def _launch(what: str) -> None:
    """Launches one kernel, without a reference: under compute-sanitizer everything is slow."""
    from resnet_kernels.kernels.geometry import Geometry
    from resnet_kernels.kernels.sm90 import chain, conv, conv_tiles, stem

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(DEVICE, BF16, memory_format=torch.channels_last)

    padded = Geometry(padding=(1, 1, 1, 1))
    for _ in range(2):
        if what == "split":
            for config in conv_tiles.CONFIGS:
                if config.split_k > 1:
                    conv.launch(draw(2, 512, 7, 7), draw(512, 512, 3, 3), None, None, None, padded, True, config)
        elif what == "stem":
            for config in stem_configs():
                stem.launch(torch.randn(2, 3, 75, 75, device=DEVICE), draw(64, 3, 7, 7), None, None, config=config)
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
