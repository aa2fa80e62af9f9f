"""Cases of Hopper's links: the chain of a bottleneck's convolutions, and the stem with its max-pool."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from helpers.compile_cases import (
    CHAIN_KERNEL,
    RING_CHAIN_KERNEL,
    SPECIALIZED_CHAIN_KERNEL,
    SPECIALIZED_STEM_KERNEL,
    STEM_KERNEL,
    STEM_PACK_KERNEL,
    Case,
    descriptor_type,
    gluon_descriptor_type,
    kernel_named,
    specialize,
)
from resnet_kernels.kernels.geometry import Geometry


class _Chain(NamedTuple):
    """A chain's kind, and its shapes: chain_layout.plan's first six arguments."""

    kind: Any
    key: tuple
    shapes: tuple
    preact: bool
    what: str


def _chains() -> Iterator[_Chain]:
    """Every kind of chain at 56x56 and 28x28: batch 256 and 1, v1 and v2, both strides, and channels that fill no block."""
    from resnet_kernels.kernels.sm90.chain_layout import CONFIGS, Kind, ShortcutShape

    # Of the last one only specialized_chain.py has a kernel.
    kinds = (*CONFIGS, Kind(64, 0, 64))
    for kind, less, preact, stride, batch in itertools.product(kinds, (0, 32), (False, True), (1, 2), (256, 1)):
        width, c_next, c_shortcut = (channels and channels - less for channels in kind)
        if preact and not c_next:
            continue
        c_out, size = 4 * kind.width, 56 * 64 // kind.width
        geometry, step = Geometry((stride, stride), (1, 1, 1, 1)), Geometry((stride, stride))
        x_shape = (batch, width, size * stride, size * stride)
        conv2, following = (width, width, 3, 3), (c_next, c_out, 1, 1) if c_next else None
        projection = (c_out, c_shortcut, 1, 1) if c_shortcut else None
        branch = ShortcutShape((batch, c_shortcut or c_out, *x_shape[2:]), projection, step)
        # The input itself, at stride 1, is an ordinary residual.
        shortcut = branch if projection or stride == 2 else None
        what = f"{width} to {c_out}, {'v2' if preact else 'v1'}, stride {stride}, batch {batch}"
        key = less, preact, stride, projection is None
        yield _Chain(kind, key, (x_shape, conv2, geometry, c_out, shortcut, following), preact, what)


def chain_cases(everything: bool) -> list[Case]:
    """Cases of chain.py's kernel.

    Without `everything`, one case of each kind, and one of each combination that leads to another loop.
    """
    from resnet_kernels.kernels.sm90.chain_layout import BLOCK_VECTORS, CONFIGS, plan, why_not

    cases: dict[object, Case] = {}
    names = kernel_named(CHAIN_KERNEL).arg_names
    for kind, key, shapes, preact, what in _chains():
        if kind not in CONFIGS:
            continue
        x_shape, conv2, geometry, c_out, shortcut, following = shapes
        width, projection = conv2[0], shortcut and shortcut.weight
        conv3 = (c_out, width, 1, 1)
        assert why_not(x_shape, conv2, geometry, conv3, torch.bfloat16, shortcut, following) is None
        todo = plan(*shapes, (True, not preact, True))
        arguments, aligned, constants = specialize(todo.integers)
        absent: tuple[str, ...] = () if projection else ("shortcut_scale_desc", "shortcut_shift_desc")
        absent += () if preact else ("norm_scale_desc", "norm_shift_desc")
        pointers = ("scale2_ptr", "shift2_ptr", *(("scale1_ptr", "shift1_ptr") if following else ()))
        for dtype in ("bf16", "fp16") if everything else ("bf16",):
            boxes = {
                name: ("fp32" if name in BLOCK_VECTORS else dtype, view.box)
                for name, view in todo.views.items()
                if name not in absent
            }
            types = {n: descriptor_type(t, box) for n, (t, box) in boxes.items()}
            types |= dict.fromkeys(pointers, "*fp32") | arguments
            given = constants | todo.constants
            config = todo.config
            case = Case(
                CHAIN_KERNEL, chain_label(kind, CONFIGS[kind]), dtype, what, config.num_warps, config.num_stages, types,
                aligned, {name: given.get(name) for name in names if name not in types},
            )  # fmt: skip
            for where in [repr(case)] if everything else [kind, key]:
                cases.setdefault(where, case)
    return list({repr(case): case for case in cases.values()}.values())


def chain_label(kind, config) -> str:
    """The name of a chain's configuration: its kind and its tile. It is the same for steps of 32 and 64 input channels."""
    stages = f"s{config.num_stages}/{config.tail_stages}"
    return f"{'-'.join(map(str, kind))} {config.block_m}x{config.block_c} w{config.num_warps} {stages}"


def specialized_chain_cases() -> list[Case]:
    """Cases of specialized_chain.py's kernels: one of each combination that leads to another loop."""
    from resnet_kernels.kernels.sm90.specialized_layout import plan_chain, why_not_chain

    cases: dict[object, Case] = {}
    for kind, key, shapes, preact, what in _chains():
        x_shape, conv2, geometry, c_out, shortcut, following = shapes
        conv3 = (c_out, conv2[0], 1, 1)
        if why_not_chain(x_shape, conv2, geometry, conv3, torch.bfloat16, shortcut, following) is not None:
            continue
        todo = plan_chain(*shapes, (True, not preact, True))
        arguments, aligned, constants = specialize(todo.integers)
        pointers = ["scale2_ptr", "shift2_ptr", "scale3_ptr", "shift3_ptr"]
        pointers += ["norm_scale_ptr", "norm_shift_ptr"] if preact else []
        pointers += ["shortcut_scale_ptr", "shortcut_shift_ptr"] if shortcut and shortcut.weight else []
        pointers += ["scale1_ptr", "shift1_ptr"] if following else []
        types = {n: gluon_descriptor_type("bf16", view.box) for n, view in todo.views.items()}
        types |= dict.fromkeys(pointers, "*fp32") | arguments
        given = constants | todo.constants
        config = f"s{given['STAGES']} b{given['BUFFERS']}"
        kernel = RING_CHAIN_KERNEL if todo.in_ring else SPECIALIZED_CHAIN_KERNEL
        names = kernel_named(kernel).arg_names
        case = Case(
            kernel, config, "bf16", what, 4, 3, types, aligned,
            {name: given.get(name) for name in names if name not in types},
        )  # fmt: skip
        cases.setdefault((kind, key), case)
    return list(cases.values())


# Batch, size, output channels: one image; a batch of the usual size; images of an odd size, with fewer channels.
_STEMS = ((1, 224, 64), (256, 224, 64), (8, 301, 48))


def stem_cases() -> list[Case]:
    """Every configuration of Hopper's stem, and the kernel that packs its image and weight."""
    from resnet_kernels.kernels.sm90 import stem_layout

    cases: dict[str, Case] = {}
    for dtype, (batch, size, c_out), config in itertools.product(("fp16", "bf16"), _STEMS, stem_layout.CONFIGS):
        todo = stem_layout.plan((batch, 3, size, size), c_out, 132, config)
        arguments, aligned, constants = specialize(todo.integers)
        types = dict.fromkeys(("w_ptr", "y_ptr"), "*" + dtype) | dict.fromkeys(("scale_ptr", "shift_ptr"), "*fp32")
        types["x"] = descriptor_type(dtype, todo.windows.box) if config.descriptor else "*" + dtype
        constants |= dict(
            BLOCK_W=config.block_w, BLOCK_C=stem_layout.BLOCK_C, DESCRIPTOR=config.descriptor, UPCAST=False
        )  # fmt: skip
        case = Case(
            STEM_KERNEL, stem_label(config), dtype, f"{batch} x {size} x {size} to {c_out}", config.num_warps,
            config.num_stages, types | arguments, aligned, constants,
        )  # fmt: skip
        cases.setdefault(repr(case), case)
    names = kernel_named(STEM_PACK_KERNEL).arg_names
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


def specialized_stem_cases() -> list[Case]:
    """Cases of specialized_stem.py's kernel, one without scales."""
    from resnet_kernels.kernels.sm90.specialized_layout import plan_stem

    cases: dict[str, Case] = {}
    kernel = kernel_named(SPECIALIZED_STEM_KERNEL)
    names, unknown = kernel.arg_names, [param.name for param in kernel.params if param.do_not_specialize]
    for dtype, (batch, size, c_out), scaled in itertools.product(("fp16", "bf16"), _STEMS, (True, False)):
        todo = plan_stem((batch, 3, size, size), c_out, 132)
        arguments, aligned, constants = specialize(todo.integers, unknown)
        types = {n: gluon_descriptor_type(dtype, view.box) for n, view in todo.views.items()}
        types |= dict.fromkeys(("scale_ptr", "shift_ptr") if scaled else ("shift_ptr",), "*fp32") | {
            "y_ptr": "*" + dtype
        }
        types |= arguments
        given = constants | todo.constants
        what = f"{batch} x {size} x {size} to {c_out}{'' if scaled else ', no scales'}"
        case = Case(
            SPECIALIZED_STEM_KERNEL, f"{todo.constants['ROWS']} rows", dtype, what, 4, 3, types, aligned,
            {name: given.get(name) for name in names if name not in types},
        )  # fmt: skip
        cases.setdefault(repr(case), case)
    return list(cases.values())


def stem_label(config) -> str:
    """The name of a stem's configuration."""
    return f"{config.block_w} w{config.num_warps} s{config.num_stages}{' descriptor' if config.descriptor else ''}"
