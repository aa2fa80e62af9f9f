"""Number of cores that other processes keep busy while something is timed.

Taking turns does not cancel their effect: PyTorch's OpenMP threads spin while they wait, so on a machine short of cores they
suffer more than pools whose threads sleep, and ratios of the two say more about the other processes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")


class Neighbors:
    """Counter of the CPU time of other processes since its construction."""

    def __init__(self):
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Reads (wall seconds, CPU seconds of all other processes); None without /proc/stat."""
        try:
            fields = _STAT.read_text().split("\n")[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields[:8])
        every = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.perf_counter(), every - own.user - own.system

    def cores(self) -> float | None:
        """Cores that other processes have kept busy since construction, on average; None without /proc/stat."""
        now = self._now()
        if now is None or self._start is None or now[0] <= self._start[0]:
            return None
        return max(0.0, (now[1] - self._start[1]) / (now[0] - self._start[0]))
