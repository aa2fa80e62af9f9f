"""ObjectWatch: each write is seen, reading is not, and without a way to see there is no answer "unchanged"."""

import copy
import gc
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from resnet_kernels.kernels.cpu import library
from resnet_kernels.runtime import object_watch
from resnet_kernels.runtime.model_snapshot import Watch
from resnet_kernels.runtime.object_watch import ObjectWatch


@pytest.fixture
def sight():
    if object_watch._sight() is None:
        pytest.skip(
            "writes to dicts can't be seen here: no compiled library, or another Python than CPython with its lock"
        )


def renewed(objects=(), dicts=()):
    watch = ObjectWatch(objects, dicts)
    assert not watch.are_unchanged()
    watch.renew()
    assert watch.are_unchanged()
    return watch


def dicts_of(module):
    return [module.__dict__, module._parameters, module._buffers, module._modules, module._forward_hooks]


CHANGES = {
    "attribute": lambda m: setattr(m[1], "eps", 1.0),
    "the same value": lambda m: setattr(m[0], "stride", (2, 2)),
    "new attribute": lambda m: setattr(m[2], "forward", torch.tanh),
    "mode": lambda m: m[1].train(),
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(4, 3, 3, 3))),
    "buffer": lambda m: setattr(m[1], "running_mean", torch.zeros(4)),
    "deleted": lambda m: delattr(m[1], "running_mean"),
    "registered": lambda m: m[0].register_buffer("more", torch.zeros(1)),
    "module": lambda m: m.__setitem__(2, nn.ReLU()),
    "appended": lambda m: m.append(nn.ReLU()),
    "hook": lambda m: m[2].register_forward_hook(lambda *_: None),
    "class": lambda m: setattr(m[0], "__class__", type("Other", (nn.Conv2d,), {})),
    "past setattr": lambda m: m[1].__dict__.update(momentum=0.5),
    "setdefault": lambda m: m[1].__dict__.setdefault("later", 1),
    "popped": lambda m: m[1]._buffers.pop("running_var"),
    "cleared": lambda m: m[1]._buffers.clear(),
    "fused": rk.fuse_,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_once(sight, change):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    watch = renewed(model.modules(), [d for module in model.modules() for d in dicts_of(module)])
    change(model)
    assert not watch.are_unchanged() and not watch.are_unchanged()
    watch.renew()
    assert watch.are_unchanged()


def test_reading_and_calling_is_no_change(sight):
    model = rk.models.BY_NAME["resnet18"](num_classes=3).eval()
    watch = renewed(model.modules(), [d for module in model.modules() for d in dicts_of(module)])
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
        model[0].weight.mul_(2) if isinstance(model, nn.Sequential) else model.conv1.weight.mul_(2)
    list(model.state_dict()), copy.deepcopy(model), [*model.named_modules()], model.zero_grad()
    assert watch.are_unchanged()


def test_watches_are_independent(sight):
    mine, theirs = {"a": 1}, OrderedDict(b=2)
    first, second = renewed(dicts=[mine]), renewed(dicts=[mine, theirs])
    theirs.move_to_end("b")
    theirs["b"] = 3
    assert not second.are_unchanged()
    mine["a"] = 2
    assert not first.are_unchanged()
    second.renew()
    assert second.are_unchanged() and not first.are_unchanged()


def test_a_forgotten_watch_has_no_answer_until_it_begins_anew(sight):
    watch = renewed(dicts=[{}])
    watch.forget()
    assert not watch.are_unchanged()
    watch.renew()
    assert watch.are_unchanged()


def test_what_is_watched_stays_alive(sight):
    watch = renewed([nn.ReLU()], [{"a": 1}])
    for _ in range(1000):
        {}.update(a=1)
        nn.Identity().a = 1
    gc.collect()
    assert watch.are_unchanged()


@pytest.mark.parametrize("why", ("no library", "another layout"))
def test_where_nothing_can_be_seen_each_call_looks(monkeypatch, why):
    object_watch._sight.cache_clear()
    if why == "no library":
        monkeypatch.setattr(library, "library_or_none", lambda: None)
    else:
        monkeypatch.setattr(object_watch, "_CLASS", 0)  # the reference count
    try:
        watch = ObjectWatch([nn.ReLU()], [{}])
        watch.renew()
        assert not watch.are_unchanged()
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        snapshot = Watch(model)
        assert snapshot.is_current() and snapshot.is_current()
        model[1].eps = 1.0
        assert not snapshot.is_current()
        model[1].eps = 1e-5
        assert snapshot.is_current()
    finally:
        object_watch._sight.cache_clear()


def test_a_snapshot_compares_members_only_after_a_write(sight, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    snapshot, compared = Watch(model), []
    actual = Watch._has_same_members
    monkeypatch.setattr(Watch, "_has_same_members", lambda self: compared.append(1) or actual(self))
    for _ in range(3):
        assert snapshot.is_current()
    assert len(compared) == 1
    model[1].eps = 1e-5  # as it was
    assert snapshot.is_current() and snapshot.is_current() and len(compared) == 2
    model[1].eps = 1.0
    assert not snapshot.is_current() and not snapshot.is_current() and len(compared) == 4


class _Holder:
    def __init__(self):
        self.watch = ObjectWatch([], [], [self])


def test_who_holds_a_watch_around_itself_dies_with_its_last_reference(sight):
    gc.collect()
    gc.disable()
    try:
        holder = _Holder()
        holder.watch.renew()
        assert holder.watch.are_unchanged()
        holder.more = 1
        assert not holder.watch.are_unchanged()
        holder.watch.renew()
        watch, reference = holder.watch, weakref.ref(holder)
        holder.__dict__ = dict(holder.__dict__)
        assert not watch.are_unchanged()
        del holder
        assert reference() is None and not watch.are_unchanged()
    finally:
        gc.enable()


def test_a_mapping_of_another_kind_is_no_dict(sight):
    script = torch.jit.script(nn.Sequential(nn.ReLU()))
    watch = ObjectWatch([script], dicts_of(script))
    watch.renew()
    assert not isinstance(script._parameters, dict) and not watch.are_unchanged()
