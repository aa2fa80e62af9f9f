"""PReLU in our Triton kernels, which read its slopes: each kernel against fp64, gradients against autograd's, planted bugs."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

from helpers.activations import INF, NAN, assert_activated, special
from helpers.batch_norms import compare, nothing_but, vectors
from helpers.convolutions import Case, operands, truth
from helpers.oracle import DTYPES, assert_within_budget, skip_unless_runnable
from helpers.planted import plant, planted
from resnet_kernels import ops
from resnet_kernels.kernels.activations import PReLU
from resnet_kernels.kernels.geometry import Geometry, normalize
from resnet_kernels.kernels.operands import ConvOperands

CHANNELS_LAST = torch.channels_last
FP16 = torch.float16
GROUPED = Case("", 2, 16, 5, 6, 24, groups=2)


@pytest.fixture
def triton_fp32(device):
    skip_unless_runnable("triton", device, torch.float32)


def slopes(number, device):
    """Of both signs, beyond 1, and none alike."""
    return torch.linspace(-1.7, 2.3, number, device=device)


def on_cpu(last):
    return PReLU(last.slopes.cpu())


@pytest.mark.parametrize("number", ("one", "each"))
def test_the_pass_after_a_convolution(triton_fp32, number, device):
    from resnet_kernels.kernels import epilogue

    for channels in (3, 64):
        last = PReLU(slopes(channels if number == "each" else 1, device))
        x = special(2, channels, 5, 7).to(device, memory_format=CHANNELS_LAST)
        scale, shift = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
        for residual in (None, x):
            z = epilogue.launch(x, scale, shift, residual, activation=None)
            y = epilogue.launch(x, scale, shift, residual, activation=last)
            assert_activated(y.cpu(), on_cpu(last), z.cpu())


def test_slopes_of_any_layout(triton_fp32, device):
    """Strided, negated lazily, one expanded, and a parameter, which is read where it is."""
    from resnet_kernels.kernels import activations, epilogue

    x = torch.randn(2, 6, 5, 7, device=device).contiguous(memory_format=CHANNELS_LAST)
    dense = slopes(6, device)
    for given in (dense.repeat_interleave(2)[::2], torch._neg_view(-dense), dense[2:3].expand(6), dense[2:3]):
        y = epilogue.launch(x, None, None, activation=PReLU(given))
        torch.testing.assert_close(y, PReLU(given.clone())(x), rtol=1e-6, atol=1e-6)
    parameter = torch.nn.Parameter(dense)
    assert activations.slopes_by_channel(PReLU(parameter), 6) is parameter


def portable(kernel, device):
    """The portable kernel's result on groups, its PReLU, and what that has to read, from the package's own kernel."""
    from resnet_kernels.kernels import conv_bias_act

    x, weight, bias, _, scale = operands(GROUPED, torch.float32, device, real=True)
    residual = special(2, 24, 5, 6).to(device, memory_format=CHANNELS_LAST)
    given = ConvOperands(x, weight, bias, residual, scale, normalize(1, 1, 1, 2), PReLU(slopes(24, device)))
    return (
        kernel.launch(given).cpu(),
        on_cpu(given.activation),
        conv_bias_act.launch(given._replace(activation=None)).cpu(),
    )


def test_the_portable_convolution(triton_fp32, device):
    from resnet_kernels.kernels import conv_bias_act

    assert_activated(*portable(conv_bias_act, device))


@pytest.mark.parametrize(
    "bug",
    (
        ("slope_of(slopes_ptr, SLOPE, offs_c,", "slope_of(slopes_ptr, SLOPE, offs_n,"),
        ("elementwise.activate(acc, ACT, elementwise.slope_of(slopes_ptr, SLOPE, offs_c, mask_n))", "acc"),
        ("slopes_ptr=slopes_by_channel(activation, c_out)", "slopes_ptr=slopes_by_channel(activation, c_out).flip(0)"),
    ),
    ids=("slopes of the first group", "left out", "slopes of another channel"),
)
def test_a_bug_in_the_portable_convolution_is_caught(triton_fp32, bug, tmp_path, device):
    found = portable(planted("conv_bias_act", tmp_path, *bug), device)
    with pytest.raises(AssertionError):
        assert_activated(*found)


@pytest.mark.usefixtures("hopper_with_nan_outputs")
def test_hoppers_convolutions(device):
    from resnet_kernels.kernels.sm90 import conv, tap_sharing

    for kernel, case in (
        (conv, Case("", 2, 24, 6, 5, 40)),
        (conv, Case("", 2, 64, 9, 9, 72, stride=2)),
        (tap_sharing, Case("", 1, 32, 4, 6, 40)),
    ):
        x, weight, bias, residual, scale = operands(case, FP16, device, real=True)
        last = PReLU(slopes(case.c_out, device))
        geometry = normalize(case.stride, 1, 1, 1)
        y = kernel.launch(ConvOperands(x, weight, bias, residual, scale, geometry, last))
        linear = truth(case, x, weight, bias, residual, scale, False)
        eager = ops.conv_bias_act(
            x, weight, bias, residual, scale=scale, stride=case.stride, padding=1, activation=last, backend="eager"
        )
        assert_within_budget(y, eager, on_cpu(last)(linear), kernel.__name__)


@pytest.mark.usefixtures("hopper_with_nan_outputs")
def test_a_merged_shortcut(device):
    from resnet_kernels.kernels.sm90 import conv

    h, x = (torch.randn(2, channels, 6, 5, device=device).to(FP16) for channels in (32, 16))
    weight, own = (torch.randn(40, channels, 1, 1, device=device).to(FP16) / 8 for channels in (32, 16))
    scale, own_scale = torch.rand(40, device=device) + 0.5, torch.rand(40, device=device) + 0.5
    last = PReLU(slopes(40, device))
    for parks in (False, True):
        scale = torch.where(torch.arange(40, device=device) == 7, 1e12, scale) if parks else scale
        y = conv.launch(
            ConvOperands(h, weight, None, None, scale, Geometry(), last),
            shortcut=conv.Shortcut(x, own, None, own_scale, Geometry()),
        )
        parts = [
            torch.conv2d(image.double().cpu(), w.double().cpu()) * s.double().cpu()[:, None, None]
            for image, w, s in ((h, weight, scale), (x, own, own_scale))
        ]
        torch.testing.assert_close(y.double().cpu(), on_cpu(last)(sum(parts)).to(FP16).double(), rtol=2e-3, atol=2e-3)


@pytest.mark.slow(unless=lambda dtype, **_: dtype == torch.float32)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("with_residual", (True, False), ids=("residual", "alone"))
def test_batch_norm_and_all_its_gradients(with_residual, training, dtype, device):
    skip_unless_runnable("triton", device, dtype)
    x = (3 * torch.randn(2, 24, 9, 7, device=device) + 1).contiguous(memory_format=CHANNELS_LAST)
    residual = 2 * torch.randn(2, 24, 9, 7, device=device) if with_residual else None
    given = vectors(24, device)
    given["weight"] *= 3
    compare(x, residual, given, dtype, training=training, slopes=slopes(24, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_slope_for_all_channels(dtype, device):
    """As if each channel had it. Its gradient is the sum of theirs, each of which was rounded."""
    skip_unless_runnable("triton", device, dtype)
    x = torch.randn(2, 24, 9, 7, device=device, dtype=dtype)
    dy, given, found = torch.randn_like(x), vectors(24, device), []
    for number in (1, 24):
        weight = torch.full((number,), -0.3, device=device, requires_grad=True)
        y = ops.batch_norm_act(
            x, x, **given, training=False, momentum=0.1, eps=1e-5, activation=PReLU(weight), backend="triton"
        )
        found.append((y, *torch.autograd.grad(y, weight, dy)))
    (y, one), (other, each) = found
    assert torch.equal(y, other)
    assert (one - each.double().sum()).abs() <= 2**-24 * (each.double().abs().sum() + one.abs())


def gradients_of_z(z, number, backend):
    """The gradients of z itself and of the slopes: BN does nothing."""
    leaf, weight = z.clone().requires_grad_(), slopes(number, z.device).to(z.dtype).requires_grad_()
    y = nothing_but(PReLU(weight), leaf, backend)
    dy = torch.linspace(-1, 1, z.shape[3]).to(z).expand(z.shape)
    return [y.detach(), *torch.autograd.grad(y, (leaf, weight), dy)]


@pytest.mark.parametrize("number", (1, 3))
@pytest.mark.parametrize("value", (0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, INF, -INF, NAN))
def test_gradients_at_what_is_special(triton_fp32, value, number, device):
    """A NaN is in the gradient of its slope alone, as PyTorch has it."""
    z = torch.randn(2, 3, 2, 5, device=device)
    z[1, 1, 1, 2] = value
    ours, eager = (gradients_of_z(z, number, backend) for backend in ("triton", "eager"))
    truth = gradients_of_z(z.double().cpu(), number, "eager")
    for found, by_eager, oracle in zip(ours, eager, truth, strict=True):
        assert torch.equal(found.isnan().cpu(), oracle.isnan()) or torch.equal(found.isnan(), by_eager.isnan())
        finite = oracle.isfinite() & by_eager.cpu().isfinite()
        assert_within_budget(*(t.cpu()[finite] for t in (found, by_eager, oracle)))


def test_an_infinite_slope_stays_in_its_channel(triton_fp32, device):
    """Rows past a tile's end are read as zeros, and 0 * inf is NaN."""
    x = torch.rand(1, 3, 3, 3, device=device) + 1
    weight = torch.tensor([INF, 2.0, -INF], device=device, requires_grad=True)
    one, zero = torch.ones(3, device=device, requires_grad=True), torch.zeros(3, device=device)
    y = ops.batch_norm_act(
        x, None, one, zero, zero, one.detach(), training=False, momentum=0.1, eps=0.0, activation=PReLU(weight),
        backend="triton",
    )  # fmt: skip
    for gradient in torch.autograd.grad(y.sum(), (one, weight)):
        assert gradient.isfinite().all()


def test_only_the_gradients_that_are_asked_for(triton_fp32, device):
    """Frozen slopes, and slopes alone."""
    given = vectors(8, device)
    x = torch.randn(2, 8, 3, 3, device=device)
    weight = slopes(8, device)
    settings = dict(training=True, momentum=0.1, eps=1e-5, backend="triton")

    def run(x, weight):
        running = {name: given[name].clone() for name in ("running_mean", "running_var")}
        return ops.batch_norm_act(
            x, None, given["weight"], given["bias"], **running, activation=PReLU(weight), **settings
        ).square()

    leaf, own = x.clone().requires_grad_(), weight.clone().requires_grad_()
    both = torch.autograd.grad(run(leaf, own).sum(), (leaf, own))
    (alone,) = torch.autograd.grad(run(x, own).sum(), own)
    (frozen,) = torch.autograd.grad(run(leaf, weight).sum(), leaf)
    assert torch.equal(alone, both[1]) and torch.equal(frozen, both[0])
    assert not run(x, weight).requires_grad


FILES = ("batch_norm_device", "batch_norm_act", "batch_norm_act_backward")
BUGS = {
    "slopes of another channel": ("slopes_ptr=slopes_by_channel(activation, channels)",
                                  "slopes_ptr=slopes_by_channel(activation, channels).flip(0)"),
    "the residual is not in z": ("0.0, dy * z)", "0.0, dy * normalize(centered, scale, bias))"),
    "z without the BN's bias": ("tl.where(z > 0, 0.0, dy * z)",
                                "tl.where(z > 0, 0.0, dy * (z - bias[None, :]))"),
    "the positive side counts": ("tl.where(z > 0, 0.0, dy * z)", "dy * z"),
    "one split of all": ("mask=mask, other=0.0), 0)\n        if dslopes_ptr",
                         "mask=mask & (offs_s == 0)[:, None], other=0.0), 0)\n        if dslopes_ptr"),
    "the sum of one tile": ("sum_at_slope += at_slope", "sum_at_slope = at_slope"),
}  # fmt: skip


@pytest.mark.slow(unless=lambda name: name in ("nothing", "one split of all"))
@pytest.mark.parametrize("name", [*BUGS, "nothing"])
def test_a_bug_in_training_is_caught(triton_fp32, name, tmp_path, device, monkeypatch):
    nothing = ("import annotations",) * 2
    old, new = BUGS.get(name, nothing)
    sources = {f: inspect.getsource(importlib.import_module(f"resnet_kernels.kernels.{f}")) for f in FILES}
    for file in FILES:
        plant(file, planted(file, tmp_path, *((old, new) if old in sources[file] else nothing)), monkeypatch)
    assert any(old in source for source in sources.values())
    for where in (*FILES[1:], "batch_norm_tiles"):
        monkeypatch.setattr(importlib.import_module(f"resnet_kernels.kernels.{where}"), "MOST_SPLITS", 2)
    x = 3 * torch.randn(2, 8, 40, 40, device=device) + 1
    found = True
    try:
        compare(x, torch.randn_like(x), vectors(8, device), torch.float32, training=True, slopes=slopes(8, device))
    except AssertionError:
        found = False
    assert found == (name == "nothing")
