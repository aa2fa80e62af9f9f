"""Metadata that is saved with each measurement: versions, driver, commit and time."""

from __future__ import annotations

import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._version import __version__


def environment(device: torch.device) -> dict[str, Any]:
    """Returns the metadata of a measurement: versions, driver, time, and the commit if there is one."""
    values = {**versions(), "driver": None, "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=40")}
    if device.type == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        values["driver"] = driver.splitlines()[0] if driver else None
    values["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return values


def versions() -> dict[str, str | int | None]:
    """Returns the versions that a candidate's speed depends on. Problems with a record of other versions are measured anew."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    # PyTorch knows cuDNN's version without touching a GPU.
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {"resnet_kernels": __version__, "torch": torch.__version__, "triton": triton, "cudnn": cudnn}


_seen: dict[tuple[str, ...], str | None] = {}


def _output(*command: str) -> str | None:
    """Output of a command, which runs once per process; None if it does not exist or fails."""
    if command not in _seen:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=20, check=True, cwd=Path(__file__).parent
            )
            _seen[command] = done.stdout.strip() or None
        except (OSError, subprocess.SubprocessError):
            _seen[command] = None
    return _seen[command]
