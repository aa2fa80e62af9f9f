"""Inputs and weights of subclasses of Tensor: they run fused, and come out as eager gives them."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.testing._internal.two_tensor import TwoTensor

import resnet_kernels as rk
from helpers.own_kernels import is_fused_convolution
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.models.resnet_v1 import BasicBlock

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


class TensorImage(Tensor):
    """Tensor's own rule, as fastai's images have it: the subclass comes out."""


class Plain(Tensor):
    """torchvision's rule: a plain Tensor comes out."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            y = function(*args, **(kwargs or {}))
        return y.as_subclass(Tensor) if isinstance(y, cls) else y


class MetaTensor(Tensor):
    """MONAI's rule: the subclass comes out, with the metadata of the operation's first argument that has some."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs or {})
        meta = next((a.meta for a in args if isinstance(a, cls) and hasattr(a, "meta")), None)
        if isinstance(y, cls) and meta is not None:
            y.meta = meta
        return y


class Off(Tensor):
    """A rule that is switched off: plain tensors come out."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Weight(nn.Parameter):
    """A Parameter of a class of its own."""


class Net(nn.Module):
    """A stem and a stage, with user's code before, between and after them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.layer1, self.layer2 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16)), BasicBlock(16, 16)
        self.seen = []

    def see(self, x):
        self.seen.append((type(x), getattr(x, "meta", None)))
        return x

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(self.see(x))))
        return self.see(self.layer2(self.see(self.layer1(self.see(x)))))


def block():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


def stage():
    """A container without a run at its entry."""
    return nn.Sequential(nn.Identity(), BasicBlock(3, 3), BasicBlock(3, 3))


def fused_calls(call):
    """A call's result, and how many fused convolutions ran; a warning is an error."""
    with warnings.catch_warnings(), torch.no_grad(), profile() as profiled:
        warnings.simplefilter("error", RuntimeWarning)
        y = call()
    return y, sum(e.count for e in profiled.key_averages() if is_fused_convolution(e.key))


def make(net):
    torch.manual_seed(0)
    return randomise_batch_norms_(net()).eval()


@pytest.mark.parametrize("kind", (TensorImage, Plain, MetaTensor, Off, Weight))
@pytest.mark.parametrize("net", (block, stage, Net))
def test_a_plain_subclass_ran_eager_without_a_word(net, kind):
    net, x = make(net), torch.randn(2, 3, 48, 48)
    fused = rk.fuse(net)
    _, expected_calls = fused_calls(lambda: fused(x))
    image = Weight(x) if kind is Weight else x.as_subclass(kind)
    image.meta = "from a scanner"
    for model in (net, fused):
        model.seen = []
    with torch.no_grad():
        expected = net(image)
    for _ in range(2):
        fused.seen.clear()
        y, calls = fused_calls(lambda: fused(image))
        assert calls == expected_calls > 0
        assert type(y) is type(expected) and y.__dict__ == expected.__dict__
        assert y.stride() == expected.stride() and fused.seen == net.seen
        torch.testing.assert_close(y.as_subclass(Tensor), expected.as_subclass(Tensor))
    assert type(image) is kind and image.meta == "from a scanner"


def test_an_image_of_torchvision():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors", reason="needs torchvision")
    net, x = make(Net), tv_tensors.Image(torch.randn(2, 3, 48, 48))
    fused = rk.fuse(net)
    with torch.no_grad():
        expected = net(x)
    fused.seen.clear()
    y, calls = fused_calls(lambda: fused(x))
    assert calls and type(y) is type(expected) is Tensor and fused.seen == net.seen
    with tv_tensors.set_return_type("TVTensor"), torch.no_grad():
        assert type(fused(x)) is type(net(x))


def test_images_of_a_subclass_are_normalized():
    class Quiet(Net):
        def see(self, x):
            return x

    mean_std, net = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), make(Quiet)
    fused = rk.fuse(net, normalize=mean_std)
    x = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    expected, calls = fused_calls(lambda: fused(x))
    y, calls_for_subclass = fused_calls(lambda: fused(x.as_subclass(TensorImage)))
    assert calls == calls_for_subclass and torch.equal(y.as_subclass(Tensor), expected)


class Refusing(Tensor):
    """A rule that knows PyTorch's own operations only."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if not getattr(function, "__module__", None) or "resnet_kernels" not in function.__module__:
            return super().__torch_function__(function, types, args, kwargs)
        return NotImplemented


def test_a_rule_that_refuses_runs_eager_and_is_named_once():
    net, x = make(Net), torch.randn(2, 3, 48, 48).as_subclass(Refusing)
    fused = rk.fuse(net)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="__torch_function__ of Refusing refuses") as said:
        for _ in range(2):
            assert torch.equal(fused(x), net(x))
    assert len(said) == 1


class FirstTwo(Tensor):
    """A rule that hands on the first two images only."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(args[0].as_subclass(Tensor)[:2], *args[1:], **(kwargs or {}))


def test_a_rule_that_hands_on_another_tensor():
    net, x = make(block), torch.randn(4, 3, 48, 48).as_subclass(FirstTwo)
    fused = rk.fuse(net)
    with torch.no_grad():
        expected = net(x)
    y, calls = fused_calls(lambda: fused(x))
    assert calls and len(y) == 2
    torch.testing.assert_close(y, expected)


def test_an_error_of_the_operation_is_not_taken_for_a_refusal(monkeypatch):
    fused, x = rk.fuse(make(block), backend="cpu"), torch.randn(2, 3, 48, 48).as_subclass(TensorImage)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        with pytest.raises(RuntimeError, match="oneDNN is switched off"):
            fused(x)


@pytest.mark.parametrize("net", (block, stage, Net))
def test_a_subclass_with_a_dispatch_of_its_own_runs_eager_and_is_named_once(net):
    net, x = make(net), TwoTensor(torch.randn(2, 3, 48, 48), torch.randn(2, 3, 48, 48))
    fused = rk.fuse(net)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="TwoTensor is a subclass of Tensor with") as said:
        for _ in range(2):
            expected, y = net(x), fused(x)
            assert type(y) is TwoTensor and torch.equal(y.a, expected.a) and torch.equal(y.b, expected.b)
    assert len({str(w.message) for w in said}) == len(said)


def test_a_gradient_for_an_input_of_a_subclass():
    net = make(block).requires_grad_(False)
    fused, gradients = rk.fuse(net), []
    for model in (net, fused):
        x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)).as_subclass(TensorImage)
        y = model(x.requires_grad_())
        assert type(y) is TensorImage
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def with_weights(net, of):
    for module in net.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = of(value.detach())
    return net


def test_weights_of_a_subclass_of_parameter():
    net, x = with_weights(make(Net), Weight), torch.randn(2, 3, 48, 48)
    fused = rk.fuse(net)
    with torch.no_grad():
        expected = net(x)
    y, calls = fused_calls(lambda: fused(x))
    assert calls
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("kind", (TensorImage, MetaTensor))
def test_weights_with_a_rule_run_eager_and_are_named(kind):
    """Their rule asks to see each operation that reads them."""
    net = make(Net)
    fused, x = rk.fuse(net), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        fused(x)
    for model in (net, fused):
        with_weights(model, lambda value: nn.Parameter(value.as_subclass(kind)))
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=f"conv1.weight is a {kind.__name__}"):
        expected, y = net(x), fused(x)
    assert type(y) is type(expected)
    torch.testing.assert_close(y.as_subclass(Tensor), expected.as_subclass(Tensor), rtol=0, atol=1e-5)
    assert any(f"weight is a {kind.__name__}" in row.reason for row in rk.explain(fused))


def test_weights_with_a_dispatch_of_their_own_run_eager_and_are_named():
    net = make(block)
    twin = copy.deepcopy(net)
    for model in (net, twin):
        weight = model[0].weight.detach()
        model[0].weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    fused, x = rk.fuse_(twin) and twin, torch.randn(2, 3, 48, 48)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="0.weight is a TwoTensor"):
        expected, y = net(x), fused(x)
    assert type(y) is type(expected)
