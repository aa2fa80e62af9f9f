"""Captured models on a GPU, where the graphs are CUDA's."""

import copy

import pytest
import torch
from torch import nn

import resnet_kernels as rk
from helpers.oracle import assert_within_budget
from resnet_kernels.models import resnet_v1

pytestmark = pytest.mark.gpu


class Waits(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x


def gpu_model(backend="auto"):
    torch.manual_seed(1)
    model = rk.models.ResNet(resnet_v1.Bottleneck, (1, 1, 1, 1), num_classes=5).eval().cuda()
    return rk.fuse(model.to(memory_format=torch.channels_last), backend=backend)


@pytest.mark.parametrize("backend", ("eager", "cudnn", "triton"))
@pytest.mark.parametrize("batch", (1, 8))
def test_gpu_replays_are_the_model(backend, batch):
    model = gpu_model(backend)
    x = torch.randn(batch, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    run = rk.capture(model, x)
    for _ in range(3):
        x = torch.randn_like(x)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x))
    assert len(run._graphs) == 1


@pytest.mark.parametrize("backend", ("eager", "cudnn", "triton"))
def test_gpu_edits_are_seen_and_replacements_captured(backend):
    model = gpu_model(backend)
    x = torch.randn(2, 3, 64, 64, device="cuda")
    run = rk.capture(model, x)
    watch = run._watch
    with torch.no_grad():
        before = run(x)
        model.layer1[0].conv1.weight.data.mul_(1.5)
        model.layer2[0].bn1.running_var.add_(1)
        torch.testing.assert_close(run(x), model(x))
        assert run._watch is watch and not torch.equal(run(x), before)
        model.layer1[0].conv1.weight.data = model.layer1[0].conv1.weight.data * 2
        torch.testing.assert_close(run(x), model(x))
        assert run._watch is not watch
        rk.unfuse_(model)
        torch.testing.assert_close(run(x), model(x))


@pytest.mark.parametrize("backend", ("auto", "cudnn", "triton"))
def test_gpu_a_frozen_models_graph_reads_constants_that_were_made_before(backend):
    model = rk.fuse(gpu_model("eager"), backend=backend, freeze=True)
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.no_grad():
        run = rk.capture(model, x)
        watch, before = run._watch, run(x)
        _assert_is_eagers(before, model, x)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            _assert_is_eagers(model(x), model, x)
        model.layer1[0].bn1.running_var.add_(1)
        torch.testing.assert_close(run(x), before)
        assert run._watch is watch
        rk.refresh(model)
        noise = [torch.full_like(p, float("nan")) for p in model.parameters()]  # where the dropped constants were
        after = run(x)
        _assert_is_eagers(after, model, x)
        assert run._watch is not watch and not torch.allclose(after, before) and noise


def _assert_is_eagers(y, model, x):
    eager = rk.unfuse_(copy.deepcopy(model))
    assert_within_budget(y, eager(x), eager.double()(x.double()))


def test_gpu_shapes_share_a_pool_and_streams_take_turns():
    model = gpu_model()
    xs = [torch.randn(n, 3, 64, 64, device="cuda") for n in (1, 2, 3)]
    run = rk.capture(model, xs[0], max_graphs=2)
    with torch.no_grad():
        expected = [model(x) for x in xs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(3)]
        results = []
        for step in range(30):
            with torch.cuda.stream(streams[step % 3]):
                results.append((run(xs[step % 2]), expected[step % 2]))
        results.append((run(xs[2]), expected[2]))
        torch.cuda.synchronize()
    for y, other in results:
        torch.testing.assert_close(y, other)
    assert len(run._graphs) == 2


def test_gpu_autocast_reads_live_weights():
    model = gpu_model()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        run = rk.capture(model, x)
        with torch.no_grad():
            model.fc.weight.mul_(2)
            torch.testing.assert_close(run(x), model(x))
    assert run(x).dtype == torch.float32


def test_gpu_refusals_leave_the_stream_as_it_was():
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match=r"waits for the GPU .+CUDA said: .*captur"):
        rk.capture(Waits().eval(), torch.randn(2, 3, 8, 8).cuda())
    assert torch.cuda.current_stream() == stream
    model = gpu_model()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with pytest.raises(RuntimeError, match=r"x is on cpu and its conv1\.weight on cuda:0"):
        rk.capture(model, x.cpu())
    with torch.no_grad():
        torch.testing.assert_close(rk.capture(model, x)(x), model(x))


def test_gpu_inside_another_graph():
    model = gpu_model()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    run = rk.capture(model, x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = run(x)
        with torch.cuda.graph(graph):
            y = run(x)
    graph.replay()
    torch.testing.assert_close(y, expected)
