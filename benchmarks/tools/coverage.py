"""python -m benchmarks.tools.coverage: how much of other people's networks runs in fused kernels, and what the rest lacks.

    --json FILE     measures on this CPU and writes FILE: for each network the convolutions, those that ran fused in a call,
                    the reasons for the others, parity, and with --seconds the time of eager and fused calls in turns
    --before FILE   adds the numbers of an older version, which this command has written with that version installed
    --write PAGE    puts the table of benchmarks/results/coverage/networks.json between the marks in PAGE, docs/models.md

Weights are random, so that nothing is downloaded. Networks of torchvision and timm are left out where these are not installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cpuinfo import get_cpu_info
from torch import Tensor, nn
from torch.autograd.profiler import profile

import resnet_kernels as rk
from resnet_kernels.kernels.cpu import library
from resnet_kernels.models.random_weights import randomise_batch_norms_
from resnet_kernels.perf import environment, timing
from resnet_kernels.runtime.profiler_ranges import PREFIX

from .. import other_models as others
from .readme_tables import fill

RESULTS = Path(__file__).parents[1] / "results" / "coverage" / "networks.json"


class Net(NamedTuple):
    """A network. build: makes it. tiny: makes one of its family with few layers. size: of images."""

    name: str
    source: str
    build: Callable[[], nn.Module]
    tiny: Callable[[], nn.Module]
    size: int = 224


def _of_torchvision(name: str, size: int = 224, tiny: dict[str, Any] | None = None, **options: Any):
    def build(**more: Any) -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options, **more)

    return Net(name, "torchvision", build, lambda: build(**(tiny or {})), size)


def _of_timm(name: str, size: int = 224, tiny: str | None = None, **options: Any):
    def build(called: str) -> nn.Module:
        import timm

        return timm.create_model(called, pretrained=False, **options)

    return Net(name, "timm", lambda: build(name), lambda: build(tiny or name), size)


def _rewritten(name: str, of: str, cls: type[nn.Module], size: int = 224, **tiny: Any) -> Net:
    return Net(name, f"as in {of}", cls, lambda: cls(**tiny), size)


def _feature_extractor(layers: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    from torchvision.models import resnet
    from torchvision.models.feature_extraction import create_feature_extractor

    net = resnet.ResNet(resnet.Bottleneck, [*layers]).eval()
    return create_feature_extractor(net, ["layer2", "layer3", "layer4"])


_SMALL: dict[str, Any] = {"layers": (1, 2, 1, 1), "width": 8}
NETS = (
    _of_torchvision("densenet121")._replace(tiny=lambda: _dense()),
    _of_torchvision("mobilenet_v2", tiny={"width_mult": 0.1}),
    _of_torchvision("mobilenet_v3_large", tiny={"reduced_tail": True}),
    _of_torchvision("efficientnet_b0"),
    _of_torchvision("regnet_y_400mf"),
    _of_torchvision("googlenet", aux_logits=False, init_weights=False),
    _of_torchvision("shufflenet_v2_x1_0"),
    _of_torchvision("convnext_tiny"),
    Net("r3d_18", "torchvision", lambda: _video(), lambda: _video(), 0),
    Net("create_feature_extractor(resnet50)", "torchvision", _feature_extractor, lambda: _feature_extractor((1, 1, 1, 1))),
    _of_timm("darknet53", tiny="darknet17"),
    _of_timm("cspresnet50", tiny="cspresnet50d"),
    _of_timm("seresnet50", tiny="seresnet18"),
    _of_timm("ecaresnet26t", tiny="ecaresnet26t"),
    _of_timm("resnetrs50", tiny="seresnet18"),
    _of_timm("res2net50_26w_4s", tiny="res2net50_14w_8s"),
    _of_timm("resnest26d", tiny="resnest14d"),
    _of_timm("skresnet34", tiny="skresnet18"),
    _of_timm("dla34", tiny="dla46_c"),
    _of_timm("inception_resnet_v2", size=299, tiny="inception_resnet_v2"),
    _of_timm("hrnet_w18_small", tiny="hrnet_w18_small"),
    _of_timm("resnetblur50", tiny="resnetblur18"),
    _rewritten("ResNet-50, FrozenBatchNorm", "detectron2", others.DetectronResNet, **_SMALL),
    _rewritten("ResNet-50, with_cp", "OpenMMLab", others.MMResNet, **_SMALL),
    _rewritten("iresnet50", "insightface", others.IResNet, size=112, num_features=16, **_SMALL),
    _rewritten("RN50", "CLIP", others.CLIPResNet, **_SMALL),
    _rewritten("YOLOv8n's backbone", "Ultralytics", others.YoloBackbone, layers=(1, 1), width=8),
    _rewritten("ResNet-50", "transformers", others.HFResNet, **_SMALL),
    Net("Unet(resnet34)", "as in segmentation_models_pytorch", lambda: others.SMPUnet(rk.models.resnet34()),
        lambda: others.SMPUnet(rk.models.resnet18())),
)  # fmt: skip


def _dense() -> nn.Module:
    from torchvision.models import densenet

    return densenet.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8)


def _video() -> nn.Module:
    import torchvision

    return torchvision.models.video.r3d_18(weights=None)


def images(net: Net, batch: int, size: int | None = None) -> Tensor:
    """Returns random images for a network; a clip of 4 frames of 32x32 for one of videos."""
    size = size or net.size
    return torch.randn(batch, 3, size, size) if size else torch.randn(batch, 3, 4, 32, 32)


def convolutions_of(model: nn.Module) -> set[str]:
    """Returns the paths of a model's convolutions."""
    return {path for path, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)}


def that_ran(fused: nn.Module, x: Tensor) -> set[str]:
    """Returns the paths of the convolutions that run in fused kernels in a call, as a profiler sees them."""
    with torch.no_grad(), profile() as profiled:
        fused(x)
    names = [event.name.removeprefix(PREFIX) for event in profiled.function_events if event.name.startswith(PREFIX)]
    first = {step.split("+")[0] for name in names for step in name.split(" -> ")}
    # A Conv2d with a norm of its own is a module of one step, "conv+norm".
    return convolutions_of(fused) & (first | {name.removesuffix(".conv") for name in first})


def measure(net: Net, seconds: float, progress: Callable[[str], object]) -> dict[str, Any]:
    """Returns a network's row of the results."""
    torch.manual_seed(0)
    progress(net.name)
    model = randomise_batch_norms_(net.build()).eval()
    x = images(net, 1)
    fused = rk.fuse(model)
    with torch.no_grad():
        fused(x)
    ran = that_ran(fused, x)
    report = rk.explain(fused)
    result = rk.verify(model, fused, x)
    row = {
        "name": net.name,
        "source": net.source,
        "convolutions": len(convolutions_of(model)),
        "fused": len(ran),
        # An older version doesn't tell.
        "left": [[left.convolutions, left.reason] for left in getattr(report, "unfused", ())],
        "verified": bool(result),
        "error": result.output.error,
        "budget": result.output.budget,
    }
    if seconds and x.dim() == 4:  # clips have no channels_last
        eager = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's types lack it
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            timings = timing.interleave(
                {"eager": lambda: eager(x), "fused": lambda: fused(x)}, seconds=seconds, device=x.device
            )
        row["eager_ms"], row["fused_ms"] = (1e3 * timings[name].median for name in ("eager", "fused"))
        row["times_eager"] = timing.ratio(timings["eager"], timings["fused"])
    return row


def _measured(seconds: float, before: dict[str, Any] | None) -> dict[str, Any]:
    def progress(name: str) -> None:
        print(name, file=sys.stderr)

    rows = []
    older = {row["name"]: row["fused"] for row in before["networks"]} if before else {}
    for net in NETS:
        try:
            row = measure(net, seconds, progress)
        except ImportError as error:
            print(f"{net.name} is left out: {error}", file=sys.stderr)
            continue
        if net.name in older:
            row["fused_before"] = older[net.name]
        rows.append(row)
    found = library.library_or_none()
    machine = {
        **environment.environment(torch.device("cpu")),
        "cpu": get_cpu_info().get("brand_raw", "a CPU"),
        "isa": "no kernels of ours" if found is None else found.isa,
        "threads": torch.get_num_threads(),
    }
    return {"environment": machine, "networks": rows}


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown: one table of counts, and one of speeds."""
    rows = results["networks"]
    lines = [
        "| network | from | convolutions | fused | before | what the others lack | error / budget |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        left = "; ".join(f"{count}: {reason}" for count, reason in row["left"]) or "-"
        verified = f"{row['error']:.1e} / {row['budget']:.1e}" + ("" if row["verified"] else " FAILS")
        before = row.get("fused_before", "")
        lines.append(
            f"| {row['name']} | {row['source']} | {row['convolutions']} | {row['fused']} | {before} | {left} | {verified} |"
        )
    timed = [row for row in rows if "eager_ms" in row]
    if timed:
        machine = results["environment"]
        lines += [
            "",
            f"Batch 1 on {machine['cpu']} ({machine['isa']}), {machine['threads']} threads, torch {machine['torch']}, fp32, "
            "channels_last; eager and fused calls took turns:",
            "",
            "| network | eager ms | fused ms | times eager's speed |",
            "|---|---|---|---|",
        ]
        for row in timed:
            lines.append(
                f"| {row['name']} | {row['eager_ms']:.1f} | {row['fused_ms']:.1f} | {row['times_eager']:.2f} |"
            )
    return "\n".join(lines)


def main(arguments: Iterable[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="measure, and write this file")
    parser.add_argument("--before", type=Path, help="a file of an older version, for the column of that name")
    parser.add_argument("--seconds", type=float, default=0.0, help="time for each network (default: none is timed)")
    parser.add_argument("--write", type=Path, help="the page whose table is written")
    options = parser.parse_args(None if arguments is None else [*arguments])
    warnings.simplefilter("ignore")
    if options.json:
        before = json.loads(options.before.read_text()) if options.before else None
        options.json.write_text(json.dumps(_measured(options.seconds, before), indent=1) + "\n")
    if options.write:
        options.write.write_text(fill(options.write.read_text(), {"coverage": table(json.loads(RESULTS.read_text()))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
