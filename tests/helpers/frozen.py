"""A model to freeze, what thaws it, what changes it, and whether its results are stale."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from resnet_kernels.models.random_weights import randomise_batch_norms_


def plain_model():
    block = rk.models.resnet_v1.BasicBlock
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    return randomise_batch_norms_(nn.Sequential(stem, block(32, 32), block(32, 32))).eval()


X = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))


def call(model, x=X):
    """The second call with the model as it is: the first packs."""
    with torch.no_grad():
        model(x)
        return model(x)


def eagers(fused, x=X):
    return call(rk.unfuse_(copy.deepcopy(fused)), x)


def is_stale(fused, x=X):
    return not torch.allclose(call(fused, x), eagers(fused, x), rtol=1e-4, atol=1e-4)


def edit(fused):
    """What the promise rules out."""
    with torch.no_grad():
        fused[0][0].weight.mul_(-2)
        fused[1].conv1.weight.data.mul_(3)
        fused[1].bn2.running_mean.numpy()[:] += 5
        fused[2].conv2.weight.data = fused[2].conv2.weight.data * 2


def train(fused):
    fused.train().eval()


def train_around(fused):
    nn.Sequential(nn.Identity(), fused).train().eval()


def load(fused):
    fused.load_state_dict({name: value * 1.5 for name, value in fused.state_dict().items()})


def load_around(fused):
    around = nn.ModuleDict({"net": fused})
    around.load_state_dict({name: value * 1.5 for name, value in around.state_dict().items()})


def load_assigning(fused):
    fused.load_state_dict({name: value * 1.5 for name, value in fused.state_dict().items()}, assign=True)


def load_strictly_in_vain(fused):
    state = {name: value * 1.5 for name, value in fused.state_dict().items()}
    del state["2.conv1.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        fused.load_state_dict(state)


def to(fused):
    fused.to(torch.float64).to(torch.float32)


def half_around(fused):
    nn.Sequential(fused).double().float()


def refresh(fused):
    rk.refresh(fused)


def refresh_around(fused):
    rk.refresh(nn.Sequential(fused))


def training_step(fused):
    fused.train()
    fused(X).square().mean().backward()
    torch.optim.SGD(fused.parameters(), lr=0.1).step()
    fused.eval()


def gradients(fused):
    with pytest.warns(RuntimeWarning, match="gradients are on"):
        fused(X)


THAWS = [
    train, train_around, load, load_around, load_assigning, load_strictly_in_vain, to, half_around, refresh,
    refresh_around, training_step, gradients,
]  # fmt: skip


def _hook(fused):
    fused[1].bn1.register_forward_hook(lambda module, inputs, output: output * 2)


def _bn_mode(fused):
    fused[1].bn2.train()


def _module(fused):
    fused[2].conv1 = nn.Conv2d(32, 32, 3, padding=1, bias=False)


def _parameter(fused):
    fused[2].conv1.weight = nn.Parameter(torch.randn(32, 32, 3, 3))


def _eps(fused):
    fused[1].bn1.eps = 1.0


def _stride(fused):
    fused[0][0].stride = (2, 2)


def _bias(fused):
    fused[1].conv1.bias = nn.Parameter(torch.ones(32))


# Changes that a frozen model sees, too.
CHANGES = (_hook, _bn_mode, _module, _parameter, _eps, _stride, _bias)
REPLACED_TENSORS = (_parameter, _bias)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = (copy.deepcopy, _pickled, _saved)


def edited(fused):
    """A frozen model after a call and an edit of its weights, which the next call has not seen."""
    before = call(fused)
    assert not is_stale(fused)
    edit(fused)
    assert torch.equal(call(fused), before), "weights are read or compared"
    assert is_stale(fused), "the edit must matter"
    return fused
