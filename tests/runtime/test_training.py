"""Training through fused blocks: every gradient and buffer against fp64 and eager; the loops that people write around it."""

import copy

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import DTYPES, skip_unless_runnable
from helpers.training_steps import small_d2l, spy_on_training
from resnet_kernels.models import d2l, resnet_v1, resnet_v2
from resnet_kernels.runtime import fused_module

CHANNELS_LAST = torch.channels_last


def downsample(c_in, c_out, stride):
    return nn.Sequential(resnet_v1.conv1x1(c_in, c_out, stride), nn.BatchNorm2d(c_out))


BLOCKS = {
    "BasicBlock": lambda: resnet_v1.BasicBlock(16, 16),
    "BasicBlock, stride 2": lambda: resnet_v1.BasicBlock(16, 24, 2, downsample(16, 24, 2)),
    "Bottleneck": lambda: resnet_v1.Bottleneck(16, 4),
    "Bottleneck, projection": lambda: resnet_v1.Bottleneck(16, 8, 1, downsample(16, 32, 1)),
    "Bottleneck, groups": lambda: resnet_v1.Bottleneck(16, 8, 2, downsample(16, 32, 2), groups=4, base_width=16),
    "Residual": lambda: d2l.Residual(16, 16),
    "Residual, stride 2": lambda: d2l.Residual(16, 24, use_1x1conv=True, strides=2),
    "Residual, Keras": lambda: d2l.Residual(16, 24, use_1x1conv=True, strides=2, tf_padding=True),
    "PreactBottleneck": lambda: resnet_v2.PreactBottleneck(16, 16, 8),
    "PreactBottleneck, subsampled": lambda: resnet_v2.PreactBottleneck(16, 16, 8, 2),
    "PreactBottleneck, projection": lambda: resnet_v2.PreactBottleneck(16, 32, 8, 2),
}


def randomise(module):
    """Weights and statistics with which no BN is the identity and no gradient zero."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d) and m.affine:
                m.weight.uniform_(0.5, 1.5)
                m.bias.uniform_(-0.5, 0.5)
            if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
                m.running_mean.uniform_(-0.5, 0.5)
                m.running_var.uniform_(0.5, 2)
    return module


def results(module, x, upstream, dtype=None):
    """Output, all gradients and all buffers of one step, by name."""
    module = module if dtype is None else module.to(dtype)
    x = x.detach().to(dtype or x.dtype).requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(upstream.to(y.dtype))
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def relative_errors(tensors, oracle):
    """||t - oracle|| / ||oracle||, by name. A gradient that is truly zero (a bias before a BN) counts against all of them."""
    whole = torch.stack([t.double().norm() for name, t in oracle.items() if name.startswith("d")]).norm()
    found = {}
    for name, truth in oracle.items():
        if truth.is_floating_point():
            size = truth.norm() if truth.norm() > 1e-9 * whole else whole
            found[name] = ((tensors[name].double() - truth).norm() / size).item()
    return found


def assert_parity(module, fused, x, rounding=None):
    """One step of both against fp64: the root mean square of all relative errors is at most twice eager's plus one rounding.

    Over all tensors, as single small vectors are a lottery: eager's error of one is by luck a tenth of that of its neighbor.
    """
    with torch.no_grad():
        shape = copy.deepcopy(module)(x).shape
    upstream = torch.randn(shape, device=x.device).to(x.dtype)
    wide = copy.deepcopy(module)
    ours, eager = results(fused, x, upstream), results(module, x, upstream)
    oracle = results(wide, x, upstream, torch.float64)
    assert ours.keys() == eager.keys() == oracle.keys()
    for name, mine in ours.items():
        assert mine.dtype == eager[name].dtype and mine.shape == eager[name].shape, name
        if not mine.is_floating_point():
            assert torch.equal(mine, eager[name]), name
    own, budget = (relative_errors(tensors, oracle) for tensors in (ours, eager))
    rounding = torch.finfo(x.dtype).eps / 2 if rounding is None else rounding
    rms = lambda errors: (sum(e * e for e in errors.values()) / len(errors)) ** 0.5  # noqa: E731
    assert rms(own) <= 2 * rms(budget) + rounding, {n: (own[n], budget[n]) for n in own}
    return ours, eager


@pytest.mark.slow(unless=lambda name, dtype: dtype == torch.float32 and name in [*BLOCKS][::3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, dtype, device, monkeypatch):
    skip_unless_runnable("triton", device, dtype)
    seen = spy_on_training(monkeypatch)
    module = randomise(BLOCKS[name]()).to(device, dtype, memory_format=CHANNELS_LAST).train()
    fused = rk.fuse(module, backend="triton")
    x = torch.randn(3, 16, 9, 10, device=device).to(dtype, memory_format=CHANNELS_LAST)
    ours, eager = assert_parity(module, fused, x)
    assert len(seen) == 1
    assert ours["y"].stride() == eager["y"].stride()


def small_resnet(num_classes=10):
    return resnet_v1.ResNet(resnet_v1.BasicBlock, (1, 1, 1, 1), num_classes)


def small_v2(num_classes=10):
    stages = [resnet_v2.resnet_v2_block("block1", 8, 2, 2), resnet_v2.resnet_v2_block("block2", 8, 1, 1)]
    return resnet_v2.ResNetV2(stages, num_classes)


def timm_v2():
    timm = pytest.importorskip("timm", reason="needs timm")
    return timm.models.resnetv2.ResNetV2(
        layers=(1, 1), channels=(32, 64), num_classes=10, stem_chs=16, norm_layer=timm.layers.BatchNormAct2d,
        conv_layer=timm.layers.create_conv2d,
    )  # fmt: skip


NETS = {
    "torchvision": (small_resnet, 3, 5),
    "slim v2": (small_v2, 3, 4),
    "d2l": (lambda: d2l.d2l_resnet18(width=16, num_blocks=(1, 1)), 1, 3),
    "d2l, Keras": (lambda: d2l.d2l_resnet18(width=16, num_blocks=(1, 1), tf_padding=True), 1, 3),
    "timm resnetv2": (timm_v2, 3, 2),
}


@pytest.mark.slow(unless=lambda name, layout: name == "d2l" and layout == CHANNELS_LAST)
@pytest.mark.parametrize("layout", (CHANNELS_LAST, torch.contiguous_format), ids=str)
@pytest.mark.parametrize("name", NETS)
def test_nets(name, layout, device, monkeypatch):
    skip_unless_runnable("triton", device, torch.float32)
    build, channels, recipes = NETS[name]
    seen = spy_on_training(monkeypatch)
    net = randomise(build()).to(device, memory_format=CHANNELS_LAST).train()
    x = torch.randn(3, channels, 64, 64, device=device).to(memory_format=layout)
    fused = rk.fuse(net, backend="triton")
    assert len(rk.explain(fused).fused) == recipes and not any(row.reason for row in rk.explain(fused))
    assert_parity(net, fused, x)
    assert len(seen) == recipes
    rk.unfuse_(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in net.modules()]


def test_timm_group_norms_are_skipped_with_the_reason():
    timm = pytest.importorskip("timm", reason="needs timm")
    report = rk.explain(timm.create_model("resnetv2_50x1_bit", pretrained=False))
    assert len(report.skipped) == 16 and not report.fused
    assert all("GroupNormAct" in row.reason or "StdConv2d" in row.reason for row in report.skipped), str(report)


@pytest.mark.parametrize("momentum", (0.3, None))
def test_buffers_step_by_step(momentum, device):
    """num_batches_tracked counts, and momentum None averages over all batches."""
    skip_unless_runnable("triton", device, torch.float32)
    module = randomise(BLOCKS["BasicBlock"]()).to(device).train()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    fused = rk.fuse(module, backend="triton")
    for _ in range(3):
        x = torch.randn(2, 16, 6, 6, device=device)
        with torch.no_grad():  # batch statistics without gradients: a model being calibrated
            module(x), fused(x)
    for (name, mine), theirs in zip(fused.named_buffers(), module.buffers()):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
    assert int(fused.bn1.num_batches_tracked) == 3


def test_one_bn_in_train_mode_in_an_eval_model(device):
    skip_unless_runnable("triton", device, torch.float32)
    module = randomise(BLOCKS["Bottleneck"]()).to(device).eval()
    module.bn2.train()
    fused = rk.fuse(module, backend="triton")
    ours, _ = assert_parity(module, fused, torch.randn(2, 16, 6, 6, device=device))
    assert int(ours["bn2.num_batches_tracked"]) == 1 and int(ours["bn1.num_batches_tracked"]) == 0


@pytest.mark.parametrize("mode", ("train", "eval"))
@pytest.mark.parametrize("norm", ("parameters frozen", "FrozenBatchNorm2d", "trained"))
@pytest.mark.parametrize("backend", ("triton", "cpu", "cudnn"))
def test_frozen_bn(backend, norm, mode, device, monkeypatch):
    """Running statistics with gradients: fine-tuning, detection, attacks on an eval model."""
    skip_unless_runnable(backend, device, torch.float32)
    layer = nn.BatchNorm2d
    if norm == "FrozenBatchNorm2d":
        layer = pytest.importorskip("torchvision.ops", reason="needs torchvision").FrozenBatchNorm2d
    net = resnet_v1.Bottleneck(16, 8, 2, nn.Sequential(resnet_v1.conv1x1(16, 32, 2), layer(32)), norm_layer=layer)
    net = randomise(net).to(device, memory_format=CHANNELS_LAST).train(mode == "train")
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.requires_grad_(norm == "trained")
    fused, seen = rk.fuse(net, backend=backend), spy_on_training(monkeypatch)
    x = torch.randn(2, 16, 9, 9, device=device).to(memory_format=CHANNELS_LAST)
    if norm == "trained" and backend != "triton":
        with pytest.warns(RuntimeWarning, match="gradients are on in eval mode"):
            assert_parity(net, fused, x)
        assert not seen
    else:
        assert_parity(net, fused, x)
        assert len(seen) == 1


def test_auto_on_the_cpu_trains_as_eager_does_bit_for_bit(monkeypatch):
    """There PyTorch's own BN is as fast as anything that we have, so it stays."""
    seen = spy_on_training(monkeypatch)
    net = small_resnet().train()
    fused, x = rk.fuse(net), torch.randn(2, 3, 64, 64)
    upstream = torch.randn(2, 10)
    mine, theirs = results(fused, x, upstream), results(net, x, upstream)
    assert not seen and all(torch.equal(mine[name], theirs[name]) for name in theirs)


class NoisyInTraining(resnet_v1.BasicBlock):
    def forward(self, x):
        return super().forward(x * 2 if self.training else x)


def test_a_forward_that_is_another_one_in_training(device):
    skip_unless_runnable("triton", device, torch.float32)
    module = NoisyInTraining(8, 8).to(device).train()
    fused, x = rk.fuse(module, backend="triton"), torch.randn(2, 8, 5, 5, device=device)
    assert "another one in train() mode" in rk.explain(fused).rows[0].reason
    with pytest.warns(RuntimeWarning, match="its forward is another one in train"):
        assert torch.equal(fused(x), module(x))
    assert not rk.explain(fused.eval()).rows[0].reason


def test_dropout_and_sync_batch_norm_run_eager_with_the_reason(device):
    skip_unless_runnable("triton", device, torch.float32)

    class Dropping(resnet_v1.BasicBlock):
        def __init__(self):
            super().__init__(8, 8)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.relu(self.drop(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))) + x)

    x = torch.randn(2, 8, 5, 5, device=device)
    dropping = rk.fuse(Dropping().to(device).train(), backend="triton")
    with pytest.warns(RuntimeWarning, match="drop is a Dropout in train"):
        dropping(x)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(resnet_v1.BasicBlock(8, 8)).to(device).train()
    report = rk.explain(rk.fuse(module, backend="triton"))
    assert "bn1 is a SyncBatchNorm, whose statistics are of all processes" in report.rows[0].reason
    assert not rk.explain(rk.fuse(module.eval(), backend="triton")).rows[0].reason


def test_hook_on_an_inner_module_fires_in_training(device):
    skip_unless_runnable("triton", device, torch.float32)
    fused, seen = rk.fuse(resnet_v1.BasicBlock(8, 8).to(device).train(), backend="triton"), []
    fused.bn1.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(RuntimeWarning, match="a hook on bn1 has to fire"):
        fused(torch.randn(2, 8, 5, 5, device=device)).sum().backward()
    assert seen == [1]


def test_eval_after_training_sees_the_new_weights(device):
    """Packed weights and statistics of before must not survive a step."""
    net = randomise(small_resnet()).to(device).eval()
    fused, x = rk.fuse(net), torch.randn(2, 3, 64, 64, device=device)
    for model in (net, fused):
        with torch.no_grad():
            model.eval()(x)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(x).square().mean().backward()
        optimizer.step()
        model.eval()
    assert rk.verify(net, fused, x)


@pytest.mark.slow
def test_strided_1x1_of_few_channels(device):
    """oneDNN writes that weight's gradient past its buffer on channels_last data; a contiguous model must not meet that."""
    skip_unless_runnable("triton", device, torch.float32)
    for channels in (8, 12):
        for norm in (nn.Identity, nn.BatchNorm2d):
            shortcut = nn.Sequential(resnet_v1.conv1x1(channels, 16, 2), norm(16))
            module = resnet_v1.BasicBlock(channels, 16, 2, shortcut).to(device).train()
            for _ in range(5):
                fused = rk.fuse(module, backend="triton")
                assert_parity(copy.deepcopy(module), fused, torch.randn(3, channels, 16, 16, device=device))
    x = torch.randn(3, 8, 16, 16, device=device).to(memory_format=CHANNELS_LAST)
    weight = torch.randn(16, 8, 1, 1, device=device, requires_grad=True)
    for _ in range(5):
        rk.ops.conv_bias_act(x, weight, stride=2).sum().backward()


@pytest.mark.parametrize("name", ("BasicBlock", "Residual", "PreactBottleneck", "Residual, stride 2"))
def test_a_wider_input_under_autocast(name, device):
    """A block by itself, fed fp32: torchvision's in-place add keeps the half dtype, d2l's and slim's sum is fp32."""
    skip_unless_runnable("triton", device, torch.float32)
    module = randomise(BLOCKS[name]()).to(device).train()
    fused, x = rk.fuse(module, backend="triton"), torch.randn(2, 16, 6, 6, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        mine, theirs = fused(x), module(x)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("triton", "auto"))
def test_torch_compile(backend, device):
    skip_unless_runnable("triton", device, torch.float32)
    torch.manual_seed(0)
    net = small_d2l().to(device, memory_format=CHANNELS_LAST).train()
    fused = rk.fuse(net, backend=backend)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    x, upstream = torch.randn(4, 1, 16, 16, device=device), torch.randn(4, 10, device=device)
    mine, theirs = results(compiled, x, upstream), results(fused, x, upstream)
    for name, value in theirs.items():
        name = (
            name if name in ("y", "dx") else "d_orig_mod." + name[1:] if name.startswith("d") else f"_orig_mod.{name}"
        )
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_compiled_training_runs_our_op(device):
    """What Dynamo has captured holds batch_norm_act, and the blocks' own BN is gone."""
    skip_unless_runnable("triton", device, torch.float32)
    fused, graphs = rk.fuse(BLOCKS["Residual"]().to(device).train(), backend="triton"), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(fused, fullgraph=True, backend=keep)(torch.randn(2, 16, 6, 6, device=device))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("batch_norm_act" in target for target in called) == 2


def test_data_parallel_replicas(device):
    """A replica's parameters are plain tensors: it must still see that they want gradients."""
    skip_unless_runnable("triton", device, torch.float32)
    module = BLOCKS["BasicBlock"]().to(device).train()
    fused = rk.fuse(module, backend="triton")
    replica = fused._replicate_for_data_parallel()
    for name, child in fused.named_children():
        copied = child._replicate_for_data_parallel()
        for key, parameter in child._parameters.items():
            if parameter is None:
                copied._parameters[key] = None
            else:
                setattr(copied, key, parameter.clone())
        replica._modules[name] = copied
    x = torch.randn(2, 16, 6, 6, device=device)
    replica(x).square().mean().backward()
    expected = copy.deepcopy(module)
    expected.load_state_dict(module.state_dict())
    expected(x).square().mean().backward()
    for mine, theirs in zip(fused.parameters(), expected.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_built_preact_bottleneck_is_fused(device):
    skip_unless_runnable("triton", device, torch.float32)
    block = rk.PreactBottleneck(16, 32, 8, stride=2).to(device)
    assert fused_module.is_fused(block)
    names = {name for name, _ in block.named_children()}
    assert names == {"preact", "conv1", "bn1", "conv2", "bn2", "conv3", "shortcut"}
    assert block(torch.randn(2, 16, 6, 6, device=device)).shape == (2, 32, 3, 3)
    assert "shortcut" not in dict(rk.PreactBottleneck(16, 16, 8).named_children())
    assert rk.Residual(3, 6, use_1x1conv=True, strides=2)(torch.randn(4, 3, 6, 6)).shape == (4, 6, 3, 3)
    assert rk.Residual(3, 6, use_1x1conv=True, strides=2, tf_padding=True)(torch.randn(4, 3, 6, 6)).shape == (
        4,
        6,
        3,
        3,
    )
