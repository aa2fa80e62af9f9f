"""Cases of the kernels that multiply no matrices: add and ReLU, the epilogue, BN's scale and shift, folded weights."""

from __future__ import annotations

import itertools

from helpers.compile_cases import DTYPES, EPILOGUE_KERNEL, FOLD_KERNEL, Case, specialize
from resnet_kernels.kernels.activations import RELU, as_constexprs


def pointwise_cases() -> list[Case]:
    """All cases of this file; add and ReLU with sizes that allow wide loads and that do not."""
    from resnet_kernels.kernels import add_relu, bn_scale_shift

    cases = [*epilogue_cases(), *fold_cases()]
    for dtype in ("fp16", "bf16", "fp32"):
        pointers = dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr"), "*" + dtype)
        size = {"BLOCK_SIZE": add_relu.BLOCK_SIZE}
        for n_elements in (64 * 56 * 56, 17):
            arguments, aligned, _ = specialize({"n_elements": n_elements})
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
    """The epilogue as its own pass: with every argument it can take, with scale and shift alone, and with biases alone."""
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
        arguments, aligned, _ = specialize(dict(n_rows=256 * size * size, n_channels=n_channels))
        types = dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr"), "*" + dtype) | dict.fromkeys(vectors, "*fp32")
        absent = {"residual_ptr", *vectors} - set(forms[form])
        given = {name: kind for name, kind in types.items() if name not in absent} | arguments
        last = as_constexprs(RELU if form != "biases" else None)
        case = Case(
            EPILOGUE_KERNEL, "x".join(map(str, tile.values())), dtype, f"{n_channels} channels, {form}",
            epilogue.NUM_WARPS, 3, given, aligned, dict(**last, **tile, **dict.fromkeys(absent)),
        )  # fmt: skip
        cases[repr(case)] = case
    return list(cases.values())


def fold_cases() -> list[Case]:
    """Folding of weights that are aligned and that allow no wide loads. fp32 into bf16 is a call under autocast."""
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
