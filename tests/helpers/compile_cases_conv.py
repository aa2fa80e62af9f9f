"""Cases of the convolution for every target, with its heaviest epilogue: scale, bias, residual and ReLU."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from helpers.compile_cases import DTYPES, Case, label, specialize
from resnet_kernels import models
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.models.d2l import Residual


def layers() -> dict[tuple, str]:
    """Names of all convolutions of the nets, by (weight shape, geometry, input size, output size)."""
    found: dict[tuple, str] = {}

    def visit(net_name, build, *shape):
        def note(module, inputs, output, name):
            key = (
                tuple(module.weight.shape),
                Geometry.of_module(module, inputs[0].shape[2:]),
                *(t.shape[2:] for t in (inputs[0], output)),
            )
            found.setdefault(key, f"{net_name} {name}".strip())

        with torch.device("meta"):
            net = build().eval()
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda *call, name=name: note(*call, name))
        net(torch.empty(shape, device="meta"))

    for net_name in ("resnet18", "resnet50", "resnext50_32x4d"):
        visit(net_name, models.BY_NAME[net_name], 1, 3, 224, 224)
    visit("d2l_resnet18", models.d2l_resnet18, 1, 1, 96, 96)
    visit("d2l 3 to 3", lambda: Residual(3, 3), 4, 3, 6, 6)
    visit("d2l 3 to 6", lambda: Residual(3, 6, use_1x1conv=True, strides=2), 4, 3, 6, 6)
    # No net has these. They lead configurations to their other loop, over whole or over ragged chunks of channels.
    for c_in, c_out in ((32, 64), (17, 33), (17, 32)):
        visit(f"{c_in} to {c_out}", lambda c_in=c_in, c_out=c_out: nn.Conv2d(c_in, c_out, 3, 1, 1), 1, c_in, 14, 14)
    return found


def conv_case(config, dtype: str, layer: str, weight_shape, geometry: Geometry, in_size, out_size, n_pixels) -> Case:
    """One convolution of `n_pixels` output pixels (of all images together), with this configuration."""
    from resnet_kernels.kernels import conv_bias_act

    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"  # type: ignore[attr-defined]  # PyTorch's stubs lack it
    c_out, c_in, pad = weight_shape[0] // geometry.groups, weight_shape[1], geometry.padding
    integers = dict(
        n_pixels=n_pixels, in_h=in_size[0], in_w=in_size[1], out_h=out_size[0], out_w=out_size[1],
        c_in=c_in, c_out=c_out, groups=geometry.groups, pad_top=pad[0], pad_left=pad[2],
    )  # fmt: skip
    arguments, aligned, constants = specialize(integers)
    data = dict.fromkeys(("x_ptr", "w_ptr", "residual_ptr", "y_ptr"), "*" + dtype.replace("tf32", "fp32"))
    given = data | {"scale_ptr": "*fp32", "bias_ptr": "*fp32"} | arguments
    constants |= conv_bias_act.constexprs(DTYPES[dtype], weight_shape, geometry, RELU, config)
    return Case(
        "conv_bias_act", label(config), dtype, layer, config.num_warps, config.num_stages, given, aligned, constants
    )


def conv_cases(everything: bool) -> list[Case]:
    """Every convolution of the nets in every dtype, at batch 1 and 256, with the configuration that it would get."""
    from resnet_kernels.kernels.conv_bias_act import choose_config

    cases: dict[tuple, Case] = {}
    for (weight_shape, geometry, in_size, out_size), name in layers().items():
        c_out, c_in = weight_shape[0] // geometry.groups, weight_shape[1]
        for batch in (1, 256):
            n_pixels = batch * out_size[0] * out_size[1]
            for dtype in DTYPES:
                config = choose_config(n_pixels, c_in, c_out, DTYPES[dtype])
                case = conv_case(config, dtype, name, weight_shape, geometry, in_size, out_size, n_pixels)
                # Stride, batch and image size are not in the key: compile_jobs.py says why.
                loop = (case.constants["WHOLE_CHUNKS"], case.constants["IN_BOUNDS"], weight_shape[2:])
                key = repr(replace(case, layer="")) if everything else (loop, c_in == 1, geometry.groups == 1)
                cases.setdefault((config, dtype, key), case)
    return list(cases.values())


def planted_case() -> Case:
    """A tile that no target can hold: 512 fp32 sums per thread on NVIDIA, and at least 128 KiB of operands."""
    from resnet_kernels.kernels.conv_bias_act import ConvConfig

    config = ConvConfig(256, 256, 64, num_warps=4, num_stages=3)
    geometry = Geometry(padding=(1, 1, 1, 1))
    case = conv_case(config, "bf16", "planted", (256, 256, 3, 3), geometry, (14, 14), (14, 14), 256 * 14 * 14)
    return replace(case, planted=True)
