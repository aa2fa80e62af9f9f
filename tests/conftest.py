"""Set-up shared by all tests: Triton's interpreter where there is no GPU, an importable torchvision, no network."""

import os
import sys
from pathlib import Path

import torch

# Before anything imports triton. On a GPU the kernels are compiled, and the same tests run there.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# pytest-xdist's workers share the cores; PyTorch's threads spin, and two on one core hold each other up.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    # What tests start is no worker: pytest-benchmark would not measure in one.
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        del os.environ[name]
# A backend forced from outside would change what the tests test.
os.environ.pop("RESNET_KERNELS_BACKEND", None)
# So would a table that was measured on this machine.
os.environ["RESNET_KERNELS_CACHE"] = os.devnull

import pytest

from helpers import interpreter

if "TRITON_INTERPRET" in os.environ:
    interpreter.hurry()

if torch.version.cuda is None:
    # torchvision's wheel from PyPI is built for CUDA builds of torch; on a CPU build it imports once these two exist. (On a
    # CUDA build, with a GPU or without, its own library loads, and a second definition would abort the process.)
    try:
        _LIBRARY = torch.library.Library("torchvision", "DEF")
        _LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass  # a torchvision that has them

from resnet_kernels.ops import backends

# benchmarks/ is tested in the checkout; the package where it is installed, which comes first.
sys.path.append(str(Path(__file__).parents[1]))

# The fixtures that several test files use.
pytest_plugins = (
    "helpers.cpu_chains", "helpers.hopper", "helpers.own_kernels", "helpers.recorder", "helpers.stages", "helpers.stem_nets",
    "helpers.tiny", "helpers.tuned_tables",
)  # fmt: skip


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _says_again():
    # Each fallback is said once a process; each test is to hear its own.
    backends._said.clear()


# What takes longest, the dearest first: --dist loadfile keeps a file on one worker, and the last one should be a short one.
DEAREST = (
    "test_rehearsal_tune", "test_rehearsal", "test_conv_bias_act_tma", "test_conv_bias_act", "test_stem", "test_cpu_kernels",
    "test_training", "test_training_loops", "test_merged_shortcut_tma", "test_chain_tma", "test_counting",
    "test_parity", "test_train_processes", "test_gpu_session", "test_batch_norm_act", "test_compile", "test_cli",
    "test_train", "test_fusion", "test_fused_under_torch",
)  # fmt: skip


def pytest_configure(config):
    # pytest-xdist would start with the files that have most tests.
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before pytest's own, which leaves out what -m leaves out
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: DEAREST.index(item.path.stem) if item.path.stem in DEAREST else len(DEAREST))
    for item in items:
        # slow(unless=...): all of a test's parameters are slow but those of which this is true.
        item.own_markers[:] = [m for m in item.own_markers if not (m.name == "slow" and is_quick(m, item))]
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


def is_quick(marker: pytest.Mark, item: pytest.Item) -> bool:
    """Whether a marker slow(unless=predicate) leaves an item's parameters in the quick tests."""
    unless = marker.kwargs.get("unless")
    return unless is not None and bool(unless(**item.callspec.params))
