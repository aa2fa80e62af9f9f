"""Reading a forward that does more than compute: it is refused, and nothing that its code can reach has changed."""

import collections
import contextlib
import copy
import gc
import os
import random
import sys
import threading
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_kernels as rk
from helpers.oracle import assert_within_budget
from resnet_kernels.graph import known_code, reader
from resnet_kernels.graph.recipe import CannotRead

FEATURES = []
COUNTS = {"calls": 0}
CALLS = 0
SETTINGS = types.SimpleNamespace(calls=0, active=True)


class Block(nn.Module):
    """A block; subclasses do something besides."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.features, self.by_name, self.nested = [], {}, {"all": [[]]}
        self.config = types.SimpleNamespace(calls=0, log=[])
        self.generator, self.python_generator = torch.Generator(), random.Random(0)
        self.numpy_generator = np.random.default_rng(0)
        self.register_buffer("seen", torch.zeros(1))

    def besides(self, x):
        """The side effect."""

    def forward(self, x):
        out = self.bn(self.conv(x))
        self.besides(out)
        return self.relu(out + x)


def _global_count(self, x):
    global CALLS
    CALLS += 1


def _swallowed(self, x):
    try:
        torch.rand(1)
    except Exception:
        pass


def _with_no_grad(self, x):
    with torch.no_grad():
        self.relu(x)


def _autocast_off(self, x):
    # No difference where autocast is off when the forward is read; a difference where it is on in a call.
    with torch.autocast("cpu", enabled=False):
        self.relu(x)


@contextlib.contextmanager
def _label():
    yield


def _own_context(self, x):
    with _label():
        self.relu(x)


def _closure_append():
    features = []

    def besides(self, x):
        features.append(x)

    return besides


SIDE_EFFECTS = {
    "a list of the module": lambda self, x: self.features.append(x),
    "a dict of the module": lambda self, x: self.by_name.update(x=x),
    "a nested list": lambda self, x: self.nested["all"][0].append(x),
    "a list of an object": lambda self, x: self.config.log.append(x),
    "a counter of an object": lambda self, x: setattr_plain(self.config),
    "a list of the file": lambda self, x: FEATURES.append(x),
    "a counter in a dict of the file": lambda self, x: COUNTS.__setitem__("calls", COUNTS["calls"] + 1),
    "a global counter": _global_count,
    "a list of an enclosing function": _closure_append(),
    "a default argument": lambda self, x, seen=[]: seen.append(x),
    "an attribute": lambda self, x: self.__dict__.update(last=x),
    "an attribute by setattr": lambda self, x: setattr(self, "last", x),
    "an attribute of a child": lambda self, x: self.conv.__setattr__("last", x),
    "an attribute of a tensor": lambda self, x: x.__setattr__("tag", 1),
    "a class attribute": lambda self, x: setattr_class(),
    "a buffer": lambda self, x: self.seen.add_(1),
    "a parameter": lambda self, x: self.conv.weight.data.mul_(2),
    "a hook": lambda self, x: self.conv.register_forward_hook(print),
    "a print": lambda self, x: print("forward runs"),
    "a write": lambda self, x: sys.stdout.write("forward runs"),
    "torch.rand": lambda self, x: torch.rand(1),
    "a generator of torch": lambda self, x: self.generator.seed(),
    "torch.manual_seed": lambda self, x: torch.manual_seed(0),
    "torch.manual_seed as torch.compile has it": lambda self, x: torch._disable_dynamo(torch.manual_seed)(0),
    "random.random": lambda self, x: random.random(),
    "a generator of Python": lambda self, x: self.python_generator.random(),
    "np.random.rand": lambda self, x: np.random.rand(),
    "a generator of NumPy": lambda self, x: self.numpy_generator.random(),
    "an exception that is caught": _swallowed,
    "torch.no_grad": _with_no_grad,
    "torch.is_grad_enabled": lambda self, x: torch.is_grad_enabled(),
    "torch.is_autocast_enabled": lambda self, x: torch.is_autocast_enabled("cpu"),
    "torch.get_default_dtype": lambda self, x: torch.get_default_dtype(),
    "torch.get_num_threads": lambda self, x: torch.get_num_threads(),
    "autocast that is off": _autocast_off,
    "a context of one's own": _own_context,
    "torch.set_grad_enabled": lambda self, x: torch.set_grad_enabled(True),
    "torch.no_grad as a decorator": torch.no_grad()(lambda self, x: None),
}


def setattr_plain(config):
    config.calls += 1


def setattr_class():
    Block.calls += 1


@pytest.mark.parametrize("besides", SIDE_EFFECTS.values(), ids=SIDE_EFFECTS)
def test_a_forward_that_does_more_than_compute_is_refused_and_leaves_no_trace(besides, capsys):
    block = type("Acts", (Block,), {"besides": besides})().eval()
    state = {name: value.clone() for name, value in block.state_dict().items()}
    attributes = dict(block.__dict__)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with pytest.raises(CannotRead):
        reader.read(block).recipe()
    assert not rk.explain(nn.Sequential(block, nn.Sequential(block))).fused
    assert block.__dict__ == attributes
    assert block.features == [] and block.by_name == {} and block.nested == {"all": [[]]}
    assert vars(block.config) == {"calls": 0, "log": []}
    assert FEATURES == [] and COUNTS == {"calls": 0} and CALLS == 0 and Block.calls == 0
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    assert not block.conv._forward_hooks and capsys.readouterr().out == ""
    assert torch.is_grad_enabled() and sys.gettrace() is None
    after = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert after == (random.random(), np.random.rand(), torch.rand(1).item())
    assert block.python_generator.random() == random.Random(0).random()
    assert block.numpy_generator.random() == np.random.default_rng(0).random()


Pair = collections.namedtuple("Pair", "a b")


def _local_list(self, x):
    features = [x]
    features.append(x)
    by_name = collections.OrderedDict()
    by_name["x"] = features[-1]


@pytest.mark.parametrize(
    "besides",
    [
        _local_list,
        lambda self, x: self.config.calls,
        lambda self, x: [isinstance(child, nn.ReLU) for child in self.children()],
        lambda self, x: len(self.features) + max(1, 2) + sum(range(3)),
        lambda self, x: None if SETTINGS.active else print(),
        lambda self, x: np.sqrt(2.0),
        lambda self, x: Pair(x, dict.fromkeys("ab")),
    ],
)  # fmt: skip
def test_a_forward_that_only_computes_is_read(besides):
    block = type("Computes", (Block,), {"besides": besides})().eval()
    assert str(reader.read(block).recipe()) == "conv+bn+add+relu"


@pytest.mark.parametrize(
    "file, origin, stateful",
    [
        ("site-packages/numpy/__init__.py", "user", False),
        ("site-packages/torch/nn/functional.py", "torch", False),
        ("site-packages/torch/random.py", "torch", True),
        ("random.py", "python", True),
        ("collections/__init__.py", "python", False),
    ],
)
def test_packages_inside_pythons_own_folder_are_not_pythons(file, origin, stateful, monkeypatch):
    """Without a virtual environment, site-packages is a folder of the standard library."""
    torch_there = os.path.join(known_code._STDLIB, "site-packages", "torch") + os.sep
    there = tuple(name.replace(known_code._TORCH, torch_there) for name in known_code._STATEFUL)
    monkeypatch.setattr(known_code, "_TORCH", torch_there)
    monkeypatch.setattr(known_code, "_STATEFUL", there)
    known_code.origin_of.cache_clear(), known_code.is_stateful.cache_clear()
    try:
        file = known_code._STDLIB + file.replace("/", os.sep)
        assert (known_code.origin_of(file), known_code.is_stateful(file)) == (origin, stateful)
    finally:
        known_code.origin_of.cache_clear(), known_code.is_stateful.cache_clear()


def test_a_device_context_around_explain_is_none_of_the_forward():
    class Net(Block):
        def forward(self, x):
            return torch.flatten(self.relu(self.bn(self.conv(x))), 1)

    with torch.device("meta"):
        net = Net()
        assert len(rk.explain(net).fused) == 1


def test_explain_beside_calls_of_other_threads_shows_them_no_proxy():
    net = nn.Sequential(*(Block() for _ in range(4))).eval()
    x, errors, stop = torch.randn(1, 8, 6, 6), [], threading.Event()
    expected = str(rk.explain(net))

    def call():
        while not stop.is_set():
            try:
                assert type(net(x)) is torch.Tensor
            except Exception as error:
                errors.append(error)

    def explain():
        for _ in range(20):
            if str(rk.explain(net)) != expected:
                errors.append("a wrong report")

    with torch.no_grad():
        callers = [threading.Thread(target=call)]
        readers = [threading.Thread(target=explain) for _ in range(2)]
        for thread in (*callers, *readers):
            thread.start()
        for thread in readers:
            thread.join()
        stop.set()
        callers[0].join()
    assert errors == []


@pytest.mark.parametrize("enabled", [True, False])
def test_a_callback_of_the_garbage_collector_is_none_of_the_forward(enabled):
    """hypothesis installs one; Python 3.11 crashes where it runs under a trace function."""
    calls = []

    def callback(phase, info):
        calls.append(print)

    gc.callbacks.append(callback)
    before, was_on = gc.get_threshold(), gc.isenabled()
    gc.set_threshold(1)
    try:
        gc.enable() if enabled else gc.disable()
        for _ in range(20):
            assert str(reader.read(Block()).recipe()) == "conv+bn+add+relu"
            assert gc.isenabled() == enabled
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*before)
        gc.enable() if was_on else gc.disable()


def test_an_interrupted_explain_leaves_pytorch_as_it_was(monkeypatch):
    module_call, module_getattr = nn.Module.__call__, nn.Module.__getattr__

    class Interrupted(Block):
        def besides(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rk.explain(nn.Sequential(Interrupted(), Block()))
    assert nn.Module.__call__ is module_call and nn.Module.__getattr__ is module_getattr
    assert sys.gettrace() is None
    assert type(Block().eval()(torch.randn(1, 8, 6, 6))) is torch.Tensor


class FrozenBatchNorm2d(nn.Module):
    """DETR's, whose eps is a local variable: there is no self.eps."""

    eps_in_code = 1e-5

    def __init__(self, n):
        super().__init__()
        for name, value in {"weight": 1.5, "bias": 0.5, "running_mean": 0.2, "running_var": 1e-4}.items():
            self.register_buffer(name, torch.full((n,), value))

    def forward(self, x):
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        mean, var = self.running_mean.reshape(1, -1, 1, 1), self.running_var.reshape(1, -1, 1, 1)
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class PlainName(FrozenBatchNorm2d):
    """Another way to write it, with eps as an attribute."""

    def __init__(self, n):
        super().__init__(n)
        self.eps = 1e-3

    def forward(self, x):
        scale = self.weight / torch.sqrt(self.running_var + self.eps)
        return (x - self.running_mean[None, :, None, None]) * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class NotFrozenBatchNorm2d(FrozenBatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("norm, fused", [(FrozenBatchNorm2d, 1), (PlainName, 1), (NotFrozenBatchNorm2d, 0)])
@pytest.mark.parametrize("train", [False, True])
def test_a_frozen_bn_of_the_users_is_known_by_its_forward(norm, fused, train):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU())
    model = rk.fuse(net)
    assert len(rk.explain(net).fused) == fused
    x = torch.randn(2, 3, 8, 8)
    net.train(train), model.train(train)

    def assert_as_eager():
        assert_within_budget(model(x), net(x), copy.deepcopy(net).double()(x.double()))

    with torch.no_grad():
        assert_as_eager()
        if fused:
            for m in (net, model):
                m[1].running_var.mul_(3)
                if norm is PlainName:
                    m[1].eps = 0.5
            assert_as_eager()


class Dropout2d(nn.Module):
    """Monte-Carlo dropout: it drops in eval mode, too."""

    def forward(self, x):
        return F.dropout2d(x, 0.5, True)


class Identity(nn.Module):
    def forward(self, x):
        return x * 2


class BatchNormAct2d(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class DropPath(nn.Module):
    """A copy of timm's, as many repositories have one."""

    def __init__(self, rate=0.5):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        mask = torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 1 - self.rate))
        return x * mask / (1 - self.rate)


@pytest.mark.parametrize("make", [Dropout2d, Identity, lambda: BatchNormAct2d(8)])
def test_a_stranger_with_a_famous_name_keeps_its_forward(make):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.BatchNorm2d(8), nn.ReLU()).eval()
    fused, x = rk.fuse(net), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            torch.manual_seed(0)
            expected = net(x)
            torch.manual_seed(0)
            torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)


def test_a_copy_of_drop_path_is_an_identity_in_eval_mode_and_drops_in_train_mode():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.drop = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), DropPath()

        def forward(self, x):
            return F.relu(self.drop(self.bn(self.conv(x))) + x)

    net = Net().eval()
    assert str(reader.read(net).recipe()) == "conv+bn+add+relu"
    fused, x = rk.fuse(net), torch.randn(4, 8, 6, 6)
    for mode in ("eval", "train", "drop alone"):
        for m in (net, fused):
            m.train(mode == "train")
            m.drop.train(mode != "eval")
        torch.manual_seed(0)
        with torch.no_grad():
            expected = net(x)
        torch.manual_seed(0)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # one of ours says that the block runs eager
            torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)
