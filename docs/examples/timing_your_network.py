"""Timing of a network of your own as TF-slim's text does it: forward, then forward and backward, plain and fused.

Put your network into build() and your images into example_input(); rk.timing.time_run prints the text's lines. The command
line takes the same file, and verifies the network before it times it.

    python docs/examples/timing_your_network.py
    python docs/examples/timing_your_network.py --batch-size 32 --image-size 224 --num-batches 100 --burn-in 10
    python -m resnet_kernels time --model docs/examples/timing_your_network.py:build
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_kernels as rk


class Net(nn.Module):
    """Three residual stages for small images, with blocks of your own code."""

    def __init__(self, width: int = 16, classes: int = 10):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.stages = nn.Sequential(Unit(width, width, 1), Unit(width, 2 * width, 2), Unit(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))


class Unit(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride) if stride > 1 or c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def build() -> nn.Module:
    return Net()


def example_input() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def main(arguments: list | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, help="default: example_input's")
    parser.add_argument("--image-size", type=int, help="default: example_input's")
    parser.add_argument("--num-batches", type=int, default=10)
    parser.add_argument("--burn-in", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build().eval().to(device, memory_format=torch.channels_last)
    x = example_input()
    if options.batch_size or options.image_size:
        size = options.image_size or x.shape[-1]
        x = torch.randn(options.batch_size or len(x), x.shape[1], size, size)
    x = x.to(device, memory_format=torch.channels_last)

    fused = rk.fuse(model)
    print(rk.explain(fused))
    result = rk.verify(model, fused, x)
    print(f"parity: {bool(result)}")
    if not result:
        raise SystemExit(str(result))

    steps = {"num_batches": options.num_batches, "num_steps_burn_in": options.burn_in, "device": device}
    with torch.no_grad():
        labels = torch.randint(model(x).shape[1], (len(x),), device=device)
    for name, net in (("plain", model), ("fused", fused)):
        net.eval()
        with torch.inference_mode():
            rk.timing.time_run(lambda net=net: net(x), f"Forward, {name}", **steps)
        parameters = list(net.train().parameters())

        def forward_backward(net: nn.Module = net, parameters: list = parameters) -> object:
            return torch.autograd.grad(F.cross_entropy(net(x), labels), parameters)

        rk.timing.time_run(forward_backward, f"Forward-backward, {name}", **steps)


if __name__ == "__main__":
    main()
