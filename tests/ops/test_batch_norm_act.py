"""batch_norm_act: values, every gradient and the running statistics against fp64, within eager's own error."""

import importlib
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_kernels as rk
from helpers.batch_norms import SETTINGS, compare, on_triton, results, vectors
from helpers.oracle import DTYPES, error, skip_unless_runnable
from resnet_kernels.kernels.activations import RELU
from resnet_kernels.ops import batch_norm_act, reference
from resnet_kernels.ops.batch_norm_act import undispatched

module = importlib.import_module("resnet_kernels.ops.batch_norm_act")  # the package has the function under this name

SHAPES = (
    (2, 16, 5, 7),
    (4, 3, 6, 6),  # d2l's channels
    (3, 80, 9, 9),  # a ragged tile of channels, and of rows
    (1, 64, 1, 2),  # the fewest values there can be
    (2, 8, 40, 40),  # several splits
)


@pytest.mark.slow(
    unless=lambda shape, dtype, relu, with_residual, **_: (
        dtype == torch.float32 and (shape != (2, 8, 40, 40) or (relu and with_residual))
    )
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("relu", (True, False), ids=("relu", "linear"))
@pytest.mark.parametrize("with_residual", (True, False), ids=("residual", "alone"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, with_residual, relu, training, dtype, device):
    skip_unless_runnable("triton", device, dtype)
    x = (torch.randn(shape, device=device) * 2 + 3).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(shape, device=device) if with_residual else None  # contiguous: to be converted
    ours = compare(x, residual, vectors(shape[1], device), dtype, relu=relu, training=training)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "absent", (("weight", "bias"), ("bias",), ("weight",), ("running_mean", "running_var")), ids=str
)
def test_without_affine_or_running_statistics(absent, device):
    skip_unless_runnable("triton", device, torch.float32)
    given = vectors(16, device) | dict.fromkeys(absent)
    for with_residual in (True, False):
        residual = torch.randn(2, 16, 5, 5, device=device) if with_residual else None
        compare(torch.randn(2, 16, 5, 5, device=device), residual, given, torch.float32, training=True)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_vectors_in_half_precision(dtype, device):
    """A model that is half precision throughout: so are its gradients."""
    skip_unless_runnable("triton", device, dtype)
    given = {name: v.to(dtype) for name, v in vectors(16, device).items()}
    x, upstream = torch.randn(2, 16, 5, 5, device=device).to(dtype), torch.randn(2, 16, 5, 5, device=device).to(dtype)
    ours = results(x, None, given, upstream, dtype, on_triton, training=True, **SETTINGS)
    oracle = results(x, None, given, upstream, torch.float64, reference.batch_norm_act, training=True, **SETTINGS)
    for name, truth in oracle.items():
        assert ours[name].dtype == dtype
        # Each value is rounded once, its fp32 self being right.
        assert error(ours[name], truth) <= torch.finfo(dtype).eps, name


@pytest.mark.slow(unless=lambda with_residual, most, **_: with_residual and most == 2)
@pytest.mark.parametrize("most", (1, 2, 4))
@pytest.mark.parametrize("shape", ((2, 8, 39, 41), (1, 64, 17, 19), (2, 70, 11, 13)), ids=str)
@pytest.mark.parametrize("with_residual", (True, False), ids=("residual", "alone"))
def test_several_tiles_in_a_split(shape, with_residual, most, device, monkeypatch):
    """As a large layer has them, with a ragged last one."""
    skip_unless_runnable("triton", device, torch.float32)
    from resnet_kernels.kernels import batch_norm_act, batch_norm_act_backward, batch_norm_tiles

    for module in (batch_norm_tiles, batch_norm_act, batch_norm_act_backward):
        monkeypatch.setattr(module, "MOST_SPLITS", most)
    # Launchers of the number of splits before; those of this test are of shapes that no other has.
    batch_norm_act._statistics_of.cache_clear()
    batch_norm_act_backward._launchers.cache_clear()
    rows = shape[0] * shape[2] * shape[3]
    split = batch_norm_tiles.choose_split(rows, shape[1], 4)
    assert split.rows > split.block_rows and rows % split.block_rows
    residual = torch.randn(shape, device=device) if with_residual else None
    compare(torch.randn(shape, device=device) + 3, residual, vectors(shape[1], device), torch.float32, training=True)


@pytest.mark.parametrize("channels", (1, 3, 64, 65, 2048))
@pytest.mark.parametrize("rows", (1, 63, 64, 12544, 3211264))
@pytest.mark.parametrize("itemsize", (2, 4))
def test_splits_cover_all_rows_once(rows, channels, itemsize):
    kernel = pytest.importorskip("resnet_kernels.kernels.batch_norm_act", reason="needs Triton")
    split = kernel.choose_split(rows, channels, itemsize)
    assert (split.n_splits - 1) * split.rows < rows <= split.n_splits * split.rows
    assert split.rows % split.block_rows == 0 and split.n_splits <= kernel.MOST_SPLITS
    # Many rows: as many programs as there are multiprocessors on an H200, at least.
    programs = split.n_splits * -(-channels // split.block_channels)
    assert programs >= 132 or rows < 132 * split.block_rows


@pytest.mark.slow(unless=lambda mean, first: (mean, first) == (1000.0, 1e4))
@pytest.mark.parametrize("mean", (1000.0, -1000.0, 3.0))
@pytest.mark.parametrize("first", (None, 1e4, 0.0), ids=("plain", "outlier first", "zero first"))
def test_mean_1000_deviation_1(mean, first, device):
    """E[x^2] - E[x]^2 has no digit left there, and sums around an outlier lose theirs."""
    skip_unless_runnable("triton", device, torch.float32)
    x = torch.randn(4, 8, 33, 33, device=device) + mean
    if first is not None:
        x[0, :, 0, 0] = first
    given = vectors(8, device)
    ours = compare(x, None, given, torch.float32, training=True, momentum=1.0)
    variance = x.double().var((0, 2, 3))
    assert ((ours["running_var"].double() - variance).abs() / variance).max() < 1e-6


def test_constant_channel(device):
    """A variance of zero: no root of a rounding below it."""
    skip_unless_runnable("triton", device, torch.float32)
    x = torch.full((2, 4, 40, 40), 0.1, device=device)
    ours = compare(x, None, vectors(4, device), torch.float32, training=True, momentum=1.0)
    assert torch.equal(ours["running_var"], torch.zeros(4, device=device)) and ours["dx"].isfinite().all()


@pytest.mark.parametrize("value", (float("inf"), float("-inf"), float("nan")))
@pytest.mark.parametrize("where", ((0, 0, 0), (1, 3, 2)), ids=("first", "later"))
@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("with_residual", (True, False), ids=("residual", "alone"))
def test_non_finite_input(value, where, training, with_residual, device):
    """The same values are lost as in eager, in the same places, running statistics and gradients included."""
    skip_unless_runnable("triton", device, torch.float32)
    x = torch.randn(2, 4, 5, 5, device=device)
    x[where[0], 2, where[1], where[2]] = value
    residual = torch.randn(2, 4, 5, 5, device=device) if with_residual else None
    if with_residual:
        residual[1, 1, 0, 0] = value
    given, upstream = vectors(4, device), torch.randn(2, 4, 5, 5, device=device)
    settings = SETTINGS | {"training": training}
    ours = results(
        x, residual, given, upstream, x.dtype, lambda *a, **k: batch_norm_act(*a, **k, backend="triton"), **settings
    )
    eager = results(x, residual, given, upstream, x.dtype, reference.batch_norm_act, **settings)
    for name, expected in eager.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)


@pytest.mark.parametrize("channels", (1, 24, 65))
def test_exact_on_integers(channels, device):
    """Means and deviations that are exact make every value an exact one: a wrong index or mask is a wrong integer."""
    skip_unless_runnable("triton", device, torch.float32)
    sign = torch.ones(2, channels, 4, 8, device=device)
    sign.view(-1)[::2] = -1
    scale = 2.0 ** (torch.arange(channels, device=device) % 3)[:, None, None]
    center = torch.arange(channels, device=device)[:, None, None]
    x, residual = sign * scale + center, torch.randint(-9, 9, sign.shape, device=device).float()
    weight, bias = torch.arange(1.0, channels + 1, device=device), torch.arange(channels, device=device) % 5.0
    # eps=1e-30 is lost in a variance of 1, so rstd is exactly 1 / scale.
    y = batch_norm_act(
        x, residual, weight, bias, None, None, training=True, momentum=0.1, eps=1e-30, relu=True, backend="triton"
    )
    expected = torch.relu(sign * weight[:, None, None] + bias[:, None, None] + residual)
    assert torch.equal(y, expected)


@pytest.mark.slow
def test_deterministic(device):
    """Bit for bit the same, run after run: all sums have a fixed order."""
    skip_unless_runnable("triton", device, torch.float32)
    x, given, upstream = (
        torch.randn(2, 8, 40, 40, device=device),
        vectors(8, device),
        torch.randn(2, 8, 40, 40, device=device),
    )
    run = lambda: results(x, None, given, upstream, x.dtype, on_triton, training=True, **SETTINGS)  # noqa: E731
    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("with_residual", (True, False), ids=("residual", "alone"))
def test_saves_the_least(with_residual, device):
    """x, y after a residual (the next layer's own input), vectors; no second activation."""
    skip_unless_runnable("triton", device, torch.float32)
    x, residual = (torch.randn(2, 8, 5, 5, device=device, requires_grad=True) for _ in range(2))
    given, saved = vectors(8, device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        weight, bias = (given[name].requires_grad_() for name in ("weight", "bias"))
        y = batch_norm_act(
            x, residual if with_residual else None, weight, bias, given["running_mean"], given["running_var"],
            training=True, **SETTINGS, backend="triton",
        )  # fmt: skip
    activations = {t.data_ptr() for t in saved if t.dim() == 4}
    assert activations == ({x.data_ptr(), y.data_ptr()} if with_residual else {x.data_ptr()})


def test_only_what_is_asked_for(device):
    """Each set of needed gradients gives the same gradients."""
    skip_unless_runnable("triton", device, torch.float32)
    given, upstream = vectors(8, device), torch.randn(2, 8, 5, 5, device=device)
    values = [torch.randn(2, 8, 5, 5, device=device) for _ in range(2)] + [given["weight"], given["bias"]]
    for relu, training in itertools.product((True, False), repeat=2):
        everything = None
        for needed in sorted(itertools.product((True, False), repeat=4), reverse=True):
            if not any(needed):
                continue
            leaves = [v.detach().clone().requires_grad_(n) for v, n in zip(values, needed)]
            y = batch_norm_act(
                *leaves, given["running_mean"].clone(), given["running_var"].clone(), training=training, relu=relu,
                **SETTINGS, backend="triton",
            )  # fmt: skip
            y.backward(upstream)
            everything = everything or [leaf.grad for leaf in leaves]
            for leaf, right, asked in zip(leaves, everything, needed):
                assert torch.equal(leaf.grad, right) if asked else leaf.grad is None


def test_a_change_between_forward_and_backward_is_noticed(device):
    skip_unless_runnable("triton", device, torch.float32)
    x, given = torch.randn(2, 4, 5, 5, device=device), vectors(4, device)
    weight = given["weight"].requires_grad_()
    y = batch_norm_act(x, None, weight, None, None, None, training=True, **SETTINGS, backend="triton")
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivative_is_refused_with_a_reason(device):
    skip_unless_runnable("triton", device, torch.float32)
    x = torch.randn(2, 4, 5, 5, device=device, requires_grad=True)
    y = batch_norm_act(x, None, None, None, None, None, training=True, **SETTINGS, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@pytest.mark.slow
def test_opcheck_and_compile(device):
    skip_unless_runnable("triton", device, torch.float32)
    given = vectors(8, device)
    x, residual = (torch.randn(2, 8, 5, 5, device=device, requires_grad=True) for _ in range(2))
    arguments = (x, residual, *(given[n] for n in ("weight", "bias", "running_mean", "running_var")))
    for training, backend in itertools.product((True, False), ("triton", "eager")):
        torch.library.opcheck(
            torch.ops.resnet_kernels.batch_norm_act.default, (*arguments, training, 0.1, 1e-5, "relu", 0.0, backend)
        )
    upstream = torch.randn(2, 8, 5, 5, device=device)

    def run(function):
        own = {name: v.clone() for name, v in given.items()}
        y = function(x, residual, own)
        return [y, *torch.autograd.grad(y, (x, residual), upstream), own["running_mean"], own["running_var"]]

    def op(x, residual, own):
        return batch_norm_act(
            x, residual, own["weight"], own["bias"], own["running_mean"], own["running_var"], training=True, **SETTINGS,
            backend="triton",
        )  # fmt: skip

    plain, compiled = run(op), run(torch.compile(op, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled))


@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
def test_gradcheck_of_the_reference(training):
    """fp64, finite differences; away from ReLU's kink, where they have no meaning."""
    x, residual = (torch.randn(3, 2, 4, 3, dtype=torch.float64) for _ in range(2))
    given = vectors(2, "cpu", torch.float64)
    mean, var = given.pop("running_mean"), given.pop("running_var")
    leaves = [t.requires_grad_() for t in (x, residual, *given.values())]

    def op(*leaves, relu=True):
        return batch_norm_act(*leaves, mean.clone(), var.clone(), training=training, relu=relu, **SETTINGS)

    distance = op(*leaves, relu=False).detach().abs()
    x.data[distance < 1e-3] += 0.1
    assert op(*leaves, relu=False).detach().abs().min() > 1e-4
    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


def test_strided_vectors_and_half_statistics(device):
    """A pure half-precision model; statistics and parameters that are views."""
    skip_unless_runnable("triton", device, torch.float16)
    given = {name: torch.stack([v, v], 1).half()[:, 0] for name, v in vectors(8, device).items()}
    assert not given["running_mean"].is_contiguous()
    x = torch.randn(2, 8, 5, 5, device=device).half()
    ours, eager = ({n: v.clone() if n.startswith("running") else v for n, v in given.items()} for _ in range(2))
    before = torch.stack([given["running_mean"]] * 2, 1)[:, 0]
    strided = ours | {"running_mean": before}
    batch_norm_act(x, None, *strided.values(), training=True, **SETTINGS, backend="triton")
    if device.type == "cuda":
        reference.batch_norm_act(x, None, *eager.values(), training=True, **SETTINGS)
    else:  # PyTorch's own CPU kernels refuse half statistics with half data in some versions
        wide = {n: v.double() for n, v in eager.items()}
        reference.batch_norm_act(x.double(), None, *wide.values(), training=True, **SETTINGS)
        eager = wide
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(strided[name].double(), eager[name].double(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ("auto", "eager", "cpu", "triton"))
def test_empty_batch(backend, device):
    skip_unless_runnable("eager" if backend == "auto" else backend, device, torch.float32)
    given = vectors(4, device)
    y = batch_norm_act(
        torch.randn(0, 4, 5, 5, device=device), None, *given.values(), training=False, **SETTINGS, backend=backend
    )
    assert y.shape == (0, 4, 5, 5)


def test_one_value_per_channel_is_eagers_error():
    x = torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError) as eager:
        nn.BatchNorm2d(4)(x)
    with pytest.raises(ValueError) as ours:
        batch_norm_act(x, None, None, None, None, None, training=True, **SETTINGS)
    assert str(ours.value) == str(eager.value)


GOOD = dict(
    x=torch.ones(2, 4, 3, 3), residual=None, weight=torch.ones(4), bias=torch.ones(4), running_mean=torch.ones(4),
    running_var=torch.ones(4), training=True, momentum=0.1, eps=1e-5,
)  # fmt: skip


@pytest.mark.parametrize(
    "wrong, kind, message",
    [
        (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (dict(weight=1.0), TypeError, "weight must be a torch.Tensor or None, got float"),
        (dict(x=torch.ones(2, 4, 3, 3).int()), TypeError, "x must be floating point, got torch.int32"),
        (dict(x=torch.ones(2, 4)), ValueError, r"x must have 4 dimensions \(N, C, H, W\), got shape \(2, 4\)"),
        (dict(weight=torch.ones(3)), ValueError, r"weight must have shape \(4,\), got \(3,\)"),
        (dict(bias=torch.ones(4).double()), ValueError, "bias must be of dtype torch.float32, got torch.float64"),
        (dict(running_mean=torch.ones(5)), ValueError, r"running_mean must have shape \(4,\), got \(5,\)"),
        (dict(running_var=torch.ones(4).half()), ValueError, "running_var must be of dtype torch.float32, got torch.float16"),
        (dict(running_var=torch.ones(4, device="meta")), ValueError, "running_var must be on x's device cpu, got meta"),
        (dict(residual=torch.ones(2, 4, 1, 1)), ValueError, r"residual must have shape \(2, 4, 3, 3\), got \(2, 4, 1, 1\)"),
        (dict(residual=torch.ones(2, 4, 3, 3).half()), ValueError, "residual must be of dtype torch.float32"),
        (dict(momentum=1.5), ValueError, "momentum must be from 0 to 1, got 1.5"),
        (dict(momentum=None), ValueError, "momentum must be a number, got None"),
        (dict(eps=0.0), ValueError, "eps must be finite and above 0, got 0.0"),
        (dict(eps=-1.0, training=False), ValueError, "eps must be finite and at least 0, got -1.0"),
        (dict(running_var=None, training=False), ValueError, "running_var must be given in eval mode, got None"),
        (dict(running_mean=None), ValueError, "both be None, got running_var alone, without running_mean"),
        (dict(running_var=None, backend="triton"), ValueError, "got running_mean alone, without running_var"),
        (dict(backend="gpu"), ValueError, "backend must be one of auto, triton, cudnn, cpu, eager, got 'gpu'"),
    ],
)  # fmt: skip
def test_bad_input(wrong, kind, message):
    with pytest.raises(kind, match=message):
        rk.ops.batch_norm_act(**(GOOD | wrong))


def _step(run, device, training=True, residual=True):
    """Everything that a call changes or returns, with tensors drawn anew but the same each time."""
    torch.manual_seed(0)
    x, r, upstream = (torch.randn(2, 24, 5, 7).to(device, memory_format=torch.channels_last) for _ in range(3))
    given = vectors(24, device)
    wanted = [t.requires_grad_() for t in (x, r, given["weight"], given["bias"])]
    y = run(x, r if residual else None, *given.values(), training, 0.3, 1e-4, RELU)
    gradients = torch.autograd.grad(y, wanted if residual else [x, *wanted[2:]], upstream)
    statistics = [given["running_mean"], given["running_var"]]
    return [y, *gradients, *statistics], [t._version for t in statistics]


@pytest.mark.parametrize("training", (True, False), ids=("training", "eval"))
@pytest.mark.parametrize("residual", (True, False), ids=("residual", "alone"))
def test_past_the_dispatcher_it_is_the_op(residual, training, device, monkeypatch):
    skip_unless_runnable("triton", device, torch.float32)
    op = torch.ops.resnet_kernels.batch_norm_act.default
    expected, versions = _step(lambda *given: op(*given[:-1], "relu", 0.0, "triton")[0], device, training, residual)
    monkeypatch.setattr(module, "_Function", None)  # the op's autograd
    found, found_versions = _step(lambda *given: undispatched(*given, "triton"), device, training, residual)
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected) and found_versions == versions


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _SeenFunctions(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_whoever_watches_operations_sees_ours(device):
    skip_unless_runnable("triton", device, torch.float32)

    def run(*given):
        return undispatched(*given, "triton")

    with _Seen() as seen:
        _step(run, device)
    assert {"batch_norm_act.default", "batch_norm_act_backward.default"} <= {*seen.names}
    with _SeenFunctions() as seen:
        _step(run, device)
    assert "batch_norm_act.default" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        _step(run, device)
    names = {event.key for event in profiler.key_averages()}
    assert {"resnet_kernels::batch_norm_act", "resnet_kernels::batch_norm_act_backward"} <= names


def test_a_backward_is_seen_though_the_forward_was_not(device):
    skip_unless_runnable("triton", device, torch.float32)
    x = torch.randn(2, 8, 5, 5, device=device, requires_grad=True)
    y = on_triton(x, None, *vectors(8, device).values(), training=True, **SETTINGS)
    with _Seen() as seen:
        y.sum().backward()
    assert "batch_norm_act_backward.default" in seen.names
