"""Data-parallel training of a fused network: fuse it first, then wrap it in DistributedDataParallel.

Each process trains on its own images, and gradients are averaged. At the end all processes hold the same weights, and the
network is verified against a plain copy of itself. On a CPU the processes talk by gloo, on GPUs by NCCL.

    torchrun --nproc-per-node 2 docs/examples/ddp.py
    torchrun --nproc-per-node 8 docs/examples/ddp.py --model resnet50 --image-size 224 --batch-size 64 --steps 100
"""

import argparse
import copy
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import resnet_kernels as rk


def same_everywhere(model: nn.Module) -> bool:
    """Whether all processes hold the same parameters, bit for bit."""
    for parameter in model.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        differs = torch.tensor(float(not torch.equal(first, parameter)), device=parameter.device)
        dist.all_reduce(differs)
        if differs.item():
            return False
    return True


def main(arguments: list | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="a name of rk.models (default: resnet18)")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4, help="images of each process (default: 4)")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        raise SystemExit("start it by torchrun: torchrun --nproc-per-node 2 docs/examples/ddp.py")
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")

    torch.manual_seed(0)  # the same weights everywhere
    model = getattr(rk.models, options.model)(num_classes=4).to(device, memory_format=torch.channels_last)
    if on_gpu:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # before fusing, which reads the BNs
    blocks = len(rk.fuse_(model).fused)
    network = DistributedDataParallel(model, device_ids=[device.index] if on_gpu else None)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    if rank == 0:
        print(f"{dist.get_world_size()} processes on {device.type}, {blocks} blocks fused")

    torch.manual_seed(1 + rank)  # each its own images: four classes of noise, each with a mean of its own
    labels = torch.randint(4, (options.batch_size,), device=device)
    x = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=device)
    x = (x + labels[:, None, None, None] - 1.5).contiguous(memory_format=torch.channels_last)
    for step in range(options.steps):
        loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: mean loss {mean.item():.4f}")

    same = same_everywhere(model)
    if rank == 0:
        print(f"same parameters in all processes: {same}")
        model.eval()
        result = rk.verify(rk.unfuse_(copy.deepcopy(model)), model, x)
        print(f"parity: {bool(result)} (error {result.output.error:.1e}, budget {result.output.budget:.1e})")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
