"""Cases of the training kernels: BN with an optional residual and a ReLU, forward and backward."""

from __future__ import annotations

import itertools
from dataclasses import replace

from helpers.compile_cases import DTYPES, Case, kernel_named, specialize
from resnet_kernels.kernels.activations import RELU, as_constexprs

BATCH_NORM_KERNELS = ("statistics", "finish_statistics", "forward", "reduce", "finish_reduce", "backward")
BATCH_NORM_VECTORS = (
    "mean_ptr", "rstd_ptr", "weight_ptr", "bias_ptr", "running_mean_ptr", "running_var_ptr", "dweight_ptr", "dbias_ptr",
    "coefficient_ptr",
)  # fmt: skip


def batch_norm_cases() -> list[Case]:
    """All six training kernels, each with every argument it can take and as a layer without a residual launches it.

    64 channels at 112x112 and 2048 at 7x7 give the same kernel. Only channels that 16 does not divide give another one.
    """
    from resnet_kernels.kernels import batch_norm_tiles

    cases: dict[str, Case] = {}
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
        types = dict.fromkeys(("x_ptr", "y_ptr", "kept_ptr", "dx_ptr", "dy_ptr", "residual_ptr", "dz_ptr"), "*" + dtype)
        types |= dict.fromkeys(BATCH_NORM_VECTORS, "*fp32") | dict(partial_ptr="*fp64", momentum="fp32", eps="fp32")
        for name, residual in itertools.product(BATCH_NORM_KERNELS, (True, False)):
            fn, warps, blocks = kernel_named(f"batch_norm_act {name}"), batch_norm_tiles.NUM_WARPS, tiles
            if name.startswith("finish"):
                warps, most = batch_norm_tiles.FINISH_WARPS, batch_norm_tiles.MOST_SPLITS
                blocks = dict(BLOCK_SPLITS=most, BLOCK_CHANNELS=batch_norm_tiles.FINISH_CHANNELS)
            absent = set() if residual else {"residual_ptr", "dz_ptr", "kept_ptr"}
            arguments, aligned, constants = specialize({n: v for n, v in integers.items() if n in fn.arg_names})
            arguments |= {n: t for n, t in types.items() if n in fn.arg_names and n not in absent}
            given: dict[str, object] = dict(
                **as_constexprs(RELU), VARIANCE=False, STAGES=batch_norm_tiles.STAGES, **blocks, **dict.fromkeys(absent)
            )
            constants |= {n: v for n, v in given.items() if n in fn.arg_names}
            config = "x".join(map(str, blocks.values()))
            layer = f"{n_channels} channels{', residual' if residual else ''}"
            case = Case(f"batch_norm_act {name}", config, dtype, layer, warps, 3, arguments, aligned, constants)
            cases.setdefault(repr(replace(case, layer="")), case)
    return list(cases.values())
