"""The compiled library of our CPU kernels: where it is, what it can run here, and PyTorch's pool of threads.

The library is an extension module by name only: it is loaded with ctypes and knows nothing of Python or PyTorch, so one build
serves all versions of both. `pip install` compiles it where there is a C compiler (setup.py).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

# What the environment may ask for: an instruction set of `ISAS`, or "none" for none of our kernels.
ISA_VARIABLE = "RESNET_KERNELS_CPU_ISA"
ISAS = ("portable", "avx2", "avx512")
# run.c, rk_interface: a library that an older version of this package left behind can't be called.
_INTERFACE = 9
_NAME = "_convolution"


class Library(NamedTuple):
    """The loaded library.

    Attributes:
        path: of its file.
        isa: the instruction set that is used, one of `ISAS`.
        number: of that instruction set, in the library's own counting.
        panel: output channels that a micro-kernel computes at once.
        rows: pixels that it computes at once.
        calls: the library, for its functions.
        parallel: address of the function of PyTorch's OpenMP runtime that runs another one on several threads; None if it
            was not found, and everything runs on the caller's thread.
    """

    path: Path
    isa: str
    number: int
    panel: int
    rows: int
    calls: ctypes.CDLL
    parallel: int | None

    def threads(self) -> int:
        """Threads that a call may use now: as many as PyTorch's own operations."""
        return 1 if self.parallel is None else torch.get_num_threads()


class Missing(NamedTuple):
    """The answer that there is no library. reason: why, as a sentence without a full stop."""

    reason: str


@functools.cache
def find() -> Library | Missing:
    """Loads the library, or says why there is none; the answer holds for the process."""
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted not in ("", "none", *ISAS):
        return Missing(f"{ISA_VARIABLE} must be one of {', '.join(ISAS)}, none, got {wanted!r}")
    if wanted == "none":
        return Missing(f"{ISA_VARIABLE} is none")
    path = _path()
    if path is None:
        return Missing("they are not compiled (pip install -e . does that where there is a C compiler)")
    try:
        calls = ctypes.CDLL(str(path))
        calls.rk_interface.restype = ctypes.c_int64
        found = calls.rk_interface()
    except (OSError, AttributeError) as error:
        return Missing(f"{path} can't be loaded ({error})")
    if found != _INTERFACE:
        return Missing(f"{path} is of another version: its interface is {found}, this version's is {_INTERFACE}")
    _declare(calls)
    able = [isa for number, isa in enumerate(ISAS) if calls.rk_panel(number)]
    isa = wanted or able[-1]
    if isa not in able:
        return Missing(f"{ISA_VARIABLE} is {isa}, which this processor does not have")
    number = ISAS.index(isa)
    return Library(path, isa, number, calls.rk_panel(number), calls.rk_rows(number), calls, _parallel())


def library_or_none() -> Library | None:
    """Returns the compiled library; None if there is none that can run here."""
    found = find()
    return None if isinstance(found, Missing) else found


def describe() -> str:
    """Returns one line that says which CPU kernels serve, and why: the library's path and instruction set, or oneDNN."""
    found = find()
    if isinstance(found, Missing):
        return f"CPU kernels: oneDNN's, since ours can't be used: {found.reason}"
    threads = (
        "PyTorch's threads"
        if found.parallel
        else "one thread, as PyTorch's OpenMP runtime has no GOMP_parallel to call"
    )
    return f"CPU kernels: ours, {found.isa}, on {threads}: {found.path}"


def is_asked_for() -> bool:
    """Whether the environment names an instruction set: then our kernels run wherever they can."""
    return os.environ.get(ISA_VARIABLE, "") in ISAS


def _path() -> Path | None:
    folder = Path(__file__).parent
    candidates = (folder / f"{_NAME}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _declare(calls: ctypes.CDLL) -> None:
    """Declares the library's functions, as run.c and program.c have them."""
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    for name, arguments, result in (
        ("rk_panel", [size], size),
        ("rk_rows", [size], size),
        ("rk_tasks", [size, size, pointer], size),
        ("rk_scratch", [size, size, pointer], size),
        ("rk_convolve", [size, size, pointer, size, pointer, pointer, size], None),
        ("rk_phase", [], size),
        ("rk_run", [size, pointer, size, size, pointer, pointer, size, pointer, pointer, size], None),
        ("rk_is_same", [size, pointer, pointer, pointer, pointer, pointer], size),
        ("rk_peak", [size, size, size, pointer], size),
        ("rk_pack", [size, size, pointer, pointer, pointer, pointer, size, pointer], size),
    ):
        function = getattr(calls, name)
        function.argtypes, function.restype = arguments, result


def _parallel() -> int | None:
    """Address of GOMP_parallel, which libgomp has and LLVM's and Intel's runtimes for Linux have, too; None without one.

    The global scope comes first, as it does for PyTorch's own calls: a runtime that was preloaded serves both.
    """
    if sys.platform != "linux":
        return None
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            return ctypes.cast(ctypes.CDLL(library).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
