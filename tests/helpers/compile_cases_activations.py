"""Cases of the kernels that end in an activation, or begin with its gradient, with others than ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from helpers.compile_cases import DTYPES, Case
from resnet_kernels.kernels.activations import PRELU, Activation, as_constexprs

# The longest formula, an exponential and a division, and those with slopes.
_ACTIVATIONS = (Activation("gelu"), Activation("gelu_tanh"), Activation("leaky_relu", 0.1), PRELU)


def activation_cases(cases: Sequence[Case]) -> list[Case]:
    """For each kernel that knows activations, its first case in bf16 and in fp32, with each of a few in ReLU's place."""
    first: dict[tuple[str, str], Case] = {}
    for case in cases:
        if case.dtype in ("bf16", "fp32") and case.constants.get("ACT") == "relu":
            first.setdefault((case.kernel, case.dtype), case)
    return [_with(case, activation) for case in first.values() for activation in _ACTIVATIONS]


def _with(case: Case, activation: Activation) -> Case:
    # No kernel before main() has removed TRITON_INTERPRET.
    from resnet_kernels.kernels import batch_norm_tiles
    from resnet_kernels.kernels.batch_norm_act_backward import split_of

    constants = {**case.constants, **as_constexprs(activation)}
    if case.kernel in ("batch_norm_act reduce", "batch_norm_act backward"):
        constants |= batch_norm_tiles.blocks(split_of(256 * 112 * 112, 64, DTYPES[case.dtype].itemsize, activation))
    arguments = dict(case.arguments)
    if activation == PRELU:
        arguments["slopes_ptr"] = "*fp32"
        if case.kernel == "batch_norm_act reduce":
            arguments["slopes_partial_ptr"] = "*fp64"
    config = "x".join(str(constants[name]) for name in ("BLOCK_ROWS", "BLOCK_CHANNELS") if name in constants)
    layer = f"{case.layer}, {activation}"
    return replace(case, layer=layer, config=config or case.config, arguments=arguments, constants=constants)
