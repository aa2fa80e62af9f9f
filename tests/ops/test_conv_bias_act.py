"""conv_bias_act on every backend: exact on integers, within eager's error on reals, and kind to bad input."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.convolutions import Case, arguments, operands, truth
from helpers.oracle import DTYPES, assert_within_budget, skip_unless_runnable
from resnet_kernels import ops
from resnet_kernels.kernels import target
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.kernels.geometry import Geometry, normalize
from resnet_kernels.kernels.operands import ConvOperands
from resnet_kernels.ops import onednn, reference

BACKENDS = ("triton", "cudnn", "cpu", "eager")


CASES = (
    Case("stem 7x7/2 on RGB", 2, 3, 21, 19, 64, (7, 7), 2, 3),
    Case("stem 7x7/2 on one channel", 2, 1, 28, 28, 64, (7, 7), 2, 3),
    Case("3x3", 2, 64, 9, 9, 64),
    Case("3x3 to 128", 1, 64, 7, 7, 128),
    Case("3x3/2", 1, 64, 9, 9, 128, stride=2),
    Case("3x3/2 even size", 1, 64, 8, 8, 128, stride=2),
    Case("3x3 dilation 2", 1, 64, 9, 9, 64, padding=2, dilation=2),
    Case("3x3 dilation 4", 1, 64, 9, 9, 64, padding=4, dilation=4),
    Case("1x1", 2, 64, 6, 6, 256, (1, 1), padding=0),
    Case("1x1/2", 2, 256, 7, 7, 64, (1, 1), 2, 0),
    Case("1x1 on 2048 channels", 1, 2048, 2, 2, 16, (1, 1), padding=0),
    Case("5x5, stride 3", 1, 16, 13, 11, 24, (5, 5), 3, 2),
    Case("3x1, strides and dilations of their own", 1, 8, 11, 9, 12, (3, 1), (2, 1), (1, 0), (1, 2)),
    Case("ResNeXt 32x4d", 1, 128, 7, 7, 128, groups=32),
    Case("depthwise", 1, 32, 7, 7, 32, groups=32),
    Case("depthwise, two outputs a channel", 1, 16, 7, 7, 32, groups=16),
    Case("two groups", 1, 64, 6, 6, 128, groups=2),
    Case("3 channels to 6", 2, 3, 6, 6, 6, stride=2),
    Case("6 channels to 6", 2, 6, 5, 5, 6),
    Case("17 channels to 33", 1, 17, 5, 5, 33),
    Case("TF SAME 3x3/2", 1, 16, 8, 8, 16, stride=2, padding=((0, 1), (0, 1))),
    Case("TF SAME 7x7/2", 1, 3, 16, 16, 32, (7, 7), 2, ((2, 3), (2, 3))),
    Case("padding on one side", 1, 8, 6, 6, 8, padding=((2, 0), (0, 1))),
    Case("1x1 image", 3, 64, 1, 1, 64),
    Case("one row", 1, 32, 1, 33, 32),
    Case("padding wider than the image", 1, 16, 2, 2, 16, padding=3),
)


# Layers of ResNet-18, ResNet-50, ResNeXt-50 and their late-stage sums of K = 2048 and 4608 terms, each sum as it is; of the
# dearest two a part of the outputs.
REAL_LAYERS = (
    Case("stem", 1, 3, 64, 64, 64, (7, 7), 2, 3),
    Case("stage 1 3x3", 1, 64, 28, 28, 64),
    Case("stage 2 3x3/2", 1, 128, 28, 28, 128, stride=2),
    Case("stage 3 1x1 up", 1, 256, 14, 14, 1024, (1, 1), padding=0),
    Case("stage 4 1x1 down", 1, 2048, 7, 7, 512, (1, 1), padding=0),
    Case("stage 4 3x3", 1, 512, 7, 7, 128),
    Case("stage 2 shortcut", 1, 256, 28, 28, 512, (1, 1), 2, 0),
    Case("ResNeXt 3x3", 1, 128, 7, 7, 128, groups=32),
)


@pytest.mark.slow(
    unless=lambda case, backend, dtype: (
        backend != "triton" or (dtype == torch.float16 and case.groups == 1) or case.name in ("3x3", "two groups")
    )
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_on_integers(case, backend, dtype, device):
    """A wrong index or mask is a wrong integer."""
    skip_unless_runnable(backend, device, dtype)
    x, weight, bias, residual, scale = operands(case, dtype, device)
    for use in ((bias, residual, scale, True), (None, None, None, False), (bias, None, None, True)):
        expected = truth(case, x, weight, *use)
        assert expected.abs().max() <= 256, "the test's own sums must be exact"
        y = ops.conv_bias_act(
            x, weight, use[0], use[1], scale=use[2], relu=use[3], backend=backend, **arguments(case)
        )  # fmt: skip
        assert torch.equal(y.cpu().double(), expected)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow(unless=lambda case, backend, dtype: backend != "triton" or case.name == "stage 2 3x3/2")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", REAL_LAYERS, ids=str)
def test_as_accurate_as_eager(case, backend, dtype, device):
    skip_unless_runnable(backend, device, dtype)
    x, weight, bias, residual, scale = operands(case, dtype, device, real=True)
    x = x.contiguous(memory_format=torch.channels_last)
    y = ops.conv_bias_act(x, weight, bias, residual, scale=scale, backend=backend, **arguments(case))
    geometry = normalize(case.stride, case.padding, case.dilation, case.groups)
    # Eager as a user would have it: convolution, BN, add and ReLU apart, each rounded.
    z = torch.conv2d(
        reference.pad_if_asymmetric(x, geometry), weight, None, geometry.stride, geometry.conv2d_padding,
        geometry.dilation, geometry.groups,
    )  # fmt: skip
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    eager = torch.relu(torch.batch_norm(z, scale, bias, zero, one, False, 0.0, 0.0, False) + residual)
    assert_within_budget(y, eager, truth(case, x, weight, bias, residual, scale, True))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("batch", (1, 8))
@pytest.mark.parametrize("terms", (512, 1024, 2048))
def test_long_sums_on_one_thread_are_as_accurate_as_eager(terms, batch, device, one_thread):
    """Regression: on a single thread eager's 1x1 convolutions are a GEMM's, three times as accurate as oneDNN's."""
    case = Case("", batch, terms, 7, 7, 64, (1, 1), padding=0)
    test_as_accurate_as_eager(case, "auto", torch.float32, device)


@pytest.mark.parametrize("threads", (1, 2))
def test_goes_to_pytorchs_gemm_where_eager_does(threads, one_thread):
    """PyTorch is asked what eager would run, so a version that decides otherwise is noticed."""
    torch.set_num_threads(threads)
    seen = set()
    for batch in (1, 8, 16):
        for size in (3, 7, 14):
            for kernel, stride in ((1, 1), (1, 2), (3, 1)):
                x, weight = torch.empty(batch, 1024, size, size), torch.empty(8, 1024, kernel, kernel)
                backend = torch._C._select_conv_backend(x, weight, None, [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1)
                elsewhere = backend != torch._C._ConvBackend.Mkldnn
                seen.add(elsewhere)
                assert onednn.is_for_aten(x.shape, x.dtype, weight.shape, (stride, stride)) == elsewhere, (
                    x.shape,
                    kernel,
                    stride,
                )
    assert seen == {True, False}


def _configs():
    from resnet_kernels.kernels.conv_bias_act import CONFIGS

    return CONFIGS


@pytest.mark.slow(unless=lambda index, dtype: dtype == torch.float16 and index in (0, 3, 6))
@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_every_shipped_config_is_exact(index, dtype, device):
    """Ragged in every axis: 7x7 pixels, 72 output channels, 40 (or 64) input channels."""
    skip_unless_runnable("triton", device, dtype)
    from resnet_kernels.kernels import conv_bias_act as kernel

    for c_in in (40, 64):
        case = Case("", 2, c_in, 7, 7, 72)
        x, weight, bias, residual, scale = operands(case, dtype, device)
        given = ConvOperands(x, weight, bias, residual, scale, normalize(1, 1, 1, 1))
        y = kernel.launch(given, kernel.CONFIGS[index])
        assert torch.equal(y.double().cpu(), truth(case, x, weight, bias, residual, scale, True))


def test_the_config_test_covers_all_configs(device):
    skip_unless_runnable("triton", device, torch.float32)
    assert len(_configs()) == 7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan_and_inf_stays_inf(backend, dtype, device):
    skip_unless_runnable(backend, device, dtype)
    x = torch.randn(1, 16, 6, 6).to(device, dtype)
    weight = torch.randn(16, 16, 1, 1).abs().to(device, dtype)
    x[0, 3, 2, 2] = float("nan")
    x[0, 5, 4, 4] = float("inf")
    y = ops.conv_bias_act(x, weight, backend=backend)
    assert y[0, :, 2, 2].isnan().all() and y.isnan().sum() == 16
    assert y[0, :, 4, 4].isposinf().all() and y.isinf().sum() == 16
    residual = torch.zeros_like(y)
    residual[0, 0, 0, 0] = float("nan")
    y = ops.conv_bias_act(x, weight, residual=residual, backend=backend)
    assert y[0, 0, 0, 0].isnan() and y.isnan().sum() == 17


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_beside_the_edge_does_not_see_the_next_image(backend, device):
    """Regression guard: an image full of NaN above and below in the batch must not leak in through the padding."""
    skip_unless_runnable(backend, device, torch.float32)
    x = torch.full((3, 16, 5, 5), float("nan"), device=device)
    x[1] = 1.0
    y = ops.conv_bias_act(x, torch.ones(16, 16, 3, 3, device=device), padding=1, backend=backend)
    assert y[1].isfinite().all() and y[[0, 2]].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, device):
    skip_unless_runnable(backend, device, torch.float32)
    y = ops.conv_bias_act(
        torch.empty(0, 8, 5, 5, device=device), torch.ones(4, 8, 3, 3, device=device), backend=backend
    )
    assert y.shape == (0, 4, 3, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_do_not_matter(backend, device):
    skip_unless_runnable(backend, device, torch.float32)
    case = Case("", 2, 16, 8, 8, 16)
    x, weight, bias, residual, scale = operands(case, torch.float32, device)
    expected = truth(case, x, weight, bias, residual, scale, True)
    wide = torch.randn(2, 16, 8, 16, device=device)
    wide[..., ::2] = x
    permuted = residual.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    strided_bias = torch.stack([bias, bias], 1)[:, 0]
    for operands_ in (
        (x, weight.contiguous(memory_format=torch.channels_last), bias, residual),
        (wide[..., ::2], weight, bias, residual),
        (x, weight, strided_bias, permuted),
    ):
        y = ops.conv_bias_act(*operands_, scale=scale, padding=1, backend=backend)
        assert torch.equal(y.double().cpu(), expected)


def test_offsets_beyond_2_to_the_31(device):
    """A 1x16x16385x16384 fp16 image has 4.3e9 elements; stride 8192 touches nine pixels of it, the last ones included."""
    if device.type != "cpu":
        pytest.skip("needs 8.6 GB that are never touched: the CPU's lazy zero pages")
    skip_unless_runnable("triton", device, torch.float16)
    pixels = torch.from_numpy(np.zeros((1, 16385, 16385, 16), np.float16)).permute(0, 3, 1, 2)
    assert pixels.numel() > 2**32 and pixels.is_contiguous(memory_format=torch.channels_last)
    pixels[0, :, 16384, 16384] = 3
    pixels[0, :, 8192, 16384] = 2
    y = ops.conv_bias_act(pixels, torch.ones(1, 16, 1, 1, dtype=torch.float16), stride=8192, backend="triton")
    assert y[0, 0].tolist() == [[0, 0, 0], [0, 0, 32], [0, 0, 48]]


def test_batches_beyond_2_to_the_31_pixels_are_split(device, monkeypatch):
    skip_unless_runnable("triton", device, torch.float32)
    from resnet_kernels.kernels import conv_bias_act as kernel

    monkeypatch.setattr(kernel, "_MOST_PIXELS", 100)
    case = Case("", 5, 16, 7, 7, 16)
    x, weight, bias, residual, scale = operands(case, torch.float32, device)
    y = ops.conv_bias_act(x, weight, bias, residual, scale=scale, padding=1, backend="triton")
    assert torch.equal(y.double().cpu(), truth(case, x, weight, bias, residual, scale, True))


@given(
    n=st.integers(1, 3), c_in=st.integers(1, 9), c_out=st.integers(1, 20), groups=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    sides=st.tuples(*[st.integers(0, 3)] * 4), relu=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_geometry_is_exact(n, c_in, c_out, groups, size, kernel, stride, dilation, sides, relu, seed):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    skip_unless_runnable("triton", device, torch.float32)
    torch.manual_seed(seed)
    padding = (sides[:2], sides[2:])
    case = Case("", n, c_in * groups, *size, c_out * groups, kernel, stride, padding, dilation, groups)
    out_h, out_w = normalize(stride, padding, dilation, groups).out_size(size, kernel)
    if out_h < 1 or out_w < 1:
        with pytest.raises(ValueError, match="must fit into the padded input"):
            ops.conv_bias_act(torch.ones(n, case.c_in, *size), torch.ones(case.c_out, c_in, *kernel), **arguments(case))
        return
    x, weight, bias, residual, scale = operands(case, torch.float32, device)
    expected = truth(case, x, weight, bias, residual, scale, relu)
    for backend in ("triton", "auto"):
        y = ops.conv_bias_act(x, weight, bias, residual, scale=scale, relu=relu, backend=backend, **arguments(case))
        assert torch.equal(y.double().cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in {"3x3/2", "TF SAME 3x3/2", "ResNeXt 32x4d"}], ids=str)
def test_gradients(case, backend, device):
    skip_unless_runnable(backend, device, torch.float32)
    values = operands(case, torch.float32, device, real=True)
    upstream = torch.randn_like(values[3])

    def gradients(dtype, run):
        leaves = [t.detach().to(dtype).requires_grad_() for t in values]
        y = run(*leaves)
        return torch.autograd.grad(y, leaves, upstream.to(dtype))

    geometry = normalize(case.stride, case.padding, case.dilation, case.groups)

    def plain(x, weight, bias, residual, scale):
        return reference.conv_bias_act(x, weight, bias, residual, scale, geometry, RELU)

    def ours(x, weight, bias, residual, scale):
        return ops.conv_bias_act(x, weight, bias, residual, scale=scale, backend=backend, **arguments(case))

    names = ("x", "weight", "bias", "residual", "scale")
    results = zip(
        names, gradients(torch.float32, ours), gradients(torch.float32, plain), gradients(torch.float64, plain)
    )
    for name, y, eager, oracle in results:
        assert_within_budget(y, eager, oracle, name)


def test_gradcheck_in_fp64():
    torch.manual_seed(1)
    x, weight = torch.randn(1, 2, 4, 5).double(), torch.randn(4, 1, 3, 3).double()
    bias, scale, residual = torch.randn(4).double(), torch.rand(4).double() + 0.5, torch.randn(1, 4, 2, 3).double()
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual, scale)]

    def run(x, weight, bias, residual, scale):
        return ops.conv_bias_act(
            x, weight, bias, residual, scale=scale, stride=2, padding=((1, 1), (0, 2)), groups=2, backend="eager"
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.slow(unless=lambda backend: backend != "triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_library_opcheck(backend, device):
    """Schema, fake implementation, autograd registration and AOT dispatch, by PyTorch's own checker."""
    skip_unless_runnable(backend, device, torch.float32)
    x, weight, bias, residual, scale = operands(Case("", 2, 16, 6, 6, 16), torch.float32, device, real=True)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual, scale)]
    torch.library.opcheck(
        torch.ops.resnet_kernels.conv_bias_act.default, (*leaves, *normalize(1, 1, 1, 1), "relu", 0.0, backend)
    )


@pytest.mark.parametrize("backend", ("triton", "auto"))
def test_torch_compile_fullgraph(backend, device):
    skip_unless_runnable(backend if backend != "auto" else "eager", device, torch.float32)
    x, weight, bias, residual, scale = operands(CASES[2], torch.float32, device)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(x, residual):
        return ops.conv_bias_act(x, weight, bias, residual, scale=scale, padding=1, backend=backend) * 2

    for n in (2, 1):
        expected = truth(CASES[2], x[:n], weight, bias, residual[:n], scale, True) * 2
        assert torch.equal(run(x[:n], residual[:n]).double().cpu(), expected)


def test_torch_export(device):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3))

        def forward(self, x):
            return ops.conv_bias_act(x, self.weight, padding=1, backend="eager")

    module, x = Module(), torch.randn(2, 4, 6, 6)
    program = torch.export.export(module, (x,))
    assert any("resnet_kernels.conv_bias_act" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), module(x))


@pytest.mark.parametrize("backend", ("triton", "cpu", "eager"))
def test_autocast_decides_the_dtype(backend, device):
    skip_unless_runnable(backend, device, torch.bfloat16)
    x, weight, bias, residual, scale = operands(CASES[2], torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = ops.conv_bias_act(x, weight, bias, residual, scale=scale, padding=1, backend=backend)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.double().cpu(), truth(CASES[2], x, weight, bias, residual, scale, True))


def test_environment_variable_goes_over_the_argument(monkeypatch, device):
    x, weight = torch.ones(1, 4, 4, 4, device=device), torch.ones(4, 4, 1, 1, device=device)
    monkeypatch.setenv("RESNET_KERNELS_BACKEND", "cudnn" if device.type == "cpu" else "cpu")
    with pytest.raises(RuntimeError, match="backend="):
        ops.conv_bias_act(x, weight, backend="eager")
    monkeypatch.setenv("RESNET_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"RESNET_KERNELS_BACKEND must be one of auto, .* got 'fast'"):
        ops.conv_bias_act(x, weight)


def test_triton_on_cpu_tensors_names_the_interpreter(monkeypatch):
    from resnet_kernels.ops import backends

    pytest.importorskip("triton", reason="needs triton")
    monkeypatch.setattr(target, "is_interpreted", lambda: False)
    backends.why_never.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            ops.conv_bias_act(torch.ones(1, 4, 4, 4), torch.ones(4, 4, 1, 1), backend="triton")
    finally:
        backends.why_never.cache_clear()


def test_absent_triton_is_named(monkeypatch):
    import importlib.util

    from resnet_kernels.ops import backends

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backends.why_never.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="package triton, which is not installed"):
            ops.conv_bias_act(torch.ones(1, 4, 4, 4), torch.ones(4, 4, 1, 1), backend="triton")
        assert ops.conv_bias_act(torch.ones(1, 4, 4, 4), torch.ones(4, 4, 1, 1)).shape == (1, 4, 4, 4)
    finally:
        backends.why_never.cache_clear()


X, W = torch.ones(2, 8, 6, 6), torch.ones(4, 8, 3, 3)
BAD = [
    ("x is a list", dict(x=[1]), TypeError, "x must be a torch.Tensor, got list"),
    ("weight is None", dict(weight=None), TypeError, "weight must be a torch.Tensor, got NoneType"),
    ("bias is a float", dict(bias=1.0), TypeError, "bias must be a torch.Tensor or None, got float"),
    ("x has rank 3", dict(x=X[0]), ValueError, "x must have 4 dimensions"),
    ("weight has rank 2", dict(weight=W[:, :, 0, 0]), ValueError, "weight must have 4 dimensions"),
    ("channels differ", dict(x=X[:, :5]), ValueError, "x must have 8 channels"),
    ("short bias", dict(bias=torch.ones(3)), ValueError, r"bias must have shape \(4,\)"),
    ("scale has rank 2", dict(scale=torch.ones(4, 1)), ValueError, r"scale must have shape \(4,\)"),
    ("integer bias", dict(bias=torch.ones(4, dtype=torch.int32)), TypeError, "bias must be torch.float32"),
    ("integer x", dict(x=X.int()), TypeError, "x must be floating point, got torch.int32"),
    ("mixed dtypes", dict(weight=W.half()), TypeError, "weight must have x's dtype torch.float32"),
    ("residual of another shape", dict(residual=torch.ones(2, 4, 6, 6)), ValueError, "residual must have the output's"),
    ("residual of another dtype", dict(residual=torch.ones(2, 4, 4, 4).half()), TypeError, "residual must have x's dtype"),
    ("residual elsewhere", dict(residual=torch.ones(2, 4, 4, 4, device="meta")), ValueError, "residual must be on x's"),
    ("weight elsewhere", dict(weight=W.to("meta")), ValueError, "weight must be on x's device cpu, got meta"),
    ("groups do not divide", dict(groups=3), ValueError, "groups must divide C_in and C_out"),
    ("no groups", dict(groups=0), ValueError, "groups must be at least 1"),
    ("groups as text", dict(groups="2"), TypeError, "groups must be an int"),
    ("stride 0", dict(stride=0), ValueError, "stride must be at least 1"),
    ("stride of three", dict(stride=(1, 1, 1)), TypeError, "stride must be an int or a pair"),
    ("stride as float", dict(stride=1.5), TypeError, "stride must be an int or a pair"),
    ("dilation 0", dict(dilation=(1, 0)), ValueError, "dilation must be at least 1"),
    ("negative padding", dict(padding=-1), ValueError, "padding must be at least 0"),
    ("padding as text", dict(padding="same"), TypeError, "padding must be an int"),
    ("lopsided padding", dict(padding=((1, 1), 1)), TypeError, "padding must be an int or a pair"),
    ("negative side", dict(padding=((1, 1), (0, -1))), ValueError, "padding .left, right. must be at least 0"),
    ("kernel too large", dict(dilation=3), ValueError, "the kernel must fit into the padded input"),
    ("unknown backend", dict(backend="tensorrt"), ValueError, "backend must be one of auto, triton, cudnn, cpu, eager"),
    ("empty kernel", dict(weight=torch.ones(4, 8, 0, 3)), ValueError, "kernel of at least 1x1"),
]  # fmt: skip


@pytest.mark.parametrize("changes, kind, message", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(changes, kind, message):
    arguments = {"x": X, "weight": W, **changes}
    with pytest.raises(kind, match=message):
        ops.conv_bias_act(arguments.pop("x"), arguments.pop("weight"), **arguments)


def test_explicit_backends_refuse_fp64_and_auto_runs_eager(device):
    x, weight = torch.randn(1, 4, 5, 5, device=device).double(), torch.randn(4, 4, 3, 3, device=device).double()
    for backend in ("triton", "cpu", "cudnn"):
        with pytest.raises(RuntimeError, match=f'backend="{backend}"'):
            ops.conv_bias_act(x, weight, backend=backend)
    assert torch.equal(ops.conv_bias_act(x, weight), torch.relu(torch.conv2d(x, weight)))


def test_tf32_if_and_only_if_cudnn_has_it(device):
    skip_unless_runnable("triton", device, torch.float32)
    from resnet_kernels.kernels.conv_bias_act import CONFIGS, constexprs

    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = setting
            for dtype, expected in ((torch.float32, setting), (torch.float16, "ieee")):
                values = constexprs(dtype, (8, 8, 3, 3), Geometry(), RELU, CONFIGS[3])
                assert values["INPUT_PRECISION"] == expected
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_public_docstring_names_every_argument():
    text = ops.conv_bias_act.__doc__
    for name in (
        "x",
        "weight",
        "bias",
        "residual",
        "scale",
        "stride",
        "padding",
        "dilation",
        "groups",
        "relu",
        "backend",
    ):
        assert re.search(rf"^ +{name}: ", text, re.M), name


@pytest.mark.parametrize("shape", ((2, 16, 1, 1), (2, 1, 2, 2)), ids=("single pixels", "one channel"))
def test_a_residual_that_pytorch_2_11_could_not_create_a_memory_for(shape):
    n, c, h, w = shape
    x = torch.empty_strided((n, 16, h, w), (16 * h * w, 1, 16 * w, 16)).normal_()
    residual = torch.empty_strided(shape, (c * h * w, 1, c * w, c)).normal_()
    weight, before = torch.randn(c, 16, 3, 3), residual.clone()
    y = ops.conv_bias_act(x, weight, torch.randn(c), residual, padding=1, backend="cpu")
    assert y.shape == shape and torch.equal(residual, before)
