"""Fused blocks, stages and stems with every activation: values, gradients, edits after fusing, unfuse and pickles."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import resnet_kernels as rk
from helpers.activations import MODULES
from helpers.cpu_chains import assert_next_call_like_eager
from helpers.oracle import assert_within_budget, error, skip_unless_runnable
from helpers.own_kernels import onednn_alone, skip_unless_compiled  # noqa: F401  # a fixture
from resnet_kernels.graph.recipe import CallStep, ConvStep, NormStep
from resnet_kernels.kernels.activations import RELU, Activation
from resnet_kernels.kernels.cpu import library
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import onednn
from resnet_kernels.runtime.cpu import compiled_program
from resnet_kernels.runtime.state import state_of

CHANNELS_LAST = torch.channels_last


class Block(nn.Module):
    """A residual block with a projection where it is needed."""

    def __init__(self, c_in: int, c_out: int, act: nn.Module, groups: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, groups=groups, bias=False)
        self.bn1, self.bn2, self.act = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out), act
        self.down = nn.Sequential(nn.Conv2d(c_in, c_out, 1), nn.BatchNorm2d(c_out)) if c_in != c_out else None

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = y + (x if self.down is None else self.down(x))
        return self.act(y)


class Darknet(Block):
    """The activation comes before the add."""

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        return x + self.act(self.bn2(self.conv2(y)))


class Preactivated(nn.Module):
    """A BN and its activation before each convolution, and an activation of the sum."""

    def __init__(self, channels: int, act: nn.Module):
        super().__init__()
        self.bn1, self.bn2, self.act = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels), act
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x):
        y = self.conv1(self.act(self.bn1(x)))
        y = self.conv2(self.act(self.bn2(y)))
        return self.act(y) + self.act(x)


class Net(nn.Module):
    """A stem with its pool, stages of blocks, and a head."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 12, 7, 2, 3, bias=False), nn.BatchNorm2d(12), act
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(12, 20, act), Block(20, 20, act, groups=5), Darknet(20, 20, act))
        self.layer2 = nn.Sequential(Preactivated(20, act), Preactivated(20, act))
        self.avg, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(20, 10)

    def forward(self, x):
        x = self.pool(self.act(self.bn(self.conv(x))))
        return self.fc(torch.flatten(self.avg(self.layer2(self.layer1(x))), 1))


def net(name):
    # A module of its own in each place: shared ones can't be in a run.
    built = Net(nn.Identity())
    for module in [*built.modules()]:
        if "act" in module._modules:
            module.act = copy.deepcopy(MODULES[name])
    return randomise_batch_norms_(built).eval()


def assert_all_within_budget(ours, eager, oracle, what):
    """The root mean square of all relative errors is at most twice eager's plus one rounding, as in test_training.py.

    Eager's error of a single small vector is now and then far below that of its neighbor.
    """
    ours, eager, oracle = ([*tensors] for tensors in (ours, eager, oracle))
    own, budget = ([*map(error, found, oracle)] for found in (ours, eager))
    assert len(own) == len(budget) == len(oracle) == len(ours), what
    rms = lambda errors: (sum(e * e for e in errors) / len(errors)) ** 0.5  # noqa: E731
    assert rms(own) <= 2 * rms(budget) + torch.finfo(torch.float32).eps / 2, f"{what}: {[*zip(own, budget)]}"


@pytest.mark.parametrize("name", MODULES)
def test_networks_on_the_cpu(name, programs):
    """All blocks run as one program, from the stem to the head."""
    skip_unless_compiled()
    plain = net(name)
    fused = rk.fuse(plain)
    report = rk.explain(fused)
    assert len(report.fused) == 6 and not report.skipped, str(report)
    assert all(name in row.steps for row in report.fused), str(report)
    for batch in (1, 3):
        for layout in (torch.contiguous_format, CHANNELS_LAST):
            programs.clear()
            x = torch.randn(batch, 3, 37, 33).contiguous(memory_format=layout)
            assert_next_call_like_eager(plain, fused, x, f"{name}, {batch} images, {layout}")
            assert len(programs) == 1
    with torch.no_grad():
        assert rk.verify(plain, fused, torch.randn(2, 3, 37, 33)).ok
    x = torch.randn(1, 3, 37, 33)
    x[0, 0, 5, 5] = float("nan")
    with torch.no_grad():
        assert torch.equal(fused(x).isnan(), plain(x).isnan())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_networks_on_onednn(name, dtype, onednn_alone):  # noqa: F811
    if onednn.why_not(dtype):
        pytest.skip(f"oneDNN {onednn.why_not(dtype)}")
    plain = net(name).to(dtype)
    fused, x = rk.fuse(plain), torch.randn(2, 3, 37, 33).to(dtype)
    with torch.no_grad():
        assert_within_budget(fused(x), plain(x), copy.deepcopy(plain).double()(x.double()), name)
        assert fused(x).isfinite().all()


def test_a_slope_beyond_one_made_onednn_lose_a_nan(onednn_alone):  # noqa: F811
    """Bounds on sums grow by the slope: oneDNN's own ReLU behind it must not run where a sum may overflow."""

    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)

        def forward(self, x):
            return F.relu(self.conv2(F.leaky_relu(self.conv1(x), 1e36))) + x

    plain = Steep().eval()
    with torch.no_grad():
        plain.conv1.weight.copy_(-torch.eye(4).view(4, 4, 1, 1) * 1e5)
        plain.conv2.weight.copy_(torch.eye(4).view(4, 4, 1, 1))  # 0 * inf
    fused, x = rk.fuse(plain), torch.full((2, 4, 20, 20), 1.0)
    with torch.no_grad():
        y, eager = fused(x), plain(x)
    assert eager.isnan().any() and torch.equal(y.isnan(), eager.isnan())


@pytest.mark.parametrize("name", MODULES)
def test_training_on_triton(name, device):
    skip_unless_runnable("triton", device, torch.float32)
    act = MODULES[name]
    plain = nn.Sequential(Block(8, 12, act), Darknet(12, 12, act), Preactivated(12, act)).to(device).train()
    randomise_batch_norms_(plain)
    fused = rk.fuse(plain, backend="triton")
    assert len(rk.explain(fused).fused) == 3
    x, upstream = torch.randn(3, 8, 7, 6, device=device), None

    def step(model, dtype):
        nonlocal upstream
        model, leaf = copy.deepcopy(model).to(dtype), x.clone().to(dtype).requires_grad_()
        y = model(leaf)
        upstream = torch.randn_like(y) if upstream is None else upstream
        y.backward(upstream.to(dtype))
        found = {"y": y.detach(), "dx": leaf.grad} | {n: p.grad for n, p in model.named_parameters()}
        # A bias before a BN has no gradient but rounding errors.
        found = {n: v for n, v in found.items() if not n.endswith("down.0.bias")}
        return found | {n: b for n, b in model.named_buffers() if b.is_floating_point()}

    ours, eager, oracle = step(fused, torch.float32), step(plain, torch.float32), step(plain, torch.float64)
    assert ours.keys() == eager.keys() == oracle.keys()
    assert_all_within_budget(*(found.values() for found in (ours, eager, oracle)), name)


@pytest.mark.parametrize("backend", ("auto", "triton"))
@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_eval_mode(name, backend, device):
    """A frozen BN whose weights want no gradient is a scale and a shift: the whole step is one operation."""
    skip_unless_runnable("triton", device, torch.float32)
    act = MODULES[name]
    plain = randomise_batch_norms_(nn.Sequential(Block(8, 12, act), Darknet(12, 12, act))).to(device).eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    fused, x = rk.fuse(plain, backend=backend), torch.randn(2, 8, 7, 6, device=device)
    upstream = torch.randn(2, 12, 7, 6, device=device)

    def step(model, dtype):
        model, leaf = copy.deepcopy(model).to(dtype), x.clone().to(dtype).requires_grad_()
        y = model(leaf)
        y.backward(upstream.to(dtype))
        return [y.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    assert_all_within_budget(step(fused, torch.float32), step(plain, torch.float32), step(plain, torch.float64), name)


def _edits():
    yield "leaky_relu(0.1)", lambda act: setattr(act, "negative_slope", 0.5), "negative_slope"
    yield "gelu", lambda act: setattr(act, "approximate", "tanh"), "approximate"
    yield "relu6", lambda act: setattr(act, "max_val", 3.0), "max_val"


@pytest.mark.filterwarnings("always:resnet_kernels. in a:RuntimeWarning")
@pytest.mark.parametrize("name, edit, setting", _edits(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_setting_was_changed_after_fusing(name, edit, setting, recwarn):
    """In a block and in the stem; eager's own code runs, and the report says why."""
    plain = net(name)
    fused, x = rk.fuse(plain), 4 * torch.randn(2, 3, 37, 33)
    assert_next_call_like_eager(plain, fused, x)
    for path in ("layer1.0.act", "act"):
        for model in (plain, fused):
            edit(model.get_submodule(path))
        assert_next_call_like_eager(plain, fused, x, path)
        row = next(row for row in rk.explain(fused) if row.path == path.removesuffix("act").rstrip("."))
        assert row.reason
        assert any(f"act.{setting}, which its forward depends on, changed" in str(w.message) for w in recwarn)
    rk.fuse_(fused)
    assert len(rk.explain(fused).skipped) == (setting == "max_val")
    assert_next_call_like_eager(plain, fused, x, "fused again")


def test_unfuse_and_pickle():
    for name in MODULES:
        plain = net(name)
        x = torch.randn(1, 3, 37, 33)
        fused = rk.fuse(plain)
        with torch.no_grad():
            expected = fused(x)
            assert torch.equal(pickle.loads(pickle.dumps(fused))(x), expected)
            assert torch.equal(copy.deepcopy(fused)(x), expected)
        rk.unfuse_(fused)
        assert [*map(type, fused.modules())] == [*map(type, plain.modules())]


def test_steps_of_pickles_from_before_activations():
    """Such a step's `relu` says whether a ReLU comes last."""

    def older(step, relu):
        state = {name: value for name, value in step.__dict__.items() if name != "activation"}
        made = object.__new__(type(step))
        made.__setstate__(state if relu is None else state | {"relu": relu})
        return made

    for relu, activation in ((True, RELU), (False, None)):
        assert older(ConvStep("c", "b", activation, 0, 1), relu) == ConvStep("c", "b", activation, 0, 1)
        assert older(NormStep("b", activation, 0, 1), relu) == NormStep("b", activation, 0, 1)
    for what, activation in (("add", None), ("relu", RELU), ("add_relu", RELU)):
        step = CallStep(what, False, (0,), 1, activation=activation)
        assert older(step, None) == step
    assert older(CallStep("relu", True, (0,), 1), None) == CallStep("relu", True, (0,), 1)
    step = ConvStep("c", None, Activation("leaky_relu", 0.1), 0, 1)
    assert pickle.loads(pickle.dumps(step)) == step and copy.deepcopy(step) == step


@pytest.mark.slow
def test_torch_compile():
    """Without and with gradients: the operation is there, and what it has no backward for follows it."""
    for name in ("silu", "leaky_relu(0.1)"):
        act = MODULES[name]
        plain = randomise_batch_norms_(nn.Sequential(Block(8, 12, act), Darknet(12, 12, act))).eval()
        for parameter in plain.parameters():
            parameter.requires_grad_(False)
        fused = rk.fuse(plain)
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        x = torch.randn(2, 8, 7, 6)
        wide = copy.deepcopy(plain).double()
        with torch.no_grad():
            assert_within_budget(compiled(x), plain(x), wide(x.double()), name)
        found = []
        for model, dtype in ((compiled, torch.float32), (plain, torch.float32), (wide, torch.float64)):
            leaf = x.clone().to(dtype).requires_grad_()
            found.append(torch.autograd.grad(model(leaf).square().sum(), leaf)[0])
        assert_within_budget(*found, name)


def test_the_state_holds_activations_and_no_module():
    fused = rk.fuse(net("leaky_relu(0.1)"))
    state = state_of(fused.layer1[0])
    assert {step.activation for step in state.plan.steps} == {Activation("leaky_relu", 0.1), None}


class Learned(Block):
    """Two PReLUs: one slope for all channels, and one for each."""

    def __init__(self, channels: int, last: nn.Module | None = None):
        super().__init__(channels, channels, nn.PReLU())
        self.last = last or nn.PReLU(channels)

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        return self.last(self.bn2(self.conv2(y)) + x)


def test_a_prelu_is_a_part_of_its_step(device):
    """Its weight is live, and learns."""
    plain = randomise_batch_norms_(nn.Sequential(Learned(8), Learned(8))).eval()
    fused, x = rk.fuse(plain), torch.randn(2, 8, 9, 7)
    assert [row.steps for row in rk.explain(fused).fused] == ["conv1+bn1+act -> conv2+bn2+add+last"] * 2
    assert_next_call_like_eager(plain, fused, x)
    with torch.no_grad():
        for model in (plain, fused):
            model[0].act.weight.fill_(-2)
            model[1].last.weight[3] = 7
    assert_next_call_like_eager(plain, fused, x, "weights edited")
    wide = copy.deepcopy(plain).double()
    for backend in ("triton", "cpu"):
        skip_unless_runnable(backend, device, torch.float32)
        found = []
        for model in (rk.fuse(plain, backend=backend).train(), copy.deepcopy(plain).train(), wide.train()):
            model = copy.deepcopy(model)
            loss = model(x.to(next(model.parameters()).dtype)).square().sum()
            found.append(torch.autograd.grad(loss, [*model.parameters()]))
        assert_all_within_budget(*found, backend)


@pytest.mark.parametrize("backend", ("auto", "triton"))
def test_slopes_alone_learn(backend, device):
    """All else is frozen, so that each step is one operation."""
    skip_unless_runnable("triton", device, torch.float32)
    plain = randomise_batch_norms_(nn.Sequential(Learned(8), Learned(8))).eval().requires_grad_(False)
    for block in plain:
        block.act.requires_grad_(True), block.last.requires_grad_(True)
    fused, x = rk.fuse(plain, backend=backend), torch.randn(2, 8, 9, 7)
    found = []
    for model, dtype in ((fused, torch.float32), (plain, torch.float32), (plain, torch.float64)):
        model = copy.deepcopy(model).to(dtype)
        y = model(x.to(dtype))
        wanted = [p for p in model.parameters() if p.requires_grad]
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    assert len(found[0]) == 5
    assert_all_within_budget(*found, backend)


class Stem(nn.Module):
    """A network's stem that ends in a PReLU, and blocks."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.PReLU(8)
        self.pool, self.layers = nn.MaxPool2d(3, 2, 1), nn.Sequential(Learned(8), Learned(8))
        nn.init.normal_(self.act.weight)

    def forward(self, x):
        return self.layers(self.pool(self.act(self.bn1(self.conv1(x)))))


def test_a_stem_ends_in_a_prelu():
    plain = randomise_batch_norms_(Stem()).eval()
    fused = rk.fuse(plain)
    assert "conv1+bn1+act -> pool" in [row.steps for row in rk.explain(fused).fused]
    for _ in range(2):
        assert_next_call_like_eager(plain, fused, torch.randn(2, 3, 33, 30))
        for model in (plain, fused):
            model.act.weight.data.mul_(-1.5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("training", (False, True), ids=("eval", "training"))
def test_slopes_in_fp32_under_autocast(training, dtype, device):
    skip_unless_runnable("triton", device, dtype)
    plain = randomise_batch_norms_(nn.Sequential(Learned(8), Learned(8))).train(training)
    x, found = torch.randn(2, 8, 9, 7), []
    for model in (rk.fuse(plain, backend="triton"), copy.deepcopy(plain)):
        with torch.autocast(device.type, dtype=dtype):
            y = model(x)
        found.append(torch.autograd.grad(y.float().sum(), [*model.parameters()]))
    wide = copy.deepcopy(plain).double()
    found.append(torch.autograd.grad(wide(x.double()).sum(), [*wide.parameters()]))
    assert [gradient.dtype for gradient in found[0]] == [parameter.dtype for parameter in plain.parameters()]
    ours, eager, oracle = (torch.cat([gradient.double().flatten() for gradient in each]) for each in found)
    assert (ours - oracle).norm() <= 2 * (eager - oracle).norm() + torch.finfo(dtype).eps / 2 * oracle.norm()


class Faces(nn.Module):
    """insightface's block, with every kind of step before a PReLU."""

    def __init__(self, channels: int = 20):
        super().__init__()
        self.bn0, self.bn1, self.bn2 = (nn.BatchNorm2d(channels) for _ in range(3))
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False) for groups in (1, 5, 20, 1)
        )
        self.prelus = nn.ModuleList(nn.PReLU(channels) for _ in range(6))
        for prelu in self.prelus:
            nn.init.normal_(prelu.weight)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        y = self.prelus[0](self.bn1(self.conv1(self.bn0(x))))
        y = self.prelus[2](self.bn2(self.prelus[1](self.conv2(y))))
        y = self.prelus[3](self.conv3(y) + y)
        return self.prelus[5](self.pool(self.prelus[4](self.conv4(y)) + x))


@pytest.fixture
def faces(monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, skip_unless_compiled().isa)
    torch.manual_seed(0)
    plain = randomise_batch_norms_(Faces()).eval()
    return plain, rk.fuse(plain), torch.randn(2, 20, 14, 10)


def test_prelus_are_parts_of_programs(faces, programs):
    plain, fused, x = faces
    for kernel in (1, 3):  # `direct`, too
        for model in (plain, fused):
            model.conv1 = nn.Conv2d(20, 20, kernel, padding=kernel // 2, bias=False)
            nn.init.ones_(model.conv1.weight)
        programs.clear()
        assert_next_call_like_eager(plain, fused, x)
        assert_next_call_like_eager(plain, fused, x.contiguous(memory_format=CHANNELS_LAST))
        assert len(programs) == 2 and programs[0] <= 9
    (program,) = [p for p in fused._rk_state.copies.compiled.values() if p.runs]
    labels = [layer.label for layer in program._program.layers]
    assert sum("prelus" in label for label in labels) == 6
    assert [label for label in labels if label.startswith("prelus")] == ["prelus.5"], "the others end other steps"


class AddsLast(nn.Module):
    """darknet's block with every kind of step before the add, and adds whose other side comes too late, or is read again."""

    def __init__(self, act: nn.Module, channels: int = 20):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False)
            for kernel, groups in ((3, 1), (1, 1), (3, 5), (3, 20), (1, 1), (3, 1))
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(7))
        self.act, self.pool = act, nn.MaxPool2d(2)

    def step(self, number, x):
        return self.act(self.bns[number](self.convs[number](x)))

    def forward(self, x):
        for first, second in ((1, 0), (0, 1), (1, 2), (0, 3)):
            x = self.step(second, self.step(first, x)) + x  # x dies here
        y = self.act(self.bns[6](x)) + x
        first, second = self.step(4, y), self.step(5, y)
        third = self.step(2, y)
        return self.pool(first + second) + self.pool(first) + self.pool(third + y) + self.pool(third)


@pytest.mark.parametrize("name", ("relu", "leaky_relu(0.1)", "silu", "prelu"))
def test_an_add_behind_an_activation_is_a_part_of_its_step(name, programs, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, skip_unless_compiled().isa)
    torch.manual_seed(0)
    act = nn.ReLU() if name == "relu" else nn.PReLU(20, -0.3) if name == "prelu" else MODULES[name]
    plain = randomise_batch_norms_(AddsLast(act)).eval()
    fused, x = rk.fuse(plain), torch.randn(3, 20, 12, 10)
    for given in (x, x.contiguous(memory_format=CHANNELS_LAST)):
        assert_next_call_like_eager(plain, fused, given)
        before = given.clone()
        with torch.no_grad():
            fused(given)
        assert torch.equal(given, before), "a result was written over the input"
    assert len(set(programs)) == 1
    (program, *_) = [p for p in fused._rk_state.copies.compiled.values() if p.runs]
    labels = [layer.label for layer in program._program.layers]
    assert [label.endswith("+add") for label in labels[:11]] == [False, True] * 4 + [True, False, True], labels
    assert not any(label.endswith("+add") for label in labels[11:]), "what others read, too, is made by itself"
    assert assert_next_call_like_eager(plain, fused, torch.full_like(x, float("nan"))).isnan().all()


def test_prelus_without_a_program(monkeypatch):
    """Our kernels step by step, as where an add broadcasts."""
    monkeypatch.setenv(library.ISA_VARIABLE, skip_unless_compiled().isa)
    monkeypatch.setattr(compiled_program, "find", lambda *_: None)
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 8, 1), nn.PReLU())
    plain = randomise_batch_norms_(block).eval()
    fused, x = rk.fuse(plain), torch.randn(2, 8, 30, 30)
    for _ in range(3):
        assert_next_call_like_eager(plain, fused, x)
        for model in (plain, fused):
            model[2].weight.data.mul_(-1.5)


def _slope_of_all(prelu):
    prelu.weight = nn.Parameter(torch.tensor([0.3]))


def _too_few(prelu):
    prelu.weight = nn.Parameter(torch.ones(7))


class _Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def _freed(prelu):
    prelu.weight.untyped_storage().resize_(0)
    prelu.weight = nn.Parameter(torch.full((20,), 0.7))


PRELU_EDITS = {
    "in place": lambda prelu: prelu.weight.data.mul_(-2),
    "by NumPy": lambda prelu: prelu.weight.detach().numpy().__imul__(3),
    "other memory": lambda prelu: setattr(prelu.weight, "data", prelu.weight.data * 2),
    "another parameter": lambda prelu: setattr(prelu, "weight", nn.Parameter(prelu.weight.detach() * 2)),
    "one for all channels": _slope_of_all,
    "NaN for all channels": lambda prelu: setattr(prelu, "weight", nn.Parameter(torch.tensor([float("nan")]))),
    "NaN": lambda prelu: prelu.weight.data.fill_(float("nan")),
    "too few": _too_few,
    "strided": lambda prelu: setattr(prelu, "weight", nn.Parameter(torch.ones(20, 2)[:, 0] * 0.5)),
    "negated": lambda prelu: setattr(prelu, "weight", nn.Parameter(torch._neg_view(prelu.weight.detach()))),
    "parametrized": lambda prelu: parametrize.register_parametrization(prelu, "weight", _Halved()),
    "freed": _freed,
    "a hook": lambda prelu: prelu.register_forward_hook(lambda module, inputs, y: 2 * y),
    "its forward": lambda prelu: setattr(prelu, "forward", lambda x: 3 * x),
    "double": lambda prelu: prelu.double(),
}


@pytest.mark.parametrize("edit", PRELU_EDITS)
@pytest.mark.filterwarnings("ignore:resnet_kernels:RuntimeWarning")
def test_an_edit_of_a_prelu_was_not_seen(edit, faces):
    plain, fused, x = faces
    before = assert_next_call_like_eager(plain, fused, x)
    for number in (0, 5):
        for model in (plain, fused):
            with torch.no_grad():
                PRELU_EDITS[edit](model.prelus[number])
        for _ in range(2):
            y = assert_next_call_like_eager(plain, fused, x, edit)
        assert isinstance(y, Exception) or not torch.equal(y, before)
    if edit == "one for all channels":  # its value is a part of the program
        for model in (plain, fused):
            model.prelus[0].weight.data.fill_(-0.5)
        assert not torch.equal(assert_next_call_like_eager(plain, fused, x, edit), y)


def test_timms_prelu_is_one_too():
    layers = pytest.importorskip("timm.layers", reason="needs timm")
    plain = randomise_batch_norms_(nn.Sequential(Learned(8, layers.PReLU(8)), Learned(8))).eval()
    fused = rk.fuse(plain)
    assert [row.steps for row in rk.explain(fused).fused] == ["conv1+bn1+act -> conv2+bn2+add+last"] * 2
    assert_next_call_like_eager(plain, fused, torch.randn(2, 8, 9, 7))
