"""FSDP2 on a fused model, and fusing a model that FSDP2 has sharded. One process on the CPU."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import resnet_kernels as rk


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def make():
    torch.manual_seed(0)
    return rk.models.resnet18(num_classes=10)


def train_and_evaluate(model):
    """Gradients of a training step, and the output in eval mode after it."""
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model.train()
    model(x).square().sum().backward()
    gradients = [getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for p in model.parameters()]
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        return gradients, [model(x) for _ in range(3)][-1]


@pytest.mark.parametrize("blocks", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["root", "blocks"])
@pytest.mark.parametrize("first", ["fuse", "shard"])
def test_fully_sharded(first, blocks, mesh):
    plain, model = make(), make()
    if first == "fuse":
        rk.fuse_(model)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4) if blocks else ():
        for block in stage:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    classes = [type(module) for module in model.modules()]
    if first == "shard":
        assert rk.fuse_(model).fused
    for _ in range(2):
        torch.testing.assert_close(train_and_evaluate(model), train_and_evaluate(plain), atol=1e-4, rtol=1e-4)
    assert rk.explain(model).fused  # between calls the parameters are DTensors
    rk.unfuse_(model)
    assert isinstance(model, FSDPModule) and not any("_rk_state" in module.__dict__ for module in model.modules())
    if first == "shard":
        assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(train_and_evaluate(model), train_and_evaluate(plain), atol=1e-4, rtol=1e-4)
