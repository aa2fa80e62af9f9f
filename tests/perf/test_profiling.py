"""Where time went: every kernel in its module's range, counted once, fused and eager, forward and backward."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

import resnet_kernels as rk
from helpers.own_kernels import is_fused_convolution, skip_unless_compiled
from resnet_kernels.cli import main as cli
from resnet_kernels.cli import profile as profile_command
from resnet_kernels.kernels.cpu.library import ISA_VARIABLE
from resnet_kernels.models import resnet_v1, resnet_v2
from resnet_kernels.ops import backends
from resnet_kernels.perf import ceilings, profiling
from resnet_kernels.perf.profiling import KernelTime
from resnet_kernels.perf.roofline import bounds, network
from resnet_kernels.runtime import profiler_ranges

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small():
    return rk.models.ResNet(resnet_v1.BasicBlock, (1, 1, 1, 1), num_classes=5).eval()


def forward(model, x=X):
    def call():
        with torch.inference_mode():
            model(x)

    return call


def rows_of(model, call, x=X):
    return profiling.by_range(profiling.profile(call, model, steps=1, warm_up=1), network.trace(model, x), 4)


def test_eager_ranges_are_the_operations_of_the_network():
    model = small()
    rows = rows_of(model, forward(model))
    net = network.trace(model, X)
    known = [row for row in rows if row.least is not None]
    assert [row.range for row in known][:4] == ["conv1", "bn1", "relu", "maxpool"]
    # Not one operation is missing or counted twice.
    eager = bounds.eager(net, 4)
    for what in ("flops", "hbm_bytes"):
        assert sum(getattr(row.least, what) for row in known) == sum(getattr(kernel, what) for kernel in eager)
    assert [(row.call, row.layer) for row in rows if row.range == "layer2.0.relu"] == [
        (0, "layer2.0.conv1+bn1+relu"),
        (1, "layer2.0.conv2+bn2+add+relu"),
    ]
    kinds = {row.range: row.kind for row in rows}
    assert (kinds["conv1"], kinds["layer1.0.bn2"], kinds["layer1.0"], kinds["fc"]) == ("conv", "bn", "rest", "rest")
    assert all(row.seconds > 0 and not row.backward for row in rows)


def test_fused_ranges_are_steps_and_stay_fused(onednn_alone):
    model = rk.fuse(small())
    rows = rows_of(model, forward(model))
    known = {row.range: row for row in rows if row.least is not None}
    for step in (
        "conv1+bn1+relu",
        "layer1.0.conv1+bn1+relu",
        "layer2.0.downsample.0+downsample.1",
        "layer2.0.conv2+bn2+add+relu",
    ):
        (kernel,) = [kernel for kernel in known[step].kernels if is_fused_convolution(kernel.name)]
        assert kernel.kind == "conv", step
    assert known["layer2.0.downsample.0+downsample.1"].layer == "layer2.0.downsample.0+1"
    expected = bounds.per_layer(network.trace(model, X), 4)
    assert sum(row.least.flops for row in known.values()) == sum(kernel.flops for kernel in expected)
    assert sum(row.least.hbm_bytes for row in known.values()) == sum(kernel.hbm_bytes for kernel in expected)


def test_layers_of_eager_and_fused_are_the_same(onednn_alone):
    model = small()
    eager, fused = rows_of(model, forward(model)), rows_of(fast := rk.fuse(model), forward(fast))
    assert {row.layer for row in eager} == {row.layer for row in fused}


def test_a_norm_that_comes_first_and_a_module_that_is_a_step(onednn_alone):
    blocks = [resnet_v2.resnet_v2_block(f"block{i}", 4, 2, stride) for i, stride in ((1, 2), (2, 1))]
    model = rk.fuse(rk.models.ResNetV2(blocks, num_classes=5).eval())
    rows = rows_of(model, forward(model))
    assert any(row.range.endswith("unit_1.preact+relu") and row.kind == "bn" for row in rows)
    # The step calls the module, whose range bears the same name: one call.
    assert all(row.call == 0 for row in rows if row.range.endswith("subsample"))


def test_what_a_kernel_takes_along_has_no_pass_of_its_own(monkeypatch):
    """A BN on the way in, and a max-pool behind: their time is the convolution's."""
    # Asked for, our kernels run wherever they can, not only where they were measured.
    monkeypatch.setenv(ISA_VARIABLE, skip_unless_compiled().isa)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    pooled = rk.fuse(nn.Sequential(net, resnet_v1.BasicBlock(16, 16)).eval())
    ranges = {row.range for row in rows_of(pooled, forward(pooled))}
    assert {"0.0+1+relu", "1.conv1+bn1+relu"} <= ranges and not any(range_.endswith(".3") for range_ in ranges)
    blocks = [resnet_v2.resnet_v2_block("block1", 4, 2, 1)]
    model = rk.fuse(rk.models.ResNetV2(blocks, num_classes=5).eval())
    rows = [row for row in rows_of(model, forward(model)) if row.range.startswith("block1.unit_1")]
    assert not [row for row in rows if "preact" in row.range]
    assert any(row.range.startswith("block1.unit_1.conv1") and row.kind == "conv" for row in rows)


def test_names_that_c_plus_plus_would_read_as_mangled():
    model = rk.models.d2l_resnet18(3, 5, width=4, num_blocks=(1, 1)).eval()
    assert "2.0" in {row.range for row in rows_of(model, forward(model))}


@pytest.mark.parametrize("fused", (False, True))
def test_a_backward_is_of_its_forwards_ranges(fused):
    model = small().train()
    model = rk.fuse(model) if fused else model
    rows = rows_of(model, lambda: model(X).sum().backward())
    for kind in ("conv", "bn"):
        # Not by `row.kind`: on a busy machine the count of a BN's batches may take longer than the BN.
        of_kind = [row for row in rows if kind in {kernel.kind for kernel in row.kernels}]
        there = {row.range for row in of_kind if not row.backward and row.range != ""}
        back = {row.range for row in of_kind if row.backward}
        assert there == back and len(there) == 12
    calls = [(row.call, row.backward) for row in rows if row.range == "layer1.0.relu"]
    assert sorted(calls) == [(0, False), (0, True), (1, False), (1, True)]
    assert all(row.least is None for row in rows if row.backward)


def test_training_of_a_fused_step_knows_no_least_of_its_rest():
    model = rk.fuse(resnet_v1.BasicBlock(4, 4), backend="triton").train()
    reason = backends.why_not("triton", X.device.type, X.dtype)
    if reason is not None:
        pytest.skip(f"triton {reason}")
    x = torch.randn(2, 4, 8, 8)
    rows = rows_of(model, lambda: model(x), x)
    least = {row.range: row.least for row in rows}
    assert least["conv1"].flops > 0 and least["conv1+bn1+relu"] is None
    assert {row.range: row.kind for row in rows}["conv1+bn1+relu"] == "bn"


def test_what_runs_is_what_runs_without_a_profiler():
    model = rk.fuse(small())
    seen = []
    with torch.inference_mode():
        before = model(X)
        profiling.profile(lambda: seen.append(model(X)), model, steps=2)
    assert len(seen) == 4 and all(torch.equal(y, before) for y in seen)
    assert "runs eager" not in str(rk.explain(model))


def test_ceilings_are_rates():
    machine = ceilings.ceilings(torch.device("cpu"), torch.float32)
    assert 1e8 < machine.flops_per_s < 1e16 and 1e7 < machine.hbm_bytes_per_s < 1e14
    assert machine.bound(bounds.Kernel("", 0, 0, 10**18)) == (0, "FLOP")  # L2 was not measured


def test_module_calls_are_as_before_even_after_an_error():
    original = nn.Module.__call__
    with pytest.raises(ZeroDivisionError):
        profiling.profile(lambda: 1 / 0, small())
    calls = iter((None, None))
    with pytest.raises(StopIteration):
        profiling.profile(lambda: next(calls), small())
    assert nn.Module.__call__ is original


def test_somebodys_own_profiler_sees_the_steps_of_a_fused_model():
    model = rk.fuse(small())
    with torch.inference_mode(), torch.profiler.profile() as profiler:
        model(X)
        model(X)  # the first packs, the second runs a flat list
    names = [event.name for event in profiler.events()]
    assert names.count("module:layer3.0.conv2+bn2+add+relu") == names.count("module:conv1+bn1+relu") == 2


def test_without_a_profiler_steps_are_handed_on():
    steps = [("a",), ("b",)]
    assert profiler_ranges.around(steps, "path") is steps


def test_a_range_ends_with_an_error_inside():
    with torch.profiler.profile() as profiler:
        with pytest.raises(ZeroDivisionError):
            for _ in profiler_ranges.around([("a",)], "m"):
                raise ZeroDivisionError
        torch.ones(2).add_(1)
    add = next(event for event in profiler.events() if event.name == "aten::add_")
    assert add.cpu_parent is None and "module:m.a" in {event.name for event in profiler.events()}


def test_chrome_trace(tmp_path):
    model = rk.fuse(small())
    profiling.profile(forward(model), model, steps=1, trace=tmp_path / "trace.json")
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"module:layer1.0.conv1+bn1+relu", "module:layer4.0.conv2+bn2+add+relu", "module:fc"} <= names


class Events:
    """Events as torch.profiler gives them: sorted by start, each knows its parent."""

    def __init__(self):
        self.all = []

    def add(self, name, parent=None, *, self_us=0.0, kernels=(), sequence=-1, annotation=False, device=DeviceType.CPU):
        annotation = annotation or name.startswith(("module:", "resnet_kernels.profile step"))
        self.all.append(
            SimpleNamespace(
                name=name, cpu_parent=parent, self_cpu_time_total=self_us, sequence_nr=sequence, thread=1, fwd_thread=1,
                is_user_annotation=annotation, device_type=device,
                kernels=[SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels],
                time_range=SimpleNamespace(elapsed_us=lambda: self_us),
            )
        )  # fmt: skip
        return self.all[-1]

    def step(self):
        return self.add("resnet_kernels.profile step")


def test_self_times_add_up_once_and_average_over_steps():
    events = Events()
    for us in (10.0, 30.0):
        step = events.step()
        module = events.add("module:a", step, self_us=100.0)  # Python between operations is no operation's
        conv = events.add("aten::conv2d", module, self_us=us)
        events.add("aten::relu", conv, self_us=2 * us)  # a part of the convolution
        inner = events.add("module:a.b", conv)
        events.add("aten::batch_norm", inner, self_us=5.0)
        compiled = events.add("## Call CompiledFxGraph", step, self_us=7.0, annotation=True)
        events.add("mkldnn::_convolution_pointwise", compiled, self_us=1.0)
    times = profiling._kernel_times(events.all, False, 2)
    assert times == [
        KernelTime("a", 0, "aten::conv2d", "conv", False, pytest.approx(60e-6)),
        KernelTime("a.b", 0, "aten::batch_norm", "bn", False, pytest.approx(5e-6)),
        KernelTime("", 0, "## Call CompiledFxGraph", "rest", False, pytest.approx(7e-6)),
        KernelTime("", 0, "mkldnn::_convolution_pointwise", "conv", False, pytest.approx(1e-6)),
    ]


def test_device_times_are_kernels():
    events = Events()
    step = events.step()
    module = events.add("module:a+bn", step, kernels=[("module:a+bn", 50.0)])
    conv = events.add("aten::conv2d", module, self_us=99.0, sequence=7)
    events.add("aten::cudnn_convolution", conv, kernels=[("sm90_xmma", 20.0), ("nchwToNhwc", 3.0)], sequence=7)
    back = events.add("autograd::engine::evaluate_function: ConvolutionBackward0", sequence=7)
    events.add("aten::convolution_backward", back, kernels=[("dgrad", 8.0), ("wgrad", 9.0)])
    events.add("aten::copy_", step, kernels=[("elementwise", 1.0)])
    # The device's own events: those above, one that a range alone launched, and the range's shadow on the device.
    for name, us in (("sm90_xmma", 20.0), ("nchwToNhwc", 3.0), ("dgrad", 8.0), ("wgrad", 9.0), ("elementwise", 1.0)):
        events.add(name, self_us=us, device=DeviceType.CUDA)
    events.add("_bn_scale_shift_kernel", self_us=2.0, device=DeviceType.CUDA)
    events.add("module:a+bn", self_us=50.0, device=DeviceType.CUDA)
    events.add("optimizer", step, kernels=[("optimizer", 4.0)], annotation=True)
    events.add("optimizer", self_us=4.0, device=DeviceType.CUDA)
    times = profiling._kernel_times(events.all, True, 1)
    seconds = {(t.range, t.name, t.kind, t.backward): t.seconds for t in times}
    assert seconds == pytest.approx(
        {
            ("a+bn", "sm90_xmma", "conv", False): 20e-6,
            ("a+bn", "nchwToNhwc", "conv", False): 3e-6,
            ("a+bn", "dgrad", "conv", True): 8e-6,
            ("a+bn", "wgrad", "conv", True): 9e-6,
            ("", "elementwise", "rest", False): 1e-6,
            ("", "_bn_scale_shift_kernel", "bn", False): 2e-6,
        }
    )


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::convert_element_type", "rest"),
        ("aten::cudnn_convolution_relu", "conv"),
        ("resnet_kernels::conv_bias_act", "conv"),
        ("CudnnBatchNormBackward0", "bn"),
        ("_bn_scale_shift_kernel", "bn"),
        ("_epilogue_kernel", "bn"),
        ("_fold_weights_kernel", "bn"),
        ("triton_poi_fused__native_batch_norm_legit_relu_3", "bn"),
        ("aten::max_pool2d", "rest"),
    ],
)
def test_kinds(name, kind):
    assert profiling._kind(name) == kind


@pytest.mark.gpu
def test_device_times_of_a_gpu():
    model = rk.fuse(small().cuda().to(memory_format=torch.channels_last))
    x = X.cuda().contiguous(memory_format=torch.channels_last)
    times = profiling.profile(forward(model, x), model, device="cuda", steps=2)
    seen = {time.range for time in times if time.kind == "conv"}
    assert {"conv1+bn1+relu", "layer2.0.downsample.0+downsample.1", "layer4.0.conv2+bn2+add+relu"} <= seen
    assert all(time.seconds > 0 for time in times)


def test_errors():
    model = small()
    with pytest.raises(TypeError, match="call must be callable, got Tensor"):
        profiling.profile(X, model)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or None, got function"):
        profiling.profile(forward(model), forward(model))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        profiling.profile(forward(model), model, steps=0)
    with pytest.raises(ValueError, match="device must be a CPU or CUDA device, got mps"):
        profiling.profile(forward(model), model, device="mps")
    with pytest.raises(ValueError, match="model must not be compiled"):
        profiling.profile(lambda: None, torch.compile(model))
    with pytest.raises(ValueError, match="model must not be compiled"):
        model.compile()
        profiling.profile(lambda: None, model)


def test_command(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    assert (
        cli.main(
            [
                "profile",
                "--model",
                "resnet18",
                "--device",
                "cpu",
                "--image-size",
                "32",
                "--top",
                "30",
                "--trace",
                str(trace),
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert 'resnet18, fused, backend="auto": inference, batch 2, 32x32, 5 steps' in text
    assert "measured ceilings" in text and "ms (median) for a step without the profiler" in text
    row = r"^layer4\.0\.downsample\.0\+downsample\.1 +\S+ +conv +\d+\.\d{3} +\d+\.\d% +\d+\.\d +\d+\.\d +\d+%$"
    assert re.search(row, text, re.M), text
    totals = text[text.index("\nkind ") :]
    assert re.search(r"^kind +forward ms +of all$", totals, re.M) and re.search(r"^conv +\d+\.\d{3} +\d", totals, re.M)
    assert "module:layer4.1.conv2+bn2+add+relu" in trace.read_text()


@pytest.mark.slow
def test_command_rows_are_the_slowest_first_and_the_rest_is_summed_up(capsys):
    assert cli.main(["profile", "--model", "d2l_resnet18", "--device", "cpu", "--eager", "--top", "3"]) == 0
    text = capsys.readouterr().out
    lines = text.split("\n\n")[1].splitlines()[2:]
    assert len(lines) == 4 and re.match(r"\d+ more +\d", lines[3]) and "plain PyTorch: inference" in text
    milliseconds = [float(re.search(r" (\d+\.\d{3}) ", line).group(1)) for line in lines[:3]]
    assert milliseconds == sorted(milliseconds, reverse=True)


@pytest.mark.slow
def test_command_json_of_a_training_step(capsys):
    assert (
        cli.main(["profile", "--model", "d2l_resnet18", "--device", "cpu", "--backward", "--steps", "1", "--json"]) == 0
    )
    values = json.loads(capsys.readouterr().out)
    assert values["backward"] and values["seconds_per_step"] > 0 and values["ceilings"]["flops_per_s"] > 0
    assert set(values["totals"]) == {"forward", "backward"}
    for name, backward in (("forward", False), ("backward", True)):
        rows = [row for row in values["rows"] if row["backward"] == backward]
        assert sum(values["totals"][name].values()) == pytest.approx(sum(row["seconds"] for row in rows))
        assert values["totals"][name]["conv"] > 0 and values["totals"][name]["bn"] > 0
        assert all((row["flops"] is None) for row in rows) == backward
    shares = [row["share_of_roofline"] for row in values["rows"] if row["kind"] == "conv" and not row["backward"]]
    assert shares and all(share > 0 for share in shares)


def test_command_errors(capsys, tmp_path):
    missing = str(tmp_path / "none" / "trace.json")
    for arguments, message in (
        (["--trace", missing], "--trace must be in a directory that exists"),
        (["--model", "resnet51"], "--model must be one of resnet18, "),
    ):
        assert cli.main(["profile", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    with pytest.raises(SystemExit):
        cli.main(["profile", "--steps", "0"])


def test_an_h200_is_compared_with_an_h200(monkeypatch):
    images = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(ceilings, "ceilings", lambda *_: "measured")
    assert profile_command._machine(images) == (bounds.h200("bf16"), "of an H200")
    images.dtype = torch.float64
    assert profile_command._machine(images)[0] == "measured"
    images.dtype = torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert profile_command._machine(images)[0] == "measured"
