"""Our compiled CPU kernels: exact on integers, within their buffers, on every width of vectors; planted bugs are caught.

Programs of several layers run, too, on several threads: a layer that does not wait for another one reads NaN.
"""

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


def _drive(
    library: Path, number: int, examples: int, *more: str, seed: int = 0, **environment: str
) -> subprocess.CompletedProcess:
    command = [sys.executable, str(DRIVER), str(library), str(number), str(examples), str(seed), *more]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def _compile(folder: Path, sources: Path, width: int, rows: int, *flags: str) -> Path:
    """The kernels for this very processor, with vectors of another width than its own. flags: more sources, too."""
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


@pytest.mark.slow(unless=lambda isa: isa == "avx2")  # which nearly every machine has
@pytest.mark.parametrize("isa", ISAS)
def test_integers_are_exact_and_no_buffer_is_left(isa):
    """Also for images of more than 2**31 elements."""
    found = skip_unless_compiled()
    number = ISAS.index(isa)
    if not found.calls.rk_panel(number):
        pytest.skip(f"this processor lacks {isa}")
    done = _drive(found.path, number, 200, "huge")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def _preloaded(name: str) -> str:
    """The path of a sanitizer's library, which has to come before all others."""
    runtime = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip(f"needs gcc's {name}")
    return runtime


def _planted(folder: Path, name: str, right: str, wrong: str) -> Path:
    """A copy of the sources in which a file has something wrong in the place of what is right."""
    planted = shutil.copytree(SOURCES, folder / "sources", ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__"))
    text = (planted / name).read_text()
    assert right in text, "the bug must be planted somewhere"
    (planted / name).write_text(text.replace(right, wrong))
    return planted


@pytest.mark.slow
@pytest.mark.parametrize("isa", SIZES)
def test_under_sanitizers(isa, tmp_path):
    """Every width, compiled for this processor, under AddressSanitizer and UBSan."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-march=native"]
    library = _compile(tmp_path, SOURCES, *SIZES[isa], *flags)
    done = _drive(library, 0, 400, "plain", LD_PRELOAD=_preloaded("libasan.so"), ASAN_OPTIONS="detect_leaks=0")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


# Threads that ThreadSanitizer sees begin and end: it knows nothing of libgomp's, and would find races in all that they share.
THREADS = """
#include <pthread.h>

typedef struct {
    void (*function)(void *);
    void *argument;
} Start;

static void *begin(void *start)
{
    ((Start *)start)->function(((Start *)start)->argument);
    return 0;
}

void threads_of_its_own(void (*function)(void *), void *argument, unsigned count, unsigned flags)
{
    pthread_t threads[8];
    Start start = {function, argument};
    (void)flags;
    for (unsigned i = 1; i < count; i++)
        pthread_create(&threads[i], 0, begin, &start);
    function(argument);
    for (unsigned i = 1; i < count; i++)
        pthread_join(threads[i], 0);
}
"""
SPINS, SLEEPS = "SPIN_NS = 200000", "SPIN_NS = 0"
WAITS, HARDLY_WAITS = "done < layer->needs; done++", "done < layer->needs - 1; done++"


@pytest.mark.slow
@pytest.mark.parametrize(
    "right, wrong, exit_code",
    ((SPINS, SPINS, 0), (SPINS, SLEEPS, 0), (WAITS, HARDLY_WAITS, 66)),
    ids=("spins", "sleeps", "planted race"),
)
def test_under_thread_sanitizer(right, wrong, exit_code, tmp_path):
    sources, flags = _planted(tmp_path, "program.c", right, wrong), ["-fsanitize=thread", "-march=native"]
    (tmp_path / "threads.c").write_text(THREADS)
    library = _compile(tmp_path, sources, 8, 6, *flags, str(tmp_path / "threads.c"))
    options = {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66", "OPENBLAS_NUM_THREADS": "1"}
    done = _drive(library, 0, 400, "plain", LD_PRELOAD=_preloaded("libtsan.so"), **options)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("gcc's ThreadSanitizer can't run with this kernel's random addresses")
    assert done.returncode == exit_code, f"{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads sleep on a futex")
def test_nobody_woke_a_sleeping_thread(tmp_path):
    sources = _planted(tmp_path, "program.c", SPINS, SLEEPS)
    done = _drive(_compile(tmp_path, sources, 8, 6, "-march=native"), 0, 400)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


# What is planted, in which file, in the place of what.
BUGS = {
    "dropped ReLU": ("micro_kernel.h", "a##i = relu(a##i)", "a##i = a##i"),
    "ReLU of the ragged panel": ("vectors.h", "quick_one(out, sum, k)", "sum"),
    "dropped activation of a product": (
        "vectors.h",
        "activate_rows(out, 0, count, first * PANEL, last * PANEL);",
        "(void)0;",
    ),
    "dropped activation of a tile": (
        "winograd.h",
        "activate_rows(out, pixel, 1, panel * PANEL, (panel + 1) * PANEL);",
        "",
    ),
    "dropped activation of a ragged tile": (
        "winograd.h",
        "activate_rows(out, pixel, 1, panel * PANEL, c->c_out);",
        "",
    ),
    "dropped activation of narrow groups": (
        "grouped.h",
        "activate_rows(out, 0, count, panel * PANEL, last * PANEL);",
        "",
    ),
    "dropped activation of a pixel": ("pointwise.h", "activate_rows(out, row, 1, 0, channels);", ""),
    "activation of channels that are none": ("activations.h", "least(end, out->c_out) - first", "end - first"),
    "added on both sides of the activation": ("direct.h", "c->adds_last ? NULL : residual", "residual"),
    "what is added, of another row": ("activations.h", "load(out->last + at)", "load(out->last + channel)"),
    "nothing added to the last channels": ("activations.h", "last ? rest[i] + last[k] : rest[i]", "rest[i]"),
    "what is added behind rows, of another row": (
        "activations.h",
        "out->later_last + at : NULL",
        "out->later_last + first : NULL",
    ),
    "nothing added behind a product": (
        "micro_kernel.h",
        "a##i += load(last + i * out->step)",
        "a##i += 0 * load(last + i * out->step)",
    ),
    "nothing added behind the last sums": ("vectors.h", "sum + out->last[at]", "sum"),
    "slopes of the first channels": ("activations.h", "load(out->slopes + channel)", "load(out->slopes + 0 * channel)"),
    "slope of the last channels": ("activations.h", "out->slopes[channel]", "out->slopes[0 * channel]"),
    "dropped activation of the last channels": ("activations.h", "store(rest, RESULT);", "store(rest, v);"),
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
    "gates of the first image": ("pointwise.h", "c->gates + image * channels", "c->gates"),
    "pixels of the next image": ("pointwise.h", "least(area, begin + c->block)", "begin + c->block"),
    "gates that are no numbers of 0 to 1": ("pointwise.h", "activate_floats((int)c->gate, NULL, gates, channels);", ""),
    "images without a gate": ("pointwise.h", "out.scale = gates;", ""),
    "pixels of the first image": ("pointwise.h", "c->x + (image * area + begin) * channels", "c->x + begin * channels"),
    "channels of the next task": ("pointwise.h", "task % across * pool_panels(c) * PANEL", "0 * across"),
    "one vector of four": (
        "pointwise.h",
        "store(y + k + q * WIDTH, sums[q] / count);",
        "store(y + k + q * WIDTH, sums[0] / count);",
    ),
    "window of the pool": (
        "direct.h",
        "least(c->out_h, h0 + c->pool_kernel)",
        "least(c->out_h, h0 + c->pool_kernel - 1)",
    ),
    "finished from the first channel on": ("pointwise.h", "1, whole, x + whole, 0", "1, whole, x, 0"),
    "dropped ReLU of whole vectors": ("activations.h", "v = quick_of(out, v, channel);", ""),
    "scale of whole vectors alone": ("pointwise.h", "load(x + k) * load(out->scale + k)", "load(x + k)"),
    "lost NaN of the last channels": ("pointwise.h", "b > a || b != b ? b : a", "b > a ? b : a"),
    "ReLU of NaN": ("vectors.h", "return v <= 0 ? 0 : v;", "return v > 0 ? v : 0;"),
    "pixels of the next task": (
        "pointwise.h",
        "least(begin + c->block, c->batch * c->out_h * c->out_w)",
        "begin + c->block",
    ),
    "padding was counted": (
        "pointwise.h",
        "(float)((at.h1 - at.h0) * (at.w1 - at.w0))",
        "(float)(c->pool_kernel * c->pool_kernel)",
    ),
    "window over the lower edge": ("pointwise.h", "least(c->in_h, top + c->pool_kernel)", "top + c->pool_kernel"),
    "window over the left edge": ("pointwise.h", "most(0, left)", "left"),
    "pooled rows of the next image": ("pointwise.h", "least(c->pool_h, begin + c->block)", "begin + c->block"),
    "pooled rows left out": (
        "pointwise.h",
        "per_image = blocks(c->pool_h, c->block)",
        "per_image = most(1, c->pool_h / c->block)",
    ),
    "first pixel of a row was left out": ("pointwise.h", "int64_t j = at.w0; j", "int64_t j = at.w0 + (i > at.h0); j"),
    "nobody waited": ("program.c", "for (; done < layer->needs; done++)", "for (; done < 0; done++)"),
    "waited for all but the last": (
        "program.c",
        "for (; done < layer->needs; done++)",
        "for (; done < layer->needs - 1; done++)",
    ),
    "taken was done": (
        "program.c",
        "atomic_load(&call->phases[layer].done) >= call",
        "atomic_load(&call->phases[layer].taken) >= call",
    ),
    "counters of the last call": ("program.c", "atomic_store(&call->phases[i].taken, 0);", ""),
    "tasks done in the last call": ("program.c", "atomic_store(&call->phases[i].done, 0);", ""),
    "shared scratch memory": ("program.c", "atomic_fetch_add(&call->next_thread, 1) * call", "0 * call"),
    "place within its memory": ("program.c", "call->bases[place.base] + place.at", "call->bases[place.base]"),
    "a place that is none": ("program.c", "place.base < 0 ? NULL :", "place.base < -1 ? NULL :"),
    "kernel of the first layer": ("program.c", "kinds[layer->kind].run", "kinds[call->layers[call->first].kind].run"),
    "channels of the next group": ("micro_kernel.h", "b##i += row##i[k + SECOND] * w1", "b##i += row##i[k] * w1"),
    "sum of another channel": ("grouped.h", "EXCHANGED(2, PAIR(i, 2, 3))", "EXCHANGED(1, PAIR(i, 2, 3))"),
    "weights of another channel": ("run.c", "task * panel + (narrow ? i ^ c : i)", "task * panel + i"),
    "pixels that are none were written": ("narrow_groups.h", "if (row + i < count) \\", "if (1) \\"),
    "channels of the first group": ("grouped.h", "panel / together * step", "0 * panel"),
    "panels of two groups": ("grouped.h", "c->c_out / c->groups % PANEL == 0", "group_size(c) % PANEL == 0"),
    "channels behind the last group": ("grouped.h", "least(step, c->c_in - channel)", "step"),
    "copied rows of another panel": (
        "grouped.h",
        "copy_rows(c, image, begin, end, channel,",
        "copy_rows(c, image, begin, end, 0,",
    ),
    "dropped ragged end of narrow groups": ("grouped.h", "channel + WIDTH <= out->c_out", "1"),
    "weights of the next tap": ("depthwise.h", "load(w + j * p->w_tap)", "load(w + (j ? j - 1 : j) * p->w_tap)"),
    "column of the next row": ("depthwise.h", "(uint64_t)column >= (uint64_t)columns", "column < 0 * columns"),
    "row of taps below the image": (
        "depthwise.h",
        "least(c->kernel_h, blocks(c->in_h - top, c->dilation_h))",
        "c->kernel_h",
    ),
    "row of taps above the image": ("depthwise.h", "top < 0 ? blocks(-top, c->dilation_h) : 0", "0"),
    "channels of another vector": ("depthwise.h", "least(k, channels - WIDTH)", "k"),
    "channels of another task": ("depthwise.h", "lane = first - at;", "lane = 0 * (first - at);"),
    "pixels behind the row": (
        "depthwise.h",
        "p.count = is_known ? least(size, rest) : 1",
        "p.count = is_known ? size : 1",
    ),
    "dropped activation of depthwise": ("depthwise.h", "activate_rows(&out, p.row, p.count, first, end);", ""),
    "ReLU before the residual": ("depthwise.h", "out->quick && !adds", "out->quick"),
    "nothing added behind depthwise": ("depthwise.h", "out->last ? v + out->last[begin + k] : v", "v"),
    "weights of missing channels": (
        "run.c",
        "to += step)\n            for",
        "to += panel + 0 * step)\n            for",
    ),
    "lost padding on the right": (
        "direct.h",
        "memset(copy + right * step, 0, sizeof(float) * (width - right) * step);",
        "",
    ),
    "dropped sign": ("winograd.h", "(p[4 + j] - p[8 + j]) - p[12 + j]", "(p[4 + j] - p[8 + j]) + p[12 + j]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_catches_a_planted_bug(bug, tmp_path):
    planted = _planted(tmp_path, *BUGS[bug])
    library = _compile(tmp_path, planted, 8, 6, "-march=native", "-O0")  # compiles in a third of the time
    # A thread that does not wait may be late by chance, above all on a busy machine.
    assert any(_drive(library, 0, 400, seed=seed).returncode != 0 for seed in range(8))


@pytest.mark.slow
def test_planted_bugs_are_all_that_is_wrong(tmp_path):
    done = _drive(_compile(tmp_path, SOURCES, 8, 6, "-march=native"), 0, 400)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
