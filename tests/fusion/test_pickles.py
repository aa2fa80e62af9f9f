"""Whole fused models that were pickled by an earlier version still load, and run fused."""

from pathlib import Path

import torch

import resnet_kernels as rk

# torch.save of {"model": a fused Sequential of a convolution and two BasicBlocks, "y": its output before fusing}, by 0.1.0,
# whose modules had other names.
BY_0_1_0 = Path(__file__).parents[1] / "data" / "fused_by_0_1_0.pt"


def test_a_model_fused_by_0_1_0_loads():
    saved = torch.load(BY_0_1_0, weights_only=False)
    model = saved["model"]
    x = torch.arange(2 * 3 * 6 * 6.0).reshape(2, 3, 6, 6).sin()
    with torch.no_grad():
        torch.testing.assert_close(model(x), saved["y"], rtol=1e-5, atol=1e-5)
    report = rk.explain(model)
    assert [row.fused for row in report if row.path in ("1", "2")] == [True, True]
    plain = rk.unfuse_(model)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), saved["y"])
