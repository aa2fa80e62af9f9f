"""resnet_kernels: residual networks as few, fast kernels, without leaving PyTorch.

    fused = rk.fuse(model)                    the same model on fused kernels; the original is untouched
    fused = rk.fuse(model, freeze=True)       with a promise that weights stay, so that calls needn't look
    report = rk.fuse_(model)                  in place; what was fused, and why the rest was not
    rk.unfuse_(model)                         back to exactly the model from before
    report = rk.explain(model)                the report alone
    result = rk.verify(model, fused, x)       parity, layer by layer, against fp64
    run = rk.capture(fused, x)                a CUDA graph of its inference; on the CPU the model itself
    result = rk.tune(fused, x)                measures what is fastest on this GPU; `auto` runs by it from then on
    rk.ops.conv_bias_act, batch_norm_act, add_relu    the fused operations themselves
    rk.BasicBlock, rk.Bottleneck, rk.PreactBottleneck, rk.Residual    fused blocks to build with
    rk.models                                 the model zoo, in plain PyTorch
    rk.timing.time_run(step, "Forward")       the slim text's timing loop

Importing it probes no GPU and imports no Triton.
"""

from . import _moved as _moved
from . import models, ops
from ._version import __version__ as __version__
from .fusion.blocks import BasicBlock, Bottleneck, PreactBottleneck, Residual
from .fusion.convert import explain, fuse, fuse_, refresh, unfuse_
from .fusion.report import FuseReport, VerifyResult
from .fusion.verify import verify
from .perf import timing
from .perf.tuning.tune_model import tune
from .perf.tuning.tune_result import TuneResult
from .runtime.cuda_graph import CapturedModel, capture

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "CapturedModel",
    "FuseReport",
    "PreactBottleneck",
    "Residual",
    "TuneResult",
    "VerifyResult",
    "capture",
    "explain",
    "fuse",
    "fuse_",
    "models",
    "ops",
    "refresh",
    "timing",
    "tune",
    "unfuse_",
    "verify",
]
