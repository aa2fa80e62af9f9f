"""A detector's backbone, fused: torchvision's ResNet with a feature pyramid, and Faster R-CNN around it.

It fuses the ResNet inside the pyramid, and verifies all of the pyramid's maps. With --detector it also runs Faster R-CNN
before and after `fuse_`, and compares the boxes.

    python docs/examples/detection_backbone.py
    python docs/examples/detection_backbone.py --backbone resnet50 --image-size 800 --detector
"""

import argparse

import torch

import resnet_kernels as rk


def run_detector(backbone: str, size: int, device: torch.device) -> None:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    pyramid = resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=5)
    # Without training all scores are low, so none is thrown away.
    detector = FasterRCNN(pyramid, num_classes=3, min_size=size, max_size=2 * size, box_score_thresh=0.0)
    detector.eval().to(device)
    images = [torch.rand(3, size, size, device=device), torch.rand(3, size, 3 * size // 2, device=device)]
    with torch.inference_mode():
        before = detector(images)
        report = rk.fuse_(detector)
        after = detector(images)
    print(f"Faster R-CNN: {len(report.fused)} blocks fused")
    for index, (old, new) in enumerate(zip(before, after)):
        before_boxes, after_boxes, moved = old["boxes"], new["boxes"], ""
        if len(before_boxes) == len(after_boxes) > 0:
            moved = f", moved by {(before_boxes - after_boxes).abs().max():.1e} pixels at most"
        print(f"image {index}: {len(before_boxes)} boxes before, {len(after_boxes)} after{moved}")


def main(arguments: list | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18", help="a ResNet of torchvision (default: resnet18)")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument(
        "--detector", action="store_true", help="run Faster R-CNN, too; it needs torchvision's C++ operations"
    )
    options = parser.parse_args(arguments)
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # torchvision builds it with FrozenBatchNorm2d, which fuses in training, too: it is a constant scale and shift.
    pyramid = resnet_fpn_backbone(backbone_name=options.backbone, weights=None, trainable_layers=5).eval().to(device)
    fused = rk.fuse(pyramid)
    report = rk.explain(fused)
    print(f"{len(report.fused)} blocks fused, {len(report.skipped)} skipped")

    x = torch.randn(1, 3, options.image_size, options.image_size, device=device)
    with torch.inference_mode():
        print("maps:", ", ".join(f"{name} {tuple(y.shape[1:])}" for name, y in fused(x).items()))
    result = rk.verify(pyramid, fused, x)
    print(f"parity: {bool(result)} (error {result.output.error:.1e}, budget {result.output.budget:.1e})")
    if options.detector:
        run_detector(options.backbone, options.image_size, device)


if __name__ == "__main__":
    main()
