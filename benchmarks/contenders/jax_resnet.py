"""Translation of a torch residual network to JAX in NHWC: torch.fx traces it, and each node becomes its jax.lax equivalent.

BN becomes a scale and a shift, made once in fp64 from its running statistics. The translation covers the modules of the four
systems' blocks, stages and models; for any other it raises NotImplementedError with its name.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.utils import _pair

from resnet_kernels.models import Conv2dSame, MaxPool2dSame

from ..extra_info import tf32
from ..workload import ForeignRunner, Workload


def convert(workload: Workload) -> ForeignRunner:
    """Runner of the workload's forward pass as one jitted function."""
    # By default JAX takes three quarters of a GPU's memory for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp
    import numpy as np

    dtype = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}
    dtype = dtype[workload.case.platform.dtype]
    device = jax.devices({"cpu": "cpu", "cuda": "gpu"}[workload.device.type])[0]

    def to_jax(tensor: Tensor):
        values = tensor.detach().float().cpu().contiguous().numpy()
        return jax.device_put(jnp.asarray(values, dtype=dtype), device)

    def to_torch(y) -> Tensor:
        y = torch.from_numpy(np.array(y, dtype=np.float32)).to(workload.device)
        return y.permute(0, 3, 1, 2) if y.ndim == 4 else y

    network = _Network(workload.eager)
    parameters = {name: to_jax(value) for name, value in network.parameters.items()}
    with jax.default_matmul_precision("default" if tf32(workload.device) else "highest"):
        run = jax.jit(network).lower(parameters, to_jax(_nhwc(workload.operands.inputs[0]))).compile()
    return ForeignRunner(lambda x: run(parameters, x).block_until_ready(), lambda x: to_jax(_nhwc(x)), to_torch)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, (Conv2dSame, MaxPool2dSame)) or super().is_leaf_module(module, path)


class _Network:
    """Traced module: its `parameters` by name, as tensors, and a JAX function of (parameters, x)."""

    def __init__(self, module: nn.Module):
        self.graph = _Tracer().trace(module)
        self.modules = dict(module.named_modules())
        self.parameters: dict[str, Tensor] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                for name, value in _parameters(self.modules[node.target]).items():
                    self.parameters[f"{node.target}.{name}"] = value

    def __call__(self, parameters: dict, x):
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            args = fx.map_arg(node.args, values.get)
            kwargs = fx.map_arg(node.kwargs, values.get)
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "output":
                return args[0]
            elif node.op == "call_module":
                own = {name: parameters[f"{node.target}.{name}"] for name in _parameters(self.modules[node.target])}
                values[node] = _run_module(self.modules[node.target], own, args[0])
            else:
                values[node] = _function(node)(*args, **kwargs)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of a module in JAX's layout: weights (h, w, in, out), BN as scale and shift."""
    if isinstance(module, nn.Conv2d):
        found = {"weight": module.weight.permute(2, 3, 1, 0), "bias": module.bias}
    elif isinstance(module, nn.Linear):
        found = {"weight": module.weight.t(), "bias": module.bias}
    elif isinstance(module, nn.BatchNorm2d):
        assert module.running_mean is not None and module.running_var is not None
        scale = module.weight.double() * (module.running_var.double() + module.eps).rsqrt()
        found = {"scale": scale, "shift": module.bias.double() - module.running_mean.double() * scale}
    else:
        found = {}
    return {name: value for name, value in found.items() if value is not None}


def _run_module(module: nn.Module, own: dict, x):
    import jax
    from jax import lax

    if isinstance(module, nn.Conv2d):
        padding = "SAME" if isinstance(module, Conv2dSame) else [(p, p) for p in module.padding]
        y = lax.conv_general_dilated(
            x, own["weight"], module.stride, padding, rhs_dilation=module.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=module.groups,
        )  # fmt: skip
        return y + own["bias"] if "bias" in own else y
    if isinstance(module, nn.Linear):
        return x @ own["weight"] + own["bias"]
    if isinstance(module, nn.BatchNorm2d):
        return x * own["scale"] + own["shift"]
    if isinstance(module, nn.MaxPool2d):
        same = isinstance(module, MaxPool2dSame)
        padding = "SAME" if same else [(0, 0), *((p, p) for p in _pair(module.padding)), (0, 0)]
        window, stride = ((1, *_pair(values), 1) for values in (module.kernel_size, module.stride))
        return lax.reduce_window(x, -float("inf"), lax.max, window, stride, padding)
    if isinstance(module, nn.AdaptiveAvgPool2d) and _pair(module.output_size) == (1, 1):
        return x.mean((1, 2), keepdims=True)
    simple: dict[type, Callable] = {
        nn.ReLU: jax.nn.relu,
        nn.Identity: lambda x: x,
        nn.Softmax: lambda x: jax.nn.softmax(x, axis=module.dim),
        nn.Flatten: _flatten,
    }
    if type(module) not in simple:
        raise NotImplementedError(f"no JAX version of {type(module).__name__}")
    return simple[type(module)](x)


def _function(node: fx.Node) -> Callable:
    import jax

    functions: dict[object, Callable] = {
        operator.add: operator.add,
        operator.iadd: operator.add,
        torch.add: operator.add,
        F.relu: lambda x, inplace=False: jax.nn.relu(x),
        torch.relu: jax.nn.relu,
        torch.flatten: _flatten,
        "flatten": _flatten,
        # The mean over height and width, which are axes 1 and 2 in NHWC.
        "mean": lambda x, dim, keepdim=False: x.mean(_HEIGHT_AND_WIDTH[tuple(dim)], keepdims=keepdim),
    }
    if node.target not in functions:
        raise NotImplementedError(f"no JAX version of {node.target}")
    return functions[node.target]


_HEIGHT_AND_WIDTH = {(2, 3): (1, 2)}


def _flatten(x, start_dim: int = 1):
    if x.shape[1:-1] != (1, 1) and x.ndim == 4:
        raise NotImplementedError("no JAX version of flattening a map: its order is another in NHWC")
    return x.reshape(x.shape[0], -1)
