"""fuse(freeze=True) on a GPU's backends: what a plan writes in each call is written once, and a thaw has it written anew."""

import copy
import importlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers import frozen, pretend
from helpers.forms import cheaper, forms_of, plan_of, prepared
from helpers.frozen import CHANGES, COPIES, THAWS, X, call, eagers, edit, edited, is_stale, plain_model
from helpers.oracle import skip_unless_runnable
from helpers.stages import CHANNELS_LAST, FP16, Net, basic_blocks, bottlenecks, d2l, preacts, run
from resnet_kernels import models
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.runtime import freezing, state
from resnet_kernels.runtime.gpu import frozen_constants
from resnet_kernels.runtime.gpu.constants import Constants
from resnet_kernels.runtime.parts import ConvPart

CONTIGUOUS = torch.contiguous_format
STAGES = (bottlenecks, preacts, basic_blocks, d2l)
QUICK = (frozen.train, frozen.load, frozen.to, frozen.refresh)


@pytest.fixture(autouse=True)
def _pretended(monkeypatch, device):
    skip_unless_runnable("triton", device, torch.float32)
    if device.type != "cpu":
        pytest.skip("the pretended GPU is the CPU")
    pretend.nvidia(monkeypatch)


@pytest.fixture
def written(monkeypatch):
    """The launches that write constants, and each weight that PyTorch makes one of."""
    from resnet_kernels.kernels import bn_scale_shift, fold_weights

    seen = []

    def noted(owner, name, what):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: seen.append(what) or original(*arguments))

    noted(bn_scale_shift.Layers, "launch", "vectors")
    noted(fold_weights.Table, "launch", "weights")
    noted(importlib.import_module("resnet_kernels.runtime.gpu.constants"), "scaled_weight", "weight")
    noted(frozen_constants, "scaled_weight", "weight")
    return seen


def _frozen():
    """Its weights are contiguous, so that each of them is copied: no edit of any is seen."""
    return rk.fuse(plain_model(), freeze=True)


@pytest.mark.slow(unless=lambda make, what: make is basic_blocks or (make is preacts and what == "folding"))
@pytest.mark.parametrize("what", ("folding", "a pass"))
@pytest.mark.parametrize("make", STAGES, ids=lambda f: f.__name__)
def test_constants_are_written_once(make, what, written, monkeypatch):
    """With the same result, to the bit, as those that are written in each call."""
    stage, x = prepared(make, layout=CONTIGUOUS)
    # These are copied anyway, and frozen ones kept, so folding would cost nothing.
    monkeypatch.setattr("resnet_kernels.runtime.gpu.forms._folding_bytes", lambda *_: 1)
    cheaper(monkeypatch, what)
    live, frozen = rk.fuse(stage), rk.fuse(stage, freeze=True)
    expected = run(live, x)
    written.clear()
    assert torch.equal(run(live, x), expected)
    assert written == ["vectors", "weights"]
    written.clear()
    assert torch.equal(run(frozen, x), expected)
    assert written[0] == "vectors" and "weight" in written and "weights" not in written
    written.clear()
    assert torch.equal(run(frozen, x), expected) and not written


@pytest.mark.parametrize("backend", ("triton", "cudnn"))
def test_on_an_explicit_backend_too(backend, written, monkeypatch):
    if backend == "cudnn":
        from resnet_kernels.ops import backends

        original = backends.why_not
        monkeypatch.setattr(backends, "why_not", lambda name, *rest: None if name == "cudnn" else original(name, *rest))
    stage, x = prepared(basic_blocks)
    expected = run(rk.fuse(stage, backend=backend), x)
    frozen = rk.fuse(stage, backend=backend, freeze=True)
    assert torch.equal(run(frozen, x), expected)
    written.clear()
    assert torch.equal(run(frozen, x), expected) and not written


@pytest.mark.slow(unless=lambda make: make in (preacts, Net))
@pytest.mark.parametrize("make", (*STAGES, Net), ids=lambda f: f.__name__)
def test_every_launch_takes_the_kept_weight(make, hopper):
    """Under autocast all weights are cast: a launch that reads a live one would see zeros."""
    stage, x = (Net(nn.MaxPool2d(3, 2, 1)), torch.randn(1, 3, 18, 20)) if make is Net else make("cpu")
    # In fp16, as a network's stem makes it: d2l's first block promotes its sum with a wider input, and is eager then.
    x = x.to(FP16)
    fused = rk.fuse(randomise_batch_norms_(stage).eval(), backend="triton", freeze=True)
    with torch.autocast("cpu", FP16):
        before = run(fused, x)
        with torch.no_grad():
            for module in fused.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.zero_()
        assert torch.equal(run(fused, x), before)
        assert not torch.equal(run(rk.refresh(fused), x), before)


@pytest.mark.slow(unless=lambda thaw: thaw in QUICK)
@pytest.mark.parametrize("thaw", THAWS, ids=lambda f: f.__name__.strip("_"))
def test_thawed_by(thaw):
    fused = edited(_frozen())
    thaw(fused)
    assert not is_stale(fused)
    assert rk.explain(fused).frozen, "only the constants go, not the promise"
    edit(fused)
    assert is_stale(fused)


@pytest.mark.slow(unless=lambda thaw: thaw is frozen.refresh)
@pytest.mark.parametrize("thaw", THAWS, ids=lambda f: f.__name__.strip("_"))
def test_planted_bug_constants_that_always_hold_are_stale(thaw, monkeypatch):
    monkeypatch.setattr(freezing.FrozenCopies, "hold", lambda self: True)
    monkeypatch.setattr(state.FusedState, "drop_copies", lambda self: None)
    with pytest.raises(AssertionError):
        test_thawed_by(thaw)


def test_a_block_thaws_alone_in_a_plan_of_several():
    fused = edited(_frozen())
    assert len(plan_of(fused)._modules) == 3
    rk.refresh(fused[2])  # the plan is the first block's
    assert is_stale(fused)
    first, second = call(fused[1], Y), call(fused[2], Y)
    assert not torch.allclose(first, eagers(fused[1], Y)) and torch.allclose(second, eagers(fused[2], Y), atol=1e-4)
    rk.refresh(fused[0])
    rk.refresh(fused[1])
    assert not is_stale(fused)


Y = torch.randn(2, 32, 20, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:resnet_kernels. in a")
def test_what_is_looked_at_as_ever(change):
    fused = _frozen()
    before = call(fused)
    change(fused)
    with torch.no_grad():
        y = fused(X)
    torch.testing.assert_close(y, eagers(fused), rtol=1e-4, atol=1e-4)
    assert y.shape != before.shape or not torch.allclose(y, before), "the change must matter"


def test_functional_call_uses_the_given_parameters():
    fused = _frozen()
    before = call(fused)
    given = {name: parameter * 2 for name, parameter in fused.named_parameters()}
    with torch.no_grad():
        y = torch.func.functional_call(fused, given, X)
        expected = torch.func.functional_call(rk.unfuse_(copy.deepcopy(fused)), given, X)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(call(fused), before)


@pytest.mark.slow(unless=lambda copied: copied is copy.deepcopy)
@pytest.mark.parametrize("copied", COPIES, ids=lambda f: f.__name__.strip("_"))
def test_copies_keep_the_promise_and_make_their_own(copied):
    fused = edited(_frozen())
    twin = copied(fused)
    assert rk.explain(twin).frozen and not is_stale(twin) and is_stale(fused)
    edit(twin)
    assert is_stale(twin)


def test_all_sizes_are_of_the_weights_that_were_read_first(written):
    """And share their copies: another size costs no memory."""
    fused, sizes = _frozen(), [torch.randn(1, 3, size, size) for size in (5, 12)]
    plain = rk.unfuse_(copy.deepcopy(fused))
    call(fused)
    edit(fused)
    written.clear()
    for x in sizes:
        torch.testing.assert_close(call(fused, x), call(plain, x), rtol=1e-4, atol=1e-4)
    assert "weight" not in written
    weights = [
        [constants.weight.data_ptr() for constants in plan.constants.read().values()]
        for plan in fused[0]._rk_state.plans.values()
    ]
    assert len(weights) == 3 and weights[0] == weights[1] == weights[2]
    rk.refresh(fused)
    assert not any(is_stale(fused, x) for x in sizes)


def test_each_dtype_has_its_own():
    fused = _frozen()
    before = call(fused)
    live = rk.fuse(rk.unfuse_(copy.deepcopy(fused)))
    with torch.autocast("cpu", FP16):
        half = call(fused)
        assert half.dtype == FP16
        assert torch.equal(half, call(live))
    assert torch.equal(call(fused), before)


@pytest.mark.parametrize("backend", ("triton", "auto"))
def test_a_weight_that_can_be_read_as_it_is_is_not_copied(backend):
    stage, x = prepared(basic_blocks, FP16)  # float16 is never folded
    fused = rk.fuse(stage, backend=backend, freeze=True)
    run(fused, x)
    plan = plan_of(fused)
    own = {part.step.out: part.conv.weight.data_ptr() for part in plan.parts}
    assert {out: constants.weight.data_ptr() for out, constants in plan.constants.read().items()} == own


def test_kept_weights_are_as_a_descriptor_takes_them():
    stage, x = prepared(basic_blocks, FP16, CONTIGUOUS)
    conv = stage[0].conv1
    conv.weight = nn.Parameter(
        torch.empty(conv.weight.numel() + 1, dtype=FP16)[1:].view_as(conv.weight).copy_(conv.weight)
    )
    assert conv.weight.data_ptr() % 16
    fused = rk.fuse(stage, backend="triton", freeze=True)
    run(fused, x)
    for constants in plan_of(fused).constants.read().values():
        assert constants.weight.is_contiguous(memory_format=CHANNELS_LAST) and constants.weight.data_ptr() % 16 == 0


def test_biases_without_a_norm_are_kept_as_a_chain_takes_them(hopper):
    stage, x = prepared(preacts, FP16)
    fused = rk.fuse(stage, backend="triton", freeze=True)
    assert torch.equal(run(fused, x), run(rk.fuse(stage, backend="triton"), x))
    plan = plan_of(fused)
    biases = {part.step.out: part.conv.bias for part in plan.parts if isinstance(part, ConvPart) and part.bn is None}
    kept = {out: plan.constants.read()[out].shift for out in biases}
    assert len(kept) == 4 and all(kept[out].dtype == torch.float32 for out in kept)
    assert all(torch.equal(kept[out], biases[out].float()) for out in kept)


def test_frozen_weights_are_folded_at_any_batch():
    """Folding bytes count once, so a pass over the output never saves any."""
    for batch in (1, 256):
        found = forms_of(models.resnet18, batch, torch.bfloat16, freeze=True)
        assert all(form.folds or form.bare for name, form in found.items() if name != "conv1+bn1+relu")
    small = forms_of(models.resnet18, 1, torch.bfloat16)
    assert not small["layer4.1.conv2+bn2+add+relu"].folds
    assert not any(form.folds for form in forms_of(models.resnet18, 256, FP16, freeze=True).values())


def _tensors(plan):
    return [tensor for constants in plan.constants.read().values() for tensor in constants if tensor is not None]


def test_made_in_inference_mode_they_are_ordinary_tensors():
    fused = _frozen()
    with torch.inference_mode():
        before = fused(X)
    fused.requires_grad_(False)
    assert not any(tensor.is_inference() for tensor in _tensors(plan_of(fused)))
    assert torch.equal(fused(X), before)


def test_a_model_of_inference_tensors():
    with torch.inference_mode():
        fused = _frozen()
        before = fused(X)
    with torch.no_grad():
        assert torch.equal(fused(X), before)


# Captures. What a capture allocates is the graph's.


@pytest.fixture
def capturing(monkeypatch):
    is_on = []
    monkeypatch.setattr(frozen_constants, "_is_capturing", lambda device: bool(is_on))
    return is_on


def test_a_capture_keeps_nothing(capturing, written):
    fused = _frozen()
    call(fused)
    before = call(rk.refresh(fused))
    rk.refresh(fused[2])  # the plan is the first block's, and stays
    plan = plan_of(fused)
    capturing.append(True)
    inside = plan.constants.read()
    assert not {id(t) for t in _tensors(plan)} & {id(t) for c in inside.values() for t in c}
    capturing.clear()
    written.clear()
    assert torch.equal(call(fused), before) and "vectors" in written


def test_a_capture_reads_what_was_made_before_and_keeps_it(capturing, written):
    fused = _frozen()
    before = call(fused)
    constants = {id(t) for t in _tensors(plan_of(fused))}
    capturing.append(True)
    written.clear()
    assert torch.equal(call(fused), before) and not written
    tables = state.tables_of(fused)
    rk.refresh(fused)
    assert not state.tables_of(fused)
    kept = {id(t) for _, made in tables for constants in made.constants.values() for t in constants if t is not None}
    assert constants <= kept


# Threads and streams.


def test_threads_that_come_at_once_make_them_once(written):
    fused = _frozen()
    call(fused)
    plan = plan_of(fused)
    rk.refresh(fused[2])
    start, found = threading.Barrier(4), []
    original = plan.constants._live.vectors
    made = []
    plan.constants._live.vectors = lambda: made.append(True) or original()

    def work():
        start.wait()
        found.append(plan.constants.read())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(made) == 1 and len(found) == 4 and all(each is found[0] for each in found)


def test_a_thaw_while_they_are_made_is_seen():
    """What was made of old weights while new ones are loaded does not hold."""
    fused = _frozen()
    call(fused)
    plan = plan_of(fused)
    rk.refresh(fused[2])
    original = plan.constants._live.vectors

    def vectors():
        found = original()
        edit(fused)
        rk.refresh(fused)
        return found

    plan.constants._live.vectors = vectors
    plan.constants.read()
    assert not plan.constants._made.copies.hold()
    assert not is_stale(fused)


class _Stream(SimpleNamespace):
    def synchronize(self):
        self.waited.append(self.cuda_stream)


def test_streams(monkeypatch):
    """The one that makes them is waited for, once; each other that reads them is told to the allocator, once."""
    waited, recorded = [], []
    streams = [_Stream(cuda_stream=i, waited=waited) for i in range(3)]
    now = [streams[0]]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: now[0].cuda_stream, raising=False)

    def vector(name):
        return SimpleNamespace(record_stream=lambda stream: recorded.append((name, stream.cuda_stream)))

    shared = vector("shared")
    constants = {1: Constants(vector("scale"), shared), 2: Constants(None, shared, vector("weight"))}
    made = frozen_constants._Made(None, constants, torch.device("cuda", 0))
    assert waited == [0]
    for i in (0, 1, 1, 2, 0, 1):
        now[0] = streams[i]
        made.is_read_here()
    assert waited == [0]
    assert recorded == [(name, i) for i in (1, 2) for name in ("scale", "shared", "weight")]
