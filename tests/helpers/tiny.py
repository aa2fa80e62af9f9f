"""A network that trains in a second, known to the command line as `tiny`; and a process that has it."""

import os
import sys
from pathlib import Path

import pytest
import torch

import resnet_kernels as rk
from resnet_kernels.cli import main as cli

NAME = "tiny"
# Of a process of its own: one thread, and the package that the tests run on, installed or not.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(rk.__file__).parents[1])}
TRAIN = ["train", "--model", NAME, "--image-size", "16", "--device", "cpu"]


def tiny(num_classes: int, in_channels: int):
    return rk.models.d2l_resnet18(in_channels, num_classes, width=8, num_blocks=(1, 1))


@pytest.fixture
def tiny_in_zoo(monkeypatch):
    monkeypatch.setitem(rk.models.BY_NAME, NAME, tiny)
    # Layers this small gain nothing from a second thread, and wait for it, spinning, on a machine that others use too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def main(arguments):
    rk.models.BY_NAME[NAME] = tiny
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
