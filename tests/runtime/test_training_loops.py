"""Loops that people write around a model, fused and eager: steps on real data, AMP, checkpointing, torch.compile, DDP."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import resnet_kernels as rk
from helpers.oracle import skip_unless_runnable
from helpers.training_steps import small_d2l, spy_on_training


def digits():
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return F.interpolate(images, 16), torch.tensor(labels)


def train(net, device, steps=50, *, forward=None, autocast=None, scaler=False, accumulate=1, perturb=None):
    """Losses of a short run with SGD on the digits, the same batches each time."""
    torch.manual_seed(1)
    images, labels = (t.to(device) for t in digits())
    if perturb is not None:
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1 + torch.finfo(p.dtype).eps * perturb)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=scaler)
    forward, losses = forward or net, []
    for step in range(steps):
        batch = torch.randint(len(images), (16,), generator=torch.Generator().manual_seed(step)).to(device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(forward(images[batch]).float(), labels[batch])
        scaler.scale(loss / accumulate).backward()
        if (step + 1) % accumulate == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def assert_stays_with_eager(device, wrap=None, **options):
    """The curve is as near to eager's as eager's own is when a single rounding of its first weights is another.

    Training amplifies roundings, so no fixed distance is right; how much, eager itself shows.
    """
    skip_unless_runnable("triton", device, torch.float32)
    torch.manual_seed(0)
    net = small_d2l().to(device, memory_format=torch.channels_last).train()
    eager = train(copy.deepcopy(net), device, **options)
    others = [train(copy.deepcopy(net), device, perturb=sign, **options) for sign in (1, -1, 2, -2)]
    spread = max((other - eager).norm().item() for other in others)
    fused = rk.fuse(net, backend="triton")
    ours = train(fused, device, forward=wrap and wrap(fused), **options)
    assert eager[-5:].mean() < eager[:5].mean(), "it does not learn"
    assert (ours - eager).norm().item() <= 2 * spread
    return fused


@pytest.mark.slow
def test_fifty_steps(device, monkeypatch):
    seen = spy_on_training(monkeypatch)
    assert_stays_with_eager(device)
    assert len(seen) == 100  # the stem and a block, 50 times


@pytest.mark.slow
def test_fifty_steps_under_autocast_and_grad_scaler(device):
    assert_stays_with_eager(device, autocast=torch.bfloat16 if device.type == "cpu" else torch.float16, scaler=True)


@pytest.mark.slow
def test_gradient_accumulation(device):
    assert_stays_with_eager(device, steps=24, accumulate=2)


@pytest.mark.slow
def test_checkpoint(device):
    from torch.utils.checkpoint import checkpoint

    def wrap(net):
        def forward(x):
            for stage in net[:2]:
                x = checkpoint(stage, x, use_reentrant=False)
            return net[2:](x)

        return forward

    skip_unless_runnable("triton", device, torch.float32)
    torch.manual_seed(0)
    net = small_d2l().to(device).train()
    plain, fused = copy.deepcopy(net), rk.fuse(net, backend="triton")
    losses = [train(model, device, 10, forward=wrap(model)) for model in (plain, fused)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    # Each block ran twice in a step, in eager as well.
    assert int(fused[0][1].num_batches_tracked) == int(plain[0][1].num_batches_tracked) == 20


_TWO_PROCESSES = """
import os, sys, torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import interpreter
from helpers.training_steps import small_d2l, spy_on_training

import resnet_kernels as rk
from resnet_kernels.models import d2l

interpreter.hurry()
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
for backend in ("none", "auto", "triton"):
    torch.manual_seed(0)
    net = d2l.d2l_resnet18(width=8, num_blocks=(1,)).train()
    if backend != "none":
        rk.fuse_(net, backend=backend)
    model = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x, labels = torch.randn(4, 1, 16, 16, generator=generator), torch.randint(10, (4,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    torch.save(net.state_dict(), os.path.join(sys.argv[1], f"{backend}-{rank}.pt"))
dist.barrier()
# Without PyTorch's own way out, in which gloo now and then ends a process ("terminate called without an active exception").
os._exit(0)
"""


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    """Two gloo processes on the CPU: both ranks end with the same parameters, and with those of eager's run."""
    skip_unless_runnable("triton", torch.device("cpu"), torch.float32)
    script = tmp_path / "two.py"
    script.write_text(_TWO_PROCESSES)
    folders = Path(rk.__file__).parents[1], Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    load = lambda backend, rank: torch.load(tmp_path / f"{backend}-{rank}.pt")  # noqa: E731
    for backend in ("auto", "triton"):
        first, second, eager = load(backend, 0), load(backend, 1), load("none", 0)
        for name, value in first.items():
            if "running" not in name:
                assert torch.equal(value, second[name]), name
            torch.testing.assert_close(value, eager[name], rtol=1e-4, atol=1e-5, msg=name)
