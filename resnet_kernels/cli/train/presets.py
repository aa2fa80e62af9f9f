"""The settings of a training run, and the recipes of the texts as data.

Sources:
    cifar: the CIFAR-10 text of the torchvision ResNets: batches of 32, SGD at 1e-3 with momentum 0.9 and weight decay 5e-4,
        cosine annealing over 200 epochs, pixels moved from [0, 1] to [-1, 1], no augmentation.
    d2l: Zhang et al., d2l.ai, first edition (PyTorch), section 7.6 with `train_ch6` of section 6.6: Fashion-MNIST resized to
        96x96, batches of 256, plain SGD at 0.05, 10 epochs, Xavier-uniform weights. The second edition (section 8.6) changed
        it to batches of 128 and 0.01; the model here has the first edition's keys, so the recipe is the first edition's.
    d2l-keras: the Keras text: Fashion-MNIST at 28x28 and in [0, 1], Adam at 1e-3 with Keras' epsilon of 1e-7, batches of 64,
        5 epochs, the last 20% of the training images held out before shuffling.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of torch.optim; momentum is SGD's, eps Adam's and AdamW's."""

    name: str
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    eps: float = 1e-8


# The optimizers that --optimizer chooses where the preset has another one.
OPTIMIZERS = {
    "sgd": Optimizer("sgd", lr=0.02, momentum=0.9),
    "adam": Optimizer("adam", lr=1e-3),
    "adamw": Optimizer("adamw", lr=1e-3, weight_decay=0.01),
}


@dataclass(frozen=True)
class Settings:
    """All settings that decide what a run computes. A checkpoint holds them, so --resume recognizes another run's.

    Args:
        data: the data set.
        model: a network of the zoo.
        batch_size: images in a batch, of all processes together.
        epochs: epochs to train.
        optimizer: optimizer with its learning rate.
        schedule: steps of the learning rate, one per epoch: ("cosine", epochs of the half wave), ("exponential", factor) or
            None. It never depends on `epochs`, which --resume may raise.
        image_size: height and width that images are resized to; None leaves them as the data set has them.
        normalize: whether pixels are moved from [0, 1] to [-1, 1].
        held_out: share of the training images, cut off at the end before shuffling, for validation. With 0, as in texts that
            train on all images, validation is on the test set.
        xavier: whether the weights of convolutions and linear layers are drawn Xavier-uniform.
        amp: whether autocast is on.
        seed: seed of weights and shuffling.
    """

    data: str = "digits"
    model: str = "d2l_resnet18"
    batch_size: int = 32
    epochs: int = 10
    optimizer: Optimizer = OPTIMIZERS["adam"]
    schedule: tuple[str, float] | None = ("exponential", 0.7)
    image_size: int | None = None
    normalize: bool = False
    held_out: float = 0.2
    xavier: bool = False
    amp: bool = False
    seed: int = 0

    def fingerprint(self) -> dict[str, Any]:
        """Returns all settings but the number of epochs, in plain types."""
        values = asdict(self)
        del values["epochs"]
        return values


DEFAULT = Settings()

PRESETS = {
    "d2l": Settings(
        data="fashion-mnist",
        batch_size=256,
        optimizer=Optimizer("sgd", lr=0.05),
        schedule=None,
        image_size=96,
        held_out=0.0,
        xavier=True,
    ),
    "d2l-keras": Settings(
        data="fashion-mnist",
        model="d2l_resnet18_keras",
        batch_size=64,
        epochs=5,
        optimizer=Optimizer("adam", lr=1e-3, eps=1e-7),
        schedule=None,
    ),
    "cifar": Settings(
        data="cifar10",
        model="resnet18",
        epochs=200,
        optimizer=Optimizer("sgd", lr=1e-3, momentum=0.9, weight_decay=5e-4),
        schedule=("cosine", 200),
        normalize=True,
        held_out=0.0,
    ),
}


def settings(preset: str | None, *, optimizer: str | None = None, lr: float | None = None, **given: Any) -> Settings:
    """Returns a preset, or the default, in which arguments that are not None replace its settings.

    Raises:
        ValueError: if the preset or the optimizer is unknown.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if optimizer is not None and optimizer not in OPTIMIZERS:
        raise ValueError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    base = DEFAULT if preset is None else PRESETS[preset]
    chosen = base.optimizer if optimizer in (None, base.optimizer.name) else OPTIMIZERS[optimizer]
    if lr is not None:
        chosen = replace(chosen, lr=lr)
    return replace(base, optimizer=chosen, **{name: value for name, value in given.items() if value is not None})
