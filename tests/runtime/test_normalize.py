"""fuse(model, normalize=(mean, std)): the fused model takes images as a decoder gives them, whatever runs."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import assert_within_budget
from helpers.stem_nets import Net, prepared
from resnet_kernels import models

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZE = (MEAN, STD)


def normalized(x, dtype=torch.float32):
    v = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    mean, std = (torch.tensor(s)[:, None, None] for s in NORMALIZE)
    return ((v - mean) / std).to(dtype)


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 24, 20), dtype=torch.uint8)


@pytest.fixture(params=("uint8", "float32", "channels_last"))
def x(request, images):
    floats = images / 255
    return {"uint8": images, "float32": floats, "channels_last": floats.contiguous(memory_format=torch.channels_last)}[
        request.param
    ]


@torch.no_grad()
def same(fused, model, x):
    y, expected = fused(x), model(normalized(x))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert y.stride() == expected.stride()


def test_gives_what_the_model_gives_on_normalized_images(x):
    model = prepared(Net())
    fused = rk.fuse(model, normalize=NORMALIZE)
    for _ in range(2):
        same(fused, model, x)
    with torch.no_grad(), pytest.raises(AssertionError):
        torch.testing.assert_close(fused(x), rk.fuse(model)(x.float()))


def test_where_no_run_is_at_the_entry(x):
    """The first convolution of a Sequential lies in a block of its own: normalized in front."""
    net = prepared(Net())
    model = nn.Sequential(nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool), net.layer1)
    fused = rk.fuse(model, normalize=NORMALIZE)
    assert fused._rk_state.plan.entry is None
    same(fused, model, x)


def test_in_training_with_gradients_and_under_hooks(x):
    model = prepared(Net()).train()
    fused = rk.fuse(model, normalize=NORMALIZE)
    y, expected = fused(x), model(normalized(x))
    torch.testing.assert_close(y, expected)
    model.eval(), fused.eval()
    fused.bn1.register_forward_hook(lambda *_: None)
    with pytest.warns(RuntimeWarning, match="a hook on bn1"):
        same(fused, model, x)
    if x.dtype != torch.uint8:
        leaf = x.clone().requires_grad_()
        with pytest.warns(RuntimeWarning, match="gradients are on"):
            fused(leaf).sum().backward()
        assert leaf.grad.abs().sum() > 0


def test_eager_backend_and_other_dtypes(x):
    model = prepared(Net())
    same(rk.fuse(model, normalize=NORMALIZE, backend="eager"), model, x)
    double = model.double()
    expected = double(normalized(x).double())
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="runs float32 and bfloat16, got torch.float64"):
        torch.testing.assert_close(rk.fuse(double, normalize=NORMALIZE)(x), expected, rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_keep_it_and_unfuse_removes_it(images):
    model = prepared(Net())
    fused = rk.fuse(model, normalize=NORMALIZE)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        same(twin, model, images)
    rk.fuse_(fused)
    same(fused, model, images)
    other = rk.fuse_(fused, normalize=((0.5,) * 3, (0.5,) * 3))
    assert other.normalize.mean == (0.5,) * 3
    rk.unfuse_(fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(normalized(images)), model(normalized(images)))
    assert rk.fuse_(fused).normalize is None


def test_the_report_shows_it():
    model = prepared(Net())
    fused = rk.fuse(model, normalize=NORMALIZE)
    report = rk.explain(fused)
    assert "normalized by mean (0.485, 0.456, 0.406)" in str(report)
    assert json.loads(report.to_json())["normalize"] == {"mean": [*MEAN], "std": [*STD]}
    assert rk.explain(model).normalize is None and "normalized" not in str(rk.explain(model))


@pytest.mark.parametrize(
    "normalize, reason",
    [
        (((0.5,) * 3, (0.5,) * 2), "for each channel, got 3 and 2"),
        (((0.5,), (0.5,)), "model's 3 channels, got 1"),
        (((), ()), "for each channel"),
        (((0.5,) * 3, (0.5, 0.0, 0.5)), "no std of 0"),
        (((0.5,) * 3, (0.5, float("nan"), 0.5)), "finite numbers"),
        (((0.5,) * 3, ("a",) * 3), "finite numbers"),
        (0.5, r"must be \(mean, std\)"),
        ((0.5, 0.5), r"must be \(mean, std\)"),
        ("ab", r"must be \(mean, std\)"),
    ],
)
def test_what_is_refused(normalize, reason):
    model = prepared(Net())
    with pytest.raises(ValueError, match=reason):
        rk.fuse_(model, normalize=normalize)
    assert type(model) is Net and not rk.explain(model).normalize


def test_a_model_that_can_not_take_it_is_refused():
    with pytest.raises(ValueError, match="network with fused blocks in it"):
        rk.fuse(models.resnet_v1.BasicBlock(8, 8).eval(), normalize=NORMALIZE)
    with pytest.raises(ValueError, match="network with fused blocks in it"):
        rk.fuse(nn.Linear(3, 3), normalize=NORMALIZE)


def test_inputs_that_are_no_images_are_refused(images):
    fused = rk.fuse(prepared(Net()), normalize=NORMALIZE)
    with pytest.raises(TypeError, match=r"uint8 or floating-point tensor .* got torch\.int64"):
        fused(images.long())
    with pytest.raises(TypeError, match="got list"):
        fused([images])
    with pytest.raises(TypeError, match="first positional"):
        fused(x=images)
    for wrong in (images[:, :1], images[0]):
        with pytest.raises(ValueError, match=r"x must be \(N, 3, H, W\)"):
            fused(wrong)


def test_verify_says_that_it_can_not_compare(images):
    model = prepared(Net())
    with pytest.raises(ValueError, match="takes other images than model"):
        rk.verify(model, rk.fuse(model, normalize=NORMALIZE), images / 255)


@torch.no_grad()
@pytest.mark.parametrize("floats", (False, True))
def test_the_stem_kernel_normalizes_while_it_packs(floats, launches, images):
    model = prepared(Net())
    model.layer1 = nn.Sequential(model.layer1[0])
    half, x = model.half(), images[:1]
    x = x / 255 if floats else x
    fused = rk.fuse(half, normalize=NORMALIZE, backend="triton")
    true = normalized(x).half()
    assert_within_budget(fused(x), half(true), half.double()(normalized(x.double() if floats else x).double()))
    ((image, *_, mean, std),) = launches
    assert image.dtype == x.dtype and (mean, std) == NORMALIZE
