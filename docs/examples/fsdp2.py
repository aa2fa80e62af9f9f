"""Sharded training of a fused network: fuse it first, then shard its stages and the network by fully_shard (FSDP2).

It trains for a few steps beside a plain network that is sharded in the same way, and compares both losses and the outputs in
eval mode, where the blocks run fused on the gathered parameters. On a CPU the processes talk by gloo, on GPUs by NCCL.

    torchrun --nproc-per-node 2 docs/examples/fsdp2.py
    torchrun --nproc-per-node 8 docs/examples/fsdp2.py --model resnet50 --image-size 224 --batch-size 64 --steps 100
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import resnet_kernels as rk


def build(name: str, device: torch.device, fuse: bool, mesh) -> tuple[nn.Module, int]:
    torch.manual_seed(0)  # the same weights everywhere
    model = getattr(rk.models, name)(num_classes=4).to(device)  # fully_shard refuses channels_last weights
    blocks = len(rk.fuse_(model).fused) if fuse else 0
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        fully_shard(stage, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, blocks


def train(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, steps: int) -> list[float]:
    """Returns the mean loss of all processes in each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model.train()(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def main(arguments: list | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="a name of rk.models (default: resnet18)")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4, help="images of each process (default: 4)")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        raise SystemExit("start it by torchrun: torchrun --nproc-per-node 2 docs/examples/fsdp2.py")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rank = dist.get_rank()

    plain, _ = build(options.model, device, False, mesh)
    fused, blocks = build(options.model, device, True, mesh)
    if rank == 0:
        print(f"{dist.get_world_size()} processes on {device.type}, {blocks} blocks fused")

    torch.manual_seed(1 + rank)  # each its own images: four classes of noise, each with a mean of its own
    labels = torch.randint(4, (options.batch_size,), device=device)
    x = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=device)
    x = (x + labels[:, None, None, None] - 1.5).contiguous(memory_format=torch.channels_last)
    both = zip(train(fused, x, labels, options.steps), train(plain, x, labels, options.steps))
    for step, (ours, theirs) in enumerate(both):
        if rank == 0:
            print(f"step {step}: mean loss {ours:.5f} fused, {theirs:.5f} plain")
    with torch.no_grad():
        ours, theirs = fused.eval()(x), plain.eval()(x)
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    if rank == 0:
        print(f"relative difference of the outputs in eval mode: {difference:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
