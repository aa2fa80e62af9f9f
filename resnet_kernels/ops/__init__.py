"""Fused operations on tensors. Each takes `backend=`; see dispatch.py for which one runs."""

from .add_relu import add_relu
from .conv_bias_act import conv_bias_act

__all__ = ["add_relu", "conv_bias_act"]
