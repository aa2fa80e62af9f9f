"""Networks as torch.fx.GraphModules: fused as a whole, edited, copied and pickled."""

import copy
import operator
import pickle
import warnings

import pytest
import torch
import torch.fx
from torch import nn
from torch.ao.quantization import quantize_fx
from torch.utils import _pytree as pytree

import resnet_kernels as rk
from helpers.oracle import assert_within_budget
from helpers.small_resnet import close, convolutions_that_ran
from resnet_kernels.models.random_weights import randomise_batch_norms_

_noted = []


def note(y):
    _noted.append(y.shape)


def network():
    """torchvision's: torch.fx can't pickle the code of a forward with annotations that are strings, as ours have."""
    resnet = pytest.importorskip("torchvision.models.resnet", reason="needs torchvision")
    torch.manual_seed(0)
    return randomise_batch_norms_(resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=10)).eval()


def traced():
    return torch.fx.symbolic_trace(network())


def extractor():
    net = network()
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(net, ["layer1", "layer3", "layer4"])


def count(model):
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


def check(plain, fused, x):
    with torch.no_grad():
        ours, theirs = pytree.tree_leaves(fused(x)), pytree.tree_leaves(plain(x))
        oracle = copy.deepcopy(plain)
        oracle.train(plain.training)  # torch.fx forgets it
        for (_, a), (_, b) in zip(oracle.named_modules(), plain.named_modules()):
            a.training = b.training
        truths = pytree.tree_leaves(oracle.double()(x.double()))
    assert len(ours) == len(theirs) > 0
    for y, eager, truth in zip(ours, theirs, truths):
        assert_within_budget(y, eager, truth)
        assert y.stride() == eager.stride()


@pytest.mark.parametrize("make", [traced, extractor])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_of_it_is_fused(make, layout):
    plain, x = make(), torch.randn(2, 3, 40, 32).contiguous(memory_format=layout)
    fused = rk.fuse(plain)
    assert isinstance(fused, torch.fx.GraphModule) and fused.graph.nodes and fused.code == plain.code
    assert fused.training == plain.training is False
    for _ in range(2):
        check(plain, fused, x)
    assert len(convolutions_that_ran(fused, x)) == count(plain) == rk.explain(fused).convolutions
    assert not rk.explain(fused).unfused and rk.verify(plain, fused, x)


@pytest.mark.parametrize("make", [traced, extractor])
def test_copies_pickles_and_unfusing(make):
    plain, x = make(), torch.randn(1, 3, 32, 32)
    fused = rk.fuse(plain)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        other.train(False)
        for module in other.modules():
            module.training = False
        check(plain, other, x)
        assert len(convolutions_that_ran(other, x)) == count(plain)
    check(plain, fused, x)  # pickling has not touched it
    assert len(convolutions_that_ran(fused, x)) == count(plain)
    names = list(fused.state_dict())
    rk.unfuse_(fused)
    assert list(fused.state_dict()) == names == list(plain.state_dict())
    assert not convolutions_that_ran(fused, x)
    check(plain, fused, x)


def test_an_edited_graph_is_read_again():
    plain, x = traced(), torch.randn(1, 3, 32, 32)
    fused = rk.fuse(plain)
    check(plain, fused, x)
    for model in (plain, fused):
        add = next(node for node in model.graph.nodes if node.target in (operator.add, operator.iadd))
        with model.graph.inserting_after(add):
            double = model.graph.call_function(operator.mul, (add, 1.5))
        add.replace_all_uses_with(double, delete_user_cb=lambda user, double=double: user is not double)
        model.recompile()
    check(plain, fused, x)
    assert len(convolutions_that_ran(fused, x)) == count(plain)
    for model in (plain, fused):
        node = next(
            node for node in model.graph.nodes if node.op == "call_module" and str(node.target).endswith("relu")
        )
        node.replace_all_uses_with(node.args[0])
        model.graph.erase_node(node)
        model.recompile()
    check(plain, fused, x)


def test_a_graph_that_does_more_than_compute_keeps_its_code():
    plain, x = traced(), torch.randn(1, 3, 32, 32)
    _noted.clear()
    output = next(node for node in plain.graph.nodes if node.op == "output")
    with plain.graph.inserting_before(output):
        plain.graph.call_function(note, (output.args[0],))
    plain.recompile()
    fused = rk.fuse(plain)
    with torch.no_grad():
        close(fused(x), plain(x))
    assert len(_noted) == 2
    report = rk.explain(plain)
    assert report.unfused and not report.fused


def test_hooks_and_training():
    plain, x = traced(), torch.randn(2, 3, 32, 32)
    fused = rk.fuse(plain)
    seen = []
    handle = fused.get_submodule("layer2.0.bn1").register_forward_hook(lambda m, args, y: seen.append(y.shape))
    with pytest.warns(RuntimeWarning, match=r"a hook on layer2\.0\.bn1 has to fire"):
        check(plain, fused, x)
    handle.remove()
    assert seen
    check(plain, fused, x)
    for model in (plain, fused):
        model.train()
        model(x).square().mean().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for a, b in zip(plain.buffers(), fused.buffers()):
        assert torch.equal(a, b)


def test_normalize_and_freeze():
    plain, x = traced(), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    fused = rk.fuse(plain, normalize=(mean, std), freeze=True)
    images = (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for _ in range(2):
        with torch.no_grad():
            close(fused(x), plain(images))


def test_a_module_that_torch_ao_has_fused():
    """Regression: its ConvReLU2d are in train() mode, whatever the model's is, so that calls ran eager without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they move to another package
        plain = quantize_fx.fuse_fx(randomise_batch_norms_(rk.models.resnet18()).eval())
    fused, x = rk.fuse(plain), torch.randn(2, 3, 48, 40)
    assert any(module.training for module in plain.modules())
    assert len(convolutions_that_ran(fused, x)) == rk.explain(fused).convolutions == 20
    assert rk.verify(plain, fused, x)
