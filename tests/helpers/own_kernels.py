"""Our CPU kernels in tests: whether they are here, and tests that are about oneDNN."""

from __future__ import annotations

import pytest

from resnet_kernels.kernels.cpu import library
from resnet_kernels.kernels.cpu.library import Library, Missing
from resnet_kernels.ops import cpu_candidates


def skip_unless_compiled() -> Library:
    """The compiled library; skips where there is none."""
    found = library.find()
    if isinstance(found, Missing):
        pytest.skip(f"needs our compiled CPU kernels: {found.reason}")
    return found


@pytest.fixture
def onednn_alone(monkeypatch):
    """No kernel of ours is a choice, as without a C compiler."""
    monkeypatch.setattr(cpu_candidates, "_own_by_rule", lambda *arguments, **options: [])


def is_fused_convolution(event: str) -> bool:
    """Whether a profiler's event is a convolution on the CPU with all that follows it: oneDNN's, or a kernel of ours."""
    return "mkldnn::_convolution_pointwise" in event or event.startswith("resnet_kernels::conv_bias_act.")
