"""BN as scale and shift, and packed weights that are never stale (rule 2)."""

import numpy as np
import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import assert_within_budget, skip_unless_runnable
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.ops import reference
from resnet_kernels.runtime.cpu import packed_conv


@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("channels", (1, 17, 512, 1030))
def test_scale_shift_kernel_against_fp64(affine, bias, dtype, channels, device):
    """Variances of 6e4 and 1e-15 included; PyTorch's own fp32 is the budget."""
    skip_unless_runnable("triton", device, torch.float32)
    from resnet_kernels.kernels import bn_scale_shift

    mean, var = torch.randn(channels).to(dtype), torch.rand(channels).to(dtype) + 0.1
    var[0], var[-1] = 6e4, 1e-15
    weight, shift = (torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)) if affine else (None, None)
    conv_bias = torch.randn(channels).to(dtype) if bias else None
    vectors = [None if t is None else t.to(device) for t in (weight, shift, mean, var, conv_bias)]
    oracle = reference.bn_scale_shift(*(None if t is None else t.double() for t in vectors), 1e-5)
    results = zip(
        bn_scale_shift.Layers([tuple(vectors)], (1e-5,)).launch(), reference.bn_scale_shift(*vectors, 1e-5), oracle
    )
    for value, eager, right in results:
        assert_within_budget(value, eager, right)


def test_layers_of_any_width_in_one_launch(device):
    skip_unless_runnable("triton", device, torch.float32)
    from resnet_kernels.kernels import bn_scale_shift

    def vectors(channels, affine, bias):
        drawn = [torch.rand(channels, device=device) + 0.1 for _ in range(5)]
        return (*((None, None) if not affine else drawn[:2]), *drawn[2:4], drawn[4] if bias else None)

    layers = [vectors(16, True, False), vectors(700, False, True), vectors(3, True, True), vectors(64, False, False)]
    eps = (1e-5, 1e-3, 0.5, 1e-5)
    table = bn_scale_shift.Layers(layers, eps)
    layers[0][3].mul_(4)  # read as it is now, not as it was
    for (scale, shift), layer, e in zip(table.split(*table.launch()), layers, eps):
        oracle = reference.bn_scale_shift(*(None if t is None else t.double() for t in layer), e)
        for value, eager, right in zip((scale, shift), reference.bn_scale_shift(*layer, e), oracle):
            assert_within_budget(value, eager, right)
    tensors = [tensor for layer in layers for tensor in layer]
    assert table.are(tensors, eps) and not table.are(tensors, (*eps[:3], 1e-4))
    moved = [*tensors[:-5], *(t if t is None else t.clone() for t in tensors[-5:])]
    assert not table.are(moved, eps)


def test_a_layer_without_a_norm_is_its_bias(device):
    skip_unless_runnable("triton", device, torch.float32)
    from resnet_kernels.kernels import bn_scale_shift

    mean, var, bias = torch.randn(5, device=device), torch.rand(5, device=device) + 0.1, torch.randn(7, device=device)
    layers = [(None, None, None, None, bias), (None, None, mean, var, None)]
    assert bn_scale_shift.takes(layers) and bn_scale_shift.takes(layers[::-1])
    table = bn_scale_shift.Layers(layers, (0.0, 1e-5))
    scale, shift = table.split(*table.launch())[0]
    assert torch.equal(scale, torch.ones_like(bias)) and torch.equal(shift, bias)


def test_vectors_that_no_table_takes(device):
    skip_unless_runnable("triton", device, torch.float32)
    from resnet_kernels.kernels.bn_scale_shift import takes

    mean, var = torch.zeros(8, device=device), torch.ones(8, device=device)
    assert takes([(None, None, mean, var, None)])
    for weight in (mean.double(), mean.half(), mean[:4], torch.zeros(16, device=device)[::2]):
        assert not takes([(None, None, mean, var, None), (weight, None, mean, var, None)])


def _model(dtype=torch.float32):
    model = randomise_batch_norms_(nn.Sequential(rk.models.resnet_v1.BasicBlock(32, 32), nn.Identity())).eval()
    return model.to(dtype)


def _fused(model):
    return rk.fuse(model, backend="cpu")


def _edit_single_vector_behind_pytorch(block):
    block.bn2.running_mean.numpy()[3] += 2.0


def _edit_weight_in_numpy(block):
    block.conv1.weight.detach().numpy()[:] *= 0.5


def _data_mul(block):
    block.conv2.weight.data.mul_(-1)


def _replace_parameter(block):
    block.conv1.weight = nn.Parameter(block.conv1.weight * 2)


def _replace_data(block):
    block.bn1.weight.data = block.bn1.weight.data * 3


def _replace_module(block):
    block.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)


def _edit_eps(block):
    block.bn1.eps = 1.0


def _edit_buffer(block):
    block.bn1.running_var.mul_(4)


def _bn_statistics(block):
    block.bn1.train()
    block.bn1(torch.randn(4, 32, 8, 8) * 3)
    block.bn1.eval()


def _load_state_dict(block):
    block.load_state_dict({key: value * 1.5 for key, value in block.state_dict().items()})


def _add_bias(block):
    block.conv1.bias = nn.Parameter(torch.ones(32))


def _fused_optimizer(block):
    for p in block.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(block.parameters(), lr=0.1, fused=True).step()
    block.zero_grad()


def _training_step(block):
    block.train()
    block(torch.randn(2, 32, 8, 8)).square().mean().backward()
    torch.optim.Adam(block.parameters(), lr=0.1, fused=True).step()
    block.eval()


EDITS = [
    _edit_single_vector_behind_pytorch, _edit_weight_in_numpy, _data_mul, _replace_parameter, _replace_data,
    _replace_module, _edit_eps, _edit_buffer, _bn_statistics, _load_state_dict, _add_bias, _fused_optimizer,
    _training_step,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode), ids=lambda f: f.__name__)
def test_never_stale(edit, mode):
    """Whatever is done to the live model, the next call sees it."""
    skip_unless_runnable("cpu", torch.device("cpu"), torch.float32)
    fused, x = _fused(_model()), torch.randn(2, 32, 8, 8)
    with mode():
        before = fused(x)
    with torch.no_grad() if edit is not _training_step else torch.enable_grad():
        edit(fused[0])
    with mode():
        after = fused(x)
        expected = type(fused[0])._rk_original_class.forward(fused[0], x)
    assert not torch.allclose(before, after), "the edit must matter"
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        fused, x = _fused(_model()), torch.randn(2, 32, 8, 8)
        before = fused(x)
        fused[0].conv1.weight.mul_(2)
        after = fused(x)
        torch.testing.assert_close(after, type(fused[0])._rk_original_class.forward(fused[0], x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before, after)


def test_refresh_sees_a_single_weight_written_behind_pytorch():
    fused, x = _fused(_model()), torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        fused(x)
        weight = fused[0].conv1.weight.detach().numpy()
        weight[np.unravel_index(5, weight.shape)] += 100.0
        rk.refresh(fused)
        torch.testing.assert_close(
            fused(x), type(fused[0])._rk_original_class.forward(fused[0], x), rtol=1e-4, atol=1e-4
        )


def test_planted_bug_a_pack_that_is_never_checked_is_stale(monkeypatch):
    """The staleness tests above can fail."""
    monkeypatch.setattr(packed_conv.PackedConv, "is_unchanged", lambda *arguments: True)
    with pytest.raises(AssertionError):
        test_never_stale(_data_mul, torch.no_grad)


def test_packed_weights_are_dropped_by_train_to_and_gradients():
    fused, x = _fused(_model()), torch.randn(2, 32, 8, 8)
    packs = lambda: fused[0].__dict__["_rk_state"].copies.packs  # noqa: E731
    for drop in (lambda: fused.train().eval(), lambda: fused.to(torch.float32), lambda: rk.refresh(fused)):
        with torch.no_grad():
            fused(x)
        assert packs()
        drop()
        assert not packs()
    with torch.no_grad():
        fused(x)
    with pytest.warns(RuntimeWarning, match="gradients are on in eval mode"):
        fused(x)
    assert not packs()


def test_folding_that_overflows_runs_unfolded():
    """Rule 1: no finite output turns non-finite, not even for a gamma of 1e30 over weights of 1e10 and inputs of 1e-38."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight.fill_(1e10)
        model[1].weight.fill_(1e30)
        x = torch.full((1, 4, 3, 3), 1e-37)
        expected = model(x)
        assert expected.isfinite().all() and expected.min() > 0
        torch.testing.assert_close(_fused(model)(x), expected, rtol=1e-5, atol=0)


def test_running_var_of_6e4_and_1e_15_in_half_precision(device):
    """Rule 1: BN's scale and shift are computed in fp32 whatever the dtype."""
    dtype = torch.bfloat16
    if device.type == "cpu":
        skip_unless_runnable("cpu", device, dtype)
    model = _model(dtype).to(device)
    with torch.no_grad():
        model[0].bn1.running_var.fill_(6e4)
        model[0].bn2.running_var.fill_(1e-15)
    x = torch.randn(1, 32, 8, 8, device=device).to(dtype)
    assert rk.verify(model, rk.fuse(model), x)


def test_a_weight_that_is_not_dense_is_packed_in_each_call():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    fused = _fused(model)
    fused[0].weight = nn.Parameter(torch.ones(1, 1, 1, 1).expand(4, 4, 1, 1))
    x = torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        for factor in (1.0, 2.0):
            fused[0].weight.data = torch.full((1, 1, 1, 1), factor).expand(4, 4, 1, 1)
            torch.testing.assert_close(fused(x), nn.Sequential.forward(fused, x))
