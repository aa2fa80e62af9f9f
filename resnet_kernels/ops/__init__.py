"""Fused operations on tensors. Each takes `backend=`; see backends.py for which one runs."""

from ..kernels.activations import Activation, PReLU
from .add_relu import add_relu
from .batch_norm_act import batch_norm_act
from .conv_bias_act import conv_bias_act

__all__ = ["Activation", "PReLU", "add_relu", "batch_norm_act", "conv_bias_act"]
