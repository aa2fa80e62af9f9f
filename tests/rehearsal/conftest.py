"""A fixture that runs rehearse.py on the stand-in for the CUDA driver."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_kernels

PACKAGE = Path(resnet_kernels.__file__).parent
FOLDER = Path(__file__).parent
SECONDS = 1800


@pytest.fixture(scope="session")
def rehearse(tmp_path_factory):
    """Runs rehearse.py with arguments, on a package; returns what it printed, or raises with the end of its errors."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        pytest.skip("no gcc to build the stand-in for libcuda with")
    folder = tmp_path_factory.mktemp("rehearsal")
    headers = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    build = [compiler, "-shared", "-fPIC", "-O1", f"-I{headers}", "-o", str(library), str(FOLDER / "fake_libcuda.c")]
    subprocess.run(build, check=True, capture_output=True, text=True)

    def run(*arguments: str, package: Path = PACKAGE):
        # Kernels here are compiled halfway, so their cache is nobody else's.
        environment = os.environ | dict(
            TRITON_LIBCUDA_PATH=str(folder),
            LD_LIBRARY_PATH=str(folder),
            TRITON_CACHE_DIR=str(folder / "cache"),
            RESNET_KERNELS_CACHE=os.devnull,
            PYTHONPATH=str(package.parent),
            TRITON_DEFAULT_FP_FUSION="0",
            OMP_NUM_THREADS="1",
        )
        for name in ("TRITON_INTERPRET", "RESNET_KERNELS_BACKEND"):
            environment.pop(name, None)
        command = [sys.executable, str(FOLDER / "rehearse.py"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        print(done.stderr)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(done.stdout)

    return run
