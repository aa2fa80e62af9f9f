"""fuse(freeze=True): weights are not compared, everything else is; what thaws, and that a promise that is broken shows."""

import copy
import importlib
import json
import threading

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers import frozen
from helpers.frozen import CHANGES, COPIES, REPLACED_TENSORS, THAWS, X, call, edit, edited, is_stale, plain_model
from helpers.oracle import skip_unless_runnable
from resnet_kernels.runtime import freezing
from resnet_kernels.runtime.cpu import packed_conv

capture = importlib.import_module("resnet_kernels.runtime.cuda_graph")


@pytest.fixture(autouse=True)
def _needs_onednn():
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)


def _frozen():
    return rk.fuse(plain_model(), backend="cpu", freeze=True)


def test_weights_are_not_compared(monkeypatch):
    fused = _frozen()
    call(fused)

    def refuse(*arguments):
        raise AssertionError("weights were compared")

    monkeypatch.setattr(packed_conv.WatchedTensors, "are_unchanged", refuse)
    call(fused)
    with pytest.raises(AssertionError, match="compared"):
        live = rk.fuse(plain_model(), backend="cpu")
        call(live), call(live)


def test_an_edit_is_not_seen_at_a_new_size_either():
    """All sizes are of the weights that were folded first, in each layout; afterwards all are of the new ones."""
    fused, sizes = _frozen(), [torch.randn(1, 3, size, size) for size in (48, 56, 5, 30)]
    plain = rk.unfuse_(copy.deepcopy(fused))
    call(fused)
    edit(fused)
    for x in sizes:
        torch.testing.assert_close(call(fused, x), call(plain, x), rtol=1e-4, atol=1e-4)
    rk.refresh(fused)
    assert not any(is_stale(fused, x) for x in sizes)


@pytest.mark.parametrize("thaw", THAWS, ids=lambda f: f.__name__.strip("_"))
def test_thawed_by(thaw):
    fused = edited(_frozen())
    thaw(fused)
    assert not is_stale(fused)
    assert rk.explain(fused).frozen, "only the copies go, not the promise"
    edit(fused)
    assert is_stale(fused)


@pytest.mark.parametrize("thaw", THAWS, ids=lambda f: f.__name__.strip("_"))
def test_planted_bug_copies_that_are_never_dropped_are_stale(thaw, monkeypatch):
    monkeypatch.setattr("resnet_kernels.runtime.state.FusedState.drop_copies", lambda self: None)
    # .to() and assigning put other tensors in place, which would be seen by themselves.
    monkeypatch.setattr(packed_conv.PackedConv, "is_of", lambda *arguments: True)
    with pytest.raises(AssertionError):
        test_thawed_by(thaw)


def test_a_block_thaws_alone():
    fused = edited(_frozen())
    fused[1].load_state_dict(fused[1].state_dict())
    assert len(fused[1]._rk_state.copies.packs) == 0 < len(fused[2]._rk_state.copies.packs)
    rk.refresh(fused[2])
    rk.refresh(fused[0])
    assert not is_stale(fused)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:resnet_kernels. in a")
def test_what_is_looked_at_as_ever(change):
    fused = _frozen()
    before = call(fused)
    change(fused)
    expected = rk.unfuse_(copy.deepcopy(fused))
    with torch.no_grad():
        y = fused(X)
        torch.testing.assert_close(y, expected(X), rtol=1e-4, atol=1e-4)
    assert y.shape != before.shape or not torch.allclose(y, before), "the change must matter"


def test_functional_call_uses_the_given_parameters():
    fused = _frozen()
    call(fused)
    given = {name: parameter * 2 for name, parameter in fused.named_parameters()}
    with torch.no_grad():
        y = torch.func.functional_call(fused, given, X)
        expected = torch.func.functional_call(rk.unfuse_(copy.deepcopy(fused)), given, X)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert not is_stale(fused)


@pytest.mark.parametrize("copied", COPIES, ids=lambda f: f.__name__)
def test_copies_keep_the_promise_and_fold_their_own(copied):
    fused = edited(_frozen())
    twin = copied(fused)
    assert rk.explain(twin).frozen and not is_stale(twin) and is_stale(fused)
    edit(twin)
    assert is_stale(twin)


def test_it_has_to_be_promised_again():
    fused = _frozen()
    call(fused)
    assert not rk.fuse_(fused, backend="cpu").frozen and not rk.explain(fused).frozen
    edit(fused)
    assert not is_stale(fused)
    assert rk.fuse_(fused, backend="cpu", freeze=True).frozen
    rk.unfuse_(fused)
    assert not rk.explain(fused).frozen and not freezing.frozen_states(fused)


def test_explain_says_frozen():
    frozen, plain = _frozen(), rk.fuse(plain_model())
    assert str(rk.explain(frozen)).endswith(", frozen") and "frozen" not in str(rk.explain(plain))
    assert json.loads(rk.explain(frozen).to_json())["frozen"] is True
    assert json.loads(rk.explain(plain).to_json())["frozen"] is False


@pytest.mark.parametrize("freeze", (None, 1, "yes", torch.ones(())), ids=repr)
def test_freeze_is_a_bool(freeze):
    model = plain_model()
    for fuse in (rk.fuse, rk.fuse_):
        with pytest.raises(TypeError, match="freeze must be True or False, got"):
            fuse(model, freeze=freeze)
    assert not any("_rk_state" in module.__dict__ for module in model.modules())


def test_a_model_without_blocks_is_not_frozen():
    model = nn.Sequential(nn.Linear(3, 3))
    assert not rk.fuse_(model, freeze=True).frozen
    assert str(rk.explain(model)).startswith("nothing to fuse")


def test_verify_sees_a_broken_promise():
    model = plain_model()
    fused = rk.fuse(model, backend="cpu", freeze=True)
    assert rk.verify(model, fused, X)
    with torch.no_grad():
        for net in (model, fused):
            net[1].conv1.weight.mul_(2)
    assert not rk.verify(model, fused, X)
    assert rk.verify(model, rk.refresh(fused), X)


def test_captured_graphs_are_dropped_with_the_copies(recorder):
    fused = _frozen()
    run = capture.CapturedModel(fused, copy=True, max_graphs=8)
    run(X)
    for thaw in (frozen.train, frozen.load, frozen.load_around, frozen.to, frozen.refresh):
        run(X)
        count = recorder.recordings
        thaw(fused)
        run(X)
        assert recorder.recordings == count + 1
        run(X)
        assert recorder.recordings == count + 1
    fused[1].conv1.weight.data.mul_(2)
    run(X)
    assert recorder.recordings == count + 1


def test_captured_graphs_of_other_models_stay(recorder):
    fused = rk.fuse(plain_model(), backend="cpu")
    run = capture.CapturedModel(fused, copy=True, max_graphs=8)
    run(X)
    for thaw in (frozen.train, frozen.load, frozen.load_around, frozen.refresh):
        thaw(fused)
        run(X)
    assert recorder.recordings == 1


def test_copies_of_several_blocks_hold_together():
    """What a plan of several blocks asks."""
    fused = _frozen()
    call(fused)
    states = [fused[i]._rk_state for i in (1, 2)]
    modules = [state.live[state.plan.modules] for state in states]
    make = lambda: freezing.FrozenCopies.of(states, modules)  # noqa: E731
    copies = make()
    edit(fused)
    assert copies.hold()
    for thaw in (
        frozen.train,
        frozen.load,
        frozen.to,
        frozen.refresh,
        lambda fused: rk.refresh(fused[2]),
        *REPLACED_TENSORS,
    ):
        copies = make()
        assert copies.hold()
        thaw(fused)
        assert not copies.hold()
    assert freezing.FrozenCopies.of([states[0], rk.fuse(plain_model())[1]._rk_state], modules) is None


def test_plans_are_dropped_with_the_copies():
    """On a GPU it is plans that hold copies."""
    fused = _frozen()
    for module in (fused[1], fused[2]):
        module._rk_state.plans["a plan"] = object()
    rk.refresh(fused[1])
    assert not fused[1]._rk_state.plans and fused[2]._rk_state.plans


def test_loading_while_other_threads_call():
    """What a call makes of old weights while new ones are loaded must not outlive the loading."""
    fused, stop, failures = _frozen(), threading.Event(), []
    states = [{name: value * factor for name, value in fused.state_dict().items()} for factor in (1.5, 0.75)]

    def work():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    fused(X)
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for state in states * 10:
            fused.load_state_dict(state)
            assert not is_stale(fused)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert not failures and not is_stale(fused)
