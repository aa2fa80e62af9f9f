"""What a call of a network found out holds for the next one, until somebody writes to a module, and no longer."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import assert_within_budget
from resnet_kernels.models import by_name
from resnet_kernels.ops import backends
from resnet_kernels.runtime import object_watch
from resnet_kernels.runtime.checked_calls import Survey

pytestmark = pytest.mark.filterwarnings("ignore:.*such calls run the model's own PyTorch code")

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FLAG = True


@pytest.fixture
def looks(monkeypatch):
    """The calls that looked at all modules."""
    if object_watch._sight() is None:
        pytest.skip(
            "writes to dicts can't be seen here: no compiled library, or another Python than CPython with its lock"
        )
    calls, actual = [], Survey._found
    monkeypatch.setattr(Survey, "_found", lambda self, packs: calls.append(packs) or actual(self, packs))
    return calls


def network(**options):
    torch.manual_seed(0)
    model = by_name.build("resnet18").eval()
    rk.fuse_(model, **options)
    return model


def unfused(model):
    model = copy.deepcopy(model)
    rk.unfuse_(model)
    return model


def warm(model, looks):
    """Calls until a call looks at nothing."""
    with torch.no_grad():
        for _ in range(4):
            model(X)
        looks.clear()
        y = model(X)
    assert not looks
    return y


@torch.no_grad()
def is_right(model, x=X):
    eager = unfused(model)
    assert_within_budget(model(x), eager(x), copy.deepcopy(eager).double()(x.double()))


@pytest.mark.parametrize("freeze", (False, True), ids=("live", "frozen"))
def test_a_call_looks_at_modules_only_after_a_write(freeze, looks):
    model = network(freeze=freeze)
    y = warm(model, looks)
    with torch.no_grad():
        assert torch.equal(model(X), y) and not looks
        model.layer2[0].bn1.eps = 1e-5  # as it was
        assert torch.equal(model(X), y) and len(looks) == 1
        assert torch.equal(model(X), y) and len(looks) == 1


CHANGES = {
    "eps": lambda m: setattr(m.layer1[0].bn1, "eps", 0.3),
    "stride": lambda m: setattr(m.layer2[0].conv2, "stride", (1, 1)),
    "stride of a list": lambda m: setattr(m.layer1[1].conv1, "padding", [1, 1]),
    "weight": lambda m: setattr(m.layer1[0].conv1, "weight", nn.Parameter(m.layer1[0].conv1.weight * 2)),
    "values": lambda m: m.layer1[0].conv1.weight.data.mul_(2),
    "data": lambda m: setattr(m.layer1[0].conv1.weight, "data", m.layer1[0].conv1.weight.data * 2),
    "numpy": lambda m: m.layer3[0].bn2.running_var.numpy().__imul__(2),
    "block": lambda m: m.layer3.__setitem__(1, nn.Identity()),
    "appended": lambda m: m.layer4.append(nn.ReLU()),
    "head": lambda m: setattr(m, "fc", nn.Linear(512, 700).eval()),
    "hook": lambda m: m.layer2[1].register_forward_hook(lambda module, args, y: y + 1),
    "hook inside": lambda m: m.layer2[1].conv1.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "forward": lambda m: setattr(m.layer1[1].conv2, "forward", lambda x: x * 3),
    "class": lambda m: setattr(m.layer1[1].relu, "__class__", nn.Sigmoid),
    "one BN in train mode": lambda m: m.layer4[1].bn2.train(),
    "backend": lambda m: setattr(m.layer1[0]._rk_state, "backend", "eager"),
    "copies dropped": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
}


@pytest.mark.slow(unless=lambda change: change in [*CHANGES.values()][::3])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_was_known_is_not_relied_on_after_a_change(change, looks):
    model = network()
    before = warm(model, looks)
    with torch.no_grad():
        change(model)
        changed = model(X)
        statistics = copy.deepcopy(model.layer4[1].bn2.state_dict())
        for _ in range(2):
            model.layer4[1].bn2.load_state_dict(statistics)
            is_right(model)
    assert change in (CHANGES["stride of a list"], CHANGES["backend"], CHANGES["stride"]) or not torch.equal(
        changed, before
    )


def test_a_settings_list_may_change_in_place(looks):
    model = by_name.build("resnet18").eval()
    model.layer1[0].conv1.padding = [1, 1]
    rk.fuse_(model)
    warm(model, looks)
    model.layer1[0].conv1.padding[0] = 0
    model.layer1[0].conv1.padding[0] = 1
    is_right(model)
    model.layer1[0].conv1.dilation = [2, 2]
    model.layer1[0].conv1.padding = [2, 2]
    warm(model, looks)
    model.layer1[0].conv1.dilation[:] = [1, 1]
    model.layer1[0].conv1.padding[:] = [1, 1]
    is_right(model)


class Flagged(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return y + x if FLAG else y


def test_a_global_that_a_forward_reads_is_compared_in_each_call(looks, monkeypatch):
    model = nn.Sequential(Flagged(), Flagged()).eval()
    rk.fuse_(model)
    warm(model, looks)
    monkeypatch.setitem(Flagged.forward.__globals__, "FLAG", False)
    is_right(model)


def test_the_environment_and_the_switches_are_asked_in_each_call(looks, monkeypatch):
    model = network()
    warm(model, looks)
    with torch.no_grad():
        expected = unfused(model)(X)
        with torch.backends.mkldnn.flags(enabled=False):
            is_right(model)
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "eager")
        assert torch.equal(model(X), expected)


def test_a_model_dies_with_its_last_reference(looks):
    gc.collect()
    gc.disable()
    try:
        for freeze in (False, True):
            model = network(freeze=freeze)
            warm(model, looks)
            parts = [weakref.ref(part) for part in (model, model.layer4[1], model.conv1.weight)]
            del model
            assert all(part() is None for part in parts)
    finally:
        gc.enable()


def test_a_copy_shares_nothing_that_was_known(looks):
    model = network()
    warm(model, looks)
    for other in (copy.deepcopy(model), copy.copy(model)):
        other.layer1 = nn.Identity()
        is_right(other)
        is_right(model)


def test_threads_that_call_and_write(looks):
    model = network()
    expected, wrong, stop = warm(model, looks), [], threading.Event()

    def write():
        while not stop.is_set():
            model.layer1[0].bn1.eps = 1e-5

    def call():
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(model(X), expected, rtol=1e-4, atol=1e-5):
                    wrong.append(1)

    writer, callers = threading.Thread(target=write), [threading.Thread(target=call) for _ in range(2)]
    for thread in (writer, *callers):
        thread.start()
    for thread in callers:
        thread.join()
    stop.set()
    writer.join()
    assert not wrong


def test_a_module_of_torchscript_inside(looks):
    model = network()
    model.relu = torch.jit.script(nn.ReLU())
    rk.fuse_(model)
    for _ in range(3):
        is_right(model)
