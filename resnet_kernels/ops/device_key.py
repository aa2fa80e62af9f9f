"""The kind of a device, by which tables of measurements are kept."""

from __future__ import annotations

import contextlib
import platform
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..kernels.cpu import library


class DeviceKey(NamedTuple):
    """A kind of device, which a table is measured for.

    Attributes:
        name: of the device.
        capability: a GPU's compute capability, as in "9.0"; a CPU's instruction set and number of threads, as in
            "avx2, 2 threads".
    """

    name: str
    capability: str

    @property
    def is_cpu(self) -> bool:
        """Whether the device is a CPU: its table holds problems with packed weights alone."""
        return self.capability.endswith("threads")

    @property
    def file_name(self) -> str:
        """The name of its table's file, as in nvidia-h200-sm90.json and amd-epyc-avx2-2-threads.json."""
        capability = self.capability if self.is_cpu else f"sm{self.capability.replace('.', '')}"
        return f"{_in_lower_case(self.name)}-{_in_lower_case(capability)}.json"


def _in_lower_case(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_key(device: torch.device) -> DeviceKey | None:
    """Returns the key of a device's tables; None where there is nothing to choose from: no GPU, no CPU kernels of ours."""
    if device.type == "cpu":
        found = library.library_or_none()
        return None if found is None else DeviceKey(cpu_name(), f"{found.isa}, {torch.get_num_threads()} threads")
    return gpu_key(device)


@lru_cache
def cpu_name() -> str:
    """Returns the processor's name, as Linux has it; the architecture's elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


@lru_cache
def gpu_key(device: torch.device) -> DeviceKey | None:
    """Returns the key of a GPU; None for another device."""
    # A fake tensor's CUDA device may be absent.
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return DeviceKey(torch.cuda.get_device_name(device), "{}.{}".format(*torch.cuda.get_device_capability(device)))
