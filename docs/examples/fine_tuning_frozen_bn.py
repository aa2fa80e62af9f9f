"""Fine-tuning with frozen BNs: a fused network learns on fused kernels, forward and backward, as BN is a constant there.

It trains a plain network and its fused copy on the same images, prints both losses, and compares all weights at the end.

    python docs/examples/fine_tuning_frozen_bn.py
    python docs/examples/fine_tuning_frozen_bn.py --model resnet50 --checkpoint FILE --image-size 224 --batch-size 32
"""

import argparse
import copy

import torch
from torch import nn
from torch.nn import functional as F

import resnet_kernels as rk


def freeze_batch_norms_(model: nn.Module) -> nn.Module:
    """Puts BNs on their running statistics and takes their weights out of training. Call it after each model.train()."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, lr: float, batch_size: int, steps: int) -> list:
    """Returns the loss of each step."""
    freeze_batch_norms_(model.train())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    losses = []
    for step in range(steps):
        here = torch.arange(step * batch_size, (step + 1) * batch_size) % len(images)
        loss = F.cross_entropy(model(images[here]), labels[here])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: list | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="a name of rk.models (default: resnet18)")
    parser.add_argument("--checkpoint", help="a state_dict to start from (default: random weights)")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.01)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    model = getattr(rk.models, options.model)()
    if options.checkpoint:
        model.load_state_dict(torch.load(options.checkpoint, map_location="cpu"))
    model.fc = nn.Linear(model.fc.in_features, 4)  # a head for four new classes
    model.to(device, memory_format=torch.channels_last)
    # Your data goes here: four classes of noise, each with a mean of its own.
    labels = torch.randint(4, (4 * options.batch_size,), device=device)
    images = torch.randn(len(labels), 3, options.image_size, options.image_size, device=device)
    images = (images + labels[:, None, None, None] - 1.5).contiguous(memory_format=torch.channels_last)

    fused = rk.fuse(freeze_batch_norms_(copy.deepcopy(model).train()))
    report = rk.explain(fused)
    running = sum(not row.reason for row in report.fused)
    print(f"{running} of {len(report)} blocks train on fused kernels")

    sizes = (options.lr, options.batch_size, options.steps)
    plain_losses, fused_losses = (train(net, images, labels, *sizes) for net in (model, fused))
    for step, (ours, theirs) in enumerate(zip(fused_losses, plain_losses)):
        print(f"step {step}: loss {ours:.5f} fused, {theirs:.5f} plain")

    differences = [
        ((a - b).norm() / b.norm()).item() for a, b in zip(fused.parameters(), model.parameters()) if b.any()
    ]
    print(f"largest relative difference of a parameter: {max(differences):.1e}")


if __name__ == "__main__":
    main()
