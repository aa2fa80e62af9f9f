"""python -m resnet_kernels env: what the package runs on here, for a bug report.

It holds versions, the operating system, the devices, the CPU kernels and the settings that change what runs. The home
directory and the user's name are left out of all paths.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..kernels.cpu import library
from ..ops import device_key, tuned_table
from ..perf import environment
from . import arguments

HELP = "show what the package runs on here; a bug report needs it"
EXAMPLES = ("", "--json")

# The packages of the extras vision, timm, report and train, and NumPy.
PACKAGES = ("numpy", "torchvision", "timm", "matplotlib", "scikit-learn", "mlxtend", "tqdm")
# Instruction sets that a kernel of ours, oneDNN or PyTorch may choose by, as Linux spells them.
_ISA_FLAGS = re.compile(r"avx2|fma|f16c|avx512\w*|avx_vnni\w*|amx_\w+|asimd\w*|bf16|i8mm|sve\w*")
_VARIABLES = re.compile(
    r"RESNET_KERNELS_\w+|TRITON_INTERPRET|OMP_NUM_THREADS|OMP_WAIT_POLICY|GOMP_SPINCOUNT|KMP_BLOCKTIME|MKL_NUM_THREADS|"
    r"ONEDNN_MAX_CPU_ISA|ATEN_CPU_CAPABILITY|CUDA_VISIBLE_DEVICES|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.set_defaults(run=run)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the values, as lines or as a JSON object; returns the exit status."""
    values = {name: _without_names(value) for name, value in _values().items()}
    if options.json:
        print(json.dumps(values, indent=2))
        return 0
    # Not through terminal.show: lines of a bug report are not to be wrapped.
    for name, value in values.items():
        lines = (
            [f"{key} {item or 'not installed'}" for key, item in value.items()] if isinstance(value, dict) else [value]
        )
        if value not in (None, {}):
            print(f"{name:15} {', '.join(map(str, lines))}")
    print(_without_names(library.describe()))
    return 0


def _values() -> dict[str, Any]:
    found = library.find()
    return {
        **environment.versions(),
        "commit": environment.environment(torch.device("cpu"))["commit"],
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "os": platform.platform(),
        "cpu": device_key.cpu_name(),
        "cpu_flags": _cpu_flags(),
        "cores": _cores(),
        "threads": f"{torch.get_num_threads()} in an operation, {torch.get_num_interop_threads()} between operations",
        "gpu": _gpus(),
        "driver": environment.environment(torch.device("cuda"))["driver"] if torch.cuda.is_available() else None,
        "torch_build": _build(),
        "cpu_kernels": None if isinstance(found, library.Missing) else str(found.path),
        "cpu_isa": None if isinstance(found, library.Missing) else found.isa,
        "cpu_reason": found.reason if isinstance(found, library.Missing) else None,
        "tables": str(tuned_table.cache_directory()),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)},
    }


def _cpu_flags() -> str | None:
    """Returns the processor's instruction sets that matter; None where Linux's list can't be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.M)
    return None if found is None else " ".join(flag for flag in found[1].split() if _ISA_FLAGS.fullmatch(flag))


def _cores() -> str:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{os.cpu_count()}, {allowed} of them for this process"


def _gpus() -> str | None:
    if not torch.cuda.is_available():
        return None
    gpus = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return "; ".join(f"{gpu.name}, {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)


def _build() -> str:
    """Returns the libraries that PyTorch was built with, and for which GPUs, as one line."""
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines() if line.lstrip().startswith("- ")]
    libraries = [re.sub(r" \(Git Hash \w+\)", "", line) for line in lines if not line.startswith("Build settings")]
    gpu = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    return "; ".join((gpu, *libraries))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _without_names(value: Any) -> Any:
    """Returns a value whose texts name neither the home directory nor, as a part of a path, the user."""
    if isinstance(value, dict):
        return {key: _without_names(item) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    home = os.path.expanduser("~")
    if len(home) > 1:
        value = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", value)
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        return value  # a container's number without a name
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\]|$)", "USER", value)
