"""fuse, fuse_, unfuse_, explain: the same model, with everything a user may do to it."""

import copy
import io
import json
import pickle
import threading
from collections import OrderedDict

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from helpers.oracle import assert_within_budget, skip_unless_eager_runs, skip_unless_runnable
from torch import nn

import resnet_kernels as rk
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import backends, onednn
from resnet_kernels.runtime import fused_module, inference
from resnet_kernels.runtime.cpu import packed_conv

IMAGE = (2, 3, 64, 64)


class PlainResidual(nn.Module):
    """A residual block as a notebook has it: module level, so that it pickles."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return F.relu(y)


def small_resnet(block=rk.models.resnet_v1.Bottleneck, layers=(2, 1, 1, 1), **options):
    return randomise_batch_norms_(rk.models.ResNet(block, layers, num_classes=10, **options)).eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small_resnet()


@pytest.fixture
def x():
    return torch.randn(IMAGE)


def fused_names(model):
    return [row.path for row in rk.explain(model).fused]


def ran_fused(module, x):
    """How many recipes this call runs fused."""
    seen = []
    original = inference.run_recipe

    def spy(recipe, *rest):
        seen.append(str(recipe))
        return original(recipe, *rest)

    inference.run_recipe = spy
    try:
        with torch.no_grad():
            module(x)
    finally:
        inference.run_recipe = original
    return len(seen)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_fuse_copies_and_fuse_in_place_does_not(model, x):
    mine = copy.deepcopy(model)
    before = {name: id(p) for name, p in mine.named_parameters()}
    modules = {name: id(m) for name, m in mine.named_modules()}
    fused = rk.fuse(mine)
    assert fused is not mine and not any(fused_module.is_fused(m) for m in mine.modules())
    report = rk.fuse_(mine)
    assert len(report.fused) == 6 and not report.skipped
    assert {name: id(p) for name, p in mine.named_parameters()} == before
    assert {name: id(m) for name, m in mine.named_modules()} == modules
    assert all(isinstance(m, rk.models.resnet_v1.Bottleneck) for m in mine.layer1)
    assert repr(mine) == repr(model)
    assert ran_fused(mine, x) == 6
    with torch.no_grad():
        close(mine(x), model(x))


def test_unfuse_is_exact(model):
    mine = copy.deepcopy(model)
    before = [(name, type(m), sorted(m.__dict__)) for name, m in mine.named_modules()]
    keys = list(mine.state_dict())
    rk.fuse_(mine)
    assert list(mine.state_dict()) == keys
    assert rk.unfuse_(mine) is mine
    assert [(name, type(m), sorted(m.__dict__)) for name, m in mine.named_modules()] == before


def test_fuse_is_idempotent(model, x):
    mine = copy.deepcopy(model)
    first, second = rk.fuse_(mine), rk.fuse_(mine)
    assert first == second == rk.explain(mine)
    rk.unfuse_(rk.unfuse_(mine))
    assert type(mine) is rk.models.ResNet and ran_fused(mine, x) == 0


def test_report(model):
    report = rk.explain(model)
    assert not any(fused_module.is_fused(m) for m in model.modules())
    text = str(report)
    assert "layer1.0" in text and "conv3+bn3+add+relu" in text and "6 fused, 0 skipped" in text
    rows = json.loads(report.to_json())["rows"]
    assert [row["path"] for row in rows] == ["", "layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]
    assert all(row["fused"] for row in rows)
    nothing = rk.explain(nn.Sequential(nn.Linear(2, 2)))
    assert len(nothing) == 0 and "nothing to fuse" in str(nothing)


def test_explain_on_a_fused_model_says_what_runs_eager_now(model, x):
    fused = rk.fuse(model)
    fused.layer1[0].conv2.register_forward_hook(lambda *_: None)
    fused.layer2[0].bn1.train()
    fused.layer3[0] = copy.deepcopy(model.layer3[0])
    rows = {row.path: row for row in rk.explain(fused)}
    assert "hook on conv2" in rows["layer1.0"].reason and "bn1 is in train() mode" in rows["layer2.0"].reason
    assert not rows["layer3.0"].fused and "call fuse_ again" in rows["layer3.0"].reason
    assert "runs eager now" in str(rk.explain(fused))


@pytest.mark.parametrize("argument", [None, "resnet50", torch.ones(1), nn.ReLU], ids=str)
def test_no_module_is_a_type_error(argument):
    for function in (rk.fuse, rk.fuse_, rk.unfuse_, rk.explain, rk.refresh):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got"):
            function(argument)


def test_unknown_backend_leaves_the_model_alone(model):
    mine = copy.deepcopy(model)
    with pytest.raises(ValueError, match="backend must be one of"):
        rk.fuse_(mine, backend="cuda")
    assert not any(fused_module.is_fused(m) for m in mine.modules())


def test_nothing_is_left_half_fused_when_swapping_fails(model, monkeypatch):
    mine = copy.deepcopy(model)
    original, calls = fused_module.swap, []

    def fails_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(fused_module, "swap", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        rk.fuse_(mine)
    assert [type(m) for m in mine.modules()] == [type(m) for m in model.modules()]
    assert not any("_rk_state" in m.__dict__ for m in mine.modules())


@pytest.mark.parametrize("add_before", (True, False))
def test_hooks_fire_whether_added_before_or_after(model, x, add_before):
    mine, seen = copy.deepcopy(model), []

    def add():
        for path in ("layer1.0", "layer1.0.conv2", "layer1.1.bn3", "layer2.0.downsample", "bn1", "layer1"):
            mine.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: seen.append((path, o.clone())))

    if add_before:
        add()
    rk.fuse_(mine)
    if not add_before:
        add()
    assert not seen, "reading a model must not fire its hooks"
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="a hook on"):
        y = mine(x)
        fired = list(seen)
        seen.clear()
        close(y, rk.unfuse_(mine)(x))
    assert [path for path, _ in fired] == [path for path, _ in seen] and len(fired) == 6
    for (_, a), (_, b) in zip(fired, seen):
        close(a, b)


def test_hooks_registered_after_the_dict_of_hooks_was_replaced_fire(model, x):
    """`module._forward_hooks = OrderedDict()` is a common way of removing hooks."""
    fused, seen = rk.fuse(model), []
    with torch.no_grad():
        fused(x), fused(x)
        for path in ("layer1.0", "layer1.0.conv2", "layer1", "bn1"):
            module = fused.get_submodule(path)
            module._forward_hooks = OrderedDict()
            module.register_forward_hook(lambda m, i, o, path=path: seen.append(path))
        with pytest.warns(RuntimeWarning, match="a hook on"):
            fused(x)
    assert seen == ["bn1", "layer1.0.conv2", "layer1.0", "layer1"]


def test_a_forward_set_on_a_fused_block_runs(model):
    """Regression: a block that was verified once ran its recipe past a forward set on the instance later."""
    fused, x = rk.fuse(nn.Sequential(model.layer1, model.layer2)), torch.randn(1, 64, 8, 8)
    with torch.no_grad():
        for _ in range(3):
            fused(x)
        fused[0][1].forward = torch.zeros_like
        close(fused(x), model.layer2(torch.zeros(1, 256, 8, 8)))


class Broadcasts(nn.Module):
    """Adds a (N, C, 1, 1) value to a map: once as a convolution's residual, once the other way round, once alone."""

    def __init__(self, form):
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.form = nn.Conv2d(8, 8, 1), form

    def forward(self, x):
        if self.form == "small residual":
            return F.relu(self.bn(self.conv(x)) + self.pool(x))
        if self.form == "large residual":
            return F.relu(x + self.bn(self.conv(self.pool(x))))
        if self.form == "small convolution as residual":
            return F.relu(self.bn(self.conv(self.conv(x))) + self.squeeze(self.pool(x)))
        return self.conv(F.relu(x + self.pool(x)))


@pytest.mark.parametrize("backend", ("cpu", "triton"))
@pytest.mark.parametrize(
    "form", ("small residual", "large residual", "small convolution as residual", "no convolution before the add")
)
def test_an_add_that_broadcasts(form, backend, device):
    """Regression: the Triton kernel read beyond a residual that was smaller than its output."""
    skip_unless_runnable(backend, device, torch.float32)
    plain = randomise_batch_norms_(nn.Sequential(Broadcasts(form), Broadcasts(form))).eval().to(device)
    fused, x = rk.fuse(plain, backend=backend), torch.randn(2, 8, 6, 6, device=device)
    assert len(rk.explain(fused).fused) == 2
    with torch.no_grad():
        for _ in range(3):
            close(fused(x), plain(x))


def test_a_hook_on_a_block_may_keep_its_output(model, x):
    """Regression guard: the next block writes its residual add over its input only when nobody else holds it."""
    mine = rk.fuse(model)
    kept = []
    mine.layer1[0].register_forward_hook(lambda m, i, o: kept.append(o))
    with torch.no_grad():
        mine(x)
        copies = [k.clone() for k in kept]
        mine.layer1[1](kept[0])
        assert torch.equal(kept[0], copies[0])
        close(kept[0], model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x))))) * 0 + copies[0])


def test_stage_never_writes_over_its_callers_input(model):
    fused = rk.fuse(model)
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    identity = rk.fuse(nn.Sequential(*(small_resnet(rk.models.resnet_v1.BasicBlock).layer1[:2])))
    with torch.no_grad():
        identity(x), fused.layer1(x)
    assert torch.equal(x, before)


def test_global_hooks_fire(model, x):
    fused, seen = rk.fuse(model), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        with torch.no_grad(), pytest.warns(RuntimeWarning, match="global module hook"):
            fused(x)
    finally:
        handle.remove()
    assert seen.count("Conv2d") == sum(isinstance(m, nn.Conv2d) for m in model.modules())


def test_symbolic_trace_and_feature_extraction(model, x):
    fused = rk.fuse(model)
    traced, plain = torch.fx.symbolic_trace(fused), torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes] == [n.target for n in plain.graph.nodes]
    with torch.no_grad():
        close(traced(x), model(x))


def test_torch_jit_trace(model, x):
    fused = rk.fuse(model)
    with torch.no_grad():
        close(torch.jit.trace(fused, x, check_trace=False)(x), model(x))


def test_torch_compile(model, x):
    """On the CPU the compiler gets the model's own graph, whole."""
    compiled = torch.compile(rk.fuse(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(x), model(x))


def test_torch_compile_sees_the_fused_ops(model, device):
    skip_unless_runnable("triton", device, torch.float32)
    stage = copy.deepcopy(model.layer1).to(device)
    fused = rk.fuse(stage, backend="triton")
    graphs = []

    def record(graph, example_inputs):
        graphs.append(graph)
        return graph

    x = torch.randn(1, 64, 6, 6, device=device)
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend=record)
        close(compiled(x), stage(x))
    calls = [node for node in graphs[0].graph.nodes if "conv_bias_act" in str(node.target)]
    assert len(calls) == 7  # three and three convolutions, and a shortcut


@pytest.mark.parametrize("copy_of", [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: copy.copy(m)
], ids=("deepcopy", "pickle", "copy"))  # fmt: skip
def test_copies(model, x, copy_of):
    fused = rk.fuse(model)
    with torch.no_grad():
        expected = fused(x)
        twin = copy_of(fused)
        assert type(twin) is type(fused) and isinstance(twin.layer1[0], rk.models.resnet_v1.Bottleneck)
        assert ran_fused(twin, x) == 6 and torch.equal(twin(x), expected)
        if copy_of is copy.deepcopy:
            twin.layer1[0].conv1.weight.zero_()
            assert torch.equal(fused(x), expected) and not torch.equal(twin(x), expected)
        assert len(rk.explain(rk.unfuse_(twin)).fused) == 6


def test_torch_save_of_the_whole_model(model, x):
    buffer = io.BytesIO()
    fused = rk.fuse(model)
    with torch.no_grad():
        expected = fused(x)
        torch.save(fused, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(x), expected) and ran_fused(loaded, x) == 6


def test_state_dict_round_trips(model, x):
    fused, other = rk.fuse(model), small_resnet()
    with torch.no_grad():
        for p in fused.parameters():
            p.mul_(1.1)
        other.load_state_dict(fused.state_dict())
        close(fused(x), other(x))
        fresh = rk.fuse(small_resnet())
        fresh(x)
        fresh.load_state_dict(model.state_dict())
        close(fresh(x), model(x))


def test_double_and_back(model, x):
    fused = rk.fuse(model)
    with torch.no_grad():
        fused(x)
        wide = fused.double()
        with pytest.warns(RuntimeWarning, match='"cpu" backend runs float32 and bfloat16, got torch.float64'):
            wide(x.double())
        torch.testing.assert_close(wide(x.double()), copy.deepcopy(model).double()(x.double()), rtol=0, atol=0)
        fused.float()
        assert ran_fused(fused, x) == 6


def test_to_bfloat16(model, x):
    skip_unless_runnable("cpu", torch.device("cpu"), torch.bfloat16)
    fused = rk.fuse(model)
    with torch.no_grad():
        fused(x)
        fused.to(torch.bfloat16)
        assert fused(x.bfloat16()).dtype == torch.bfloat16 and ran_fused(fused, x.bfloat16()) == 6
        fused.float()
        assert ran_fused(fused, x) == 6


@pytest.fixture
def cpu_without_bfloat16(monkeypatch):
    """oneDNN refuses to run bfloat16, as it does below AVX-512, whatever this CPU is."""
    original = onednn.pack_weight

    def refuse(weight, *rest):
        if weight.dtype == torch.bfloat16:
            raise RuntimeError("bf16 path needs the cpu support")
        return original(weight, *rest)

    monkeypatch.setattr(onednn, "pack_weight", refuse)
    # Any answer from before is of this CPU as it is.
    caches = backends.why_not, onednn.why_not
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_auto_falls_back_and_says_so_on_a_cpu_without_bfloat16(model, x, cpu_without_bfloat16):
    skip_unless_eager_runs(torch.device("cpu"), torch.bfloat16)
    wide = copy.deepcopy(model).bfloat16()
    fused, x = rk.fuse(wide), x.bfloat16()
    with (
        torch.no_grad(),
        pytest.warns(RuntimeWarning, match='"cpu" backend needs a CPU with bfloat16 support in oneDNN'),
    ):
        assert torch.equal(fused(x), wide(x))
    assert all("needs a CPU with bfloat16 support" in row.reason for row in rk.explain(fused))
    assert not any(row.reason for row in rk.explain(fused.float()))


def test_an_explicit_cpu_backend_raises_on_a_cpu_without_bfloat16(model, x, cpu_without_bfloat16):
    fused = rk.fuse(copy.deepcopy(model).bfloat16(), backend="cpu")
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r'backend="cpu" needs a CPU with bfloat16 .* ONEDNN_MAX_CPU'),
    ):
        fused(x.bfloat16())


def test_meta_and_moved_models_give_eagers_own_error(model, x):
    fused = rk.fuse(model)
    for bad in (x[0, 0], x[:, :2], x.double(), x.to("meta")):
        with torch.no_grad():
            with pytest.raises(RuntimeError) as theirs:
                model(bad)
            with pytest.raises(RuntimeError) as ours:
                fused(bad)
        assert str(ours.value) == str(theirs.value)


def test_training_is_eagers(x):
    torch.manual_seed(3)
    plain = small_resnet(rk.models.resnet_v1.BasicBlock).train()
    fused = rk.fuse(plain)
    for _ in range(2):
        losses = [F.cross_entropy(m(x), torch.tensor([1, 2])) for m in (plain, fused)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        for m in (plain, fused):
            with torch.no_grad():
                for p in m.parameters():
                    p -= 0.01 * p.grad
                    p.grad = None
    for (name, a), (_, b) in zip(plain.state_dict().items(), fused.state_dict().items()):
        assert torch.equal(a, b), name
    assert fused.bn1.num_batches_tracked == 2


@pytest.mark.filterwarnings("ignore:resnet_kernels. gradients are on")
def test_eval_with_gradients_on_is_frozen_bn(model, x):
    fused = rk.fuse(model)
    grads = []
    for m in (copy.deepcopy(model), fused, copy.deepcopy(model).double()):
        inputs = x.to(next(m.parameters()).dtype).requires_grad_()
        y = m(inputs)
        grads.append(
            torch.autograd.grad(y, [inputs, *m.parameters()], torch.linspace(-1, 1, 20).view(2, 10).to(y.dtype))
        )
    for eager, ours, oracle in zip(*grads):
        assert_within_budget(ours, eager, oracle)


def test_gradients_in_eval_mode_are_said_once(model, x):
    fused = rk.fuse(model)
    with pytest.warns(RuntimeWarning, match="gradients are on in eval mode") as said:
        fused(x)
        fused(x)
    assert len(said) == 1


def test_one_bn_in_train_inside_an_eval_model(model, x):
    pair = [copy.deepcopy(model), rk.fuse(model)]
    for m in pair:
        m.layer2[0].bn2.train()
    with torch.no_grad():
        close(pair[1](x), pair[0](x))
    a, b = (m.layer2[0].bn2 for m in pair)
    close(a.running_mean, b.running_mean)
    assert a.num_batches_tracked == b.num_batches_tracked == 1


def test_one_stem_bn_in_train(model, x):
    pair = [copy.deepcopy(model), rk.fuse(model)]
    for m in pair:
        m.bn1.train()
    with torch.no_grad():
        close(pair[1](x), pair[0](x))
    close(pair[0].bn1.running_var, pair[1].bn1.running_var)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("weights", (torch.contiguous_format, torch.channels_last), ids=str)
def test_output_layout_is_eagers(model, layout, weights):
    features = nn.Sequential(copy.deepcopy(model.layer1), copy.deepcopy(model.layer2)).to(memory_format=weights)
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=layout)
    fused = rk.fuse(features)
    with torch.no_grad():
        for module in (lambda m: m, lambda m: m[0], lambda m: m[0][0]):
            assert module(fused)(x).stride() == module(features)(x).stride()


def test_structure_changed_after_fusing(model, x):
    fused, plain = rk.fuse(model), copy.deepcopy(model)
    torch.manual_seed(5)
    norm = nn.GroupNorm(4, 64)
    for m in (fused, plain):
        m.layer1[0].bn1 = norm
        m.layer1[1].relu = nn.Hardswish()
        m.fc = nn.Identity()
        m.layer2[0].downsample = nn.Sequential(m.layer2[0].downsample, nn.Tanh())
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="changed after it was fused"):
        close(fused(x), plain(x))
    rows = {row.path: row for row in rk.fuse_(fused)}
    assert "bn1 is a GroupNorm" in rows["layer1.0"].reason and "relu is a Hardswish" in rows["layer1.1"].reason
    with torch.no_grad():
        close(fused(x), plain(x))


def test_sequential_changed_after_fusing():
    plain = randomise_batch_norms_(nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))).eval()  # fmt: skip
    fused, x = rk.fuse(plain), torch.randn(2, 3, 8, 8)
    assert [row.steps for row in rk.explain(fused)] == ["0+1+relu"] or fused_names(fused) == [""]
    for m in (plain, fused):
        m.insert(1, nn.Tanh())
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="call fuse_ again"):
        close(fused(x), plain(x))


def test_a_block_used_twice_and_shared_convolutions():
    torch.manual_seed(1)
    block, other = PlainResidual(8), PlainResidual(8)
    other.conv1, other.bn2 = block.conv1, block.bn2
    plain = randomise_batch_norms_(nn.Sequential(block, other, block)).eval()
    fused, x = rk.fuse(plain), torch.randn(2, 8, 8, 8)
    assert fused[0] is fused[2] and fused[0].conv1 is fused[1].conv1
    with torch.no_grad():
        close(fused(x), plain(x))
        fused[0].conv1.weight.mul_(2)
        plain[0].conv1.weight.mul_(2)
        close(fused(x), plain(x))


def test_a_stem_module_used_twice_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
            self.block = PlainResidual(3)

        def forward(self, x):
            return self.bn(self.block(self.relu(self.bn(self.conv(x)))))

    plain = randomise_batch_norms_(Net()).eval()
    fused, x = rk.fuse(plain), torch.randn(1, 3, 8, 8)
    assert [row.steps for row in rk.explain(fused)] == ["conv1+bn1+relu -> conv2+bn2+add+relu"]
    with torch.no_grad():
        close(fused(x), plain(x))


def test_lazy_modules_are_skipped_until_materialised():
    net = nn.Sequential(PlainResidual(8))
    net[0].conv1 = nn.LazyConv2d(8, 3, padding=1)
    (row,) = rk.fuse_(net)
    assert not row.fused and "lazy and not materialised" in row.reason
    net.eval()(torch.randn(1, 8, 4, 4))
    assert rk.fuse_(net).fused


def test_notebook_block_pickles_and_keeps_its_class():
    fused = rk.fuse(nn.Sequential(PlainResidual(8)).eval())
    assert isinstance(fused[0], PlainResidual) and type(fused[0]).__name__ == "PlainResidual"
    assert isinstance(pickle.loads(pickle.dumps(fused))[0], PlainResidual)


def test_quiet_modules_count_in_train_only():
    torch.manual_seed(0)
    plain = randomise_batch_norms_(nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.9), nn.ReLU())).eval()  # fmt: skip
    fused, x = rk.fuse(plain), torch.randn(2, 3, 8, 8)
    assert ran_fused(fused, x) == 1
    with torch.no_grad():
        close(fused(x), plain(x))
    fused[2].train()
    assert ran_fused(fused, x) == 0


def test_threads_share_one_fused_model(model):
    fused = rk.fuse(model)
    inputs = [torch.randn(1 + i % 3, 3, 64, 64) for i in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    results, errors = [None] * len(inputs), []

    def work(i):
        try:
            with torch.no_grad():
                for _ in range(3):
                    results[i] = fused(inputs[i])
                    fused.layer1[0].train(False)
                    if i == 0:
                        rk.refresh(fused)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for got, right in zip(results, expected):
        close(got, right)


def test_replicas_of_data_parallel_run_on_their_own_parameters(model, x):
    """nn.DataParallel's replicas share __dict__ entries, the fused state among them, and run in threads."""
    fused = rk.fuse(model)
    with torch.no_grad():
        fused(x)
        blocks_ = fused.layer1[0], fused.layer1[0]._replicate_for_data_parallel()
        block, replica = blocks_
        for name in list(replica._modules):
            replica._modules[name] = copy.deepcopy(block._modules[name])
        for p in replica.modules():
            for tensor in p._parameters.values():
                if tensor is not None:
                    tensor.mul_(1.5)
        inputs = torch.randn(1, 64, 8, 8)
        for _ in range(2):
            for b in blocks_:
                close(b(inputs), type(b)._rk_original_class.forward(b, inputs))


def test_functorch_forward_ad_and_vmap(model, x):
    fused, stage = rk.fuse(model), model.layer1
    batch = torch.randn(3, 2, 64, 8, 8)
    with torch.no_grad():
        close(torch.vmap(fused.layer1)(batch), torch.vmap(stage)(batch))
        _, ours = torch.func.jvp(fused.layer1, (batch[0],), (batch[1],))
        _, theirs = torch.func.jvp(stage, (batch[0],), (batch[1],))
    close(ours, theirs)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(batch[0], batch[1])
        tangents = [torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (fused.layer1, stage)]
    close(*tangents)


def test_functional_call_uses_the_given_parameters(model, x):
    fused = rk.fuse(model)
    given = {name: p * 1.2 for name, p in model.named_parameters()}
    with torch.no_grad():
        fused(x)
        close(torch.func.functional_call(fused, given, (x,)), torch.func.functional_call(model, given, (x,)))
        close(fused(x), model(x))


@pytest.mark.parametrize("dtype", (torch.bfloat16,), ids=str)
def test_autocast(model, x, dtype):
    skip_unless_runnable("cpu", torch.device("cpu"), dtype)
    fused = rk.fuse(model)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        y, eager = fused(x), model(x)
        assert ran_fused(fused, x) == 6
    assert y.dtype == eager.dtype
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(x.double())
    assert_within_budget(y, eager, oracle)


@pytest.mark.parametrize("batch", (0, 1))
def test_small_batches(model, batch):
    fused, x = rk.fuse(model), torch.randn(batch, 3, 64, 64)
    with torch.no_grad():
        close(fused(x), model(x))


def test_environment_variable_turns_fusion_off(model, x, monkeypatch):
    fused = rk.fuse(model)
    assert ran_fused(fused, x) == 6
    monkeypatch.setenv("RESNET_KERNELS_BACKEND", "eager")
    assert ran_fused(fused, x) == 0
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))


def test_explicit_backend_that_cannot_run_raises(model, x):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: cudnn can run")
    fused = rk.fuse(model, backend="cudnn")
    with torch.no_grad(), pytest.raises(RuntimeError, match='backend="cudnn" needs an NVIDIA GPU'):
        fused(x)


def test_peak_memory_values_die_after_their_last_use(model):
    """A fused Bottleneck holds no intermediate longer than needed: at its last step only that step's operands live."""
    import gc
    import weakref

    fused = rk.fuse(model.layer1[1])
    alive, refs = [], []
    original = packed_conv.PackedConv.__call__

    def spy(self, *arguments):
        alive.append(sum(ref() is not None for ref in refs))
        y = original(self, *arguments)
        refs.append(weakref.ref(y))
        return y

    packed_conv.PackedConv.__call__ = spy
    try:
        with torch.no_grad():
            fused(torch.randn(1, 256, 4, 4))
    finally:
        packed_conv.PackedConv.__call__ = original
    gc.collect()
    assert alive == [0, 1, 1]
