"""Settings of the process and of the thread: what holds in the first call must not decide about later ones."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.profiler import profile

import resnet_kernels as rk
from helpers.own_kernels import is_fused_convolution
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import backends, triton_check, tuned_table

# The first call under each of these runs as eager does. The call after it, without them, runs fused and says nothing.
CONTEXTS = {
    "the meta device": "torch.device('meta')",
    "another default device": "setting(torch.set_default_device, 'meta', None)",
    "another default dtype": "setting(torch.set_default_dtype, torch.float64, torch.float32)",
    "inference mode": "torch.inference_mode()",
    "autocast": "torch.autocast('cpu', torch.bfloat16)",
    "a function mode": "BaseTorchFunctionMode()",
    "a function mode that refuses factories": "NoFactories()",
    "a dispatch mode": "FlopCounterMode(display=False)",
    "fake tensors": "FakeTensorMode(allow_non_fake_inputs=True)",
    "deterministic algorithms": "setting(torch.use_deterministic_algorithms, True, False)",
    "a profiler": "torch.profiler.profile()",
    "oneDNN switched off": "torch.backends.mkldnn.flags(enabled=False)",
}
SCRIPT = """
import contextlib, copy, json, os, sys, traceback, warnings
import torch, resnet_kernels as rk
from torch import nn
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

class NoFactories(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.zeros, torch.ones, torch.empty):
            raise TypeError("no factories here")
        return function(*args, **(kwargs or {}))

@contextlib.contextmanager
def setting(function, value, before):
    function(value)
    try:
        yield
    finally:
        function(before)

def first_call(context):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    fused, x = copy.deepcopy(net), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        with warnings.catch_warnings(), context():
            warnings.simplefilter("ignore")
            rk.fuse_(fused)
            eager, ours = net(x), fused(x)
        assert type(ours) is type(eager) and ours.dtype == eager.dtype and ours.device == eager.device
        if type(ours) is torch.Tensor:
            torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)
        warnings.simplefilter("error", RuntimeWarning)
        with torch.profiler.profile() as profile:
            y = fused(x)
        torch.testing.assert_close(y, net(x))
        names = "mkldnn::_convolution_pointwise", "resnet_kernels::conv_bias_act."
        assert any(event.key.startswith(names) for event in profile.key_averages()), "not fused"
        assert not any(row.reason for row in rk.explain(fused))

failed = {}
for name, context in json.loads(sys.argv[1]).items():
    # A fork is a process in which nothing was called yet.
    read, write = os.pipe()
    if not os.fork():
        try:
            first_call(eval(f"lambda: {context}"))
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode()[-2000:])
        os._exit(0)
    os.close(write)
    os.wait()
    if said := os.read(read, 2000):
        failed[name] = said.decode()
print(json.dumps(failed))
"""


@pytest.mark.slow
def test_the_first_call_of_a_process_does_not_decide_for_later_ones():
    script = [sys.executable, "-c", SCRIPT, json.dumps(CONTEXTS)]
    done = subprocess.run(script, check=True, capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def network():
    """A stem, a stage and a container around them."""
    block = rk.models.resnet_v1.BasicBlock
    stem = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    net = nn.Sequential(*stem, nn.Sequential(block(16, 16), block(16, 16)))
    return randomise_batch_norms_(net).eval()


def operations(call):
    """A call's result, and whether oneDNN had a part in it, or a kernel of ours in its place."""
    with profile() as profiled:
        y = call()
    return y, any("mkldnn" in event.key or is_fused_convolution(event.key) for event in profiled.key_averages())


@contextlib.contextmanager
def onednn_off_by_its_setter():
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


SWITCHES = {"flags": lambda: torch.backends.mkldnn.flags(enabled=False), "setter": onednn_off_by_its_setter}
on_the_cpu = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@on_the_cpu
@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_onednn_that_is_switched_off_stays_off(switch):
    net, x = network(), torch.randn(2, 3, 96, 96)
    fused = rk.fuse(net)
    with torch.no_grad():
        before, by_onednn = operations(lambda: fused(x))
        assert by_onednn
        with switch():
            expected = net(x)
            with pytest.warns(RuntimeWarning, match="oneDNN is switched off") as said:
                for _ in range(2):
                    y, by_onednn = operations(lambda: fused(x))
                    assert not by_onednn and torch.equal(y, expected)
            assert len(said) == 1
            rows = rk.explain(fused).fused
            assert rows and all("oneDNN is switched off (torch.backends.mkldnn.flags)" in row.reason for row in rows)
        after, by_onednn = operations(lambda: fused(x))
        assert by_onednn and torch.equal(after, before)
        assert not any(row.reason for row in rk.explain(fused))


@on_the_cpu
def test_a_model_fused_while_onednn_is_off_uses_it_later():
    net, x = network(), torch.randn(2, 3, 96, 96)
    with torch.backends.mkldnn.flags(enabled=False):
        fused = rk.fuse(net)
    with torch.no_grad():
        y, by_onednn = operations(lambda: fused(x))
        assert by_onednn
        torch.testing.assert_close(y, net(x))


@on_the_cpu
def test_an_explicit_backend_raises_where_onednn_is_switched_off():
    fused, x = rk.fuse(network(), backend="cpu"), torch.randn(2, 3, 96, 96)
    calls = (lambda: fused(x), lambda: rk.ops.conv_bias_act(x, torch.randn(4, 3, 3, 3), backend="cpu"))
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        for call in calls:
            with pytest.raises(RuntimeError, match='backend="cpu" can\'t run: oneDNN is switched off'):
                call()
    with torch.no_grad():
        for call in calls:
            call()


@on_the_cpu
def test_the_operation_leaves_onednn_alone_where_it_is_switched_off():
    x, weight = torch.randn(2, 16, 32, 32), torch.randn(16, 16, 3, 3)
    with torch.backends.mkldnn.flags(enabled=False):
        y, by_onednn = operations(lambda: rk.ops.conv_bias_act(x, weight))
        assert not by_onednn and torch.equal(y, torch.relu(torch.conv2d(x, weight)))


def test_auto_runs_eager_where_cudnn_is_switched_off(monkeypatch):
    """A table may name cuDNN's operations, so that the switch comes before it."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(triton_check, "why_not", lambda device: None)
    monkeypatch.setattr(tuned_table, "covers", lambda device, dtype: True)
    backends.why_never.cache_clear()
    try:
        assert backends.resolve("auto", device, torch.float32) == "tuned"
        before = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        try:
            assert backends.resolve("auto", device, torch.float32) == "eager"
            assert "cuDNN is switched off" in backends.why_eager("auto", device, torch.float32)
            with pytest.raises(RuntimeError, match='backend="cudnn" can\'t run: cuDNN is switched off'):
                backends.resolve("cudnn", device, torch.float32)
        finally:
            torch.backends.cudnn.enabled = before
        assert backends.resolve("auto", device, torch.float32) == "tuned"
    finally:
        backends.why_never.cache_clear()


def test_another_number_of_threads_in_each_call():
    net, x, before = network(), torch.randn(2, 3, 96, 96), torch.get_num_threads()
    fused = rk.fuse(net)
    try:
        with torch.no_grad():
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                torch.testing.assert_close(fused(x), net(x))
    finally:
        torch.set_num_threads(before)
