"""Small checks on a GPU: single kernels, descriptors, cuDNN's fused operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import resnet_kernels as rk
from resnet_kernels.ops.error_budget import relative_error

from .networks import BF16, DEVICE, Result, judge, random_model


def _conv_then_relu(x: Tensor, weight: Tensor, bias: Tensor, *arguments) -> Tensor:
    return torch.relu_(torch.conv2d(x, weight, bias, *arguments))


def _milliseconds(call: Callable[[], object]) -> float:
    """Mean milliseconds of a call, over ten calls."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 10


def z_is_read(dtype: torch.dtype, benchmark: bool) -> Result:
    """Checks that NaN in the memory that cudnn_convolution_relu passes as z, with alpha 0, stays out of the result."""
    torch.backends.cudnn.benchmark = benchmark
    rows: dict[str, Result] = {}
    leaks = []
    cases = (
        (64, 56, 64, 3, 1, 1),
        (64, 56, 256, 1, 1, 0),
        (3, 224, 64, 7, 2, 3),
        (512, 7, 512, 3, 1, 1),
        (256, 56, 512, 1, 2, 0),
    )
    for c_in, size, c_out, kernel, stride, padding in cases:
        x = torch.randn(8, c_in, size, size, device=DEVICE).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(c_out, c_in, kernel, kernel, device=DEVICE).to(dtype, memory_format=torch.channels_last)
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
        layers: list[tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]] = []
        for channels in (7, 64, 2048):
            gamma, beta, mean, added = (torch.randn(channels, device=DEVICE).to(dtype) for _ in range(4))
            layers.append((gamma, beta, mean, torch.rand(channels, device=DEVICE).to(dtype) + 0.1, added))
        layers[1] = (None, None, *layers[1][2:4], None)
        eps = (1e-5, 1e-3, 1e-5)
        table = kernel.Layers(layers, eps)
        pairs = table.split(*table.launch())
        for (weight, bias, mean, var, conv_bias), e, (scale, shift) in zip(layers, eps, pairs, strict=True):
            one, zero = torch.ones_like(mean), torch.zeros_like(mean)
            true_scale = (one if weight is None else weight).double() / (var.double() + e).sqrt()
            centered = (zero if conv_bias is None else conv_bias).double() - mean.double()
            true_shift = (zero if bias is None else bias).double() + centered * true_scale
            worst = max(relative_error(scale, true_scale), relative_error(shift, true_shift))
            if not worst < 3e-7:
                return {"refused": f"{dtype}: errs by {worst:.1e}"}
    return {}


@torch.no_grad()
def uint8_stem() -> Result:
    model, _ = random_model("resnet50", 2, 224, BF16)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = torch.randint(0, 256, (5, 3, 224, 224), dtype=torch.uint8, device=DEVICE)
    fused = rk.fuse(model, backend="triton", normalize=(mean, std))
    vectors = [torch.tensor(v, device=DEVICE).view(3, 1, 1) for v in (mean, std)]
    images = (((x.float() / 255) - vectors[0]) / vectors[1]).to(BF16, memory_format=torch.channels_last)
    return judge(fused(x), model, images)


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


@torch.no_grad()
def early_launches(layers: int = 20, replays: int = 20) -> Result:
    """Checks that launches which start early (programmatic dependent launch) wait for each other's results.

    Convolutions of which each reads the one before it have to give the bits that they give when each waits for its turn, as
    calls and in a graph.
    """
    from dataclasses import replace

    from resnet_kernels.kernels.activations import RELU
    from resnet_kernels.kernels.geometry import Geometry
    from resnet_kernels.kernels.operands import ConvOperands
    from resnet_kernels.kernels.sm90 import conv
    from resnet_kernels.kernels.sm90.conv_tiles import CONFIGS

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(BF16).contiguous(memory_format=torch.channels_last)

    x, weight, pad = tensor(1, 256, 14, 14), tensor(256, 256, 3, 3) / 34, Geometry(padding=(1, 1, 1, 1))
    wrong = []
    for config in (config for config in CONFIGS if config.early):

        def run(config=config) -> Tensor:
            y = x
            for _ in range(layers):
                y = conv.launch(ConvOperands(y, weight, None, y, None, pad, RELU), config)
            return y

        expected = run(replace(config, early=False))
        outputs = [run() for _ in range(3)]
        if DEVICE == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = run()
            for _ in range(replays):
                graph.replay()
                outputs.append(captured.clone())
        if not all(torch.equal(y, expected) for y in outputs):
            wrong.append(str(config))
    return {"refused": f"other results when started early: {wrong}"} if wrong else {}


def small_checks() -> dict[str, Callable[[], Result]]:
    if DEVICE == "cpu":
        return {"nothing, dry": dict}
    return {
        "add_relu": add_relu,
        "bn_scale_shift": bn_scale_shift,
        "descriptors": descriptors,
        "early launches": early_launches,
        "l2 kernel": ceilings_run,
        "uint8 stem": uint8_stem,
        **{
            f"z of cudnn_convolution_relu, {str(dtype)[6:]}, benchmark={b}": partial(z_is_read, dtype, b)
            for dtype in (BF16, torch.float16, torch.float32)
            for b in (False, True)
        },
    }
