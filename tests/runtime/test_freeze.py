"""fuse(freeze=True): weights are not compared, everything else is; what thaws, and that a promise that is broken shows."""

import copy
import importlib
import io
import json
import pickle
import threading

import pytest
import torch
from helpers.oracle import skip_unless_runnable
from test_capture import Recorder
from torch import nn

import resnet_kernels as rk
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.runtime import freezing
from resnet_kernels.runtime.cpu import packed_conv

capture = importlib.import_module("resnet_kernels.runtime.cuda_graph")


@pytest.fixture(autouse=True)
def _needs_onednn():
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(capture, "_Recorder", Recorder)
    monkeypatch.setattr(Recorder, "recordings", 0)
    return Recorder


def _model():
    block = rk.models.resnet_v1.BasicBlock
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    return randomise_batch_norms_(nn.Sequential(stem, block(32, 32), block(32, 32))).eval()


def _frozen():
    return rk.fuse(_model(), backend="cpu", freeze=True)


X = torch.randn(2, 3, 20, 20)


def _call(model, x=X):
    """The second call with the model as it is: the first packs."""
    with torch.no_grad():
        model(x)
        return model(x)


def _eagers(fused, x=X):
    return _call(rk.unfuse_(copy.deepcopy(fused)), x)


def _is_stale(fused, x=X):
    return not torch.allclose(_call(fused, x), _eagers(fused, x), rtol=1e-4, atol=1e-4)


def _edit(fused):
    """What the promise rules out."""
    with torch.no_grad():
        fused[0][0].weight.mul_(-2)
        fused[1].conv1.weight.data.mul_(3)
        fused[1].bn2.running_mean.numpy()[:] += 5
        fused[2].conv2.weight.data = fused[2].conv2.weight.data * 2


def _edited():
    fused = _frozen()
    before = _call(fused)
    assert not _is_stale(fused)
    _edit(fused)
    assert torch.equal(_call(fused), before), "weights are compared"
    assert _is_stale(fused), "the edit must matter"
    return fused


def test_weights_are_not_compared(monkeypatch):
    fused = _frozen()
    _call(fused)

    def refuse(*arguments):
        raise AssertionError("weights were compared")

    monkeypatch.setattr(packed_conv.PackedConv, "is_unchanged", refuse)
    _call(fused)
    with pytest.raises(AssertionError, match="compared"):
        _call(rk.fuse(_model(), backend="cpu"))


def test_an_edit_is_not_seen_at_a_new_size_either():
    """All sizes are of the weights that were folded first, in each layout; afterwards all are of the new ones."""
    fused, sizes = _frozen(), [torch.randn(1, 3, size, size) for size in (48, 56, 5, 30)]
    plain = rk.unfuse_(copy.deepcopy(fused))
    _call(fused)
    _edit(fused)
    for x in sizes:
        torch.testing.assert_close(_call(fused, x), _call(plain, x), rtol=1e-4, atol=1e-4)
    rk.refresh(fused)
    assert not any(_is_stale(fused, x) for x in sizes)


def _train(fused):
    fused.train().eval()


def _train_around(fused):
    nn.Sequential(nn.Identity(), fused).train().eval()


def _load(fused):
    fused.load_state_dict({name: value * 1.5 for name, value in fused.state_dict().items()})


def _load_around(fused):
    around = nn.ModuleDict({"net": fused})
    around.load_state_dict({name: value * 1.5 for name, value in around.state_dict().items()})


def _load_assigning(fused):
    fused.load_state_dict({name: value * 1.5 for name, value in fused.state_dict().items()}, assign=True)


def _load_strictly_in_vain(fused):
    state = {name: value * 1.5 for name, value in fused.state_dict().items()}
    del state["2.conv1.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        fused.load_state_dict(state)


def _to(fused):
    fused.to(torch.float64).to(torch.float32)


def _half_around(fused):
    nn.Sequential(fused).double().float()


def _refresh(fused):
    rk.refresh(fused)


def _refresh_around(fused):
    rk.refresh(nn.Sequential(fused))


def _training_step(fused):
    fused.train()
    fused(X).square().mean().backward()
    torch.optim.SGD(fused.parameters(), lr=0.1).step()
    fused.eval()


def _gradients(fused):
    with pytest.warns(RuntimeWarning, match="gradients are on"):
        fused(X)


THAWS = [
    _train, _train_around, _load, _load_around, _load_assigning, _load_strictly_in_vain, _to, _half_around, _refresh,
    _refresh_around, _training_step, _gradients,
]  # fmt: skip


@pytest.mark.parametrize("thaw", THAWS, ids=lambda f: f.__name__.strip("_"))
def test_thawed_by(thaw):
    fused = _edited()
    thaw(fused)
    assert not _is_stale(fused)
    assert rk.explain(fused).frozen, "only the copies go, not the promise"
    _edit(fused)
    assert _is_stale(fused)


@pytest.mark.parametrize("thaw", THAWS, ids=lambda f: f.__name__.strip("_"))
def test_planted_bug_copies_that_are_never_dropped_are_stale(thaw, monkeypatch):
    monkeypatch.setattr("resnet_kernels.runtime.state.FusedState.drop_copies", lambda self: None)
    # .to() and assigning put other tensors in place, which would be seen by themselves.
    monkeypatch.setattr(packed_conv.PackedConv, "is_of", lambda *arguments: True)
    with pytest.raises(AssertionError):
        test_thawed_by(thaw)


def test_a_block_thaws_alone():
    fused = _edited()
    fused[1].load_state_dict(fused[1].state_dict())
    assert len(fused[1]._rk_state.copies.packs) == 0 < len(fused[2]._rk_state.copies.packs)
    rk.refresh(fused[2])
    rk.refresh(fused[0])
    assert not _is_stale(fused)


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


CHANGES = (_hook, _bn_mode, _module, _parameter, _eps, _stride, _bias)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:resnet_kernels. in a")
def test_what_is_looked_at_as_ever(change):
    fused = _frozen()
    before = _call(fused)
    change(fused)
    expected = rk.unfuse_(copy.deepcopy(fused))
    with torch.no_grad():
        y = fused(X)
        torch.testing.assert_close(y, expected(X), rtol=1e-4, atol=1e-4)
    assert y.shape != before.shape or not torch.allclose(y, before), "the change must matter"


def test_functional_call_uses_the_given_parameters():
    fused = _frozen()
    _call(fused)
    given = {name: parameter * 2 for name, parameter in fused.named_parameters()}
    with torch.no_grad():
        y = torch.func.functional_call(fused, given, X)
        expected = torch.func.functional_call(rk.unfuse_(copy.deepcopy(fused)), given, X)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert not _is_stale(fused)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", (copy.deepcopy, _pickled, _saved), ids=lambda f: f.__name__)
def test_copies_keep_the_promise_and_fold_their_own(copied):
    fused = _edited()
    twin = copied(fused)
    assert rk.explain(twin).frozen and not _is_stale(twin) and _is_stale(fused)
    _edit(twin)
    assert _is_stale(twin)


def test_it_has_to_be_promised_again():
    fused = _frozen()
    _call(fused)
    assert not rk.fuse_(fused, backend="cpu").frozen and not rk.explain(fused).frozen
    _edit(fused)
    assert not _is_stale(fused)
    assert rk.fuse_(fused, backend="cpu", freeze=True).frozen
    rk.unfuse_(fused)
    assert not rk.explain(fused).frozen and not freezing.frozen_states(fused)


def test_explain_says_frozen():
    frozen, plain = _frozen(), rk.fuse(_model())
    assert str(rk.explain(frozen)).endswith(", frozen") and "frozen" not in str(rk.explain(plain))
    assert json.loads(rk.explain(frozen).to_json())["frozen"] is True
    assert json.loads(rk.explain(plain).to_json())["frozen"] is False


@pytest.mark.parametrize("freeze", (None, 1, "yes", torch.ones(())), ids=repr)
def test_freeze_is_a_bool(freeze):
    model = _model()
    for fuse in (rk.fuse, rk.fuse_):
        with pytest.raises(TypeError, match="freeze must be True or False, got"):
            fuse(model, freeze=freeze)
    assert not any("_rk_state" in module.__dict__ for module in model.modules())


def test_a_model_without_blocks_is_not_frozen():
    model = nn.Sequential(nn.Linear(3, 3))
    assert not rk.fuse_(model, freeze=True).frozen
    assert str(rk.explain(model)).startswith("nothing to fuse")


def test_verify_sees_a_broken_promise():
    model = _model()
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
    for thaw in (_train, _load, _load_around, _to, _refresh):
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
    fused = rk.fuse(_model(), backend="cpu")
    run = capture.CapturedModel(fused, copy=True, max_graphs=8)
    run(X)
    for thaw in (_train, _load, _load_around, _refresh):
        thaw(fused)
        run(X)
    assert recorder.recordings == 1


def test_copies_of_several_blocks_hold_together():
    """What a plan of several blocks asks."""
    fused = _frozen()
    _call(fused)
    states = [fused[i]._rk_state for i in (1, 2)]
    wirings = [state.wiring[state.plan.modules] for state in states]
    make = lambda: freezing.FrozenCopies.of(states, wirings)  # noqa: E731
    copies = make()
    _edit(fused)
    assert copies.hold()
    for thaw in (_train, _load, _to, _refresh, lambda fused: rk.refresh(fused[2]), _parameter, _bias):
        copies = make()
        assert copies.hold()
        thaw(fused)
        assert not copies.hold()
    assert freezing.FrozenCopies.of([states[0], rk.fuse(_model())[1]._rk_state], wirings) is None


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
            assert not _is_stale(fused)
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert not failures and not _is_stale(fused)
