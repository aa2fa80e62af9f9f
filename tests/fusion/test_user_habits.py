"""Habits of users that once made a fused model differ from plain PyTorch, each on a small network of theirs."""

import contextlib
import copy
import pickle
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_kernels as rk
from helpers.oracle import skip_unless_runnable

ACTIVE = True
BACKENDS = ["auto", pytest.param("triton", marks=pytest.mark.slow)]


class Block(nn.Module):
    """Conv, BN, ReLU and a sum; subclasses change forward."""

    active = True

    def __init__(self, channels=8):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu, self.conv2 = nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        self.config, self.flags, self.table = types.SimpleNamespace(active=True), [True, False], {"active": True}

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.bn(self.conv(x)))) + x)


def twins(make, **options):
    """(plain, fused) models with the same weights, in eval mode."""
    torch.manual_seed(0)
    plain = make().eval()
    return plain, rk.fuse(plain, **options)


def agree(plain, fused, x):
    """Compares values and layouts of a call on both; returns the warnings that the fused one gave."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        expected, found = plain(x), fused(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.stride() == expected.stride()
    return [str(warning.message) for warning in said if issubclass(warning.category, RuntimeWarning)]


def images(channels=8, size=7):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def stage(forward, **attributes):
    """A function that makes a Sequential of two blocks with another forward."""

    def make():
        cls = type("Flagged", (Block,), {"forward": forward, **attributes})
        return nn.Sequential(cls(), cls(), nn.Flatten())

    return make


def _flagged(read):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x) if read(self) else x

    return forward


def _in_a_closure():
    active = True

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x) if active else x

    def switch(model):
        nonlocal active
        active = not active

    return forward, switch


def _switch_global(model):
    global ACTIVE
    ACTIVE = not ACTIVE


_closure_forward, _switch_closure = _in_a_closure()

FLAGS = {
    "a class attribute that an instance hides": (
        _flagged(lambda self: self.active),
        lambda model: setattr(model[1], "active", not model[1].active),
    ),
    "a class attribute": (
        _flagged(lambda self: self.active),
        lambda model: setattr(type(model[1]).__mro__[-3], "active", not Block.active),
    ),
    "an attribute of an object": (
        _flagged(lambda self: self.config.active),
        lambda model: setattr(model[1].config, "active", not model[1].config.active),
    ),
    "another object": (
        _flagged(lambda self: self.config.active),
        lambda model: setattr(model[1], "config", types.SimpleNamespace(active=not model[1].config.active)),
    ),
    "an element of a list": (
        _flagged(lambda self: self.flags[0]),
        lambda model: model[1].flags.__setitem__(0, not model[1].flags[0]),
    ),
    "an element of a dict": (
        _flagged(lambda self: self.table["active"]),
        lambda model: model[1].table.update(active=not model[1].table["active"]),
    ),
    "an attribute by its name": (
        _flagged(lambda self: getattr(self, "active")),  # noqa: B009
        lambda model: setattr(model[1], "active", not model[1].active),
    ),
    "an attribute that is not there": (
        _flagged(lambda self: not hasattr(self, "skip")),
        lambda model: delattr(model[1], "skip") if hasattr(model[1], "skip") else setattr(model[1], "skip", 1),
    ),
    "an attribute of a child": (
        _flagged(lambda self: self.conv.padding == (1, 1)),
        lambda model: setattr(model[1].conv, "padding", 1 if model[1].conv.padding == (1, 1) else (1, 1)),
    ),
    "a global": (_flagged(lambda self: ACTIVE), _switch_global),
    "a variable of an enclosing function": (_closure_forward, _switch_closure),
}
# Switches of a name that both models share.
SHARED = ("a class attribute", "a global", "a variable of an enclosing function")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_that_forward_asks_is_asked_in_each_call(name, backend):
    skip_unless_runnable(backend, torch.device("cpu"), torch.float32)
    forward, switch = FLAGS[name]
    plain, fused = twins(stage(forward), backend=backend)
    assert rk.explain(plain).fused
    x = images()
    try:
        for _ in range(4):
            agree(plain, fused, x)
            reasons = {row.reason for row in rk.explain(fused) if row.reason or not row.fused}
            assert all(reason.endswith("call fuse_ again") for reason in reasons)
            for model in (plain,) if name in SHARED else (plain, fused):
                switch(model)
    finally:
        Block.active = True


def test_a_call_that_a_flag_makes_eager_says_so_and_explain_does_too():
    class Asks(Block):
        def forward(self, x):
            return self.relu(self.bn(self.conv(x)) + x) if self.active else x

    plain, fused = twins(Asks)
    x = images()
    assert not agree(plain, fused, x) and not any(row.reason for row in rk.explain(fused))
    for model in (plain, fused):
        model.active = 1  # as true as before, but forward may ask `is True`
    assert any("active, which its forward depends on, changed" in said for said in agree(plain, fused, x))
    assert any("active" in row.reason for row in rk.explain(fused))
    for model in (plain, fused):
        del model.active
    assert not agree(plain, fused, x) and not any(row.reason for row in rk.explain(fused))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_asks_the_flags_of_its_own(copied):
    plain, fused = twins(FlaggedNet)
    fused = copied(fused)
    x = images()
    for model in (plain, fused):
        model.config.active = False
    agree(plain, fused, x)
    for model in (plain, fused):
        model.config.active = True
    assert not agree(plain, fused, x)


class FlaggedNet(Block):
    """At the top of the file, so that it can be pickled."""

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x) if self.config.active else x


@pytest.mark.parametrize("fused_first", [False, True])
def test_a_forward_that_is_replaced_in_the_class_is_the_forward(fused_first):
    class Replaced(Block):
        def forward(self, x):
            return self.relu(self.bn(self.conv(x)) + x)

    plain, fused = twins(lambda: nn.Sequential(Replaced(), Replaced()))
    if fused_first:
        agree(plain, fused, images())
    Replaced.forward = lambda self, x: self.conv(x)
    agree(plain, fused, images())
    assert any("forward" in row.reason or not row.fused for row in rk.explain(fused))


def test_a_method_that_forward_calls_may_be_replaced():
    class Calls(Block):
        def act(self, x):
            return self.relu(x)

        def forward(self, x):
            return self.act(self.bn(self.conv(x)) + x)

    plain, fused = twins(Calls)
    x = images()
    agree(plain, fused, x)
    Calls.act = lambda self, x: x
    agree(plain, fused, x)
    for model in (plain, fused):
        model.act = lambda x: x * 2
    agree(plain, fused, x)


@pytest.mark.parametrize(
    "edit",
    [
        lambda net: setattr(net[0], "padding_mode", "circular"),
        lambda net: setattr(net[0], "groups", 2) or setattr(net[0], "weight", nn.Parameter(net[0].weight[:, :4])),
        lambda net: (setattr(net[1], "running_mean", None), setattr(net[1], "running_var", None)),
        lambda net: setattr(net[0], "_conv_forward", lambda x, weight, bias: F.conv2d(x, weight, bias)),
        lambda net: setattr(net[0], "forward", lambda x: x),
        lambda net: setattr(net[2], "forward", lambda x: x),
        lambda net: setattr(net[3], "return_indices", False),
        lambda net: setattr(net[3], "ceil_mode", True),
        lambda net: setattr(net[2], "inplace", True),
        lambda net: setattr(net[1], "eps", 0.3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_settings_of_children_hold_in_each_call(edit, backend):
    skip_unless_runnable(backend, torch.device("cpu"), torch.float32)
    plain, fused = twins(
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)), backend=backend
    )
    x = images(size=10)
    agree(plain, fused, x)
    for model in (plain, fused):
        with torch.no_grad():
            edit(model)
    agree(plain, fused, x)
    agree(plain, fused, x)


def test_a_block_that_appends_to_a_list_goes_on_doing_so():
    class Keeps(Block):
        def __init__(self):
            super().__init__()
            self.features = []

        def forward(self, x):
            self.features.append(x)
            return super().forward(x)

    plain, fused = twins(lambda: nn.Sequential(Keeps(), Block(), Keeps()))
    agree(plain, fused, images())
    assert [len(model[i].features) for model in (plain, fused) for i in (0, 2)] == [1] * 4
    assert all(a.stride() == b.stride() for i in (0, 2) for a, b in zip(plain[i].features, fused[i].features))


class Encoder(nn.Module):
    """A container that looks at its children, and keeps what it is told to."""

    keep = False

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu, self.pool = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)
        self.layer = nn.Sequential(Block(), Block())

    def forward(self, x):
        features = []
        for child in self.children():
            x = child(x)
            if isinstance(child, nn.ReLU) or type(child) is nn.AvgPool2d:
                features.append(x)
        if self.keep:
            self.last = x
        return torch.cat([feature.flatten(1) for feature in (*features, x)], 1)


def test_a_container_sees_its_own_modules_and_itself():
    plain, fused = twins(Encoder)
    x = images(3)
    assert not agree(plain, fused, x)
    assert len(rk.explain(plain).fused) >= 2
    plain.keep = fused.keep = True
    agree(plain, fused, x)
    torch.testing.assert_close(fused.last, plain.last, rtol=1e-4, atol=1e-5)


def test_a_no_grad_island_in_a_block_cuts_the_gradient():
    class Island(Block):
        def forward(self, x):
            with torch.no_grad():
                out = self.relu(self.bn(self.conv(x)))
            return self.relu(self.conv2(out) + x)

    plain, fused = twins(Island)
    for model in (plain, fused):
        model(images()).sum().backward()
    assert plain.conv.weight.grad is None and fused.conv.weight.grad is None
    torch.testing.assert_close(fused.conv2.weight.grad, plain.conv2.weight.grad, rtol=1e-4, atol=1e-5)


def test_an_autocast_island_in_a_block_stays_in_float32():
    class Island(Block):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.relu(self.bn(self.conv(x.float())) + x)

    plain, fused = twins(Island)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = plain(images()), fused(images())
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_stochastic_depth_by_a_coin_drops_as_plain_pytorch_does(backend):
    skip_unless_runnable(backend, torch.device("cpu"), torch.float32)

    class Coin(Block):
        def forward(self, x):
            if not self.training or torch.rand(1)[0] >= 0.5:
                x = x + self.conv2(self.relu(self.bn(self.conv(x))))
            return x

    plain, fused = twins(lambda: nn.Sequential(*(Coin(4) for _ in range(4))), backend=backend)
    for model in (plain, fused):
        model.train()
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(4):
                model(images(4, 4))
    counts = [[block.bn.num_batches_tracked.item() for block in model] for model in (plain, fused)]
    assert counts[0] == counts[1] and len(set(counts[0])) > 1


class Head(nn.Module):
    """A stem, and a head of the user's that needs a contiguous tensor."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.layer, self.fc = nn.Sequential(Block(), Block()), nn.Linear(8 * 49, 4)

    def forward(self, x):
        x = self.layer(self.relu(self.bn(self.conv(x))))
        return self.fc(x.view(x.size(0), -1))


class Strides(Head):
    def forward(self, x):
        before = x.stride()
        x = self.relu(self.bn(self.conv(x)))
        return self.layer(x) * float(x.is_contiguous()) + float(before[1])


class Views(nn.Module):
    def forward(self, x):
        return x.view(x.size(0), -1)


class InPlace(Head):
    def forward(self, x):
        x.mul_(2)
        return self.layer(self.relu(self.bn(self.conv(x))))


class Permuted(Head):
    def forward(self, x):
        return self.layer(self.relu(self.bn(self.conv(x)))).permute(0, 2, 3, 1)


class ChannelsLast(Head):
    def forward(self, x):
        return self.layer(self.relu(self.bn(self.conv(x)))).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "make, channels",
    [
        (Head, 3), (lambda: Head(1), 1), (InPlace, 3), (Permuted, 3), (ChannelsLast, 3),
        (lambda: nn.Sequential(Head(3).conv, nn.BatchNorm2d(8), nn.ReLU(), Views()), 3),
        (lambda: nn.Sequential(Block(), nn.Sequential(Block(), Views())), 8),
        (lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", BACKENDS)
def test_code_of_the_users_sees_eagers_layout(make, channels, layout, backend):
    skip_unless_runnable(backend, torch.device("cpu"), torch.float32)
    plain, fused = twins(make, backend=backend)
    assert rk.explain(plain).fused
    xs = [images(channels).contiguous(memory_format=layout) for _ in range(2)]
    with torch.no_grad():
        try:
            expected = plain(xs[0])
        except RuntimeError:  # x.view of a channels_last tensor
            with pytest.raises(RuntimeError, match="view size"):
                fused(xs[1])
            return
        found = fused(xs[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.stride() == expected.stride() and torch.equal(xs[0], xs[1])


def test_a_returned_input_is_the_callers_own_tensor():
    class Both(Head):
        def forward(self, x):
            return x, self.layer(self.relu(self.bn(self.conv(x))))

    _, fused = twins(Both)
    x = images(3)
    with torch.no_grad():
        assert fused(x)[0] is x


@pytest.mark.parametrize("path", ["conv", "layer", "layer.0", "layer.0.conv2", "layer.1", "fc"])
def test_hooks_see_eagers_layout(path):
    plain, fused = twins(Head)
    seen = []
    for model in (plain, fused):
        strides = []
        seen.append(strides)
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda m, args, strides=strides: strides.append(args[0].stride()))
        module.register_forward_hook(lambda m, args, out, strides=strides: strides.append(out.stride()))
    agree(plain, fused, images(3))
    assert seen[0] == seen[1] and len(seen[0]) == 2


def test_global_hooks_see_eagers_layout():
    plain, fused = twins(Head)
    seen = {}
    for model in (plain, fused):
        strides = seen.setdefault(model, [])
        with contextlib.ExitStack() as stack, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hook = nn.modules.module.register_module_forward_hook(
                lambda m, args, out, strides=strides: strides.append((type(m).__name__, out.stride()))
            )
            stack.callback(hook.remove)
            model(images(3))
    assert seen[plain] == seen[fused]


@pytest.mark.parametrize("what", ["weight", "eps", "child"])
def test_a_forward_that_edits_its_blocks_in_mid_call_is_not_checked_in_advance(what):
    class Edits(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
            self.a, self.b = Block(), Block()

        def forward(self, x):
            x = self.a(self.relu(self.bn(self.conv(x))))
            if what == "weight":
                self.b.conv.weight.data.mul_(1.5)
            elif what == "eps":
                self.b.bn.eps = self.b.bn.eps * 50
            else:
                self.b.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
                nn.init.constant_(self.b.conv2.weight, 0.02)
            return self.b(x)

    plain, fused = twins(Edits)
    assert len(rk.explain(plain).fused) == 2
    for _ in range(3):
        agree(plain, fused, images(3))


def test_a_leaf_of_the_users_that_edits_a_block_is_seen():
    class Edits(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.blocks = [block]

        def forward(self, x):
            self.blocks[0].conv.weight.data.mul_(1.5)
            return x

    def make():
        last = Block()
        return nn.Sequential(Block(), Block(), Edits(last), last)

    torch.manual_seed(0)
    plain = make().eval()
    fused = rk.fuse(plain)
    assert fused[2].blocks[0] is fused[3]
    for _ in range(3):
        agree(plain, fused, images())


def test_mixed_dtypes_raise_as_in_eager():
    plain, fused = twins(lambda: nn.Sequential(Block(), Block()))
    x = images()
    agree(plain, fused, x)
    for model in (plain, fused):
        model[1].conv.bias.data = model[1].conv.bias.data.double()
        with torch.no_grad(), pytest.raises(RuntimeError):
            model(x)


def test_a_strided_1x1_convolution_that_falls_back_has_a_safe_gradient():
    """In channels_last oneDNN writes such a gradient past its buffer (oneDNN #6035)."""

    class Stem(Head):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1, stride=2, bias=False)

        def forward(self, x):
            return self.layer(self.relu(self.bn(self.conv(x))))

    plain, fused = twins(Stem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (plain, fused):
            model(images(3)).sum().backward()
    torch.testing.assert_close(fused.conv.weight.grad, plain.conv.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "asks", [torch.is_tensor, lambda x: isinstance(x, torch.Tensor), lambda x: type(x) is torch.Tensor]
)
def test_a_forward_that_asks_whether_it_got_a_tensor_goes_the_way_of_tensors(asks):
    class Asks(Block):
        def forward(self, x):
            out = self.bn(self.conv(x)) + x
            return self.relu(out) if asks(out) else out

    plain, fused = twins(lambda: nn.Sequential(Asks(), Asks()))
    agree(plain, fused, images())


def test_a_forward_that_asks_for_the_grad_mode_keeps_its_code():
    class Asks(Block):
        def forward(self, x):
            return self.relu(self.bn(self.conv(x)) + x) if torch.is_grad_enabled() else self.bn(self.conv(x))

    plain, fused = twins(lambda: nn.Sequential(Asks(), Asks()))
    agree(plain, fused, images())


def test_a_buffer_that_forward_replaces_is_replaced():
    class Averages(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x):
            self.mean = self.mean * 0.5 + x.mean((0, 2, 3))
            return super().forward(x)

    plain, fused = twins(lambda: nn.Sequential(Averages(), Block()))
    for _ in range(2):
        agree(plain, fused, images())
    torch.testing.assert_close(fused[0].mean, plain[0].mean, rtol=1e-5, atol=1e-6)


class Around(nn.Module):
    """A container around another one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("make", [Permuted, ChannelsLast, InPlace, Head])
def test_a_container_inside_a_container_sees_eagers_layout(make):
    plain, fused = twins(lambda: Around(make()))
    xs = [images(3), images(3)]
    with torch.no_grad():
        expected, found = plain(xs[0]), fused(xs[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.stride() == expected.stride() and torch.equal(xs[0], xs[1])


def test_a_parametrization_runs_as_often_as_in_eager():
    plain, fused = twins(lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), Block()))
    counts = []
    for model in (plain, fused):
        nn.utils.parametrizations.weight_norm(model[0])
        calls = []
        model[0].parametrizations.weight[0].register_forward_hook(lambda *args, calls=calls: calls.append(1))
        counts.append(calls)
    agree(plain, fused, images())
    assert counts[0] == counts[1] != []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_a_module_that_came_after_fusing_writes_over_the_users_input(context, layout):
    """As eager does. A container's modules get a copy in channels_last, and the change was lost with it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.conv, self.relu, self.norm = nn.Conv2d(4, 4, 3), nn.ReLU(), nn.GroupNorm(1, 4)

        def forward(self, x):
            return self.norm(self.relu(self.conv(self.bn(self.bn(self.first(x))))))

    def replace(model):
        model.first = nn.ReLU(inplace=True)

    def set_flag(model):
        model[0].inplace = True

    stage = (nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(1, 4))
    fused = rk.fuse(nn.Sequential(nn.Sequential(*stage), nn.Identity()).eval())
    fused[0] = nn.ReLU(inplace=True)
    with context():
        x = torch.randn(2, 4, 9, 9).to(memory_format=layout)
        assert fused(x) is x, "as in eager"
    for model, edit in ((Net(), replace), (nn.Sequential(*stage), set_flag)):
        plain, fused = model.eval(), rk.fuse(model)
        edit(plain)
        edit(fused)
        x = torch.randn(2, 4, 9, 9).to(memory_format=layout)
        ours, theirs = x.clone(), x.clone()
        with context():
            torch.testing.assert_close(fused(ours), plain(theirs))
        assert torch.equal(ours, theirs) and not torch.equal(ours, x)
        # And only then.
        with context():
            again = ours.clone()
            fused(again)
        assert torch.equal(again, ours)


@pytest.mark.filterwarnings("ignore")
def test_a_forward_that_asks_for_classes_sees_those_of_now():
    """It kept what a ReLU made, and after the convolution had become one, it kept what the whole run had made of that."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            kept = []
            for child in self._modules.values():
                x = child(x)
                if isinstance(child, nn.ReLU):
                    kept.append(x)
            return x, kept

    plain = Net().eval()
    fused, x = rk.fuse(plain), torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))
        for model in (plain, fused):
            model.bn.bias.fill_(1.0)
            model.conv = nn.ReLU()
        torch.testing.assert_close(fused(x), plain(x))
        assert len(fused(x)[1]) == 2


def test_a_first_weight_in_both_layouts_at_once_tells_nothing():
    """Then the next one does: a dropout draws its mask in the order of memory."""

    class Drop(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, True)

    model = nn.Sequential(nn.Conv2d(4, 32, 1, groups=4), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), Drop()).eval()
    fused = rk.fuse(model)
    x, results = torch.randn(2, 4, 9, 9), []
    for own in (model, fused):
        own.to(memory_format=torch.channels_last)
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(own(x))
    torch.testing.assert_close(*results)
    assert results[0].stride() == results[1].stride()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("place", (0, 1))
def test_a_block_whose_flag_changed_writes_over_its_input(context, place):
    """Inside a container it got a contiguous copy of that, and the change was lost with it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.active, self.conv, self.bn = True, nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            if self.active:
                x = self.bn(self.conv(x))
            return F.relu(x, inplace=True)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.block, self.last = nn.Conv2d(4, 4, 1), Block(), nn.Softmax(1)

        def forward(self, x):
            y = self.before(x) if place else x
            return self.last(self.block(y) + 2 * y)

    plain, x = Net().eval(), torch.randn(2, 4, 9, 9)
    fused = rk.fuse(plain)
    for active in (True, False):
        ours, theirs = x.clone(), x.clone()
        plain.block.active = fused.block.active = active
        with context():
            torch.testing.assert_close(fused(ours), plain(theirs))
        assert torch.equal(ours, theirs)
