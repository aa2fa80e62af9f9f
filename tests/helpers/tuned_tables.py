"""A fake device with tables of winners, played by the CPU."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from helpers.tiny import tiny
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.geometry import Geometry
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import conv_candidates, tuned_table
from resnet_kernels.ops.conv_problem import ConvProblem

KEY = tuned_table.DeviceKey("Fake GPU 1", "9.0")
CPU = torch.device("cpu")
CONV = ConvProblem(8, 6, 5, (16, 8, 3, 3), Geometry((1, 1), (1, 1, 1, 1)), True, True, False, RELU)


def record(key, winner, batch=256, dtype="fp32"):
    return {"key": str(key), "batch": batch, "dtype": dtype, "winner": winner}


def table(*records, **changes):
    return json.dumps({"schema": tuned_table.SCHEMA, "device": KEY._asdict(), "records": list(records), **changes})


@pytest.fixture
def fake_device(monkeypatch, tmp_path):
    """CPU tensors are on a device that may have tables: the package's in package/, the user's in cache/."""
    for name in ("package", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tuned_table, "device_key", lambda device: KEY)
    monkeypatch.setattr(tuned_table, "PACKAGE_DIRECTORY", tmp_path / "package")
    monkeypatch.setenv(tuned_table.CACHE_VARIABLE, str(tmp_path / "cache"))
    precision = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    tuned_table.forget()
    yield tmp_path
    torch.backends.cudnn.conv.fp32_precision = precision
    tuned_table.forget()


@pytest.fixture
def write(fake_device):
    def write(text, where="cache"):
        (fake_device / where / KEY.file_name).write_text(text)
        tuned_table.forget()

    return write


@contextlib.contextmanager
def ran(monkeypatch):
    """The names of the candidates that run meanwhile."""
    names, original = [], conv_candidates.run
    with monkeypatch.context() as patch:
        patch.setattr(conv_candidates, "run", lambda name, *rest: (names.append(name), original(name, *rest))[1])
        yield names


def small_model():
    return randomise_batch_norms_(tiny(10, 3)).eval()
