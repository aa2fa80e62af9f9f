"""`auto` without a table needs no more launches than eager, and no more time by FLOP and HBM: counted, in all four systems."""

import pytest
import torch
from torch import nn

from resnet_kernels import models
from resnet_kernels.models.by_name import image_batch, image_size
from resnet_kernels.ops import cudnn, reference
from resnet_kernels.perf.roofline import bounds, counting
from resnet_kernels.runtime.gpu import forms

pytest.importorskip("triton", reason="needs triton")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPE_NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
SYSTEMS = ("resnet18", "resnet50", "resnet_v2_50", "d2l_resnet18", "d2l_resnet18_keras")
QUICK = {("resnet18", 1, BF16), ("resnet18", 256, FP16), ("resnet_v2_50", 8, BF16), ("d2l_resnet18_keras", 32, FP32)}
CASES = [(name, batch, BF16) for name in SYSTEMS for batch in (1, 8, 32, 256)]
CASES += [(name, batch, dtype) for name in SYSTEMS for batch in (1, 256) for dtype in (FP16, FP32)]
CASES += [("resnet152", 1, BF16), ("resnet152", 256, FP32)]  # ResNet-50's layers, more of them


def network(name, batch, dtype):
    with torch.device("meta"):
        model = models.BY_NAME[name]().eval()
        x = image_batch(model, batch, image_size(name)).to(dtype)
    return model, x


def never_slower(model, x) -> list[str]:
    """What `auto` has more of than eager: nothing."""
    machine = bounds.h200(DTYPE_NAMES[x.dtype]).without_l2()
    # Eager's biases, that PyTorch adds in launches of their own, don't count here: it has to hold without them, too.
    eager = [kernel for kernel in counting.count(model, x) if kernel.name != counting.BIAS]
    auto = counting.count(model, x, "auto")
    quantities = {
        "launches": len,
        "bytes": lambda kernels: sum(kernel.hbm_bytes for kernel in kernels),
        "time": lambda kernels: sum(machine.bound(kernel)[0] for kernel in kernels),
    }
    assert sum(kernel.flops for kernel in auto) == sum(kernel.flops for kernel in eager) > 0
    return [what for what, of in quantities.items() if of(auto) > of(eager)]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=lambda case: f"{case[0]}-{case[1]}-{DTYPE_NAMES[case[2]]}",
)
def test_auto_is_never_slower_than_eager_by_counting(case):
    assert never_slower(*network(*case)) == []


def test_what_auto_did_before_is_noticed(monkeypatch):
    """Layers without a ReLU in fp32, operation by operation, as they once ran."""
    monkeypatch.setattr(cudnn, "conv_then_epilogue", lambda operands, *_: reference.conv_bias_act(*operands))
    assert "bytes" in never_slower(*network("resnet_v2_50", 8, BF16))


def test_eager_is_what_dataflow_sees():
    model, x = network("resnet18", 4, BF16)
    kernels = counting.count(model, x)
    # 20 convolutions and their BNs, 17 ReLUs, 8 adds, two pools, one product.
    assert len(kernels) == 20 + 20 + 17 + 8 + 2 + 1
    from resnet_kernels.perf.roofline import network as roofline_network

    operations = bounds.eager(roofline_network.trace(model, x), 2)
    assert sum(kernel.flops for kernel in kernels) == sum(kernel.flops for kernel in operations)
    # Beside it BN's vectors and the indices of the max-pool, 8 bytes each.
    indices = 8 * 4 * 64 * 56 * 56
    vectors = sum(kernel.hbm_bytes for kernel in kernels) - sum(kernel.hbm_bytes for kernel in operations) - indices
    assert 0 < vectors < 2e5


class Small(nn.Module):
    """A stem with a bias, and one block."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.block = models.resnet_v1.BasicBlock(8, 8)

    def forward(self, x):
        return self.block(self.conv(x)).relu_()


def test_bytes_of_each_launch():
    model, x = Small(), torch.empty(2, 3, 10, 10, dtype=BF16)
    first = counting.count(model, x)
    image, y = 2 * 3 * 100 * 2, 2 * 8 * 64 * 2
    weight = 8 * 3 * 9 * 2
    assert [(kernel.name, kernel.hbm_bytes) for kernel in first[:2]] == [
        ("convolution", image + weight + y), (counting.BIAS, 2 * y + 8 * 2)
    ]  # fmt: skip
    assert first[0].flops == 2 * 2 * 8 * 64 * 27
    assert (first[-1].name, first[-1].hbm_bytes) == ("relu", 2 * y) and first[-2].name == "relu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_pass_bytes", lambda *_: float("inf"))
        folded = counting.count(model, x, "auto")
    names = [kernel.name for kernel in folded]
    assert names[2:] == [
        "bn_scale_shift_kernel", "fold_weights_kernel", "cudnn_convolution_relu", "cudnn_convolution_add_relu", "relu"
    ]  # fmt: skip
    by_name = {kernel.name: kernel for kernel in folded}
    weights = 2 * 8 * 8 * 9 * 2
    scales = 2 * 16 * 4
    # Addresses, programs' layers and starts come on top.
    assert 0 <= by_name["fold_weights_kernel"].hbm_bytes - (2 * weights + scales + 16 * 2) < 300
    assert by_name["cudnn_convolution_add_relu"].hbm_bytes == 3 * y + weights // 2 + 8 * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_pass_bytes", lambda *_: 0)
        passes = [kernel for kernel in counting.count(model, x, "auto") if kernel.name == "epilogue_kernel"]
    assert [kernel.hbm_bytes for kernel in passes] == [2 * y + 2 * 8 * 4, 3 * y + 2 * 8 * 4]


def test_bad_input():
    with pytest.raises(ValueError, match='backend must be "auto", "triton" or None, got \'cudnn\''):
        counting.count(Small(), torch.empty(1, 3, 8, 8), "cudnn")
