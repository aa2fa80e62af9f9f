"""Closed loops: each caller sends its next batch once it has the answer to the last one."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import models

# For whoever is to start with the others: the first calls of a busy machine's processes take that long at most.
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Load:
    """Calls of one caller in a round.

    seconds: no call starts later. batches: batch sizes, of which each call draws one at random. calls: the most calls; None
    for no limit. seed: of the draws; caller number i draws from seed + i.
    """

    seconds: float
    batches: tuple[int, ...] = (1,)
    calls: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Loop:
    """One caller's round: the seconds of each call, the images of all calls, and the seconds from start to last answer."""

    latencies: tuple[float, ...]
    images: int
    seconds: float


@dataclass(frozen=True)
class Figures:
    """A round in three numbers; latencies of all callers together."""

    images_per_s: float
    p50_ms: float
    p99_ms: float

    @staticmethod
    def of(loops: Sequence[Loop]) -> Figures:
        """Returns the figures of one round.

        Rates of callers are added up. Total images over total seconds would count the time in which the first caller to end
        waits for the last.
        """
        p50, p99 = 1e3 * np.percentile([latency for loop in loops for latency in loop.latencies], (50, 99))
        return Figures(sum(loop.images / loop.seconds for loop in loops), float(p50), float(p99))

    @staticmethod
    def median(rounds: Sequence[Figures]) -> Figures:
        """Returns the median over the rounds, number by number."""
        columns = zip(*((f.images_per_s, f.p50_ms, f.p99_ms) for f in rounds))
        return Figures(*map(statistics.median, columns))


class Station:
    """Contenders made ready in this process."""

    def __init__(self, folder: Path, names: Sequence[str], demand: models.Demand):
        self._threads = demand.threads
        self._shared = {name: models.make(name, folder, demand) for name in names}
        self._image = torch.load(folder / models.IMAGES)["images"][:1]

    def round(self, name: str, callers: int, load: Load, start: Callable[[], object] | None = None) -> list[Loop]:
        """Runs callers, each a thread, on one contender.

        Args:
            name: of the contender.
            callers: number of threads.
            load: calls of each.
            start: function that returns when callers elsewhere are ready, too; for one caller only.
        """
        crowd = threading.Barrier(callers)
        stop = threading.Event()
        loops: list[Loop] = []
        errors: list[BaseException] = []

        def call_on(number: int) -> None:
            try:
                loops.append(self._loop(name, load, number, start or (lambda: crowd.wait(START_TIMEOUT_S)), stop))
            except BaseException as error:
                errors.append(error)
                crowd.abort()

        threads = [threading.Thread(target=call_on, args=(number,), daemon=True) for number in range(callers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:  # after Ctrl-C, too, nobody calls on
            stop.set()
            for thread in threads:
                thread.join(START_TIMEOUT_S)
        # The other callers' errors only say that one is missing.
        errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
        if errors:
            raise errors[0]
        return loops

    def _loop(self, name: str, load: Load, number: int, start: Callable[[], object], stop: threading.Event) -> Loop:
        torch.set_num_threads(self._threads)  # PyTorch keeps it per thread
        shared, dice = self._shared[name], random.Random(load.seed + number)
        call = shared.caller()
        inputs = {n: shared.convert(self._image.repeat(n, 1, 1, 1)) for n in load.batches}
        latencies: list[float] = []
        images = 0
        with torch.inference_mode():
            for x in inputs.values():  # uncounted: this thread's pool of threads, and what a shape's first call makes
                call(x)
            start()
            begin = now = time.perf_counter()
            while now - begin < load.seconds and len(latencies) != load.calls and not stop.is_set():
                batch = dice.choice(load.batches)
                before = time.perf_counter()
                call(inputs[batch])
                now = time.perf_counter()
                latencies.append(now - before)
                images += batch
        return Loop(tuple(latencies), images, now - begin)
