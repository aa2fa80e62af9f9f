"""Calls of chains on the CPU: inputs of all kinds, outputs, threads, errors in mid-call, memory, profilers."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import resnet_kernels as rk
from helpers.cpu_chains import assert_next_call_like_eager, net_and_ours, result, same
from helpers.own_kernels import skip_unless_compiled
from resnet_kernels.kernels.cpu import library
from resnet_kernels.models.resnet_v1 import BasicBlock
from resnet_kernels.runtime import checked_calls

NETS = ("torchvision", "v2", "d2l")


@pytest.fixture(autouse=True)
def _wherever_they_can(threads_as_before, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, skip_unless_compiled().isa)


def _inference_tensor():
    with torch.inference_mode():
        return torch.randn(2, 3, 40, 40)


def _spoiled(value):
    x = torch.randn(4, 3, 40, 40)
    x[0, 0, 0, 0] = x[1, 2, 20, 21] = x[2, 1, 39, 39] = value
    return x


class _Named(Tensor):
    pass


INPUTS = {
    "no images": lambda: torch.randn(0, 3, 40, 40),
    "channels_last": lambda: torch.randn(2, 3, 40, 40).contiguous(memory_format=torch.channels_last),
    "expanded images": lambda: torch.randn(1, 3, 40, 40).expand(3, 3, 40, 40),
    "expanded pixels": lambda: torch.randn(2, 3, 1, 1).expand(2, 3, 40, 40),
    "transposed": lambda: torch.randn(2, 3, 40, 48).transpose(2, 3),
    "a slice": lambda: torch.randn(4, 6, 90, 90)[1:3, 1:4, 3:83:2, ::2],
    "a parameter": lambda: nn.Parameter(torch.randn(2, 3, 40, 40)),
    "wants gradients": lambda: torch.randn(2, 3, 40, 40, requires_grad=True),
    "negated": lambda: torch._neg_view(torch.randn(2, 3, 40, 40)),
    "negated, channels_last": lambda: torch._neg_view(
        torch.randn(2, 3, 40, 40).contiguous(memory_format=torch.channels_last)
    ),
    "zeros of autograd's": lambda: torch._efficientzerotensor((2, 3, 40, 40)),
    "an inference tensor": _inference_tensor,
    "a subclass": lambda: torch.randn(2, 3, 40, 40).as_subclass(_Named),
    "wrong channels": lambda: torch.randn(2, 4, 40, 40),
    "one channel": lambda: torch.randn(2, 1, 40, 40),
    "a pixel": lambda: torch.randn(8, 3, 1, 1),
    "four pixels": lambda: torch.randn(2, 3, 2, 2),
    "no pixels": lambda: torch.randn(2, 3, 0, 5),
    "a row": lambda: torch.randn(2, 3, 1, 64),
    "NaN": lambda: _spoiled(float("nan")),
    "inf": lambda: _spoiled(float("inf")),
    "-inf": lambda: _spoiled(-float("inf")),
    "float64": lambda: torch.randn(2, 3, 40, 40).double(),
    "integers": lambda: torch.ones(2, 3, 40, 40, dtype=torch.int32),
    "sparse": lambda: torch.randn(2, 3, 40, 40).to_sparse(),
    "without memory": lambda: torch.randn(2, 3, 40, 40, device="meta"),
    "no tensor": lambda: None,
}


@pytest.mark.parametrize("kind", INPUTS, ids=[name.replace(" ", "_") for name in INPUTS])
@pytest.mark.slow(unless=lambda name, kind: name == "d2l")
@pytest.mark.parametrize("name", NETS)
def test_an_input_of_another_kind_is_as_in_eager(name, kind):
    net, ours = net_and_ours(name)
    assert_next_call_like_eager(net, ours, torch.randn(2, 3, 40, 40))
    x = INPUTS[kind]()
    for _ in range(2):
        if kind in ("a row", "NaN", "inf", "-inf"):
            # fp64 is no guide to what is not finite; and in single numbers eager may be lucky.
            y, eager = result(ours, x), result(net, x)
            assert torch.equal(y.isnan(), eager.isnan()) and torch.equal(y.isinf(), eager.isinf())
            torch.testing.assert_close(y, eager, rtol=1e-3, atol=1e-3, equal_nan=True)
        elif kind in ("float64", "sparse", "without memory", "no tensor", "a subclass"):
            y, eager = result(ours, x), result(net, x)
            assert type(y) is type(eager) and (
                isinstance(y, Exception) or kind == "without memory" or torch.allclose(y, eager, 1e-3, 1e-3)
            )
        else:
            assert_next_call_like_eager(net, ours, x, f"{name}: {kind}")


def test_oneDNNs_own_tensor_is_as_in_eager():
    net, ours = net_and_ours()
    x = torch.randn(2, 3, 40, 40).to_mkldnn()
    torch.testing.assert_close(result(ours, x).to_dense(), result(net, x).to_dense())


def test_freed_images_raise():
    net, ours = net_and_ours()
    x = torch.randn(2, 3, 40, 40)
    assert isinstance(result(ours, x), Tensor)
    x.untyped_storage().resize_(0)
    assert type(result(ours, x)) is type(result(net, x)) is RuntimeError


def test_a_small_number_of_programs_is_kept_for_many_shapes(programs):
    net, ours = net_and_ours("d2l")
    shapes = [
        (n, 3, h, w) for n, h, w in ((1, 32, 32), (2, 40, 32), (3, 48, 56), (4, 33, 47), (5, 64, 32), (1, 35, 96))
    ]
    first = {}
    for _ in range(2):
        for shape in shapes:
            x = torch.linspace(-2, 2, 3).view(1, 3, 1, 1) * torch.randn(
                shape, generator=torch.Generator().manual_seed(3)
            )
            if shape not in first:
                first[shape] = assert_next_call_like_eager(net, ours, x, str(shape))
            assert torch.equal(result(ours, x), first[shape])
            names = [key[0] for key in ours._rk_state.copies.compiled]
            assert all(names.count(name) <= 4 for name in names)
    assert len(programs) == 3 * len(shapes)


def _memory(field):
    """Bytes that are mapped (0), or resident (1)."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * 4096


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_memory_does_not_grow_with_the_number_of_shapes(name):
    net, ours = net_and_ours(name)
    generator = np.random.default_rng(0)

    after_warm_up = 0
    for call in range(400):
        n, h, w = int(generator.integers(1, 5)), *map(int, generator.integers(32, 97, 2))
        x = torch.randn(n, 3, h, w)
        if call == 200:
            after_warm_up = _memory(1)
        y = result(ours, x)
        if call % 20 == 0:
            torch.testing.assert_close(y, result(net, x), rtol=1e-3, atol=1e-3)
    assert _memory(1) - after_warm_up < 64 * 2**20
    for module in ours.modules():
        if (state := module.__dict__.get("_rk_state")) is not None:
            names = [key[0] for key in state.copies.compiled]
            assert all(names.count(one) <= 4 for one in names)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_edits_of_a_weight():
    net = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU()).eval()
    ours, x = rk.fuse(net), torch.randn(1, 128, 6, 6)
    weight = ours[0].weight
    before = 0
    for edit in range(120):
        if edit == 20:
            before = _memory(0)
        with torch.no_grad():
            weight.mul_(0.99)
        result(ours, x)
    # Each packed weight has 1 MB.
    assert _memory(0) - before < 32 * 2**20
    net[0].weight.data.copy_(weight)
    torch.testing.assert_close(result(ours, x), result(net, x), rtol=1e-4, atol=1e-4)


# ---- outputs


def test_outputs_are_the_users_own():
    net, ours = net_and_ours()
    features = copy.deepcopy(net)
    features.avgpool = features.fc = nn.Identity()
    features = rk.fuse(features)
    x = torch.randn(2, 3, 40, 40)
    for model in (ours, features, net_and_ours("v2")[1]):
        first = result(model, x)
        kept, before = first, first.clone()
        second = result(model, x)
        assert second.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        second.fill_(float("nan"))
        assert torch.equal(first, before) and torch.equal(result(model, x), before)
        assert torch.equal(kept, before) and first.untyped_storage().nbytes() == 4 * first.numel()
        image = x.clone()
        result(model, x)
        assert torch.equal(x, image)


@pytest.mark.parametrize("channels_last", (False, True))
def test_features_have_eagers_strides(channels_last, programs):
    from torchvision.models._utils import IntermediateLayerGetter

    net = net_and_ours()[0]
    getter = IntermediateLayerGetter(net, {"layer1": "a", "layer3": "b", "layer4": "c"}).eval()
    x = torch.randn(2, 3, 40, 40)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    ours = rk.fuse(getter)
    first = assert_next_call_like_eager(getter, ours, x)
    assert sum(programs) >= 14
    before = {name: value.clone() for name, value in first.items()}
    for value in result(ours, x).values():
        value.fill_(0)
    assert all(torch.equal(first[name], before[name]) for name in before)
    assert all(torch.equal(value, before[name]) for name, value in result(ours, x).items())


# ---- threads


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("sizes", ((40, 56), (40, 40, 40, 40)), ids=("two_shapes", "four_threads"))
def test_threads_of_one_model(sizes, frozen):
    ours = net_and_ours("d2l", freeze=frozen)[1]
    images = [torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]
    expected = [result(net_and_ours("d2l")[1], x) for x in images]
    wrong: list[object] = []
    start = threading.Barrier(len(images))

    def calls(x, y):
        start.wait()
        for _ in range(50):
            found = result(ours, x)
            if not (isinstance(found, Tensor) and torch.equal(found, y)):
                wrong.append(found)

    threads = [threading.Thread(target=calls, args=case) for case in zip(images, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_another_number_of_threads_is_seen_by_the_next_call(programs):
    net, ours = net_and_ours()
    x = torch.randn(4, 3, 40, 40)
    for threads in (1, 2, 1, 3, 2):
        torch.set_num_threads(threads)
        programs.clear()
        assert_next_call_like_eager(net, ours, x, f"{threads} threads")
        assert sum(programs) >= 14
    kept = ours._rk_state.copies.compiled
    assert {key[3] for key in kept} == {1, 2, 3} and len(kept) <= 4


# ---- errors in mid-call


class _Raises(nn.Module):
    """A module of the user's that raises in every second call."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, x):
        self.calls += 1
        if self.calls % 2 == 0:
            raise self.error("in mid-call")
        return x * 2


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt))
@pytest.mark.parametrize("place", ("between", "behind"))
def test_a_call_after_an_error_is_right(place, error):
    torch.manual_seed(0)
    blocks = [BasicBlock(8, 8), BasicBlock(8, 8)]
    user = _Raises(error)
    net = nn.Sequential(*([*blocks[:1], user, *blocks[1:]] if place == "between" else [*blocks, user])).eval()
    ours = rk.fuse(net)
    x = torch.randn(2, 8, 12, 12)
    with torch.no_grad():
        first = ours(x)
        user.calls = 0
        torch.testing.assert_close(first, net(x), rtol=1e-4, atol=1e-4)
        next(m for m in ours.modules() if isinstance(m, _Raises)).calls = 0
        for call in range(6):
            if call % 2:
                with pytest.raises(error, match="in mid-call"):
                    ours(x)
            else:
                assert torch.equal(ours(x), first)
            assert not any(value is not None for value in vars(checked_calls._call_state).values())


# ---- normalize, profilers


@pytest.mark.parametrize("frozen", (False, True))
def test_normalized_images(frozen, programs):
    net = net_and_ours()[0]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = rk.fuse(net, normalize=(mean, std), freeze=frozen)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    shape = (1, 3, 1, 1)
    x = (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    results = [result(ours, images) for _ in range(3)]
    for y in results:
        torch.testing.assert_close(y, result(net, x), rtol=1e-3, atol=1e-3)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    assert programs == [16, 16, 16]
    last = result(ours, images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, results[2], rtol=1e-4, atol=1e-4)


def test_profilers_show_each_layer(programs):
    ours = net_and_ours()[1]
    x = torch.randn(2, 3, 40, 40)
    before = result(ours, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = result(ours, x)
    assert torch.equal(y, before) and programs[-1] == 16
    names = [event.name for event in profile.events()]
    assert sum(name.startswith("resnet_kernels::conv_bias_act.") for name in names) == 15
    assert {"resnet_kernels::conv_bias_act.winograd", "resnet_kernels::conv_bias_act.direct"} <= {*names}
    assert names.count("resnet_kernels::average_pool") == 1
    for step in ("layer1.0.conv1+bn1+relu", "layer2.1.conv2+bn2+add+relu", "fc", "avgpool"):
        assert any(name.endswith(step) for name in names), step
    assert same(result(ours, x), before)
