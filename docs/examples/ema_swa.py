"""Averaged weights of a fused network: an exponential moving average (EMA) or stochastic weight averaging (SWA).

It trains a fused network, averages its weights with torch.optim.swa_utils, recomputes the average's BN statistics, and
verifies the average, which is fused as the network is, against a plain copy of itself.

    python docs/examples/ema_swa.py
    python docs/examples/ema_swa.py --average swa --model resnet50 --image-size 224 --batch-size 32 --steps 200
"""

import argparse
import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

import resnet_kernels as rk

AVERAGES = {"ema": lambda: get_ema_multi_avg_fn(0.9), "swa": get_swa_multi_avg_fn}


def loss_of(model: nn.Module, batches: list) -> float:
    model.eval()
    with torch.inference_mode():
        return sum(F.cross_entropy(model(x), labels).item() for x, labels in batches) / len(batches)


def main(arguments: list | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--average", default="ema", choices=tuple(AVERAGES))
    parser.add_argument("--model", default="resnet18", help="a name of rk.models (default: resnet18)")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    model = getattr(rk.models, options.model)(num_classes=4).to(device, memory_format=torch.channels_last)
    report = rk.fuse_(model)
    averaged = AveragedModel(model, multi_avg_fn=AVERAGES[options.average]())
    print(f"{len(report.fused)} blocks fused, {len(rk.explain(averaged).fused)} in the average")

    # Your data goes here: four classes of noise, each with a mean of its own.
    batches = []
    for _ in range(4):
        labels = torch.randint(4, (options.batch_size,), device=device)
        x = torch.randn(len(labels), 3, options.image_size, options.image_size, device=device)
        x = (x + labels[:, None, None, None] - 1.5).contiguous(memory_format=torch.channels_last)
        batches.append((x, labels))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(options.steps):
        x, labels = batches[step % len(batches)]
        loss = F.cross_entropy(model.train()(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(model)

    # Averaged weights have other activations, so the average needs statistics of its own. After so few steps the network's
    # running statistics lag behind its weights, so it gets new ones, too.
    update_bn(batches, averaged, device=device)
    update_bn(batches, model, device=device)
    print(f"loss {loss_of(model, batches):.4f} of the network, {loss_of(averaged, batches):.4f} of its average")
    plain = rk.unfuse_(copy.deepcopy(averaged.module))
    result = rk.verify(plain, averaged.module, batches[0][0])
    print(f"parity of the average: {bool(result)} (error {result.output.error:.1e}, budget {result.output.budget:.1e})")
    fresh = getattr(rk.models, options.model)(num_classes=4)
    print(f"into a plain network: {fresh.load_state_dict(averaged.module.state_dict())}")


if __name__ == "__main__":
    main()
