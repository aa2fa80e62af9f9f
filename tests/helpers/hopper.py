"""Hopper's kernels: on a Hopper, or in Triton's interpreter on the CPU."""

from collections.abc import Iterator

import pytest
import torch

from helpers.oracle import skip_unless_runnable
from resnet_kernels.kernels import target


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of compute capability 9, or the interpreter in its place."""
    if not (torch.cuda.is_available() and target.is_hopper(torch.device("cuda"))):
        if torch.cuda.is_available():
            pytest.skip("needs compute capability 9")
        monkeypatch.setattr(target, "is_hopper", lambda device: True)


@pytest.fixture
def hopper_with_nan_outputs(device: torch.device) -> Iterator[None]:
    """A device that runs the kernels of sm90/, with PyTorch set to fill the results of torch.empty with NaN.

    An output element that nothing is stored to can't be right by chance then.
    """
    skip_unless_runnable("triton", device, torch.float16)
    from resnet_kernels.kernels.sm90 import split_k_counters

    if device.type == "cuda" and not target.is_hopper(device):
        pytest.skip("needs compute capability 9")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    # A planted bug may leave counters that are not zero.
    split_k_counters._of_stream.cache_clear()
