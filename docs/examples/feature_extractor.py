"""Features of inner stages from a fused network, in two ways: forward hooks, and torchvision's IntermediateLayerGetter.

It compares both with the plain network: features pass if they err at most twice as much as eager's, plus one rounding.

    python docs/examples/feature_extractor.py
    python docs/examples/feature_extractor.py --model resnet50 --image-size 224 --batch-size 8

Fuse the network or the getter, not the graph of torchvision's create_feature_extractor: a torch.fx graph has no blocks left.
"""

import argparse
import copy

import torch
from torch import Tensor, nn

import resnet_kernels as rk

STAGES = ("layer2", "layer4")


def with_hooks(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Returns the outputs of STAGES. A hook on a whole stage fires after it and leaves its blocks fused."""
    features: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: features.update({name: output})
        )
        for name in STAGES
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return features


def error(y: Tensor, truth: Tensor) -> float:
    return ((y.double() - truth).norm() / truth.norm()).item()


def compare(what: str, fused: dict, plain: dict, truth: dict) -> None:
    for name in STAGES:
        ours, eager = error(fused[name], truth[name]), error(plain[name], truth[name])
        within = ours <= 2 * eager + torch.finfo(fused[name].dtype).eps / 2
        print(
            f"{what}, {name} {tuple(fused[name].shape)}: error {ours:.1e}, eager's {eager:.1e}, within budget: {within}"
        )


def main(arguments: list | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="a name of torchvision.models (default: resnet18)")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=2)
    options = parser.parse_args(arguments)
    import torchvision
    from torchvision.models._utils import IntermediateLayerGetter

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = torchvision.models.get_model(options.model, weights=None).eval().to(device)
    model.to(memory_format=torch.channels_last)
    x = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    fused = rk.fuse(model)
    print(f"{len(rk.explain(fused).fused)} blocks fused")

    with torch.inference_mode():
        plain, truth = with_hooks(model, x), with_hooks(copy.deepcopy(model).double(), x.double())
        compare("forward hooks", with_hooks(fused, x), plain, truth)

        # The getter stops behind the last stage that is asked for, so nothing after it is computed.
        getter = IntermediateLayerGetter(model, {name: name for name in STAGES})
        fused_getter = rk.fuse(getter)
        print(f"{len(rk.explain(fused_getter).fused)} blocks of the getter fused")
        compare("IntermediateLayerGetter", fused_getter(x), getter(x), truth)


if __name__ == "__main__":
    main()
