"""torch.conv2d as the code of a Conv2d's subclass calls it, on the module's own weight and with its own settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node


def is_own_conv(node: Node) -> bool:
    """Whether a node is torch.conv2d, as a Conv2d's own code calls it."""
    return node.op == "call_function" and node.target in (F.conv2d, torch.conv2d)


def own_conv_path(node: Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The path of the Conv2d of which a node of torch.conv2d is the whole computation; None if it is another one's."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args)) | node.kwargs
    weight = given.get("weight")
    if not isinstance(weight, Node) or weight.op != "get_attr" or not str(weight.target).endswith("weight"):
        return None
    path = str(weight.target).removesuffix("weight").removesuffix(".")
    conv = modules.get(path)
    if not isinstance(conv, nn.Conv2d) or conv._parameters.get("weight") is None or conv.padding_mode != "zeros":
        return None
    bias = given.get("bias")
    has_bias = isinstance(bias, Node) and bias.op == "get_attr" and bias.target == f"{path}.bias".lstrip(".")
    if has_bias != (conv._parameters.get("bias") is not None) or not (has_bias or bias is None):
        return None
    settings = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    same = all(_pair(given.get(name, default)) == _pair(getattr(conv, name)) for name, default in settings.items())
    return path if same else None


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list) else value
