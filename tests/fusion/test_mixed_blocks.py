"""Blocks with other operations in them: what can be fused is, and the rest runs as in eager."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import resnet_kernels as rk
from helpers.mixed_blocks import (
    BLOCKS,
    Conv2d,
    LinearExcitation,
    LinearSEBlock,
    QuietConv2d,
    SqueezeExcitation,
)  # fmt: skip
from helpers.oracle import assert_within_budget, error, skip_unless_runnable
from helpers.own_kernels import onednn_alone  # noqa: F401  # a fixture
from helpers.small_resnet import PlainResidual, close, convolutions_that_ran
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.runtime import checked_calls, fused_module, mixed_forward, training

CASES = list(BLOCKS)


def built(name, seed=0):
    torch.manual_seed(seed)
    block, channels, count = BLOCKS[name]
    return randomise_batch_norms_(block()).eval(), channels, count


def check(plain, fused, x):
    """The fused module's output, within the budget against fp64, in eager's layout."""
    with torch.no_grad():
        y, eager, oracle = fused(x.clone()), plain(x.clone()), copy.deepcopy(plain).double()(x.double())
    assert_within_budget(y, eager, oracle)
    assert y.stride() == eager.stride()
    return y


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch, layout", [(1, "contiguous"), (3, "contiguous"), (2, "channels_last")])
def test_parity(name, batch, layout):
    plain, channels, count = built(name)
    fused = rk.fuse(plain)
    x = torch.randn(batch, channels, 14, 10)
    if layout == "channels_last":
        x, plain = x.contiguous(memory_format=torch.channels_last), plain.to(memory_format=torch.channels_last)
        fused.to(memory_format=torch.channels_last)
    for _ in range(2):
        check(plain, fused, x)
    assert len(convolutions_that_ran(fused, x)) == count
    assert rk.verify(plain, fused, x)


@pytest.mark.parametrize("name", CASES)
def test_inside_a_network(name):
    """A container around it keeps values channels_last."""
    block, channels, count = built(name)
    plain = randomise_batch_norms_(nn.Sequential(
        nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU(), block, nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )).eval()  # fmt: skip
    fused, x = rk.fuse(plain), torch.randn(2, 3, 20, 16)
    for _ in range(2):
        check(plain, fused, x)
    assert len(convolutions_that_ran(fused, x)) == count + 1


@pytest.mark.parametrize("name", CASES)
def test_the_report_counts_what_runs(name):
    plain, _, count = built(name)
    report = rk.explain(plain)
    left = sum(row.convolutions for row in report.unfused)
    assert (report.convolutions - left, left) == (count, report.convolutions - count)
    assert sum(isinstance(m, nn.Conv2d) for m in plain.modules()) == report.convolutions
    assert ("The others:" in str(report)) == (left > 0)


@pytest.mark.parametrize("name", CASES)
def test_copies_and_unfusing(name):
    plain, channels, count = built(name)
    fused, x = rk.fuse(plain), torch.randn(1, channels, 12, 12)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        check(plain, other, x)
        assert len(convolutions_that_ran(other, x)) == count
    before = [(path, type(m), sorted(m.__dict__)) for path, m in plain.named_modules()]
    rk.unfuse_(fused)
    assert [(path, type(m), sorted(m.__dict__)) for path, m in fused.named_modules()] == before


@pytest.mark.parametrize("name", CASES)
def test_training_is_eager(name):
    plain, channels, _ = built(name)
    x = torch.randn(2, channels, 12, 12)
    upstream = torch.randn_like(plain(x))
    plain.train()
    fused = rk.fuse(plain)
    for module in (plain, fused):
        torch.manual_seed(1)  # dropout
        module(x).backward(upstream)
    for (path, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=path)
    for a, b in zip(plain.buffers(), fused.buffers()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:resnet_kernels")
def test_gradients_in_eval_mode(name):
    plain, channels, _ = built(name)
    fused, x = rk.fuse(plain), torch.randn(2, channels, 12, 12)
    upstream = torch.randn_like(plain(x))
    grads = []
    for module in (plain, fused):
        given = x.clone().requires_grad_()
        module(given).backward(upstream)
        grads.append([given.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:resnet_kernels")
def test_a_hook_fires_on_each_module(name):
    """On modules in runs, on those between them, and on those around them."""
    plain, channels, _ = built(name)
    fused, x = rk.fuse(plain), torch.randn(1, channels, 12, 12)
    check(plain, fused, x)
    for path, module in fused.named_modules():
        seen = {}
        twin = plain.get_submodule(path)
        handles = [
            m.register_forward_hook(lambda m, args, y, key=key, seen=seen: seen.setdefault(key, []).append(y))
            for key, m in (("fused", module), ("plain", twin))
        ]
        check(plain, fused, x)
        for handle in handles:
            handle.remove()
        # `check` makes a copy of plain with the hook on it: its outputs are in fp64.
        ours, theirs = (
            [y.clone() for y in seen.get(key, []) if y.dtype == torch.float32] for key in ("fused", "plain")
        )
        assert len(ours) == len(theirs), path
        for a, b in zip(ours, theirs):
            close(a, b)
            assert a.stride() == b.stride(), path
    assert convolutions_that_ran(fused, x)


@pytest.mark.slow(unless=lambda name: name in [*CASES][::3])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:resnet_kernels")
def test_one_module_in_train_mode(name):
    plain, channels, _ = built(name)
    for path in [path for path, _ in plain.named_modules() if path]:
        ours, theirs = rk.fuse(plain), copy.deepcopy(plain)
        x = torch.randn(2, channels, 12, 12)
        for m in (ours, theirs):
            m.get_submodule(path).train()
        for seed in range(2):
            torch.manual_seed(seed)
            with torch.no_grad():
                y = ours(x)
            torch.manual_seed(seed)
            with torch.no_grad():
                close(y, theirs(x))
        for a, b in zip(ours.buffers(), theirs.buffers()):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:resnet_kernels")
def test_edited_weights_and_replaced_modules(name):
    plain, channels, _ = built(name)
    fused, x = rk.fuse(plain), torch.randn(1, channels, 12, 12)
    check(plain, fused, x)
    for p, q in zip(plain.parameters(), fused.parameters()):
        with torch.no_grad():
            p.mul_(1.25)
            q.mul_(1.25)
    check(plain, fused, x)
    for path, module in [*plain.named_modules()]:
        if isinstance(module, nn.BatchNorm2d):
            owner, _, child = path.rpartition(".")
            for m in (plain, fused):
                setattr(m.get_submodule(owner), child, nn.InstanceNorm2d(module.num_features))
            with torch.no_grad():
                close(fused(x), plain(x))


def test_an_opaque_module_that_becomes_one_that_sees_layouts():
    plain, *_ = built("linear squeeze-and-excitation")
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), plain).eval()
    fused, x = rk.fuse(block), torch.randn(2, 3, 12, 12)
    check(block, fused, x)

    class Viewing(nn.Module):
        def forward(self, x):
            return x.view(x.shape[0], -1).cumsum(1).view(x.shape) / 100

    for m in (block, fused):
        m[3].se.fc2 = nn.Sequential(m[3].se.fc2, nn.Identity())
    with pytest.warns(RuntimeWarning, match="se is another module now: call fuse_ again"):
        check(block, fused, x)
    for m in (block, fused):
        m[3].se = Viewing().eval()
    check(block, fused, x)
    check(block, rk.fuse(block), x)


def test_a_flag_of_an_opaque_module():
    """Its forward is read, so what it depends on is watched."""

    class Switched(SqueezeExcitation):
        flat = False

        def forward(self, x):
            if self.flat:
                return x.view(x.shape[0], -1).flip(1).view(x.shape)
            return super().forward(x)

    plain, *_ = built("squeeze-and-excitation")
    plain.se = Switched(16)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), plain).eval()
    fused, x = rk.fuse(net), torch.randn(2, 3, 12, 12)
    check(net, fused, x)
    for m in (net, fused):
        m[3].se.flat = True
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="se.flat"):
        fused(x)
    check(net, fused, x)


class _Variant(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.narrow = nn.Conv2d(4, 8, 1)
        self.relu = nn.ReLU(inplace=True)
        self.gate = LinearExcitation(8)
        self.own = Conv2d(8, 8, 3, padding=1)
        self.kept = nn.Parameter(torch.ones(8, 1, 1))


def _writes_over_a_view(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    a, _ = y.chunk(2, 1)
    a += 1
    return F.relu(self.bn2(self.conv2(y))) + x


def _relu_on_a_view(self, x):
    y = self.bn1(self.conv1(x))
    a = self.relu(y[:, :4])
    return F.relu(self.bn2(self.conv2(y))) + self.narrow(a) + x


class _WritesOverItsInput(nn.Module):
    def forward(self, x):
        return x.mul_(0.5)


def _module_that_writes(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    z = self.writer(y)
    return F.relu(self.bn2(self.conv2(y))) + z + x


def _writes_over_its_input(self, x):
    y = F.relu(self.bn1(self.conv1(x * 1)))
    x += y
    return F.relu(self.bn2(self.conv2(x)))


def _uses_a_view_of_its_input(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    return self.narrow(y[:, ::2]) + F.relu(self.bn2(self.conv2(y.transpose(2, 3)))).transpose(2, 3) + x


def _sees_strides(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    return F.relu(self.bn2(self.conv2(y))) + x + y.view(-1).cumsum(0).view(y.shape) / 100


def _adds_twice(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    return F.relu(self.bn2(self.conv2(y)) + y + x) + self.gate(y)


def _parameter(self, x):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) * self.kept + x)


def _returns_several(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    return {"a": y, "b": [F.relu(self.bn2(self.conv2(y)) + x), y.shape[2]]}


def _value_read_twice(self, x):
    y = self.conv1(x)
    return F.relu(self.bn1(y)) + F.relu(self.bn2(y)) + self.gate(x)


def _called_twice(self, x):
    y = F.relu(self.bn1(self.own(x)))
    return self.gate(y) + self.bn2(self.own(F.relu(self.bn2(self.conv2(y))))) + x


def _returns_a_constant(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    return [y, 3, F.relu(self.bn2(self.conv2(y)) + self.gate(x))]


def _unused(self, x):
    self.gate(x)
    return F.relu(self.bn1(self.conv1(x)) + x).sum((2, 3))


VARIANTS = [
    _writes_over_a_view, _relu_on_a_view, _module_that_writes, _writes_over_its_input, _uses_a_view_of_its_input,
    _sees_strides, _adds_twice, _parameter, _returns_several, _value_read_twice, _unused,
]  # fmt: skip


@pytest.mark.parametrize("forward", VARIANTS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("around", [False, True])
def test_aliases_and_odd_forwards(forward, around):
    torch.manual_seed(0)
    plain = randomise_batch_norms_(type("Block", (_Variant,), {"forward": forward})())
    plain.writer = _WritesOverItsInput()
    if around:
        plain = nn.Sequential(PlainResidual(8), plain)
    plain.eval()
    fused, x = rk.fuse(plain), torch.randn(2, 8, 9, 9)
    for _ in range(2):
        ours, theirs = x.clone(), x.clone()
        with torch.no_grad():
            y, eager = fused(ours), plain(theirs)
        torch.testing.assert_close(y, eager, rtol=1e-4, atol=1e-4)
        for a, b in zip(pytree.tree_leaves(y), pytree.tree_leaves(eager)):
            assert not isinstance(a, Tensor) or a.stride() == b.stride()
        close(ours, theirs)  # neither has written over its input, or both have
    assert forward in (_writes_over_its_input, _module_that_writes) or convolutions_that_ran(fused, x)


def test_values_are_freed_as_soon_as_eager_frees_them():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(4))
            self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))

        def forward(self, x):
            for conv, bn in zip(self.convs, self.bns):
                x = F.relu(bn(conv(x))) * 2
            return x + 1

    fused = rk.fuse(Deep().eval())
    assert len(fused._rk_state.plan.runs) == 4
    for instruction in fused._rk_state.plan.instructions:
        assert len(instruction.frees) <= 1
    freed = [value for i in fused._rk_state.plan.instructions for value in i.frees]
    made = {i.out for i in fused._rk_state.plan.instructions}
    assert sorted(freed) == sorted(made - {fused._rk_state.plan.result.value})


def test_detectron2_in_training_and_on_empty_batches():
    plain, channels, _ = built("detectron2")
    fused = rk.fuse(plain)
    with torch.no_grad():
        assert fused(torch.randn(0, channels, 8, 8)).shape == plain(torch.randn(0, channels, 8, 8)).shape
    plain.conv1.norm = fused.conv1.norm = nn.SyncBatchNorm(16)
    fused.train()
    with pytest.raises(AssertionError, match="empty inputs"):
        fused(torch.randn(0, channels, 8, 8))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda w: w * 2, "Conv2d"),
        (lambda w: w - w.mean((1, 2, 3), keepdim=True), "Conv2d"),
    ],
)
def test_a_convolution_that_computes_its_weight_is_left_alone(change, reason):
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, change(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)

    plain = randomise_batch_norms_(nn.Sequential(Scaled(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    report, x = rk.explain(plain), torch.randn(1, 3, 8, 8)
    assert not report.fused and reason in report.unfused[0].reason and "own weight" in report.unfused[0].hint
    check(plain, rk.fuse(plain), x)


@pytest.mark.parametrize("change", ["stride", "padding", "dilation"])
def test_a_convolution_with_other_settings_than_its_own_is_left_alone(change):
    class Other(nn.Conv2d):
        def forward(self, x):
            settings = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, change: 2}
            return F.conv2d(x, self.weight, self.bias, **settings)

    plain = randomise_batch_norms_(nn.Sequential(Other(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    assert not rk.explain(plain).fused
    check(plain, rk.fuse(plain), torch.randn(1, 3, 8, 8))


def test_settings_of_a_user_convolution_changed_after_fusing():
    plain, channels, _ = built("detectron2")
    fused, x = rk.fuse(plain), torch.randn(1, channels, 12, 12)
    check(plain, fused, x)
    for m in (plain, fused):
        m.conv1.stride, m.shortcut.stride = (1, 1), (1, 1)
    with pytest.warns(RuntimeWarning, match="conv1.stride"):
        check(plain, fused, x)


def test_a_convolution_that_is_a_block_by_itself():
    torch.manual_seed(0)
    plain = randomise_batch_norms_(Conv2d(3, 8, 3, norm=nn.BatchNorm2d(8), activation=nn.ReLU())).eval()
    fused, x = rk.fuse(plain), torch.randn(2, 3, 9, 9)
    check(plain, fused, x)
    assert [row.steps for row in rk.explain(fused)] == ["conv+norm+relu"] and convolutions_that_ran(fused, x) == {""}
    with torch.no_grad():
        plain.weight.mul_(2), fused.weight.mul_(2)
    check(plain, fused, x)
    fused.register_forward_hook(lambda m, args, y: y + 1)
    with torch.no_grad():
        close(fused(x), plain(x) + 1)


@pytest.mark.parametrize("name", CASES)
def test_eager_and_frozen(name):
    plain, channels, _ = built(name)
    x = torch.randn(2, channels, 9, 9)
    check(plain, rk.fuse(plain, backend="eager"), x)
    frozen = rk.fuse(plain, freeze=True)
    for _ in range(2):
        check(plain, frozen, x)


@pytest.mark.parametrize("name", CASES)
def test_on_triton(name, device):
    skip_unless_runnable("triton", device, torch.float32)
    plain, channels, count = built(name)
    plain = plain.to(device)
    fused, x = rk.fuse(plain, backend="triton"), torch.randn(2, channels, 6, 7, device=device)
    assert len(convolutions_that_ran(fused, x)) == count
    check(plain, fused, x)


@pytest.mark.parametrize("name", ["linear squeeze-and-excitation", "split", "dense", "tree"])
def test_training_on_triton(name, device, monkeypatch):
    """Batch statistics, running statistics and gradients are eager's; the runs are ours."""
    skip_unless_runnable("triton", device, torch.float32)
    plain, channels, _ = built(name)
    plain = plain.to(device).train()
    fused, x = rk.fuse(plain, backend="triton"), torch.randn(3, channels, 6, 7, device=device)
    ran = []
    run_recipe = training.run_recipe
    monkeypatch.setattr(training, "run_recipe", lambda recipe, *rest: ran.append(recipe) or run_recipe(recipe, *rest))
    upstream = torch.randn_like(copy.deepcopy(plain)(x))

    def step(model, dtype):
        model, leaf = copy.deepcopy(model).to(dtype), x.detach().clone().to(dtype).requires_grad_()
        model(leaf).backward(upstream.to(dtype))
        tensors = [leaf.grad, *(p.grad for p in model.parameters())]
        return tensors + [b for b in model.buffers() if b.is_floating_point()]

    ours, eager, oracle = step(fused, torch.float32), step(plain, torch.float32), step(plain, torch.float64)
    assert len(ran) == len(fused._rk_state.plan.runs)
    own, budget = ([error(a, b) ** 2 for a, b in zip(found, oracle)] for found in (ours, eager))
    rms = lambda squares: (sum(squares) / len(squares)) ** 0.5  # noqa: E731
    assert rms(own) <= 2 * rms(budget) + torch.finfo(torch.float32).eps / 2


@pytest.mark.filterwarnings("ignore:resnet_kernels")  # of float64
def test_autocast_and_float64():
    for name in CASES:
        plain, channels, _ = built(name)
        fused, x = rk.fuse(plain), torch.randn(2, channels, 12, 12)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            y, eager = fused(x), plain(x)
        assert y.dtype == eager.dtype, name
        torch.testing.assert_close(y, eager, rtol=0.1, atol=0.1)
        with torch.no_grad():
            torch.testing.assert_close(fused.double()(x.double()), plain.double()(x.double()))


def test_no_state_is_left_behind():
    plain, *_ = built("tree")
    fused = rk.fuse(plain)
    assert all(not fused_module.is_fused(m) for m in plain.modules())
    assert list(fused.state_dict()) == list(plain.state_dict())


class _Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: isinstance(x, torch.Tensor),
        lambda x: isinstance(x, Tensor),
        lambda x: isinstance(x, (list, torch.Tensor)),
        lambda x: isinstance(torch.relu(x), torch.Tensor),
        lambda x: isinstance(x, nn.Parameter) or isinstance(x.clone(), Tensor),
        lambda x: type(x) is Tensor,
        torch.is_tensor,
    ],
)
def test_a_forward_that_asks_whether_its_input_is_a_tensor(asks):
    """A value of a trace is none, so that a trace would take the other way."""
    forward = lambda self, x: F.relu(self.bn(self.conv(x if asks(x) else -x)) + x)  # noqa: E731
    plain = randomise_batch_norms_(type("Block", (_Asking,), {"forward": forward})()).eval()
    report = rk.explain(plain)
    assert not report.fused and "asks whether a value is a Tensor" in report.unfused[0].reason, str(report)
    assert "lists" in report.unfused[0].hint
    check(plain, rk.fuse(plain), torch.randn(1, 8, 9, 9))


def _views(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    largest = y.view(y.shape[0], -1).amax(1).view(-1, 1, 1, 1)
    return F.relu(self.bn2(self.conv2(y)) + x) / largest


def test_an_operation_that_sees_layouts_gets_eagers():
    torch.manual_seed(0)
    block = type("Block", (_Variant,), {"forward": _views})()
    plain = randomise_batch_norms_(nn.Sequential(PlainResidual(8), block, PlainResidual(8))).eval()
    fused, x = rk.fuse(plain), torch.randn(2, 8, 9, 7)
    assert fused[1]._rk_state.plan.instructions
    for _ in range(2):
        check(plain, fused, x)


def test_a_module_of_another_class_sees_eagers_layout():
    """What was looked into is watched: another module in its place may see layouts."""

    class Viewing(LinearExcitation):
        def forward(self, x):
            return x * x.view(x.shape[0], -1).amax(1).view(-1, 1, 1, 1)

    torch.manual_seed(0)
    plain = randomise_batch_norms_(nn.Sequential(PlainResidual(8), LinearSEBlock(), PlainResidual(16))).eval()
    fused, x = rk.fuse(plain), torch.randn(2, 8, 12, 10)
    check(plain, fused, x)
    for m in (plain, fused):
        m[1].se.__class__ = Viewing
    with pytest.warns(RuntimeWarning, match="se is another module now"):
        check(plain, fused, x)


def test_a_global_hook_fires_for_each_module():
    plain, channels, _ = built("tree")
    fused, x = rk.fuse(plain), torch.randn(1, channels, 9, 9)
    check(plain, fused, x)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    try:
        with torch.no_grad():
            plain(x)
            theirs = seen.copy()
            seen.clear()
            with pytest.warns(RuntimeWarning, match="a global module hook is registered"):
                fused(x)
    finally:
        handle.remove()
    assert seen == theirs and len(seen) > 10


@pytest.mark.parametrize("name", CASES)
def test_modules_replaced_by_others_of_their_class(name):
    """In lists of modules and in Sequentials, too."""
    plain, channels, count = built(name)
    fused, x = rk.fuse(plain), torch.randn(1, channels, 12, 12)
    check(plain, fused, x)
    for path, module in [*plain.named_modules()]:
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            other = copy.deepcopy(module)
            with torch.no_grad():
                other.weight.mul_(-1.5)
            owner, _, child = path.rpartition(".")
            for m in (plain, fused):
                m.get_submodule(owner)._modules[child] = copy.deepcopy(other)
            check(plain, fused, x)
    assert len(convolutions_that_ran(fused, x)) == count


def test_a_slice_of_channels_keeps_eagers_layout():
    """Its strides are those of channels_last, so eager's convolution returns that."""
    torch.manual_seed(0)
    plain = randomise_batch_norms_(PlainResidual(8)).eval()
    fused, whole = rk.fuse(plain), torch.randn(2, 24, 9, 7).contiguous(memory_format=torch.channels_last)
    for x in (whole[:, 8:16], whole[:, ::3], whole[:, :8, 2:, 1:]):
        assert check(plain, fused, x).is_contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert fused(x).stride() == plain(x).stride()


def test_an_empty_batch_takes_its_own_way():
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return x if x.numel() == 0 else F.relu(self.bn(self.conv(x)))

    fused = rk.fuse(Early().eval())
    with torch.no_grad():
        assert fused(torch.randn(0, 8, 5, 5)).shape == (0, 8, 5, 5)
        assert fused(torch.randn(1, 8, 5, 5)).shape == (1, 4, 3, 3)
    assert convolutions_that_ran(fused, torch.randn(1, 8, 5, 5)) == {"conv"}


@pytest.mark.filterwarnings("ignore:resnet_kernels")
def test_checkpointing_where_gradients_are_wanted(monkeypatch):
    plain, channels, _ = built("checkpointed")
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)  # else gradients in eval mode are eager's anyway
    fused, calls = rk.fuse(plain), []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *args, **more: calls.append(1) or original(*args, **more)
    )
    fused(torch.randn(1, channels, 9, 9).requires_grad_()).sum().backward()
    assert calls
    assert len(convolutions_that_ran(fused, torch.randn(1, channels, 9, 9))) == 2


@pytest.mark.usefixtures("onednn_alone")
def test_a_run_does_not_write_over_what_others_read():
    """Without our kernels steps run one by one, and may write sums over residuals."""

    class Gated(_Variant):
        def __init__(self):
            super().__init__()
            self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            y = F.relu(self.bn2(self.conv2(x)))
            y = F.relu(self.bn3(self.conv3(y)) + x)
            return y + self.gate(x)

    torch.manual_seed(0)
    plain = randomise_batch_norms_(Gated()).eval()
    fused, x = rk.fuse(plain), torch.randn(2, 8, 9, 9)
    second = [*fused._rk_state.plan.runs.values()][-1]
    assert second.steps[-1].residual == 0 and second.steps[-1].overwrites_residual
    for _ in range(2):
        check(plain, fused, x)


def test_a_context_that_catches_warnings():
    """detectron2's newest Conv2d enters it. Filters of warnings are as they were afterwards."""
    torch.manual_seed(0)
    plain = randomise_batch_norms_(
        nn.Sequential(QuietConv2d(8, 8, 3, norm=nn.BatchNorm2d(8), activation=nn.ReLU()), PlainResidual(8))
    ).eval()
    before = [*warnings.filters]
    fused, x = rk.fuse(plain), torch.randn(2, 8, 9, 9)
    assert warnings.filters == before
    check(plain, fused, x)
    assert len(convolutions_that_ran(fused, x)) == 3


class _Context:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("make", [_Context, torch.no_grad, lambda: (warnings.catch_warnings(), _Context())[1]])
def test_other_contexts_are_refused(make):
    def forward(self, x):
        with make():
            return F.relu(self.bn(self.conv(x)) + x)

    plain = randomise_batch_norms_(type("Block", (_Asking,), {"forward": forward})()).eval()
    report = rk.explain(plain)
    assert not report.fused and any(word in report.unfused[0].reason for word in ("context", "of torch.autograd")), str(
        report
    )


@pytest.mark.parametrize("name", ("split", "split attention", "dense"))
def test_no_layout_is_converted_on_the_way(name, monkeypatch):
    """Splits, sums of groups and `contiguous()` compute the same from channels_last, so nothing asks for eager's layout."""
    plain, channels, _ = built(name)
    fused, x = rk.fuse(plain), torch.randn(2, channels, 12, 12)
    check(plain, fused, x)
    assert not any(instruction.sees_layout for instruction in fused._rk_state.plan.instructions)
    asked, original = [], checked_calls.as_eager
    monkeypatch.setattr(checked_calls, "as_eager", lambda value: asked.append(value) or original(value))
    check(plain, fused, x)
    assert not asked


def test_groups_of_channels_are_added_as_eager_adds_them():
    """In each form of a sum over five dimensions, among them some that PyTorch itself computes."""
    x = torch.randn(2, 3 * 8, 6, 5)
    for shape in ((2, 3, 8, 6, 5), (2, 1, 24, 6, 5), (2, 12, 2, 6, 5)):
        for layout in (torch.contiguous_format, torch.channels_last):
            y = x.contiguous(memory_format=layout).reshape(shape)
            for args, kwargs in (((1,), {}), ((), {"dim": 1}), (((1,),), {}), ((), {"dim": [1]}), ((2,), {}), ((), {})):
                torch.testing.assert_close(mixed_forward._sum(y, *args, **kwargs), y.sum(*args, **kwargs))
            assert mixed_forward._sum(y, 1, True).shape == y.sum(1, True).shape
            assert mixed_forward._sum(y, 1, dtype=torch.float64).dtype == torch.float64


def test_a_batch_of_one_whose_stride_is_odd():
    """Regression: PyTorch's pools go by strides, so their output was contiguous, which the next kernel refused."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.conv, self.bn = nn.AvgPool2d(3, 1, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            return F.relu(self.bn(self.conv(self.pool(x))) + x)

    plain = randomise_batch_norms_(Pooled()).eval()
    fused = rk.fuse(plain)
    whole = torch.randn(1, 16, 9, 7).contiguous(memory_format=torch.channels_last).reshape(1, 2, 8, 9, 7)
    x = whole[:, 0] + whole[:, 1]
    assert x.is_contiguous(memory_format=torch.channels_last) and x.stride(0) == 8
    for _ in range(2):
        with torch.no_grad():
            close(fused(x), plain(x))


def test_a_module_whose_name_is_that_of_a_function():
    class Named(LinearSEBlock):
        def __init__(self):
            super().__init__()
            self.sum, self.contiguous = nn.Upsample(scale_factor=2), nn.MaxPool2d(2)

        def forward(self, x):
            return self.contiguous(self.sum(super().forward(x)))

    torch.manual_seed(0)
    plain = randomise_batch_norms_(Named()).eval()
    fused = rk.fuse(plain)
    assert {"sum", "contiguous"} <= {i.target for i in fused._rk_state.plan.instructions if i.kind == "module"}
    for _ in range(2):
        check(plain, fused, torch.randn(2, 8, 12, 10))
