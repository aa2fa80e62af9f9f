"""A small ResNet, and images for it."""

import pytest
import torch
from torch import Tensor, nn

from helpers.small_resnet import small_resnet


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return small_resnet()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64)
