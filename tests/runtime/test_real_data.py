"""Real input: a network trained on real digits predicts the same after fusing, on the CPU backend and through Triton."""

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import skip_unless_runnable


@pytest.fixture(scope="module")
def trained():
    """A narrow d2l_resnet18, trained by plain PyTorch on 1,437 of scikit-learn's digits; and the 360 held out."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = nn.functional.interpolate(images, scale_factor=2)
    labels = torch.tensor(labels)
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    train, test = order[:-360], order[-360:]
    model = rk.models.d2l_resnet18(width=16, num_blocks=(2, 2))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(4):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval(), images[test], labels[test]


def test_it_learned_something(trained):
    model, images, labels = trained
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("auto", "cpu", "triton", "eager"))
def test_same_predictions_on_the_held_out_part(trained, backend, device):
    model, images, _ = trained
    if backend != "auto":
        skip_unless_runnable(backend, device, torch.float32)
    if backend == "triton" and device.type == "cpu":
        images = images[:90]  # the interpreter takes a third of a second an image
    model, images = model.to(device), images.to(device)
    fused = rk.fuse(model, backend=backend)
    assert len(rk.explain(fused).fused) == 5 and not rk.explain(fused).skipped
    with torch.no_grad():
        assert torch.equal(fused(images).argmax(1), model(images).argmax(1))
    assert rk.verify(model, fused, images[:8])
