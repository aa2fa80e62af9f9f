"""The processes that train one model together: a single one, or those that torchrun started on one or several machines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_GLOO_SECONDS = 0.2


class SharedError(ValueError):
    """An error that every process raises, so only one of them reports it."""


@dataclass(frozen=True)
class Processes:
    """This process among its peers, with its rank, their number and its own device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Adds up tensors of all processes in place; each process gets the sum."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: T) -> T:
        """Returns the first process' value in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def buffers_from_first(self, model: torch.nn.Module) -> None:
        """Copies the first process' buffers, such as BN's running statistics, to all. A checkpoint holds these."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def together(self, work: Callable[[], T]) -> T:
        """Runs work in all processes. If it fails in one, all raise that error and none is left waiting.

        Raises:
            SharedError: if a process failed, with the message of the first that did.
        """
        if self.size == 1:
            return work()
        results, message = [], None
        try:
            results.append(work())
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            message = str(error)
        messages: list[Any] = [None] * self.size
        dist.all_gather_object(messages, message)
        failed = [m for m in messages if m is not None]
        if failed:
            raise SharedError(failed[0])
        return results[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Runs work in one process after the other, with the errors of `together`."""
        for turn in range(self.size):
            if turn == self.rank:
                outcome = self.together(work)
            else:
                self.together(lambda: None)
        return outcome


@contextmanager
def join(device: str | None) -> Iterator[Processes]:
    """Joins torchrun's processes if there are any, and leaves them at the end.

    Args:
        device: the device's name; None is CUDA if there is one. Under torchrun each process takes the GPU of its local rank.

    Raises:
        RuntimeError: if there is no such device, or the other processes can't be reached.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if size == 1:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), size, chosen)
        # A process that ended right after a collective aborted at exit in 3 of 18 runs (torch 2.13, gloo): a worker thread
        # was still releasing that collective's tensors (pytorch/pytorch#179291). A barrier has no tensors, but gloo has two
        # worker threads. On a busy machine the other one may need longer, and nothing tells when it is done.
        dist.barrier()
        if chosen.type == "cpu":
            time.sleep(_GLOO_SECONDS)
    finally:
        dist.destroy_process_group()
