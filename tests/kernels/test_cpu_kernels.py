"""Our compiled CPU kernels: exact on integers, within their buffers, on every width of vectors; planted bugs are caught."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.own_kernels import skip_unless_compiled
from resnet_kernels.kernels.cpu.library import ISAS

SOURCES = Path(__file__).parents[2] / "resnet_kernels" / "kernels" / "cpu"
DRIVER = Path(__file__).with_name("drive_cpu_kernels.py")
# Floats of a vector, rows of the micro-kernel: of each instruction set.
SIZES = {"portable": (4, 6), "avx2": (8, 6), "avx512": (16, 12), "neon": (4, 8)}


def _drive(library: Path, number: int, examples: int, *more: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(DRIVER), str(library), str(number), str(examples), "0", *more]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def _compile(folder: Path, sources: Path, width: int, rows: int, *flags: str) -> Path:
    """The kernels for this very processor, with vectors of another width than its own."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = folder / f"width{width}_{rows}.so"
    command = [compiler, "-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    command += [f"-DPORTABLE_WIDTH={width}", f"-DPORTABLE_ROWS={rows}", *flags]
    command += [str(sources / name) for name in ("run.c", "program.c", "portable.c")] + ["-o", str(library), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@pytest.mark.parametrize("isa", ISAS)
def test_integers_are_exact_and_no_buffer_is_left(isa):
    """Also for images of more than 2**31 elements."""
    found = skip_unless_compiled()
    number = ISAS.index(isa)
    if not found.calls.rk_panel(number):
        pytest.skip(f"this processor lacks {isa}")
    done = _drive(found.path, number, 300, "huge")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("isa", SIZES)
def test_under_sanitizers(isa, tmp_path):
    """Every width, compiled for this processor, under AddressSanitizer and UBSan."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-march=native"]
    library = _compile(tmp_path, SOURCES, *SIZES[isa], *flags)
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("needs gcc's libasan.so")
    done = _drive(library, 0, 400, "plain", LD_PRELOAD=runtime, ASAN_OPTIONS="detect_leaks=0")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


# What is planted, in which file, in the place of what.
BUGS = {
    "dropped ReLU": ("micro_kernel.h", "a##i = relu(a##i)", "a##i = a##i"),
    "ReLU of the ragged panel": ("vectors.h", "out->relu ? relu_one(sum) : sum", "sum"),
    "swapped scale and shift": ("micro_kernel.h", "a##i *= s0", "a##i += s0"),
    "residual of the next row": (
        "micro_kernel.h",
        "load(residual + i * out->step)",
        "load(residual + (i + 1) * out->step)",
    ),
    "transposed taps": ("run.c", "h * pack->stride_h + w * pack->stride_w", "w * pack->stride_h + h * pack->stride_w"),
    "transposed taps of Winograd": (
        "run.c",
        "j / 3 * pack->stride_h + j % 3 * pack->stride_w",
        "j % 3 * pack->stride_h + j / 3 * pack->stride_w",
    ),
    "taps of a missing channel": ("run.c", "o < pack->c_out ? from[offsets[j]] : 0", "from[offsets[j]]"),
    "a tap left out": ("winograd_taps.h", "(ends - wide[3 + j])", "(ends - wide[j])"),
    "missing edge mask": ("direct.h", "w >= 0 && w < c->in_w", "w >= 0"),
    "missing edge mask of tiles": ("winograd.h", "w >= 0 && w < c->in_w", "w < c->in_w"),
    "ragged tile": ("winograd.h", "least(2, c->out_w - tile.left)", "2"),
    "ragged channels": ("winograd.h", "memset(rest, 0, sizeof rest);", ""),
    "lost block of sums": ("vectors.h", "total_step, summed > 0,", "total_step, 0 * summed,"),
    "activated padding": ("winograd.h", "if (c->pre_scale && pixels[i])", "if (c->pre_scale)"),
    "window of the pool": (
        "direct.h",
        "least(c->out_h, h0 + c->pool_kernel)",
        "least(c->out_h, h0 + c->pool_kernel - 1)",
    ),
    "dropped sign": ("winograd.h", "(p[4 + j] - p[8 + j]) - p[12 + j]", "(p[4 + j] - p[8 + j]) + p[12 + j]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_catches_a_planted_bug(bug, tmp_path):
    name, right, wrong = BUGS[bug]
    planted = shutil.copytree(
        SOURCES, tmp_path / "sources", ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__")
    )
    text = (planted / name).read_text()
    assert right in text, "the bug must be planted somewhere"
    (planted / name).write_text(text.replace(right, wrong))
    library = _compile(tmp_path, planted, 8, 6, "-march=native")
    assert _drive(library, 0, 400).returncode != 0


@pytest.mark.slow
def test_planted_bugs_are_all_that_is_wrong(tmp_path):
    done = _drive(_compile(tmp_path, SOURCES, 8, 6, "-march=native"), 0, 400)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
