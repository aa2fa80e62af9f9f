"""A case: one kernel, specialized as its launcher would specialize it for a layer of a real network.

compile_cases_*.py list the cases, a function for each kernel or two. This file has what these functions share.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

# Kernels are imported inside functions: compile_kernels.py has to remove TRITON_INTERPRET before anything imports triton.

TMA_KERNEL, CHAIN_KERNEL = "conv_bias_act tma", "chain tma"
STEM_KERNEL, STEM_PACK_KERNEL = "stem", "stem pack"
SHARING_KERNEL, SPECIALIZED_KERNEL = "tap sharing tma", "specialized conv"
SPECIALIZED_CHAIN_KERNEL, SPECIALIZED_STEM_KERNEL = "specialized chain", "specialized stem"
RING_CHAIN_KERNEL = "specialized chain, ring"
EPILOGUE_KERNEL, FOLD_KERNEL = "epilogue", "fold_weights"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One kernel, specialized.

    Args:
        kernel: its name, which kernel_named takes.
        config: the configuration's name.
        dtype: a key of DTYPES.
        layer: the layer that the kernel would be launched for, in words.
        num_warps: warps of a program.
        num_stages: stages of the pipeline.
        arguments: Triton's type of each run-time argument, by name.
        aligned: the run-time integers that Triton knows to be multiples of 16.
        constants: the compile-time arguments, by name.
        max_registers: the most registers that a thread may have; None leaves it to the compiler.
        planted: whether the checks have to find fault with the case.
    """

    kernel: str
    config: str
    dtype: str
    layer: str
    num_warps: int
    num_stages: int
    arguments: dict[str, str]
    aligned: tuple[str, ...]
    constants: Mapping[str, object] = field(default_factory=dict)
    max_registers: int | None = None
    planted: bool = False


def kernel_named(name: str):
    """Returns the Triton function that a case calls by this name."""
    from resnet_kernels.kernels import (
        add_relu,
        batch_norm_act,
        batch_norm_act_backward,
        bn_scale_shift,
        conv_bias_act,
        epilogue,
        fold_weights,
    )
    from resnet_kernels.kernels.sm90 import (
        chain,
        specialized_chain,
        specialized_chain_ring,
        specialized_conv,
        specialized_stem,
        stem,
        tap_sharing,
    )
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
        SPECIALIZED_KERNEL: specialized_conv._specialized_conv_kernel,
        SPECIALIZED_CHAIN_KERNEL: specialized_chain._specialized_chain_kernel,
        RING_CHAIN_KERNEL: specialized_chain_ring.ring_chain_kernel,
        SPECIALIZED_STEM_KERNEL: specialized_stem._specialized_stem_kernel,
        STEM_PACK_KERNEL: stem._pack_kernel,
        EPILOGUE_KERNEL: epilogue._epilogue_kernel,
        FOLD_KERNEL: fold_weights._fold_weights_kernel,
        "add_relu": add_relu._add_relu_kernel,
        "bn_scale_shift": bn_scale_shift._bn_scale_shift_kernel,
    }[name]


def specialize(
    integers: dict[str, int], unknown: Collection[str] = ()
) -> tuple[dict[str, str], tuple[str, ...], dict[str, object]]:
    """Specializes a launch's integers as Triton does: 1 becomes a constant, and a multiple of 16 is known to be one.

    Args:
        integers: by name.
        unknown: names of those that the kernel tells Triton not to specialize.

    Returns:
        The types of the run-time arguments, the names of those that are multiples of 16, and the constants.
    """
    constants: dict[str, object] = {n: 1 for n, value in integers.items() if value == 1 and n not in unknown}
    arguments = {name: "i32" for name in integers if name not in constants}
    aligned = tuple(name for name in arguments if integers[name] % 16 == 0 and name not in unknown)
    return arguments, aligned, constants


def descriptor_type(dtype: str, box) -> str:
    """Triton's type of a tensor descriptor whose loads take a box of this shape."""
    return f"tensordesc<{dtype}[{','.join(map(str, box))}]>"


def gluon_descriptor_type(dtype: str, box) -> str:
    """Type of a descriptor of 16-bit numbers in a Gluon kernel's signature."""
    from resnet_kernels.kernels.sm90.gluon_names import layout_of

    return descriptor_type(dtype, box)[:-1] + f",{layout_of(box)!r}>"


def label(config) -> str:
    """The name of a convolution's tile configuration: tile, warps, stages, and what the sum or the pixels are cut by."""
    tile = f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}"
    tile += f" k{config.split_k}" if getattr(config, "split_k", 1) > 1 else ""
    tile += " flat" if getattr(config, "flatten", False) else ""
    return f"{tile} early" if getattr(config, "early", False) else tile
