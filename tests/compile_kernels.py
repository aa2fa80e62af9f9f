"""Compiles every shipped Triton kernel for GPUs that need not be here, and says what each one takes.

    python tests/compile_kernels.py                a table
    python tests/compile_kernels.py --all          the same, of every case
    python tests/compile_kernels.py --json FILE    the same as records, which tests/kernels/test_compile.py checks

A case is a kernel with its compile-time arguments, as the launcher would specialise it for a layer of a real network; the
convolutions carry their heaviest epilogue (scale, bias, residual and ReLU).

Without --all, cases that differ only in stride, batch or image size are compiled once, and fp16 for one target only. Over all
600 (Triton 3.6.0 and 3.9.0) such cases differ by up to 62 registers, fp16 and bf16 by 11, and none in shared memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# No import of triton or of a kernel up here: main() has to take TRITON_INTERPRET away first.
import torch
from torch import nn

from resnet_kernels import models
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.models.d2l import Residual

KIB = 1024
WORKERS = 2
FP16_TARGET = "sm_90"
# Seconds each to compile; one fits but spills, the other doesn't even fit.
PLANTED_TARGETS = ("sm_90", "gfx942")
TMA_KERNEL, CHAIN_KERNEL, TMA_TARGET = "conv_bias_act tma", "chain tma", "sm_90"
STEM_KERNEL, STEM_PACK_KERNEL = "stem", "stem pack"
SHARING_KERNEL = "tap sharing tma"
EPILOGUE_KERNEL, FOLD_KERNEL = "epilogue", "fold_weights"
BATCH_NORM_KERNELS = ("statistics", "finish_statistics", "forward", "reduce", "finish_reduce", "backward")
BATCH_NORM_VECTORS = (
    "mean_ptr", "rstd_ptr", "weight_ptr", "bias_ptr", "running_mean_ptr", "running_var_ptr", "dweight_ptr", "dbias_ptr",
    "coefficient_ptr",
)  # fmt: skip
# By output channels of a tile that only a table chooses: the layers that it is compiled for, by the weight's shape.
TABLE_LAYERS = {
    64: ((64, 64, 3, 3), (64, 256, 1, 1)),
    128: ((128, 128, 3, 3), (256, 256, 3, 3), (256, 64, 1, 1)),
    256: ((256, 256, 3, 3), (256, 1024, 1, 1)),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Target:
    """A GPU to compile for. Sizes are the vendors' published ones: shared memory of a program and of an SM in bytes."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_per_program: int
    shared_per_sm: int

    @property
    def nvidia(self) -> bool:
        return self.backend == "cuda"


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * KIB, 164 * KIB),
    Target("sm_89", "cuda", 89, 32, 99 * KIB, 100 * KIB),
    Target("sm_90", "cuda", 90, 32, 227 * KIB, 228 * KIB),
    Target("sm_100", "cuda", 100, 32, 227 * KIB, 228 * KIB),
    Target("sm_120", "cuda", 120, 32, 99 * KIB, 100 * KIB),
    Target("gfx942", "hip", "gfx942", 64, 64 * KIB, 64 * KIB),
)


@dataclass(frozen=True)
class Case:
    """One kernel, specialised. arguments: run-time ones by name, with their type; aligned: those known to be 16-fold."""

    kernel: str
    config: str
    dtype: str
    layer: str
    num_warps: int
    num_stages: int
    arguments: dict[str, str]
    aligned: tuple[str, ...]
    constants: dict = field(default_factory=dict)
    max_registers: int | None = None
    planted: bool = False


def find_cuobjdump() -> str | None:
    """NVIDIA's reader of compiled kernels, from Triton's own package or the PATH."""
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(shipped) if shipped.exists() else shutil.which("cuobjdump")


def layers() -> dict[tuple, str]:
    """(weight shape, geometry, input size, output size) of every convolution of the nets, with a name for each."""
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
    # Beyond the nets: what else can lead to a configuration's other loop (whole chunks or ragged ones).
    for c_in, c_out in ((32, 64), (17, 33), (17, 32)):
        visit(f"{c_in} to {c_out}", lambda sizes=(c_in, c_out): nn.Conv2d(*sizes, 3, 1, 1), 1, c_in, 14, 14)
    return found


def specialise(integers: dict[str, int]) -> tuple[dict[str, str], tuple[str, ...], dict[str, int]]:
    """Does to a launch's integers what Triton does: 1 becomes a constant, multiples of 16 are known as such."""
    constants = {name: 1 for name, value in integers.items() if value == 1}
    arguments = {name: "i32" for name in integers if name not in constants}
    return arguments, tuple(name for name in arguments if integers[name] % 16 == 0), constants


def conv_case(config, dtype: str, layer: str, weight_shape, geometry: Geometry, in_size, out_size, n_pixels) -> Case:
    from resnet_kernels.kernels import conv_bias_act

    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    c_out, c_in, pad = weight_shape[0] // geometry.groups, weight_shape[1], geometry.padding
    integers = dict(
        n_pixels=n_pixels, in_h=in_size[0], in_w=in_size[1], out_h=out_size[0], out_w=out_size[1],
        c_in=c_in, c_out=c_out, groups=geometry.groups, pad_top=pad[0], pad_left=pad[2],
    )  # fmt: skip
    arguments, aligned, constants = specialise(integers)
    data = dict.fromkeys(("x_ptr", "w_ptr", "residual_ptr", "y_ptr"), "*" + dtype.replace("tf32", "fp32"))
    given = data | {"scale_ptr": "*fp32", "bias_ptr": "*fp32"} | arguments
    constants |= conv_bias_act.constexprs(DTYPES[dtype], weight_shape, geometry, True, config)
    return Case(
        "conv_bias_act", label(config), dtype, layer, config.num_warps, config.num_stages, given, aligned, constants
    )


def label(config) -> str:
    return f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}" + (
        f" k{config.split_k}"
        if getattr(config, "split_k", 1) > 1
        else " flat"
        if getattr(config, "flatten", False)
        else ""
    )


def conv_cases(everything: bool) -> list[Case]:
    from resnet_kernels.kernels.conv_bias_act import choose_config

    cases = {}
    for (weight_shape, geometry, in_size, out_size), name in layers().items():
        c_out, c_in = weight_shape[0] // geometry.groups, weight_shape[1]
        for batch in (1, 256):
            n_pixels = batch * out_size[0] * out_size[1]
            for dtype in DTYPES:
                config = choose_config(n_pixels, c_in, c_out, DTYPES[dtype])
                case = conv_case(config, dtype, name, weight_shape, geometry, in_size, out_size, n_pixels)
                # Stride, batch and image size are left out: see the top of this file.
                loop = (case.constants["WHOLE_CHUNKS"], case.constants["IN_BOUNDS"], weight_shape[2:])
                key = repr(replace(case, layer="")) if everything else (loop, c_in == 1, geometry.groups == 1)
                cases.setdefault((config, dtype, key), case)
    return list(cases.values())


def tma_layers() -> dict[tuple, str]:
    """(weight shape, geometry, input size, shortcut) of what Hopper's kernel may get; shortcut: the first three, or None."""
    found = {(*key[:3], None): name for key, name in layers().items()}
    same, half = Geometry(padding=(1,) * 4), Geometry((2, 2), (1,) * 4)
    # Beyond the nets: narrow and ragged channels, and stride 2 on odd sizes.
    for weight_shape, geometry, size in (
        ((32, 32, 3, 3), same, (14, 14)),
        ((64, 24, 1, 1), Geometry(), (14, 14)),
        ((64, 32, 3, 3), same, (14, 14)),
        ((128, 128, 3, 3), half, (57, 57)),
        ((256, 256, 3, 3), half, (29, 29)),
        ((64, 24, 3, 3), half, (28, 28)),
    ):
        found[weight_shape, geometry, size, None] = f"{weight_shape[1]} to {weight_shape[0]}, {size[0]}x{size[1]}"
    # The blocks with a projection: of ResNet-50 the first of a stage, of ResNet-18 the last three of them.
    for stage, (width, c_in, stride, size) in enumerate(
        ((64, 64, 1, 56), (128, 256, 2, 28), (256, 512, 2, 14), (512, 1024, 2, 7)), start=1
    ):
        step = Geometry((stride, stride))
        shortcut = ((4 * width, c_in, 1, 1), step, (stride * size,) * 2)
        found[(4 * width, width, 1, 1), Geometry(), (size, size), shortcut] = f"resnet50 layer{stage}.0 merged"
        if stride == 2:
            shortcut = ((width, width // 2, 1, 1), step, (2 * size,) * 2)
            found[(width, width, 3, 3), same, (size, size), shortcut] = f"resnet18 layer{stage}.0 merged"
    return found


def tma_cases(everything: bool) -> list[Case]:
    """The convolutions that Hopper's kernel takes; what differs only in the box of pixels or in dtype is left out."""
    from resnet_kernels.kernels.sm90.conv_layout import ConvShape, plan, why_not, why_not_tile
    from resnet_kernels.kernels.sm90.conv_tiles import CONFIGS

    cases = {}
    for (weight_shape, geometry, in_size, shortcut), name in tma_layers().items():
        by_table = [c for c in CONFIGS if c.block_m == 256 or c.flatten]
        chosen = [None, *(c for c in by_table if shortcut is None and weight_shape in TABLE_LAYERS[c.block_n])]
        dtypes = ("fp16", "bf16") if everything else ("bf16",)
        for dtype, (batch, tile) in itertools.product(dtypes, [(1, None), *((256, tile) for tile in chosen)]):
            conv = ConvShape((batch, weight_shape[1] * geometry.groups, *in_size), weight_shape, geometry)
            if why_not(*conv, DTYPES[dtype]) is not None or (tile and why_not_tile(conv, tile)):
                continue
            if shortcut is not None:
                shortcut_weight, step, size = shortcut
                projection = ConvShape((batch, shortcut_weight[1], *size), shortcut_weight, step)
            todo = plan(conv, True, config=tile, shortcut=None if shortcut is None else projection)
            arguments, aligned, constants = specialise(todo.integers)
            # A projection takes the residual's place.
            views = {n: view for n, view in todo.views.items() if not shortcut or n != "residual_desc"}
            types = {n: f"tensordesc<{dtype}[{','.join(map(str, view.box))}]>" for n, view in views.items()}
            types |= dict.fromkeys(("scale_ptr", "bias_ptr"), "*fp32")
            if shortcut:
                types |= dict.fromkeys(("shortcut_scale_ptr", "shortcut_bias_ptr", "parked_ptr"), "*fp32")
            config = todo.config
            if config.split_k > 1:
                types |= {"parked_ptr": "*fp32", "counter_ptr": "*i32"}
            case = Case(
                TMA_KERNEL, label(config), dtype, name, config.num_warps, config.num_stages, types | arguments, aligned,
                constants | todo.constants, todo.max_registers,
            )  # fmt: skip
            form = (weight_shape[2:], "x01_desc" in views, *(todo.constants[n] for n in ("IN_PAIRS", "RAGGED", "SKIP")))
            loop = (*form, bool(shortcut), todo.constants["N_CHUNKS"] == 1)
            cases.setdefault(repr(replace(case, layer="")) if everything else (config, loop), case)
    return list(cases.values())


def sharing_cases() -> list[Case]:
    """The 3x3 that shares its loads, every tile in stage 1 and in stage 3 of ResNet-50, the heaviest epilogue."""
    from resnet_kernels.kernels.sm90.tap_sharing import CONFIGS, plan

    cases = []
    for config, (channels, size) in itertools.product(CONFIGS, ((64, 56), (256, 14))):
        todo = plan((256, channels, size, size), channels, True, False, config)
        arguments, aligned, constants = specialise(todo.integers)
        types = {n: f"tensordesc<bf16[{','.join(map(str, view.box))}]>" for n, view in todo.views.items()}
        types |= dict.fromkeys(("scale_ptr", "bias_ptr"), "*fp32") | arguments
        cases.append(
            Case(SHARING_KERNEL, label(config), "bf16", f"3x3 {channels}", config.num_warps, config.num_stages, types,
                 aligned, constants | todo.constants)
        )  # fmt: skip
    return cases


def chain_cases(everything: bool) -> list[Case]:
    """Every kind of chain at 56x56 and 28x28: batch 256 and 1, v1 and v2, both strides, and channels that fill no block.

    Without `everything` one of each kind, and one of each thing that leads to another loop.
    """
    from resnet_kernels.kernels.sm90.chain_layout import BLOCK_VECTORS, CONFIGS, ShortcutShape, plan, why_not

    cases = {}
    names = _kernel(CHAIN_KERNEL).arg_names
    for kind, less, preact, stride, batch in itertools.product(CONFIGS, (0, 32), (False, True), (1, 2), (256, 1)):
        width, c_next, c_shortcut = (channels and channels - less for channels in kind)
        if preact and not c_next:
            continue
        c_out, size = 4 * kind.width, 56 * 64 // kind.width
        geometry, step = Geometry((stride, stride), (1, 1, 1, 1)), Geometry((stride, stride))
        x_shape = (batch, width, size * stride, size * stride)
        conv2, conv3, following = (width, width, 3, 3), (c_out, width, 1, 1), (c_next, c_out, 1, 1) if c_next else None
        projection = (c_out, c_shortcut, 1, 1) if c_shortcut else None
        shortcut = ShortcutShape((batch, c_shortcut or c_out, *x_shape[2:]), projection, step)
        shortcut = shortcut if projection or stride == 2 else None
        assert why_not(x_shape, conv2, geometry, conv3, torch.bfloat16, shortcut, following) is None
        todo = plan(x_shape, conv2, geometry, c_out, shortcut, following, (True, not preact, True))
        arguments, aligned, constants = specialise(todo.integers)
        absent = () if projection else ("shortcut_scale_desc", "shortcut_shift_desc")
        absent += () if preact else ("norm_scale_desc", "norm_shift_desc")
        pointers = ("scale2_ptr", "shift2_ptr", *(("scale1_ptr", "shift1_ptr") if following else ()))
        for dtype in ("bf16", "fp16") if everything else ("bf16",):
            boxes = {
                name: ("fp32" if name in BLOCK_VECTORS else dtype, view.box)
                for name, view in todo.views.items()
                if name not in absent
            }
            types = {n: f"tensordesc<{t}[{','.join(map(str, box))}]>" for n, (t, box) in boxes.items()}
            types |= dict.fromkeys(pointers, "*fp32") | arguments
            given = constants | todo.constants
            config, what = (
                todo.config,
                f"{width} to {c_out}, {'v2' if preact else 'v1'}, stride {stride}, batch {batch}",
            )
            case = Case(
                CHAIN_KERNEL, chain_label(kind, CONFIGS[kind]), dtype, what, config.num_warps, config.num_stages, types,
                aligned, {name: given.get(name) for name in names if name not in types},
            )  # fmt: skip
            for key in [repr(case)] if everything else [kind, (less, preact, stride, projection is None)]:
                cases.setdefault(key, case)
    return list({repr(case): case for case in cases.values()}.values())


def chain_label(kind, config) -> str:
    """The kind, then its tile; steps of 32 input channels count as the same."""
    stages = f"s{config.num_stages}/{config.tail_stages}"
    return f"{'-'.join(map(str, kind))} {config.block_m}x{config.block_c} w{config.num_warps} {stages}"


def stem_label(config) -> str:
    return f"{config.block_w} w{config.num_warps} s{config.num_stages}{' descriptor' if config.descriptor else ''}"


def stem_cases() -> list[Case]:
    """Hopper's stem in all its strips, and what packs its image."""
    from resnet_kernels.kernels.sm90 import stem_layout

    cases = {}
    # One image, full strips, several odd ones.
    sizes = ((1, 224, 64), (256, 224, 64), (8, 301, 48))
    for dtype, (batch, size, c_out), config in itertools.product(("fp16", "bf16"), sizes, stem_layout.CONFIGS):
        todo = stem_layout.plan((batch, 3, size, size), c_out, 132, config)
        arguments, aligned, constants = specialise(todo.integers)
        types = dict.fromkeys(("w_ptr", "y_ptr"), "*" + dtype) | dict.fromkeys(("scale_ptr", "shift_ptr"), "*fp32")
        types["x"] = (
            f"tensordesc<{dtype}[{','.join(map(str, todo.windows.box))}]>" if config.descriptor else "*" + dtype
        )
        constants |= dict(
            BLOCK_W=config.block_w, BLOCK_C=stem_layout.BLOCK_C, DESCRIPTOR=config.descriptor, UPCAST=False
        )  # fmt: skip
        case = Case(
            STEM_KERNEL, stem_label(config), dtype, f"{batch} x {size} x {size} to {c_out}", config.num_warps,
            config.num_stages, types | arguments, aligned, constants,
        )  # fmt: skip
        cases.setdefault(repr(case), case)
    names = _kernel(STEM_PACK_KERNEL).arg_names
    for image, normalize in (("fp32", False), ("bf16", True), ("u8", True)):
        types = dict(x_ptr="*" + image, packed_ptr="*bf16", w_ptr="*bf16", packed_w_ptr="*bf16")
        types |= {name: "fp32" for name in names if name.startswith(("mean", "std"))}
        given = dict(NORMALIZE=normalize, UNIT=image == "u8", BLOCK=stem_layout.PACK_BLOCK)
        types |= {name: "i32" for name in names if name not in types | given}
        layer = f"from {image}{', normalized' if normalize else ''}"
        cases[layer] = Case(
            STEM_PACK_KERNEL, str(stem_layout.PACK_BLOCK), "bf16", layer, stem_layout.PACK_WARPS, 3, types, (), given
        )  # fmt: skip
    return list(cases.values())


def pointwise_cases() -> list[Case]:
    from resnet_kernels.kernels import add_relu, bn_scale_shift

    cases = [*epilogue_cases(), *fold_cases()]
    for dtype in ("fp16", "bf16", "fp32"):
        pointers = dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr"), "*" + dtype)
        size = {"BLOCK_SIZE": add_relu.BLOCK_SIZE}
        for n_elements in (64 * 56 * 56, 17):
            arguments, aligned, _ = specialise({"n_elements": n_elements})
            cases.append(
                Case("add_relu", str(add_relu.BLOCK_SIZE), dtype, f"{n_elements} elements", add_relu.NUM_WARPS, 3,
                     pointers | arguments, aligned, size)
            )  # fmt: skip
        pointers = dict(pointers_ptr="*i64", starts_ptr="*i64", eps_ptr="*fp32", scale_ptr="*fp32", shift_ptr="*fp32")
        constants = {"DTYPE": bn_scale_shift.DTYPES[DTYPES[dtype]], "BLOCK_SIZE": bn_scale_shift.BLOCK_SIZE}
        cases.append(
            Case("bn_scale_shift", str(bn_scale_shift.BLOCK_SIZE), dtype, "any", bn_scale_shift.NUM_WARPS, 3, pointers, (),
                 constants)
        )  # fmt: skip
    return cases


def epilogue_cases() -> list[Case]:
    """The pass after a convolution, over x: with all it can take, as a layer has it, and with biases alone."""
    from resnet_kernels.kernels import epilogue

    cases = {}
    vectors = ("scale_ptr", "shift_ptr", "residual_scale_ptr", "residual_shift_ptr")
    forms = {
        "all": ("residual_ptr", *vectors),
        "scale and shift": vectors[:2],
        "biases": ("residual_ptr", "shift_ptr", "residual_shift_ptr"),
    }
    for dtype, (n_channels, size), form in itertools.product(
        ("fp16", "bf16", "fp32"), ((64, 112), (2048, 7), (6, 3)), forms
    ):
        if form != "all" and n_channels != 64:
            continue
        tile = epilogue.choose_tile(n_channels, DTYPES[dtype].itemsize)
        arguments, aligned, _ = specialise(dict(n_rows=256 * size * size, n_channels=n_channels))
        types = dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr"), "*" + dtype) | dict.fromkeys(vectors, "*fp32")
        absent = {"residual_ptr", *vectors} - set(forms[form])
        given = {name: kind for name, kind in types.items() if name not in absent} | arguments
        case = Case(
            EPILOGUE_KERNEL, "x".join(map(str, tile.values())), dtype, f"{n_channels} channels, {form}",
            epilogue.NUM_WARPS, 3, given, aligned, dict(RELU=form != "biases", **tile, **dict.fromkeys(absent)),
        )  # fmt: skip
        cases[repr(case)] = case
    return list(cases.values())


def fold_cases() -> list[Case]:
    """Weights that are folded: aligned ones, and ones that allow no wide loads; fp32 weights in a call under autocast."""
    from resnet_kernels.kernels import bn_scale_shift, fold_weights

    cases = []
    pairs = (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32"), ("fp16", "fp16"))
    for (source, dtype), aligned in itertools.product(pairs, (True, False)):
        types = dict(table_ptr="*i64", layers_ptr="*i32", scale_ptr="*fp32", shift_ptr="*fp32")
        types |= dict.fromkeys(("weights_ptr", "biases_ptr"), "*" + dtype)
        tile = dict(BLOCK_O=fold_weights.BLOCK_O, BLOCK_K=fold_weights.BLOCK_K)
        constants = dict(DTYPE=bn_scale_shift.DTYPES[DTYPES[source]], ALIGNED=aligned, **tile)
        cases.append(
            Case(FOLD_KERNEL, "x".join(map(str, tile.values())), dtype, f"{source}{', aligned' if aligned else ''}",
                 fold_weights.NUM_WARPS, 3, types, (), constants)
        )  # fmt: skip
    return cases


def batch_norm_cases() -> list[Case]:
    """All six kernels of training, each with everything it can take and as a layer without a residual has it.

    64 channels at 112x112 and 2048 at 7x7 give one and the same kernel, another only channels that 16 does not divide.
    """
    from resnet_kernels.kernels import batch_norm_tiles

    cases = {}
    for dtype, n_channels, size in (
        ("fp16", 64, 112),
        ("bf16", 64, 112),
        ("fp32", 64, 112),
        ("fp32", 2048, 7),
        ("fp32", 6, 3),
    ):
        rows = 256 * size * size
        split = batch_norm_tiles.choose_split(rows, n_channels, DTYPES[dtype].itemsize)
        integers = dict(n_rows=rows, n_channels=n_channels, rows_per_split=split.rows, n_splits=split.n_splits)
        tiles = dict(BLOCK_ROWS=split.block_rows, BLOCK_CHANNELS=split.block_channels)
        types = dict.fromkeys(("x_ptr", "y_ptr", "dx_ptr", "dy_ptr", "residual_ptr", "dz_ptr"), "*" + dtype)
        types |= dict.fromkeys(BATCH_NORM_VECTORS, "*fp32") | {
            "partial_ptr": "*fp64",
            "momentum": "fp32",
            "eps": "fp32",
        }
        for name, residual in itertools.product(BATCH_NORM_KERNELS, (True, False)):
            fn, warps, blocks = _kernel(f"batch_norm_act {name}"), batch_norm_tiles.NUM_WARPS, tiles
            if name.startswith("finish"):
                warps, blocks = (
                    batch_norm_tiles.FINISH_WARPS,
                    dict(BLOCK_SPLITS=batch_norm_tiles.MOST_SPLITS, BLOCK_CHANNELS=batch_norm_tiles.FINISH_CHANNELS),
                )
            absent = set() if residual else {"residual_ptr", "dz_ptr"} | ({"y_ptr"} if name != "forward" else set())
            arguments, aligned, constants = specialise({n: v for n, v in integers.items() if n in fn.arg_names})
            arguments |= {n: t for n, t in types.items() if n in fn.arg_names and n not in absent}
            given = dict(RELU=True, VARIANCE=False, STAGES=batch_norm_tiles.STAGES, **blocks, **dict.fromkeys(absent))
            constants |= {n: v for n, v in given.items() if n in fn.arg_names}
            config, layer = (
                "x".join(map(str, blocks.values())),
                f"{n_channels} channels{', residual' if residual else ''}",
            )
            case = Case(f"batch_norm_act {name}", config, dtype, layer, warps, 3, arguments, aligned, constants)
            cases.setdefault(repr(replace(case, layer="")), case)
    return list(cases.values())


def planted_case() -> Case:
    """A tile that no target can hold: 512 fp32 sums a thread on NVIDIA, 128 KiB of operands and more."""
    from resnet_kernels.kernels.conv_bias_act import ConvConfig

    config = ConvConfig(256, 256, 64, num_warps=4, num_stages=3)
    geometry = Geometry(padding=(1, 1, 1, 1))
    case = conv_case(config, "bf16", "planted", (256, 256, 3, 3), geometry, (14, 14), (14, 14), 256 * 14 * 14)
    return replace(case, planted=True)


def compile_case(job: tuple[Case, Target]) -> dict:
    """Compiles one case for one target; returns its record, with `error` set instead of figures where that failed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case, target = job
    fn = _kernel(case.kernel)
    attrs = {}
    for i, name in enumerate(fn.arg_names):
        if case.arguments.get(name, "").startswith("*"):
            # A ROCm launch also tells the compiler of tensors below 2 GiB: that's what buffer instructions need.
            attrs[(i,)] = [["tt.divisibility", 16]] + ([] if target.nvidia else [["tt.pointer_range", 32]])
        elif name in case.aligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    record = {**asdict(case), "target": target.name, "error": None}
    try:
        compiled = triton.compile(
            ASTSource(
                fn=fn,
                signature={name: case.arguments.get(name, "constexpr") for name in fn.arg_names},
                constexprs=case.constants,
                attrs=attrs,
            ),
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=dict(
                num_warps=case.num_warps,
                num_stages=case.num_stages,
                maxnreg=case.max_registers,
                enable_fp_fusion=True,
            ),
        )
        record["shared"] = compiled.metadata.shared
        record["operand_in_registers"] = bool(re.search(r"warp_group_dot .*dot_op<", compiled.asm["ttgir"]))
        record["dot_loops"], record["loops_in_flight"] = _dot_loops(compiled.asm["ttgir"])
        record["loads_in_loop"] = _loads_in_loop(compiled.asm["ttgir"])
        on_hopper = case.kernel in (TMA_KERNEL, CHAIN_KERNEL, STEM_KERNEL, SHARING_KERNEL)
        record |= _read_nvidia(compiled, on_hopper) if target.nvidia else _read_amd(compiled)
        record["programs"] = _programs(record, target)
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"[:2000]
    return record


def _kernel(name: str):
    from resnet_kernels.kernels import (
        add_relu,
        batch_norm_act,
        batch_norm_act_backward,
        bn_scale_shift,
        conv_bias_act,
        epilogue,
        fold_weights,
    )
    from resnet_kernels.kernels.sm90 import chain, stem, tap_sharing
    from resnet_kernels.kernels.sm90 import conv as sm90_conv

    if name.startswith("batch_norm_act "):
        kernel = f"_{name.split()[1]}_kernel"
        return getattr(batch_norm_act, kernel, None) or getattr(batch_norm_act_backward, kernel)
    return {
        "conv_bias_act": conv_bias_act._conv_bias_act_kernel,
        TMA_KERNEL: sm90_conv._conv_bias_act_tma_kernel,
        CHAIN_KERNEL: chain._chain_tma_kernel,
        STEM_KERNEL: stem._stem_kernel,
        SHARING_KERNEL: tap_sharing._tap_sharing_tma_kernel,
        STEM_PACK_KERNEL: stem._pack_kernel,
        EPILOGUE_KERNEL: epilogue._epilogue_kernel,
        FOLD_KERNEL: fold_weights._fold_weights_kernel,
        "add_relu": add_relu._add_relu_kernel,
        "bn_scale_shift": bn_scale_shift._bn_scale_shift_kernel,
    }[name]


def _loads_in_loop(ttgir: str) -> int | None:
    """How many plain (waiting) loads are left in the K loop; None without a loop."""
    loop = re.search(r"^( *)[^\n]*\bscf\.for\b.*?^\1\}", ttgir, re.S | re.M)
    return None if loop is None else len(re.findall(r"\btt\.load\b|\bbuffer_load\b", loop.group(0)))


def _dot_loops(ttgir: str) -> tuple[int, int]:
    """How many loops multiply on wgmma themselves, and how many of these keep a product in flight over their end."""
    # From the innermost outwards: what is left of an outer loop then is its own.
    innermost = re.compile(r"^( *)[^\n]*\bscf\.for\b(?:(?!\bscf\.for\b).)*?^\1\}", re.S | re.M)
    loops = [loop.group(0) for loop in innermost.finditer(ttgir)]
    loops = [loop for loop in loops if "warp_group_dot " in loop]
    return len(loops), sum(bool(re.search(r"warp_group_dot_wait.*pendings = [1-9]", loop)) for loop in loops)


def _read_nvidia(compiled, tma: bool) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [find_cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        # PTX spells TMA in several ways; the machine's own instructions have one.
        disassemble = [find_cuobjdump(), "-sass", file.name]
        sass = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout if tma else ""
    figures = {name: int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")}
    ptx = compiled.asm["ptx"]
    return dict(
        registers=figures["REG"],
        spills={"stack bytes": figures["STACK"], "local bytes": figures["LOCAL"]},
        tensor_cores=sorted(set(re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", ptx))),
        copy_bytes=sorted({int(n, 16) for n in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?(0x\w+)", ptx)}),
        load_bytes=sorted(
            {int(n or 1) * int(b) // 8 for n, b in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)}
        ),
        overwritten=overwritten_operands(sass),
        tma=sorted(set(re.findall(r"\b(UTMALDG\.\dD|UTMASTG\.\dD)\b", sass))),
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
    )


def _read_amd(compiled) -> dict:
    asm = compiled.asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    figures = {name: int(re.search(rf"\.{name}:\s+(\d+)", asm).group(1)) for name in names}
    widths = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2}
    loads = set(re.findall(r"\b(?:global|buffer|flat)_load_(?:(dword)(?:x(\d))?|([us]?byte|[us]?short))", asm))
    return dict(
        registers=figures["vgpr_count"],
        spills={
            "VGPRs": figures["vgpr_spill_count"],
            "scratch bytes": figures["private_segment_fixed_size"],
            "SGPRs": figures["sgpr_spill_count"],
        },
        tensor_cores=sorted({"mfma xf32" if xf32 else "mfma" for xf32 in re.findall(r"\bv_mfma_\w+?(xf32)?\b", asm)}),
        copy_bytes=[],
        load_bytes=sorted(4 * int(n or 1) if dword else widths[part] for dword, n, part in loads),
        tensor_memory=0,
    )


def overwritten_operands(sass: str) -> list[str]:
    """Products whose left operand, made ready before their loop, is lost in it: later turns multiply something else.

    ptxas of Triton 3.6.0 did that to a chain's projection, and an H200 computed accordingly. Nothing but the machine's own
    instructions shows it.
    """
    line = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+\s+)?([A-Za-z0-9_.]+)\s*(.*?);")
    code = [(int(at, 16), name, rest) for at, name, rest in line.findall(sass)]
    jumps = [(int(to.group(1), 16), at) for at, n, r in code if n == "BRA" and (to := re.search(r"0x([0-9a-f]+)", r))]
    loops = [(first, last) for first, last in jumps if first < last]

    def writes(name: str, rest: str) -> set[int]:
        first = re.match(r"R(\d+)", rest)
        return set(range(int(first.group(1)), int(first.group(1)) + (4 if "88.4" in name else 1))) if first else set()

    lost = []
    for at, name, rest in code:
        left = re.match(r"R\d+, R(\d+), gdesc", rest) if name.startswith("HGMMA") else None
        around = [loop for loop in loops if loop[0] <= at <= loop[1]]
        if left is None or not around:
            continue
        operand = set(range(int(left.group(1)), int(left.group(1)) + 4))
        first, last = min(around, key=lambda loop: loop[1] - loop[0])
        written = [
            (there, n) for there, n, r in code if first <= there <= last and operand & writes(n, r) and "HGMMA" not in n
        ]
        # Made anew in front of the product, or put back behind it (a move, or a load that is not transposed), is all right.
        if written and written[0][0] > at and "MOV" not in written[-1][1] and not written[-1][1].endswith(".M88.4"):
            lost.append(f"{name} {rest.strip()} at {at:#x}")
    return lost


def _programs(record: dict, target: Target) -> int:
    """How many programs run on one SM (CU) at a time: what registers, shared memory, threads and slots leave."""
    warps, registers = record["num_warps"], -(-record["registers"] // 8) * 8
    if target.nvidia:
        # Registers belong to one of four quarters of the SM. 1 KiB of each program's shared memory is the system's.
        by_registers = 4 * (64 * KIB // 4 // (32 * registers)) // warps
        by_tensor_memory = 512 // record["tensor_memory"] if record["tensor_memory"] else 32
        by_shared = target.shared_per_sm // (record["shared"] + KIB)
        return min(by_registers, by_shared, 2048 // (32 * warps), by_tensor_memory, 32)
    # 512 registers a lane in each of four SIMDs, and at most 8 waves there.
    by_registers = 4 * min(8, 512 // registers) // warps
    return min(by_registers, target.shared_per_sm // max(record["shared"], 1))


def jobs(everything: bool) -> list[tuple[Case, Target]]:
    cases = [*conv_cases(everything), *pointwise_cases(), *batch_norm_cases()]
    chosen = [(c, t) for c in cases for t in TARGETS if everything or c.dtype != "fp16" or t.name == FP16_TARGET]
    own = (*tma_cases(everything), *chain_cases(everything), *stem_cases(), *sharing_cases())
    chosen += [(c, t) for c in own for t in TARGETS if t.name == TMA_TARGET]
    return [(planted_case(), t) for t in TARGETS if t.name in PLANTED_TARGETS] + chosen


def one_of_each_kernel() -> list[tuple[Case, Target]]:
    """A job for each kernel, on Hopper: what can be compiled in seconds."""
    first: dict[str, tuple[Case, Target]] = {}
    for case, target in jobs(everything=False):
        if target.name == TMA_TARGET and not case.planted:
            first.setdefault(case.kernel, (case, target))
    return [*first.values()]


def compile_all(chosen: list[tuple[Case, Target]]) -> list[dict]:
    """Records of the chosen cases."""
    # spawn: a fork would take torch's and LLVM's threads along half-dead.
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_case, chosen))


def describe(record: dict) -> str:
    """The case in words, as a failing test names it."""
    return f"{record['kernel']} {record['config']} {record['dtype']} ({record['layer']}) on {record['target']}"


def table(records: list[dict]) -> str:
    """A line a record. spills: bytes of stack on NVIDIA; VGPRs, or SGPRs held in VGPRs, on AMD."""
    head = (
        "kernel",
        "config",
        "dtype",
        "layer",
        "target",
        "registers",
        "shared KiB",
        "programs/SM",
        "spills",
        "multiply",
    )
    rows = [head]
    for r in sorted(records, key=lambda r: [t.name for t in TARGETS].index(r["target"])):
        row = [r["kernel"], r["config"], r["dtype"], r["layer"], r["target"]]
        if r["error"]:
            row += ["error", "", "", "", ""]
        else:
            spills = ", ".join(f"{n} {what}" for what, n in r["spills"].items() if n) or "none"
            row += [
                r["registers"],
                f"{r['shared'] / KIB:.1f}",
                r["programs"],
                spills,
                ", ".join(r["tensor_cores"]) or "fma",
            ]
        rows.append([str(cell) for cell in row])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="leave no case out; takes minutes")
    parser.add_argument("--quick", action="store_true", help="one case of each kernel, on Hopper")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    arguments = parser.parse_args()
    # Under the interpreter nothing can be compiled, and a cache may hold what an older source gave.
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        # So few are done before other processes would have started.
        records = [*map(compile_case, one_of_each_kernel())] if arguments.quick else compile_all(jobs(arguments.all))
    if arguments.json:
        # A constant may be one of Triton's types.
        arguments.json.write_text(json.dumps(records, default=str))
    print(table(records))


if __name__ == "__main__":
    main()
