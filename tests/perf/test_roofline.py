"""Limits by FLOPs and bytes: counts made by hand, the project's published limits, and what must hold for any network."""

import copy
import functools
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_kernels as rk
from resnet_kernels import models
from resnet_kernels.cli import main as cli
from resnet_kernels.perf.roofline import bounds, kernel_groups
from resnet_kernels.perf.roofline import network as roofline_network
from resnet_kernels.perf.roofline.bounds import Kernel, Machine, Tiling

BATCH = 256
H200 = bounds.h200()


def trace(model, *shape):
    return roofline_network.trace(model, torch.empty(shape, device="meta"))


@functools.cache
def built(name):
    """A model of the zoo without memory, and images of its size."""
    with torch.device("meta"):
        model = models.BY_NAME[name]().eval()
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        return model, torch.empty(BATCH, first.in_channels, *([28, 28] if name.startswith("d2l") else [224, 224]))


@functools.cache
def network(name):
    return roofline_network.trace(*built(name))


@pytest.mark.slow(unless=lambda name: name in ("resnet18", "resnet50", "resnet_v2_50", "d2l_resnet18"))
@pytest.mark.parametrize("name", models.BY_NAME)
def test_flops_are_those_of_torchs_counter(name):
    model, x = built(name)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        copy.deepcopy(model)(x)
    net = network(name)
    for kernels in (
        bounds.eager(net, 2),
        bounds.per_layer(net, 2),
        bounds.chained(net, 2),
        bounds.compute(net),
    ):
        assert sum(kernel.flops for kernel in kernels) == counter.get_total_flops() > 0


def test_1x1_by_hand():
    net = trace(nn.Conv2d(64, 256, 1, bias=False), 2, 64, 8, 8)
    pixels = 2 * 8 * 8
    hbm = 64 * pixels + 256 * pixels + 64 * 256
    l2 = 2 * pixels * 64 + 64 * 256  # two tiles of 128 channels read the pixels, one tile of 128 pixels the weight
    assert bounds.eager(net, 2) == [Kernel("conv", 2 * pixels * 64 * 256, 2 * hbm, 2 * l2)]
    assert bounds.eager(net, 4, Tiling(block_n=256))[0].l2_bytes == 4 * (pixels * 64 + 64 * 256)


def test_strided_1x1_passes_over_pixels():
    (kernel,) = bounds.eager(trace(nn.Conv2d(64, 128, 1, 2, bias=False), 1, 64, 7, 9), 2)
    assert kernel.hbm_bytes == 2 * (64 * 4 * 5 + 128 * 4 * 5 + 64 * 128)


def test_3x3_with_residual_by_hand():
    first, second = bounds.per_layer(trace(models.resnet_v1.BasicBlock(64, 64), 2, 64, 8, 8), 2)
    assert (first.name, second.name) == ("conv1+bn1+relu", "conv2+bn2+add+relu")
    image, weight = 64 * 2 * 8 * 8, 9 * 64 * 64
    assert first.hbm_bytes == 2 * (2 * image + weight)
    assert second.hbm_bytes == 2 * (3 * image + weight)
    assert first.l2_bytes == second.l2_bytes == 2 * (9 * image + weight)
    assert first.flops == 2 * 128 * weight


def test_eager_3x3_with_residual_by_hand():
    kernels = bounds.eager(trace(models.resnet_v1.BasicBlock(64, 64), 2, 64, 8, 8), 2)
    assert [kernel.name for kernel in kernels] == ["conv1", "bn1", "relu", "conv2", "bn2", "add", "relu"]
    image, weight = 64 * 2 * 8 * 8, 9 * 64 * 64
    passes = [2 * image + weight, 2 * image, 2 * image, 2 * image + weight, 2 * image, 3 * image, 2 * image]
    assert [kernel.hbm_bytes for kernel in kernels] == [2 * elements for elements in passes]


def test_stem_by_hand():
    net = trace(built("resnet50")[0], 1, 3, 224, 224)
    stem, pool = bounds.per_layer(net, 2)[:2]
    image, map_, pooled, weight = 3 * 224 * 224, 64 * 112 * 112, 64 * 56 * 56, 64 * 3 * 49
    assert (stem.name, pool.name) == ("conv1+bn1+relu", "maxpool")
    assert stem.hbm_bytes == 2 * (image + map_ + weight) and pool.hbm_bytes == 2 * (map_ + pooled)
    assert stem.l2_bytes == 2 * (112 * 112 * 147 + 98 * weight)  # 12544 pixels are 98 tiles
    both = bounds.per_layer(net, 2, stem_with_pool=True)[0]
    assert both.name == "conv1+bn1+relu -> maxpool"
    assert both.hbm_bytes == 2 * (image + pooled + weight) and both.l2_bytes == stem.l2_bytes


def test_chain_by_hand():
    block = models.resnet_v1.Bottleneck
    net = trace(nn.Sequential(block(256, 64), block(256, 64)), 4, 256, 8, 8)
    names = ["0.conv1+bn1+relu", "0.conv2+bn2+relu -> conv3+bn3+add+relu -> 1.conv1+bn1+relu"]
    names.append("1.conv2+bn2+relu -> conv3+bn3+add+relu")
    kernels = bounds.chained(net, 2)
    assert [kernel.name for kernel in kernels] == names
    narrow, wide, weights = 64 * 256, 256 * 256, (9 * 64 * 64, 64 * 256, 256 * 64)
    # In: conv1's output and the residual. Out: the sum, which the next add needs, and the next conv1's output.
    assert kernels[1].hbm_bytes == 2 * (narrow + wide + wide + narrow + sum(weights))
    # 256 pixels are two tiles; between the products a tile stays in shared memory.
    assert kernels[1].l2_bytes == 2 * (9 * narrow + 2 * sum(weights))
    assert len(bounds.chained(net, 2, max_width=32)) == len(bounds.per_layer(net, 2)) == 6


def test_merged_shortcut_by_hand():
    shortcut = nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
    net = trace(models.resnet_v1.BasicBlock(64, 128, 2, shortcut), 2, 64, 16, 16)
    kernels = bounds.per_layer(net, 2, merged_shortcut=True)
    assert [kernel.name for kernel in kernels] == ["conv1+bn1+relu", "downsample.0+1 -> conv2+bn2+add+relu"]
    map_, weights = 128 * 2 * 8 * 8, 64 * 128 + 9 * 128 * 128
    assert kernels[1].hbm_bytes == 2 * (64 * 2 * 8 * 8 + 2 * map_ + weights)
    assert kernels[1].l2_bytes == 2 * (64 * 128 + 9 * map_ + weights)


def test_tap_sharing_by_hand():
    net = trace(nn.Conv2d(128, 128, 3, 1, 1, bias=False), 4, 128, 8, 8)
    weight = 9 * 128 * 128
    for columns, loads in ((1, 18), (2, 12), (4, 9)):
        # Each of three rows: columns + 2 tiles of 128 pixels for `columns` tiles of output, of which 256 pixels are two.
        (kernel,) = bounds.eager(net, 2, Tiling(columns=columns))
        assert kernel.l2_bytes == 2 * (loads * 128 * 128 + (2 if columns == 1 else 1) * weight)
    strided = trace(nn.Conv2d(128, 128, 3, 2, 1, bias=False), 4, 128, 8, 8)
    assert bounds.eager(strided, 2, Tiling(columns=2)) == bounds.eager(strided, 2)


def test_rates_that_the_tiles_need():
    """TB/s from L2 at 790 TFLOP/s; source: the project's notes on kernels, "the third roof"."""
    net = trace(nn.Conv2d(512, 512, 3, 1, 1, bias=False), 64, 512, 16, 16)
    for tiling, expected in ((Tiling(), 12.3), (Tiling(block_n=256), 9.3), (Tiling(columns=2), 7.2)):
        (kernel,) = bounds.eager(net, 2, tiling)
        assert kernel.l2_bytes / kernel.flops * 790 == pytest.approx(expected, rel=0.01)


def test_grouped_convolution_reads_its_pixels_once():
    (kernel,) = bounds.eager(trace(nn.Conv2d(256, 256, 3, 1, 1, groups=64, bias=False), 2, 256, 8, 8), 2)
    weight = 9 * 4 * 256
    assert kernel.flops == 2 * 128 * weight and kernel.l2_bytes == 2 * (9 * 256 * 128 + weight)


TWO, THREE = H200.without_l2(), H200
WIDE, SHARED = Tiling(block_n=256), Tiling(block_n=256, columns=2)


@pytest.mark.parametrize(
    "name, kernels, machine, published",
    [
        ("resnet50", bounds.eager, TWO, 24e3),
        ("resnet50", bounds.per_layer, TWO, 60e3),
        ("resnet50", functools.partial(bounds.per_layer, merged_shortcut=True), TWO, 65e3),
        ("resnet50", functools.partial(bounds.per_layer, stem_with_pool=True), TWO, 63e3),
        ("resnet50", functools.partial(bounds.per_layer, stem_with_pool=True, merged_shortcut=True), TWO, 67e3),
        ("resnet50", functools.partial(bounds.chained, across_stages=True), TWO, 83e3),
        ("resnet50", functools.partial(bounds.chained, across_stages=True, merged_shortcut=True), TWO, 89e3),
        ("resnet50", lambda net, _: bounds.compute(net), TWO, 97e3),
        ("resnet50", functools.partial(bounds.per_layer, tiling=WIDE), THREE, 52e3),
        ("resnet50", functools.partial(bounds.per_layer, tiling=SHARED), THREE, 56e3),
        ("resnet50", functools.partial(bounds.chained, max_width=128), THREE, 59e3),
        ("resnet18", bounds.per_layer, TWO, 189e3),
        ("resnet18", lambda net, _: bounds.compute(net), TWO, 218e3),
        ("resnet18", functools.partial(bounds.per_layer, tiling=Tiling(128, 256, columns=4)), THREE, 177e3),
        ("resnet152", bounds.per_layer, TWO, 25.4e3),
        ("resnet152", lambda net, _: bounds.compute(net), TWO, 34.3e3),
    ],
)
def test_published_limits(name, kernels, machine, published):
    """Source: the project's notes on kernels, section 2: H200, bf16, 224x224, batch 256, in images/s."""
    assert bounds.limit(kernels(network(name), 2), machine, BATCH) == pytest.approx(published, rel=0.03)


def test_what_differs_from_the_published_limits():
    """As the docstring says: chains within a stage, and ResNet-18 without tap sharing."""
    assert bounds.limit(bounds.chained(network("resnet50"), 2), TWO, BATCH) == pytest.approx(80.2e3, rel=0.001)
    assert bounds.limit(bounds.per_layer(network("resnet18"), 2, WIDE), THREE, BATCH) == pytest.approx(
        125.7e3, rel=0.001
    )
    assert bounds.limit(bounds.per_layer(network("resnet50"), 2), THREE, BATCH) == pytest.approx(46.6e3, rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.BY_NAME)
def test_a_larger_kernel_is_never_slower_and_a_roof_never_lifts_a_limit(name):
    net = network(name)
    limits = []
    for tiling in (Tiling(), Tiling(block_n=256, columns=2)):
        executions = (
            bounds.eager(net, 2, tiling),
            bounds.per_layer(net, 2, tiling),
            bounds.chained(net, 2, tiling),
            bounds.chained(net, 2, tiling, across_stages=True, merged_shortcut=True),
            bounds.compute(net),
        )
        for machine in (TWO, THREE):
            limits.append([bounds.limit(kernels, machine, BATCH) for kernels in executions])
            assert limits[-1] == sorted(limits[-1])
        assert all(three <= two for two, three in zip(*limits[-2:]))


@pytest.mark.parametrize("name", ("resnet18", "resnet50", "resnext50_32x4d", "resnet_v2_50", "d2l_resnet18_keras"))
def test_per_layer_is_what_fuse_does(name):
    groups = kernel_groups.layers(network(name))

    def texts(path):
        prefix = f"{path}." if path else ""
        return {
            "+".join(
                operation.name.removeprefix(prefix) if operation.kind in ("conv", "bn") else operation.kind
                for operation in group.operations
                if operation.kind != "pad"
            )
            for group in groups
        }

    rows = rk.explain(built(name)[0]).fused
    assert rows
    for row in rows:
        steps = {step for step in row.steps.split(" -> ") if "+" in step}
        assert steps <= texts(row.path)
        assert steps or row.steps == "conv1 -> pool1"  # with a pool behind it alone


@pytest.mark.parametrize("name", models.BY_NAME)
def test_kernels_are_in_an_order_in_which_they_can_run(name):
    net = network(name)
    groups = kernel_groups.merge_shortcuts(kernel_groups.merge_pools(kernel_groups.layers(net), net), net)
    for order in (kernel_groups.layers(net), groups, kernel_groups.chain(groups, net, True, None)):
        made = {0}
        for group in order:
            for operation in group.operations:
                assert {value for value, _ in operation.reads} <= made
                made.add(operation.writes)
        assert sum(len(group.operations) for group in order) == len(net.operations) and net.results <= made


def test_a_chain_takes_a_norm_that_comes_first():
    names = [kernel.name for kernel in bounds.chained(network("resnet_v2_50"), 2)]
    chain = "block1.unit_1.conv2+bn2+relu -> conv3+add+block1.unit_2.preact+relu -> conv1+bn1+relu"
    assert chain in names and "block1.unit_3.conv2+bn2+relu -> conv3+add" in names


def test_bound():
    machine = Machine(flops_per_s=100.0, hbm_bytes_per_s=10.0, l2_bytes_per_s=20.0)
    assert machine.bound(Kernel("", 400, 30, 40)) == (4.0, "FLOP")
    assert machine.bound(Kernel("", 400, 50, 40)) == (5.0, "HBM")
    assert machine.bound(Kernel("", 400, 50, 120)) == (6.0, "L2")
    assert machine.without_l2() == Machine(100.0, 10.0, math.inf)
    assert bounds.limit([Kernel("", 400, 30, 40), Kernel("", 0, 10, 0)], machine, 10) == 2.0


def test_trace_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    net = roofline_network.trace(model, torch.randn(2, 3, 8, 8))
    assert [operation.kind for operation in net.operations] == ["conv", "bn", "relu"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_errors():
    with pytest.raises(ValueError, match="no transposed convolution, got one"):
        trace(nn.ConvTranspose2d(3, 4, 3), 1, 3, 8, 8)
    with pytest.raises(ValueError, match="a convolution or a linear layer, got a ReLU"):
        trace(nn.ReLU(), 1, 3, 8, 8)
    with pytest.raises(ValueError, match="dtype must be one of bf16, fp16, fp32, got 'int8'"):
        bounds.h200("int8")


def test_command(capsys):
    assert cli.main(["roofline", "--batch-size", "2", "--hbm-tbps", "4", "--execution", "chained"]) == 0
    text = capsys.readouterr().out
    assert "Assumptions of the model, not measurements of this machine" in text
    for line in (
        "790 TFLOP/s (an H200)",
        "4 TB/s from and to HBM (as given)",
        "8 TB/s from L2 to shared memory (an H200)",
    ):
        assert line in text
    for expected in ("8.178 GFLOP an image", "conv1+bn1+relu -> maxpool", "img/s by FLOP, HBM and L2", "compute"):
        assert expected in text
    # A table, and behind it prose that begins with "auto", too.
    lines = text[text.index("way of running") :].splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in reversed(lines) if line}
    assert (
        rows["eager"][0] == "174" and len(rows["triton"]) == 2 and len(rows["auto"]) == len(rows["torch.compile"]) == 3
    )
    assert int(rows["triton"][0]) < int(rows["auto"][0]) < 174


def test_command_json_and_rates(capsys):
    rates = ["--flop-tflops", "100", "--hbm-tbps", "2", "--l2-tbps", "5"]
    assert cli.main(["roofline", "--model", "d2l_resnet18", "--dtype", "fp32", "--json", *rates]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["assumed"] == {"flop_tflops": 100, "hbm_tbps": 2, "l2_tbps": 5} and values["image_size"] == 28
    machine = Machine(100e12, 2e12, 5e12)
    kernels = bounds.per_layer(network("d2l_resnet18"), 4)
    entry = values["executions"]["per-layer"]
    assert entry["img_per_s"]["flop_hbm_l2"] == pytest.approx(bounds.limit(kernels, machine, BATCH))
    assert entry["img_per_s"]["flop_hbm"] == pytest.approx(bounds.limit(kernels, machine.without_l2(), BATCH))
    assert [kernel["hbm_bytes"] for kernel in entry["kernels"]] == [kernel.hbm_bytes for kernel in kernels]
    assert {kernel["bound_by"] for kernel in entry["kernels"]} <= {"FLOP", "HBM", "L2"}
    assert {"eager", "per-layer", "chained", "compute"} <= set(values["executions"])
    assert list(values["ways"]) == ["eager", "torch.compile", "auto", "triton"]
    assert values["ways"]["auto"]["launches"] < values["ways"]["eager"]["launches"]
    assert values["ways"]["triton"]["seconds"] is None and values["ways"]["auto"]["seconds"] > 0


def test_fp32_is_tf32(capsys):
    assert cli.main(["roofline", "--model", "d2l_resnet18", "--dtype", "fp32"]) == 0
    assert "395 TFLOP/s as TF32 (an H200)" in capsys.readouterr().out


def test_unknown_model_is_one_line_and_status_2(capsys):
    assert cli.main(["roofline", "--model", "resnet51"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --model must be one of resnet18, ") and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", (["--l2-tbps", "0"], ["--hbm-tbps", "nan"], ["--dtype", "int8"], ["--batch-size", "0"])
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["roofline", *arguments])
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err
