"""Networks as other libraries write them, small enough to read: how they call convolutions, norms and activations is kept.

They stand for detectron2, OpenMMLab, insightface, OpenAI's CLIP, Ultralytics' YOLO, Hugging Face transformers and
segmentation_models_pytorch, which need not be installed. Names of attributes, and the order of what forward does, are those of
the originals; weights don't fit. `width` and `layers` make them tiny for tests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """detectron2's: it asks whether its input wants gradients, to choose between two forms of the same arithmetic."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    def forward(self, x):
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + bias.reshape(1, -1, 1, 1).to(x.dtype)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class Conv2d(nn.Conv2d):
    """detectron2's: a Conv2d with norm and activation inside."""

    def __init__(self, *args: Any, norm: nn.Module | None = None, activation: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        if not torch.jit.is_scripting():
            if x.numel() == 0 and self.training:
                assert not isinstance(self.norm, nn.SyncBatchNorm), "SyncBatchNorm does not support empty inputs!"
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class DetectronBottleneck(nn.Module):
    def __init__(self, c_in: int, c_out: int, width: int, stride: int):
        super().__init__()
        norm = FrozenBatchNorm2d
        self.shortcut = Conv2d(c_in, c_out, 1, stride, bias=False, norm=norm(c_out)) if c_in != c_out else None
        self.conv1 = Conv2d(c_in, width, 1, 1, bias=False, norm=norm(width))
        self.conv2 = Conv2d(width, width, 3, stride, 1, bias=False, norm=norm(width))
        self.conv3 = Conv2d(width, c_out, 1, bias=False, norm=norm(c_out))

    def forward(self, x):
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        shortcut = self.shortcut(x) if self.shortcut is not None else x
        out += shortcut
        return F.relu_(out)


class DetectronStem(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = Conv2d(3, width, 7, 2, 3, bias=False, norm=FrozenBatchNorm2d(width))

    def forward(self, x):
        x = F.relu_(self.conv1(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class DetectronResNet(nn.Module):
    """detectron2's backbone: a dict of features."""

    def __init__(self, layers: Sequence[int] = (3, 4, 6, 3), width: int = 64):
        super().__init__()
        self.stem = DetectronStem(width)
        self.stage_names, c_in = [], width
        for i, blocks in enumerate(layers):
            name, inner = f"res{i + 2}", width * 2**i
            stage = []
            for j in range(blocks):
                stage.append(DetectronBottleneck(c_in, 4 * inner, inner, 2 if i and not j else 1))
                c_in = 4 * inner
            self.add_module(name, nn.Sequential(*stage))
            self.stage_names.append(name)

    def forward(self, x):
        assert x.dim() == 4, f"ResNet takes an input of shape (N, C, H, W). Got {x.shape} instead!"
        outputs = {}
        x = self.stem(x)
        for name in self.stage_names:
            x = getattr(self, name)(x)
            outputs[name] = x
        return outputs


class MMBottleneck(nn.Module):
    """OpenMMLab's block: norms by name, and checkpointing where the input wants gradients."""

    def __init__(self, c_in: int, width: int, stride: int, with_cp: bool):
        super().__init__()
        c_out = 4 * width
        self.with_cp = with_cp
        self.norm1_name, self.norm2_name, self.norm3_name = "bn1", "bn2", "bn3"
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.add_module(self.norm1_name, nn.BatchNorm2d(width))
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.add_module(self.norm2_name, nn.BatchNorm2d(width))
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.add_module(self.norm3_name, nn.BatchNorm2d(c_out))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    @property
    def norm1(self):
        return getattr(self, self.norm1_name)

    @property
    def norm2(self):
        return getattr(self, self.norm2_name)

    @property
    def norm3(self):
        return getattr(self, self.norm3_name)

    def forward(self, x):
        def _inner_forward(x):
            identity = x
            out = self.relu(self.norm1(self.conv1(x)))
            out = self.relu(self.norm2(self.conv2(out)))
            out = self.norm3(self.conv3(out))
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        if self.with_cp and x.requires_grad:
            out = torch.utils.checkpoint.checkpoint(_inner_forward, x, use_reentrant=False)
        else:
            out = _inner_forward(x)
        return self.relu(out)


class MMResNet(nn.Module):
    """OpenMMLab's backbone: a tuple of features."""

    def __init__(self, layers: Sequence[int] = (3, 4, 6, 3), width: int = 64, with_cp: bool = True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.res_layers, c_in = [], width
        for i, blocks in enumerate(layers):
            inner, stage = width * 2**i, []
            for j in range(blocks):
                stage.append(MMBottleneck(c_in, inner, 2 if i and not j else 1, with_cp))
                c_in = 4 * inner
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            self.res_layers.append(f"layer{i + 1}")
        self.out_indices = (0, 1, 2, 3)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        outs = []
        for i, layer_name in enumerate(self.res_layers):
            x = getattr(self, layer_name)(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)


class IBasicBlock(nn.Module):
    """insightface's block: BN, convolution, BN, PReLU, convolution, BN."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in, eps=1e-5), nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(c_out, eps=1e-5), nn.PReLU(c_out)
        self.conv2, self.bn3 = nn.Conv2d(c_out, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out, eps=1e-5)
        self.downsample, self.stride = None, stride
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out, eps=1e-5)
            )

    def forward(self, x):
        identity = x
        out = self.bn1(x)
        out = self.conv1(out)
        out = self.bn2(out)
        out = self.prelu(out)
        out = self.conv2(out)
        out = self.bn3(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return out


class IResNet(nn.Module):
    """insightface's face recognition network, for 112x112 images."""

    def __init__(self, layers: Sequence[int] = (3, 4, 14, 3), width: int = 64, num_features: int = 512):
        super().__init__()
        self.fp16 = False
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width, eps=1e-5)
        self.prelu, c_in = nn.PReLU(width), width
        for i, blocks in enumerate(layers):
            stage = []
            for j in range(blocks):
                stage.append(IBasicBlock(c_in, width * 2**i, 1 if j else 2))
                c_in = width * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.bn2, self.dropout = nn.BatchNorm2d(c_in, eps=1e-5), nn.Dropout(0.0, inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(7)  # the original's images give 7x7
        self.fc, self.features = nn.Linear(c_in * 49, num_features), nn.BatchNorm1d(num_features, eps=1e-5)

    def forward(self, x):
        with torch.autocast("cuda", enabled=self.fp16):
            x = self.prelu(self.bn1(self.conv1(x)))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            x = torch.flatten(self.dropout(self.pool(self.bn2(x))), 1)
        return self.features(self.fc(x.float() if self.fp16 else x))


class CLIPBottleneck(nn.Module):
    """CLIP's block: an average pool in the place of the stride."""

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(width, width * 4, 1, bias=False), nn.BatchNorm2d(width * 4)
        self.relu3, self.downsample = nn.ReLU(inplace=True), None
        if stride > 1 or c_in != width * 4:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(c_in, width * 4, 1, stride=1, bias=False)),
                        ("1", nn.BatchNorm2d(width * 4)),
                    ]
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.avgpool(out)
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu3(out)


class CLIPResNet(nn.Module):
    """CLIP's ModifiedResNet: a stem of three convolutions, and attention in the place of the last average."""

    def __init__(self, layers: Sequence[int] = (3, 4, 6, 3), width: int = 64, heads: int = 32):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu3, self.avgpool = nn.ReLU(inplace=True), nn.AvgPool2d(2)
        c_in = width
        for i, blocks in enumerate(layers):
            stage = []
            for j in range(blocks):
                stage.append(CLIPBottleneck(c_in, width * 2**i, 2 if i and not j else 1))
                c_in = 4 * width * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.attnpool = nn.MultiheadAttention(c_in, min(heads, c_in // 4), batch_first=True)

    def forward(self, x):
        def stem(x):
            x = self.relu1(self.bn1(self.conv1(x)))
            x = self.relu2(self.bn2(self.conv2(x)))
            x = self.relu3(self.bn3(self.conv3(x)))
            return self.avgpool(x)

        x = x.type(self.conv1.weight.dtype)
        x = stem(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        return self.attnpool(x[:, :1], x, x, need_weights=False)[0].squeeze(1)


class YoloConv(nn.Module):
    """Ultralytics' Conv: convolution, BN, SiLU."""

    default_act = nn.SiLU()

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, act: Any = True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = self.default_act if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class YoloBottleneck(nn.Module):
    def __init__(self, c: int, shortcut: bool = True):
        super().__init__()
        self.cv1, self.cv2, self.add = YoloConv(c, c, 3), YoloConv(c, c, 3), shortcut

    def forward(self, x):
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Ultralytics' C2f: two halves, of which one goes through bottlenecks; all are joined."""

    def __init__(self, c1: int, c2: int, n: int):
        super().__init__()
        self.c = c2 // 2
        self.cv1, self.cv2 = YoloConv(c1, 2 * self.c), YoloConv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(YoloBottleneck(self.c) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.cv1, self.cv2 = YoloConv(c, c // 2), YoloConv(c * 2, c)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class YoloBackbone(nn.Module):
    """The backbone of a YOLOv8, with its classification head."""

    def __init__(self, layers: Sequence[int] = (1, 2, 2, 1), width: int = 16, num_classes: int = 1000):
        super().__init__()
        c = width
        stages: list[nn.Module] = [YoloConv(3, c, 3, 2)]
        for n in layers:
            stages += [YoloConv(c, 2 * c, 3, 2), C2f(2 * c, 2 * c, n)]
            c *= 2
        self.model = nn.Sequential(*stages, SPPF(c))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, num_classes))

    def forward(self, x):
        return self.head(self.model(x))


class HFConvLayer(nn.Module):
    """transformers' ResNetConvLayer."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int = 3, stride: int = 1, activation: str | None = "relu"):
        super().__init__()
        self.convolution = nn.Conv2d(c_in, c_out, kernel_size, stride, kernel_size // 2, bias=False)
        self.normalization = nn.BatchNorm2d(c_out)
        self.activation = nn.ReLU() if activation is not None else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        hidden_state = self.convolution(input)
        hidden_state = self.normalization(hidden_state)
        return self.activation(hidden_state)


class HFShortCut(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.convolution = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        self.normalization = nn.BatchNorm2d(c_out)

    def forward(self, input: Tensor) -> Tensor:
        return self.normalization(self.convolution(input))


class HFBottleneckLayer(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.shortcut = HFShortCut(c_in, c_out, stride) if c_in != c_out or stride != 1 else nn.Identity()
        self.layer = nn.Sequential(
            HFConvLayer(c_in, c_out // 4, 1), HFConvLayer(c_out // 4, c_out // 4, 3, stride),
            HFConvLayer(c_out // 4, c_out, 1, activation=None),
        )  # fmt: skip
        self.activation = nn.ReLU()

    def forward(self, hidden_state):
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        return self.activation(hidden_state)


class HFEmbeddings(nn.Module):
    """transformers' ResNetEmbeddings: it checks the number of channels."""

    def __init__(self, width: int):
        super().__init__()
        self.embedder = HFConvLayer(3, width, 7, 2)
        self.pooler, self.num_channels = nn.MaxPool2d(3, 2, 1), 3

    def forward(self, pixel_values: Tensor) -> Tensor:
        num_channels = pixel_values.shape[1]
        if num_channels != self.num_channels:
            raise ValueError("Make sure that the channel dimension of the pixel values match with the configuration.")
        return self.pooler(self.embedder(pixel_values))


class HFStage(nn.Module):
    def __init__(self, c_in: int, c_out: int, blocks: int, stride: int):
        super().__init__()
        first = HFBottleneckLayer(c_in, c_out, stride)
        self.layers = nn.Sequential(first, *(HFBottleneckLayer(c_out, c_out, 1) for _ in range(blocks - 1)))

    def forward(self, input: Tensor) -> Tensor:
        hidden_state = input
        for layer in self.layers:
            hidden_state = layer(hidden_state)
        return hidden_state


class HFEncoder(nn.Module):
    def __init__(self, layers: Sequence[int], width: int):
        super().__init__()
        widths = [width, *(4 * width * 2**i for i in range(len(layers)))]
        self.stages = nn.ModuleList(
            HFStage(c_in, c_out, blocks, 2 if i else 1)
            for i, (c_in, c_out, blocks) in enumerate(zip(widths, widths[1:], layers))
        )

    def forward(self, hidden_state: Tensor, output_hidden_states: bool = False, return_dict: bool = True) -> Any:
        hidden_states: Any = () if output_hidden_states else None
        for stage_module in self.stages:
            if output_hidden_states:
                hidden_states = (*hidden_states, hidden_state)
            hidden_state = stage_module(hidden_state)
        return hidden_state if return_dict else (hidden_state, hidden_states)


class HFResNet(nn.Module):
    """transformers' ResNetForImageClassification, without its output classes."""

    def __init__(self, layers: Sequence[int] = (3, 4, 6, 3), width: int = 64, num_labels: int = 1000):
        super().__init__()
        self.embedder, self.encoder = HFEmbeddings(width), HFEncoder(layers, width)
        self.pooler = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(4 * width * 2 ** (len(layers) - 1), num_labels))

    def forward(self, pixel_values=None, labels=None, output_hidden_states=None, return_dict=None):
        hidden_state = self.embedder(pixel_values)
        hidden_state = self.encoder(hidden_state, output_hidden_states=False, return_dict=True)
        return self.classifier(self.pooler(hidden_state))


class SMPConv2dReLU(nn.Sequential):
    """segmentation_models_pytorch's Conv2dReLU."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class SMPDecoderBlock(nn.Module):
    def __init__(self, c_in: int, c_skip: int, c_out: int):
        super().__init__()
        self.interpolation_mode = "nearest"
        self.conv1, self.conv2 = SMPConv2dReLU(c_in + c_skip, c_out), SMPConv2dReLU(c_out, c_out)
        self.attention1, self.attention2 = nn.Identity(), nn.Identity()

    def forward(self, feature_map, skip_connection=None):
        feature_map = F.interpolate(feature_map, scale_factor=2, mode=self.interpolation_mode)
        if skip_connection is not None:
            feature_map = torch.cat([feature_map, skip_connection], dim=1)
            feature_map = self.attention1(feature_map)
        feature_map = self.conv1(feature_map)
        feature_map = self.conv2(feature_map)
        return self.attention2(feature_map)


class SMPUnet(nn.Module):
    """segmentation_models_pytorch's Unet over a ResNet of torchvision's form."""

    def __init__(self, encoder: nn.Module, widths: Sequence[int] = (64, 64, 128, 256, 512), classes: int = 2):
        super().__init__()
        self.encoder = encoder
        c_in, blocks = widths[-1], []
        for c_skip, c_out in zip((*reversed(widths[:-1]), 0), (256, 128, 64, 32, 16)):
            blocks.append(SMPDecoderBlock(c_in, c_skip, c_out))
            c_in = c_out
        self.blocks = nn.ModuleList(blocks)
        self.segmentation_head = nn.Conv2d(c_in, classes, 3, padding=1)

    def forward(self, x):
        e = self.encoder
        features = [e.relu(e.bn1(e.conv1(x)))]
        x = e.maxpool(features[0])
        for stage in (e.layer1, e.layer2, e.layer3, e.layer4):
            x = stage(x)
            features.append(x)
        x, skips = features[-1], features[-2::-1]
        for i, block in enumerate(self.blocks):
            x = block(x, skips[i] if i < len(skips) else None)
        return self.segmentation_head(x)
