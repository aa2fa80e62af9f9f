"""The processes that train one model together: one, or those that torchrun started, on this machine or on several."""

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
    """An error that every process raises, so that one of them is enough to report it."""


@dataclass(frozen=True)
class Processes:
    """This process among its peers: rank of size, with a device of its own."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each of them; in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: T) -> T:
        """The first process' value, in each of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def buffers_from_first(self, model: torch.nn.Module) -> None:
        """Gives all processes the first one's buffers, BN's running statistics, which a checkpoint would hold."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def together(self, work: Callable[[], T]) -> T:
        """Runs work in all processes; if it fails in one of them, all raise that error and none is left waiting.

        Raises:
            SharedError: with the message of the first process that failed.
        """
        result, message = None, None
        try:
            result = work()
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            if self.size == 1:
                raise
            message = str(error)
        if self.size > 1:
            messages: list[Any] = [None] * self.size
            dist.all_gather_object(messages, message)
            failed = [m for m in messages if m is not None]
            if failed:
                raise SharedError(failed[0])
        return result

    def in_turn(self, work: Callable[[], T]) -> T:
        """Runs work in one process after the other, as `together` does otherwise."""
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
        device: --device; None is CUDA if there is one. Under torchrun each process takes the GPU of its local rank.

    Raises:
        RuntimeError: no such device, or the others can't be reached.
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
        # was still letting go of that collective's tensors (pytorch/pytorch#179291). A barrier has none, but gloo has two
        # worker threads, and on a busy machine the other one may need a while longer; nothing tells when it is done.
        dist.barrier()
        if chosen.type == "cpu":
            time.sleep(_GLOO_SECONDS)
    finally:
        dist.destroy_process_group()
