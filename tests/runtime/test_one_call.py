"""What a call of a network asks once: which backend it runs on."""

import threading

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import skip_unless_runnable
from resnet_kernels.models.resnet_v1 import BasicBlock
from resnet_kernels.ops import backends
from resnet_kernels.runtime import checked_calls

IMAGES = (2, 1, 96, 96)


@pytest.fixture
def asked(monkeypatch):
    """The questions that reach ops/backends.py."""
    found, resolve = [], backends.resolve

    def noting(*question):
        found.append(question)
        return resolve(*question)

    monkeypatch.setattr(backends, "resolve", noting)
    return found


@pytest.fixture
def net():
    """d2l's: stages of blocks within a Sequential, fused containers within a fused container."""
    torch.manual_seed(0)
    model = rk.models.d2l_resnet18()
    with torch.no_grad():
        model(torch.randn(IMAGES))  # it is lazy
    return rk.fuse(model.eval())


@pytest.mark.parametrize("hooked", (False, True), ids=("plain", "hooked"))
def test_inference_asks_for_the_backend_once(net, asked, hooked):
    if hooked:
        net[2].register_forward_hook(lambda *_: None)
    x = torch.randn(IMAGES)
    with torch.inference_mode():
        for _ in range(2):
            asked.clear()
            net(x)
            assert len(asked) == 1, asked


def test_a_training_step_asks_once(asked):
    skip_unless_runnable("triton", torch.device("cpu"), torch.float32)
    net = rk.fuse(nn.Sequential(*(BasicBlock(8, 8) for _ in range(3))), backend="triton").train()
    x = torch.randn(2, 8, 6, 6)
    for _ in range(2):
        asked.clear()
        (net(x) * torch.randn(2, 8, 6, 6)).sum().backward()
        assert len(asked) == 1, asked


def test_the_next_call_asks_anew(net, asked, monkeypatch):
    x = torch.randn(IMAGES)
    with torch.inference_mode():
        net(x)
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "eager")
        asked.clear()
        net(x)
    assert asked and {backends.resolve(*question) for question in set(asked)} == {"eager"}


def test_a_call_that_fails_leaves_nothing_behind(net, asked):
    def fails(*_):
        raise RuntimeError("in mid-call")

    handle = net[3].register_forward_hook(fails)
    x = torch.randn(IMAGES)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="in mid-call"):
            net(x)
        assert getattr(checked_calls._call_state, "resolved", None) is None
        handle.remove()
        asked.clear()
        net(x)
    assert len(asked) == 1


def test_threads_ask_for_themselves(net, asked):
    x, inside, outside = torch.randn(IMAGES), threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert outside.wait(60)

    def call():
        with torch.inference_mode():
            net(x)

    handle = net[2].register_forward_hook(wait)
    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(60)
    handle.remove()
    asked.clear()
    call()
    assert len(asked) == 1
    outside.set()
    thread.join(60)
