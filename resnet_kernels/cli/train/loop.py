"""The training loop: an epoch, an evaluation, and the state that a checkpoint needs to go on bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset

from ...models.loss import loss_function
from . import checkpoint, data
from .presets import Settings
from .processes import Processes, SharedError

# Losses are read from the device this often: reading each would make a GPU wait for the host in each step.
STEPS_BETWEEN_CHECKS = 50


# Takes the batches of an epoch and a label, and returns the batches, with a progress bar, say.
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


class Batches(Sampler[Tensor]):
    """Batches of indices, cut from an order of images. A single last image joins the batch before: BN needs two."""

    def __init__(self, order: Sequence[int] | DistributedSampler[Any], batch_size: int):
        self.order, self.batch_size = order, batch_size

    def __iter__(self) -> Iterator[Tensor]:
        indices = torch.tensor(list(self.order))
        batches = list(indices.split(self.batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        yield from batches

    def __len__(self) -> int:
        full, rest = divmod(len(self.order), self.batch_size)
        return max(full + (rest > 1), 1)


class Training:
    """A model in training, in one process or in each of several.

    Args:
        model: the plain or fused model, on its device.
        images: the data set.
        settings: the run's recipe.
        processes: the processes that train it together.
        workers: number of processes that each data loader starts.
        progress: function that may wrap an epoch's batches in a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        images: data.DataSet,
        settings: Settings,
        processes: Processes,
        workers: int = 0,
        progress: Progress = lambda batches, label: batches,
    ):
        self.model, self.images, self.settings, self.processes = model, images, settings, processes
        self.progress = progress
        device = processes.device
        self.network: nn.Module = model
        if processes.size > 1:
            self.network = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
        self.loss = loss_function(model)
        self.optimizer = _optimizer(model, settings)
        self.scheduler = _scheduler(self.optimizer, settings)
        self.amp_dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp and self.amp_dtype is torch.float16)
        self.history: list[dict[str, float]] = []
        self.sampler: DistributedSampler[Any] = DistributedSampler(
            images.train, processes.size, processes.rank, seed=settings.seed
        )
        self.loader = self._loader(images.train, self.sampler, workers)
        self.workers = workers

    @property
    def epoch(self) -> int:
        """The number of epochs done."""
        return len(self.history)

    def train_epoch(self) -> dict[str, float]:
        """Trains on all training images once, then validates; returns the epoch's row of the history.

        Raises:
            SharedError: if a loss is not finite. The model is of no use any more.
        """
        # The order is drawn from seed and epoch alone, so a resumed run shuffles as an uninterrupted one.
        self.sampler.set_epoch(self.epoch)
        self.network.train()
        losses, sizes, total = [], [], 0.0
        correct = torch.zeros((), device=self.processes.device)
        label = f"epoch {self.epoch + 1}"
        for step, (images, labels) in enumerate(self.progress(self.loader, label), 1):
            images, labels = self._input(images), labels.to(self.processes.device)
            self.optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                outputs = self.network(images)
            loss = self.loss(outputs.float(), labels)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            losses.append(loss.detach() * len(labels))
            sizes.append(len(labels))
            correct += (outputs.detach().argmax(1) == labels).sum()
            if len(losses) == STEPS_BETWEEN_CHECKS or step == len(self.loader):
                total += self._checked_sum(losses, step)
                losses.clear()
        seen = sum(sizes) * self.processes.size
        self.scheduler.step()
        validation_loss, right, count = self.evaluate(self.images.validation)
        self.history.append(
            {
                "loss": total / seen,
                "accuracy": self.processes.sum(correct).item() / seen,
                "validation_loss": validation_loss,
                "validation_accuracy": right / count,
            }
        )
        return self.history[-1]

    def _checked_sum(self, losses: list[Tensor], step: int) -> float:
        """Returns the sum of some steps' losses over all processes. All see the same losses, so all stop together."""
        values = self.processes.sum(torch.stack(losses)).tolist()
        for at, value in enumerate(values, step - len(values) + 1):
            if not math.isfinite(value):
                raise SharedError(
                    f"the loss is {value} in epoch {self.epoch + 1}, step {at} of {len(self.loader)}: a lower --lr may help"
                )
        return sum(values)

    @torch.no_grad()
    def evaluate(self, part: TensorDataset) -> tuple[float, int, int]:
        """Returns the mean loss, the number of correct predictions and of images of a part; each image counts once."""
        self.processes.buffers_from_first(self.model)
        self.model.eval()
        mine = range(self.processes.rank, len(part), self.processes.size)
        sums = torch.zeros(3, device=self.processes.device)
        for images, labels in self._loader(part, mine, self.workers) if mine else ():
            images, labels = self._input(images), labels.to(self.processes.device)
            with self._autocast():
                outputs = self.model(images)
            loss = self.loss(outputs.float(), labels)
            sums += torch.stack((loss * len(labels), (outputs.argmax(1) == labels).sum(), loss.new_tensor(len(labels))))
        loss, correct, count = self.processes.sum(sums).tolist()
        return loss / count, int(correct), int(count)

    def state(self) -> dict[str, Any]:
        """Returns a checkpoint's content. The model's keys are the plain model's, whether it is fused or wrapped or not."""
        rng = {"cpu": torch.get_rng_state()}
        if self.processes.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.processes.device)
        return {
            "settings": self.settings.fingerprint(),
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores a state, so that training goes on where it was taken.

        Raises:
            ValueError: if the state doesn't fit this model and optimizer.
        """
        try:
            checkpoint.check_fits(state, self.state(), [parameter.shape for parameter in self.model.parameters()])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.history = list(state["history"])
            torch.set_rng_state(state["rng"]["cpu"])
            if self.processes.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.processes.device)
        except (RuntimeError, KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise ValueError(
                f"--resume: the checkpoint does not fit {self.settings.model} ({data.first_line(error)})"
            ) from error

    def _loader(
        self, part: TensorDataset, order: Sequence[int] | DistributedSampler[Any], workers: int
    ) -> DataLoader[Any]:
        # The batch size is that of all processes together, so a recipe doesn't depend on their number.
        batches = Batches(order, self.settings.batch_size // self.processes.size)
        pin = self.processes.device.type == "cuda"
        return DataLoader(part, batch_size=None, sampler=batches, num_workers=workers, pin_memory=pin)

    def _input(self, images: Tensor) -> Tensor:
        images = images.to(self.processes.device, non_blocking=True)
        size = self.settings.image_size or self.images.image_size
        return data.prepare(images, self.images.levels, size, self.settings.normalize)

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.settings.amp:
            return nullcontext()
        return torch.autocast(self.processes.device.type, self.amp_dtype)


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    chosen = settings.optimizer
    if chosen.name == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=chosen.lr, momentum=chosen.momentum, weight_decay=chosen.weight_decay
        )
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[chosen.name]
    return cls(model.parameters(), lr=chosen.lr, eps=chosen.eps, weight_decay=chosen.weight_decay)


def _scheduler(optimizer: torch.optim.Optimizer, settings: Settings) -> torch.optim.lr_scheduler.LRScheduler:
    kind, value = settings.schedule or ("exponential", 1.0)
    if kind == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(value))
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=value)
