"""What a user's class says of itself: pickling, copying, subclassing; and how long models and classes live."""

import copy
import gc
import pickle
import threading
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from resnet_kernels.runtime.fused_module import is_fused


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.width = width
        self.conv, self.bn, self.relu = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class WithState(Net):
    """Leaves its cache out of a pickle, and makes it anew."""

    def __getstate__(self):
        return {"kept": {k: v for k, v in self.__dict__.items() if k != "cache"}}

    def __setstate__(self, state):
        self.__dict__ = dict(state["kept"], cache="made anew")


class WithNewArguments(Net):
    """Its __new__ needs an argument."""

    def __new__(cls, width):
        return super().__new__(cls)

    def __getnewargs__(self):
        return (self.width,)


class WithDeepcopy(Net):
    """Counts its copies."""

    copies = 0

    def __deepcopy__(self, memo):
        copied = type(self)(self.width)
        copied.load_state_dict(self.state_dict())
        copied.eval()
        copied.copies = self.copies + 1
        return copied


class Registered(Net):
    """A class whose subclasses have to name themselves."""

    registry: ClassVar = {}

    def __init_subclass__(cls, *, name):
        Registered.registry[name] = cls


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("way", [pickled, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("cls", [Net, WithState, WithNewArguments, WithDeepcopy])
def test_a_class_with_a_protocol_of_its_own(cls, way):
    torch.manual_seed(0)
    net = cls(8).eval()
    rk.fuse_(net)
    net.cache = "old"
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        y = net(x)
        other = way(net)
        assert torch.equal(other(x), y)
    assert is_fused(net) and is_fused(other) and isinstance(other, cls)
    if cls is WithState:
        assert other.cache == "made anew"
    if cls is WithDeepcopy and way is copy.deepcopy:
        assert other.copies == 1
    assert type(rk.unfuse_(other)) is cls


def test_subclass_hooks_do_not_run():
    net = Registered().eval()
    rk.fuse_(net)
    assert is_fused(net) and not Registered.registry


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(
    "part", [lambda m: m, lambda m: m.layer1, lambda m: m.layer1[0]], ids=["net", "stage", "block"]
)
def test_a_fused_model_dies_with_its_last_reference(part, freeze):
    model = part(rk.models.resnet18(num_classes=10)).eval()
    x = torch.randn(1, 3 if hasattr(model, "fc") else 64, 32, 32)
    gc.collect()
    gc.disable()
    try:
        rk.explain(model)
        rk.fuse_(model, freeze=freeze)
        with torch.no_grad():
            model(x)
            model(x)
        alive = [weakref.ref(value) for value in (*model.modules(), *model.parameters())]
        del model
        assert not [reference for reference in alive if reference() is not None]
    finally:
        gc.enable()


def test_a_class_that_was_fused_can_be_collected():
    def make():
        class Local(Net):
            pass

        net = Local().eval()
        rk.fuse_(net)
        with torch.no_grad():
            net(torch.randn(1, 3, 8, 8))
        rk.unfuse_(net)
        return weakref.ref(Local)

    reference = make()
    gc.collect()
    assert reference() is None


def test_unfused_between_the_choice_of_forward_and_its_first_line():
    net = Net().eval()
    rk.fuse_(net)
    forward = net.forward
    rk.unfuse_(net)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(forward(x), net(x))


@pytest.mark.parametrize("where", ["layer1", "layer1.0"])
def test_unfused_by_a_hook_in_the_middle_of_a_call(where):
    torch.manual_seed(0)
    model = rk.models.resnet18(num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        rk.fuse_(model)
        model.get_submodule(where).register_forward_hook(lambda *_: rk.unfuse_(model) and None)
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_fused_and_unfused_beside_running_calls():
    torch.manual_seed(0)
    model = rk.models.resnet18(num_classes=10).layer1.eval()
    x = torch.randn(1, 64, 8, 8)
    with torch.no_grad():
        expected = model(x)
    rk.fuse_(model)
    fused = [(module, type(module), module.__dict__.get("_rk_state")) for module in model.modules()]
    failures, stop = [], threading.Event()

    @torch.no_grad()
    def call():
        while not stop.is_set():
            try:
                torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
            except Exception as error:  # to the main thread
                failures.append(error)
                return

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        rk.unfuse_(model)
        # As fuse_ does, without torch.fx.
        for module, cls, state in fused:
            if state is not None:
                module.__dict__["_rk_state"] = state
            module.__class__ = cls
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("around", (False, True))
def test_a_users_class_over_a_fused_one(around):
    """Its forward calls the fused class's, also after unfuse_, which recursed without end, and after another fuse_."""

    class Around(nn.Module):
        def __init__(self, seq):
            super().__init__()
            self.seq = seq

        def forward(self, x):
            return torch.tanh(self.seq(x))

    seq = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model, x = (Around(seq) if around else seq).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = torch.tanh(seq(x) + 1) if around else seq(x) + 1
        rk.fuse_(model)
        below = type(seq)
        seq.__class__ = type("Patched", (below,), {"forward": lambda self, x: below.forward(self, x) + 1})
        for step in (lambda model: None, rk.unfuse_, rk.fuse_, rk.fuse_, rk.unfuse_):
            step(model)
            torch.testing.assert_close(model(x), expected)
