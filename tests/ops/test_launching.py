"""Where Triton can't launch: `auto` runs PyTorch's own operations and says so once; an explicit backend says why it can't."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_kernels as rk
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import backends, triton_check

pytest.importorskip("triton", reason="needs triton")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device of capability 9.0 that is not here, on which the first launch works; cuDNN is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Pretended")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    launched = []
    monkeypatch.setattr("resnet_kernels.kernels.first_launch.launch", launched.append)
    monkeypatch.setattr(triton_check, "_known", {})
    backends.why_never.cache_clear()
    yield launched
    backends.why_never.cache_clear()


def fails_with(monkeypatch, error):
    def launch(device):
        raise error

    monkeypatch.setattr("resnet_kernels.kernels.first_launch.launch", launch)


def test_asked_once_a_device(gpu):
    for _ in range(3):
        assert backends.resolve("auto", CUDA, torch.bfloat16) == "tuned"
        assert backends.untuned(CUDA, torch.float16) == "cudnn"
    assert backends.resolve("triton", CUDA, torch.float32) == "triton"
    assert gpu == [CUDA]
    backends.resolve("auto", torch.device("cuda", 1), torch.float32)
    assert gpu == [CUDA, torch.device("cuda", 1)]


FAILURES = {
    "old GPU": (None, "needs a GPU of compute capability 8.0 or later, got 7.5"),
    "no compiler": (
        RuntimeError("Failed to find C compiler.\nPlease"),
        r"can't launch here .*Failed to find C compiler.\)",
    ),
    "old driver": (OSError("libcuda.so.1: no version"), r"can't launch here \(OSError: libcuda.so.1: no version\)"),
    "nothing said": (AssertionError(), r"can't launch here \(AssertionError: \)"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_auto_runs_pytorchs_own_operations_and_says_so_once(what, gpu, monkeypatch):
    error, reason = FAILURES[what]
    if error is None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    else:
        fails_with(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match=f"PyTorch's own operations on cuda:0: Triton {reason}") as said:
        for dtype in (torch.float32, torch.bfloat16):
            assert backends.resolve("auto", CUDA, dtype) == "eager"
    assert len(said) == 1 and not gpu
    with pytest.raises(RuntimeError, match=f'backend="triton" {reason}'):
        backends.resolve("triton", CUDA, torch.float32)
    # It needs no Triton.
    assert backends.resolve("cudnn", CUDA, torch.float32) == "cudnn"


def test_a_table_does_not_help(gpu, monkeypatch):
    fails_with(monkeypatch, RuntimeError("no"))
    monkeypatch.setattr("resnet_kernels.ops.tuned_table.covers", lambda device, dtype: True)
    with pytest.warns(RuntimeWarning, match="Triton can't launch here"):
        assert backends.resolve("auto", CUDA, torch.float32) == "eager"


def test_not_asked_where_nobody_could_answer(gpu, monkeypatch):
    """In a capture, under a mode as fake tensors have one, without a GPU, on other devices; a later call asks."""
    for device in ("cpu", "meta", "mps"):
        assert triton_check.why_not(torch.device(device)) is None
    with TorchDispatchMode():
        assert triton_check.why_not(CUDA) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert triton_check.why_not(CUDA) is None
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert triton_check.why_not(CUDA) is None
    assert not gpu
    assert triton_check.why_not(CUDA) is None and gpu == [CUDA]


def test_a_fused_model_runs_its_own_code(monkeypatch):
    """The whole way, with the CPU in a GPU's place."""
    block = nn.Sequential(randomise_batch_norms_(rk.models.resnet_v1.BasicBlock(8, 8))).eval()
    fused, x = rk.fuse(block), torch.randn(1, 8, 5, 5)
    monkeypatch.setattr(backends, "untuned", lambda device, dtype: "eager")
    with torch.no_grad():
        assert torch.equal(fused(x), block(x))


def test_the_first_launch(device):
    from helpers.oracle import runnable

    if (reason := runnable("triton", device.type, torch.float32)) or device.type != "cuda":
        pytest.skip(reason or "needs a GPU")
    triton_check._known.clear()
    assert triton_check.why_not(torch.device("cuda", torch.cuda.current_device())) is None


IN_A_SLIM_CONTAINER = """
    import warnings
    import torch
    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.backends.cudnn.is_available = lambda: True
    from resnet_kernels.ops import backends, tuned_table
    tuned_table.device_key = lambda device: None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        print([backends.resolve("auto", torch.device("cuda", 0), torch.float16) for _ in range(2)])
    print([str(warning.message) for warning in said if "resnet_kernels" in str(warning.message)])
"""


def test_without_a_c_compiler(tmp_path):
    """Triton's own search for one, with an empty PATH: it is the first thing that its driver does."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("CC", "TRITON_INTERPRET") and not k.startswith("PYTEST_")
    }
    environment |= dict(PATH="", TRITON_CACHE_DIR=str(tmp_path), TRITON_LIBCUDA_PATH=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IN_A_SLIM_CONTAINER)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    resolved, said = done.stdout.splitlines()
    assert resolved == "['eager', 'eager']"
    assert said.count("own operations on cuda:0") == 1 and "C compiler" in said
