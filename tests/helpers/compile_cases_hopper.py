"""Cases of Hopper's convolutions: the one for all sizes, the 3x3 that shares loads, the one with specialized warps."""

from __future__ import annotations

import itertools
from dataclasses import replace

from helpers.compile_cases import (
    DTYPES,
    SHARING_KERNEL,
    SPECIALIZED_KERNEL,
    TMA_KERNEL,
    Case,
    descriptor_type,
    gluon_descriptor_type,
    label,
    specialize,
)
from helpers.compile_cases_conv import layers
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.geometry import Geometry

# Some tiles are chosen by a table only. These are the layers to compile them for: weight shapes, by the tile's block_n.
TABLE_LAYERS = {
    64: ((64, 64, 3, 3), (64, 256, 1, 1)),
    128: ((128, 128, 3, 3), (256, 256, 3, 3), (256, 64, 1, 1)),
    256: ((256, 256, 3, 3), (256, 1024, 1, 1)),
}


def tma_layers() -> dict[tuple, str]:
    """Names of the convolutions that Hopper's kernel may get, by (weight shape, geometry, input size, shortcut).

    A shortcut is None, or the merged projection's own weight shape, geometry and input size.
    """
    found = {(*key[:3], None): name for key, name in layers().items()}
    same, half = Geometry(padding=(1,) * 4), Geometry((2, 2), (1,) * 4)
    # No net has these: narrow and ragged channels, and stride 2 on odd sizes.
    for weight_shape, geometry, size in (
        ((32, 32, 3, 3), same, (14, 14)),
        ((64, 24, 1, 1), Geometry(), (14, 14)),
        ((64, 32, 3, 3), same, (14, 14)),
        ((128, 128, 3, 3), half, (57, 57)),
        ((256, 256, 3, 3), half, (29, 29)),
        ((64, 24, 3, 3), half, (28, 28)),
    ):
        found[weight_shape, geometry, size, None] = f"{weight_shape[1]} to {weight_shape[0]}, {size[0]}x{size[1]}"
    # Merged projections: the first block of each stage of ResNet-50, and of the last three stages of ResNet-18.
    for stage, (width, c_in, stride, out_size) in enumerate(
        ((64, 64, 1, 56), (128, 256, 2, 28), (256, 512, 2, 14), (512, 1024, 2, 7)), start=1
    ):
        step = Geometry((stride, stride))
        shortcut = ((4 * width, c_in, 1, 1), step, (stride * out_size,) * 2)
        found[(4 * width, width, 1, 1), Geometry(), (out_size, out_size), shortcut] = f"resnet50 layer{stage}.0 merged"
        if stride == 2:
            shortcut = ((width, width // 2, 1, 1), step, (2 * out_size,) * 2)
            found[(width, width, 3, 3), same, (out_size, out_size), shortcut] = f"resnet18 layer{stage}.0 merged"
    return found


def tma_cases(everything: bool) -> list[Case]:
    """The convolutions that Hopper's kernel takes, at batch 1 and 256.

    Without `everything`, cases that differ only in their box of pixels or in dtype are compiled once.
    """
    from resnet_kernels.kernels.sm90.conv_layout import ConvShape, plan, why_not, why_not_tile
    from resnet_kernels.kernels.sm90.conv_tiles import CONFIGS

    cases: dict[object, Case] = {}
    for (weight_shape, geometry, in_size, shortcut), name in tma_layers().items():
        by_table = [c for c in CONFIGS if c.block_m == 256 or c.flatten]
        chosen = [None, *(c for c in by_table if shortcut is None and weight_shape in TABLE_LAYERS[c.block_n])]
        dtypes = ("fp16", "bf16") if everything else ("bf16",)
        # Programs that start early differ in their first instructions: one layer will do.
        early = [(1, c) for c in CONFIGS if c.early and shortcut is None and weight_shape == (256, 256, 3, 3)]
        for dtype, (batch, tile) in itertools.product(dtypes, [(1, None), *early, *((256, tile) for tile in chosen)]):
            conv = ConvShape((batch, weight_shape[1] * geometry.groups, *in_size), weight_shape, geometry)
            if why_not(*conv, DTYPES[dtype]) is not None or (tile and why_not_tile(conv, tile)):
                continue
            if shortcut is not None:
                shortcut_weight, step, size = shortcut
                projection = ConvShape((batch, shortcut_weight[1], *size), shortcut_weight, step)
            todo = plan(conv, RELU, config=tile, shortcut=None if shortcut is None else projection)
            arguments, aligned, constants = specialize(todo.integers)
            # A projection is added in place of a residual.
            views = {n: view for n, view in todo.views.items() if not shortcut or n != "residual_desc"}
            types = {n: descriptor_type(dtype, view.box) for n, view in views.items()}
            types |= dict.fromkeys(("scale_ptr", "bias_ptr"), "*fp32")
            if shortcut:
                types |= dict.fromkeys(("shortcut_scale_ptr", "shortcut_bias_ptr", "parked_ptr"), "*fp32")
            config = todo.config
            if config.split_k > 1:
                types |= {"parked_ptr": "*fp32", "counter_ptr": "*i32"}
            if config.early:
                types["w_ptr"] = "*" + dtype
            case = Case(
                TMA_KERNEL, label(config), dtype, name, config.num_warps, config.num_stages, types | arguments, aligned,
                constants | todo.constants, todo.max_registers,
            )  # fmt: skip
            form = (weight_shape[2:], "x01_desc" in views, *(todo.constants[n] for n in ("IN_PAIRS", "RAGGED", "SKIP")))
            loop = (*form, bool(shortcut), todo.constants["N_CHUNKS"] == 1)
            cases.setdefault(repr(replace(case, layer="")) if everything else (config, loop), case)
    return list(cases.values())


def sharing_cases() -> list[Case]:
    """Every tile of the 3x3 that shares its loads, in stages 1 and 3 of ResNet-50, with the heaviest epilogue."""
    from resnet_kernels.kernels.sm90.tap_sharing import CONFIGS, plan

    cases = []
    for config, (channels, size) in itertools.product(CONFIGS, ((64, 56), (256, 14))):
        todo = plan((256, channels, size, size), channels, RELU, False, config)
        arguments, aligned, constants = specialize(todo.integers)
        types = {n: descriptor_type("bf16", view.box) for n, view in todo.views.items()}
        types |= dict.fromkeys(("scale_ptr", "bias_ptr"), "*fp32") | arguments
        cases.append(
            Case(SHARING_KERNEL, label(config), "bf16", f"3x3 {channels}", config.num_warps, config.num_stages, types,
                 aligned, constants | todo.constants)
        )  # fmt: skip
    return cases


def specialized_cases() -> list[Case]:
    """Every tile of the convolution with specialized warps, for each form of its loop at batch 256.

    A form is compiled with a residual, and without one where there is a merged projection.
    """
    from resnet_kernels.kernels.sm90.conv_layout import ConvShape
    from resnet_kernels.kernels.sm90.specialized_layout import (
        CONFIGS,
        MERGED,
        plan,
        why_not,
        why_not_merged,
        why_not_tile,
    )

    cases: dict[object, Case] = {}
    for (weight_shape, geometry, in_size, shortcut), name in tma_layers().items():
        conv = ConvShape((256, weight_shape[1] * geometry.groups, *in_size), weight_shape, geometry)
        projection = None
        if shortcut is not None:
            shortcut_weight, step, size = shortcut
            projection = ConvShape((256, shortcut_weight[1], *size), shortcut_weight, step)
        if why_not(*conv, DTYPES["bf16"]) or (projection and why_not_merged(conv, projection, DTYPES["bf16"])):
            continue
        for config in (MERGED,) if projection else CONFIGS:
            if why_not_tile(conv, config) is not None:
                continue
            todo = plan(conv, RELU, config, projection)
            arguments, aligned, constants = specialize(todo.integers)
            types = {
                n: gluon_descriptor_type("bf16", view.box)
                for n, view in todo.views.items()
                if projection is None or n != "residual_desc"
            }
            types |= dict.fromkeys(("scale_ptr", "bias_ptr"), "*fp32")
            if projection:
                types |= dict.fromkeys(("shortcut_scale_ptr", "shortcut_bias_ptr", "parked_ptr"), "*fp32")
            case = Case(
                SPECIALIZED_KERNEL, str(config), "bf16", name, config.num_warps, 3, types | arguments, aligned,
                constants | todo.constants,
            )  # fmt: skip
            form = (weight_shape[2:], *(todo.constants[n] for n in ("IN_PAIRS", "SKIP", "SHORTCUT_CHUNKS")))
            cases.setdefault((config, form), case)
            if projection:  # pre-activation nets have no scales here
                kept = {n: t for n, t in case.arguments.items() if "scale" not in n and n != "parked_ptr"}
                cases.setdefault((config, "no scales"), replace(case, layer=f"{name}, no scales", arguments=kept))
    return list(cases.values())
