"""Candidates that `tune` would measure, rehearsed; a file of its own, as it takes as long as all of test_rehearsal.py."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "batch", "dtype", "every"),
    # Each net and batch once, at a second of compiling a kernel; rehearse.py takes any.
    [
        ("resnet50", "256", "bf16", "2"),
        ("resnet_v2_50", "1", "bf16", "3"),
        ("resnet18", "2", "bf16", "3"),
        ("resnet18", "1", "fp32", "3"),
    ],
)
def test_every_candidate_of_tune(model, batch, dtype, every, rehearse):
    tried = rehearse("tune", model, "--batch", batch, "--dtype", dtype, "--every", every)[batch]
    kinds = {"triton"} | ({"tma", "shared", "stem", "specialized"} if dtype == "bf16" else set())
    if "v2" not in model:
        kinds.add("pointer")  # of its first convolution; a pre-activation net's is no layer of ours
    assert kinds <= {kind for kind, number in tried.items() if number}, tried
