"""Drives the compiled CPU kernels without PyTorch: python drive_cpu_kernels.py LIBRARY NUMBER EXAMPLES SEED [huge].

Random geometries on small integers, whose sums are exact, against NumPy's int64. Every buffer ends, or begins, at a page that
can't be touched, outputs and scratch memory are full of NaN, and an address sanitizer may be loaded beforehand. It ends at the
first difference. `huge` adds images of more than 2**31 elements, of which only a few pages exist. A library with a function
`threads_of_its_own` runs on its threads, else on libgomp's.
"""

import ctypes
import mmap
import random
import re
import sys
from pathlib import Path

import drive_cpu_layers
import numpy as np

SOURCES = Path(__file__).parents[2] / "resnet_kernels" / "kernels" / "cpu"
PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
READ_WRITE, ANONYMOUS, NO_RESERVE = 3, 0x22, 0x4000

# Of the structure's fields; all others are pointers.
TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}


def _structure():
    """The structure Convolution, with its fields as convolution.h has them."""
    text = (SOURCES / "convolution.h").read_text()
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    body = re.search(r"typedef struct \{(.*?)\} Convolution;", text, re.S).group(1)
    fields = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.match(r"(const float|float|double|int64_t)\s+(.*)", declaration, re.S).groups()
        for name in re.split(r"\s*,\s*", names):
            fields.append((name.strip(" *"), TYPES.get(kind, ctypes.c_void_p)))
    return type("Convolution", (ctypes.Structure,), {"_fields_": fields})


Convolution = _structure()
DIRECT, WINOGRAD, GROUPED, DEPTHWISE = range(4)


class Buffer:
    """Floats between two pages that can't be touched, right at one of them."""

    def __init__(self, values, at_end):
        values = np.ascontiguousarray(values, np.float32)
        size = -(-max(values.nbytes, 1) // PAGE) * PAGE
        self.size = size + 2 * PAGE
        self.base = LIBC.mmap(None, self.size, READ_WRITE, ANONYMOUS, -1, 0)
        assert self.base not in (None, 2**64 - 1), "no memory"
        for guard in (self.base, self.base + PAGE + size):
            assert LIBC.mprotect(guard, PAGE, 0) == 0
        self.address = self.base + PAGE + (size - values.nbytes if at_end else 0)
        self.array = np.frombuffer((ctypes.c_float * values.size).from_address(self.address), np.float32)
        self.array[...] = values.ravel()

    def __del__(self):
        LIBC.munmap(self.base, self.size)


class Plain:
    """Floats from malloc, whose ends an address sanitizer watches."""

    def __init__(self, values, at_end):
        self.array = np.array(values, np.float32).ravel()
        self.address = self.array.ctypes.data


def reference(
    x, weight, stride, dilation, padding, scale, bias, residual, last, slopes, pre, pool, adds_last=False
):  # fmt: skip
    """The convolution in int64; x is (N, H, W, C), weight (O, C of a group, kernel_h, kernel_w)."""
    x = x.astype(np.int64)
    if pre is not None:
        x = x * pre[0].astype(np.int64) + pre[1].astype(np.int64)
        x = np.maximum(x, 0) if pre[2] else x
    top, bottom, left, right = padding
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    kernel_h, kernel_w = weight.shape[2:]
    out_h = (x.shape[1] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    out_w = (x.shape[2] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    y = np.zeros((x.shape[0], out_h, out_w, weight.shape[0]), np.int64)
    for i in range(kernel_h):
        for j in range(kernel_w):
            h, w = i * dilation[0], j * dilation[1]
            rows = x[
                :, h : h + (out_h - 1) * stride[0] + 1 : stride[0], w : w + (out_w - 1) * stride[1] + 1 : stride[1]
            ]
            groups = x.shape[3] // weight.shape[1]
            parts = zip(np.split(rows, groups, 3), np.split(weight[:, :, i, j].astype(np.int64), groups))
            y += np.concatenate([values @ taps.T for values, taps in parts], 3)
    y = y if scale is None else y * scale.astype(np.int64)
    y = y if bias is None else y + bias.astype(np.int64)
    residual = 0 if residual is None else residual.astype(np.int64)
    y = drive_cpu_layers.activated(y if adds_last else y + residual, last, np.int64(slopes))
    y = y + residual if adds_last else y
    if pool is None:
        return y
    kernel, step, pad = pool
    low = np.iinfo(np.int64).min
    y = np.pad(y, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=low)
    pooled_h, pooled_w = ((size - kernel) // step + 1 for size in y.shape[1:3])
    windows = [
        y[:, i : i + (pooled_h - 1) * step + 1 : step, j : j + (pooled_w - 1) * step + 1 : step]
        for i in range(kernel)
        for j in range(kernel)
    ]
    return np.max(windows, 0)


class Driver:
    """The library with one of its instruction sets. make: the kind of buffers."""

    def __init__(self, path, number, make=Buffer):
        self.calls, self.number, self.make = ctypes.CDLL(path), number, make
        self.structure = Convolution
        size, pointer = ctypes.c_int64, ctypes.c_void_p
        for name in ("rk_panel", "rk_pack", "rk_scratch", "rk_tasks", "rk_phase"):
            getattr(self.calls, name).restype = size
        self.calls.rk_panel.argtypes = [size]
        self.calls.rk_scratch.argtypes = self.calls.rk_tasks.argtypes = [size, size, pointer]
        self.calls.rk_run.argtypes = [size, pointer, size, size, pointer, pointer, size, pointer, pointer, size]
        self.calls.rk_convolve.argtypes = [size, size, pointer, size, pointer, pointer, size]
        self.calls.rk_pack.argtypes = [size, size, pointer, pointer, pointer, pointer, size, pointer]
        self.panel = self.calls.rk_panel(number)
        assert self.panel > 0, f"this processor can't run kernels number {number}"
        self.parallel = None
        for library, name in ((path, "threads_of_its_own"), ("libgomp.so.1", "GOMP_parallel")):
            try:
                self.parallel = ctypes.cast(getattr(ctypes.CDLL(library), name), pointer)
                break
            except (OSError, AttributeError):
                continue

    def pack(self, weight, kind, at_end=True):
        """The packed weight in a buffer, and whether it was refused."""
        planes = 16 if kind == WINOGRAD else weight.shape[2] * weight.shape[3]
        size = planes * -(-weight.shape[0] // self.panel) * weight.shape[1] * self.panel
        source, packed = self.make(weight, at_end), self.make(np.full(size, np.nan), at_end)
        four = ctypes.c_int64 * 4
        strides = four(*(stride // weight.itemsize for stride in np.ascontiguousarray(weight).strides))
        refused = self.calls.rk_pack(
            self.number, kind, source.address, four(*weight.shape), strides, packed.address, 1, None
        )
        return packed, refused

    def convolve(self, kind, threads, buffers, **sizes):
        """Runs a layer; kind: its number in convolution.h; buffers by the names of the structure's pointers."""
        arguments = Convolution(**sizes, **{name: buffer.address for name, buffer in buffers.items()})
        each = self.calls.rk_scratch(self.number, kind, ctypes.byref(arguments))
        each += each % 2  # pointers are at its beginning
        scratch = self.make(np.full(each * threads, np.nan), True)
        self.calls.rk_convolve(
            self.number, kind, ctypes.byref(arguments), threads, self.parallel, scratch.address, each
        )


def example(driver, draw):
    """One random convolution; returns its description if it is wrong."""

    def integers(*shape, most=3):
        return np.array([draw.randint(-most, most) for _ in range(int(np.prod(shape)))], np.float32).reshape(shape)

    kind = draw.choice((DIRECT, DIRECT, WINOGRAD, WINOGRAD, GROUPED, DEPTHWISE))
    winograd = kind == WINOGRAD
    copies = kind == GROUPED or (kind == DIRECT and draw.random() < 0.5)
    n, c_in = draw.choice((1, 2, 3)), draw.choice((1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 33, 300))
    c_out = draw.choice((1, 5, 8, 15, 16, 17, 31, 32, 33, 40, 70))
    groups, together = 1, 1
    if kind == GROUPED:
        vector = driver.panel // 2
        width = draw.choice([*(size for size in (2, 4, 8, 16) if size <= vector), driver.panel, 2 * driver.panel])
        out = width
        if draw.random() < 0.3:  # more output channels, or fewer
            width, out = draw.choice((vector, vector + 1, 2 * vector + 3)), draw.choice((1, 2, 3)) * driver.panel
        groups, together = draw.randint(1, 9 if width <= vector else 3), max(1, out // driver.panel)
        c_in, c_out = width * groups, out * groups
    if kind == DEPTHWISE:
        groups = c_out = c_in = draw.choice((2, 3, 4, 5, 8, 9, 15, 16, 20, 24, 33, 70))
    height, width = draw.randint(1, 9), draw.randint(1, 9) if kind != DEPTHWISE else draw.randint(1, 20)
    kernel, stride, dilation = (3, 3), (1, 1), (1, 1)
    if not winograd:
        kernel = draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 3, 5))
        stride = draw.choice((1, 2, 3)), draw.choice((1, 2, 3))
        dilation = draw.choice((1, 1, 2)), draw.choice((1, 1, 2))
    padding = tuple(draw.randint(0, 2) for _ in range(4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    if height + padding[0] + padding[1] < reach[0] or width + padding[2] + padding[3] < reach[1]:
        return None
    out_h = (height + padding[0] + padding[1] - reach[0]) // stride[0] + 1
    out_w = (width + padding[2] + padding[3] - reach[1]) // stride[1] + 1
    most = 1 if c_in == 300 else 2
    x = integers(n, height, width, c_in, most=most)
    last, factor = drive_cpu_layers.any_activation(draw)
    # The transform divides by four.
    weight = integers(c_out, c_in // groups, *kernel, most=most) * (4 if winograd else 1) * factor
    scale, bias, residual = (
        integers(*shape) if draw.random() < 0.5 else None for shape in ((c_out,), (c_out,), (n, out_h, out_w, c_out))
    )
    bias, residual = (None if values is None else factor * values for values in (bias, residual))
    pre, pool = None, None
    adds_last = residual is not None and draw.random() < 0.3
    if (winograd or copies) and draw.random() < 0.4:
        pre = integers(c_in, most=2), integers(c_in, most=2), draw.random() < 0.5
    shape = (n, out_h, out_w, c_out)
    sizes = dict(
        batch=n, c_in=c_in, in_h=height, in_w=width, c_out=c_out, out_h=out_h, out_w=out_w,
        kernel_h=kernel[0], kernel_w=kernel[1], stride_h=stride[0], stride_w=stride[1],
        dilation_h=dilation[0], dilation_w=dilation[1], pad_top=padding[0], pad_left=padding[2],
        block=draw.randint(1, 14), panels=draw.randint(1, 5) * together, copies=copies,
        activation=last, slope=drive_cpu_layers.SLOPE,
        pre_relu=pre is not None and pre[2], adds_last=adds_last, groups=groups,
    )  # fmt: skip
    if copies and kind == DIRECT and residual is None and min(out_h, out_w) > 2 and draw.random() < 0.5:
        pool = draw.choice(((2, 1, 0), (2, 2, 1), (3, 2, 1), (3, 1, 1)))
        pooled = [(size + 2 * pool[2] - pool[0]) // pool[1] + 1 for size in (out_h, out_w)]
        sizes.update(
            pool_h=pooled[0], pool_w=pooled[1], pool_kernel=pool[0], pool_stride=pool[1], pool_top=pool[2], pool_left=pool[2]
        )  # fmt: skip
        shape = (n, *pooled, c_out)
    at_end = draw.random() < 0.7
    packed, refused = driver.pack(weight, kind, at_end)
    assert not refused, "a weight of small integers was refused"
    # An image that is copied may be NCHW.
    planar = copies and draw.random() < 0.5
    order = x.transpose(0, 3, 1, 2) if planar else x
    strides = (height * width, width, 1) if planar else (1, width * c_in, c_in)
    sizes.update(x_image=height * width * c_in, x_channel=strides[0], x_row=strides[1], x_column=strides[2])
    buffers = {"x": driver.make(order, at_end), "weight": packed, "y": driver.make(np.full(shape, np.nan), at_end)}
    for name, values in (("scale", scale), ("bias", bias), ("residual", residual)):
        if values is not None:
            buffers[name] = driver.make(values, at_end)
    if residual is not None and not adds_last and draw.random() < 0.5:
        buffers["y"] = buffers["residual"]
    if pre is not None:
        buffers["pre_scale"], buffers["pre_shift"] = (driver.make(v, at_end) for v in pre[:2])
    slopes, more = drive_cpu_layers.slopes_of(driver, draw, last, c_out, at_end)
    driver.convolve(kind, draw.choice((1, 1, 2, 3)), buffers | more, **sizes)
    truth = reference(x, weight, stride, dilation, padding, scale, bias, residual, last, slopes, pre, pool, adds_last)
    if np.array_equal(buffers["y"].array.reshape(shape), truth):
        return None
    return f"kind={kind} pool={pool} pre={pre is not None} {sizes}"


def huge(driver):
    """Convolutions of the last pixels of an image of more than 2**31 elements, of which only a few pages exist."""
    height, width, c_in = 4, 2**20, 520
    size = 4 * height * width * c_in
    base = LIBC.mmap(None, size, READ_WRITE, ANONYMOUS | NO_RESERVE, -1, 0)
    if base in (None, 2**64 - 1):
        print("huge: left out, the system reserves memory for mappings")
        return
    draw = random.Random(0)
    pixels = np.frombuffer((ctypes.c_float * (size // 4)).from_address(base), np.float32)
    pixels = pixels.reshape(height, width, c_in)
    last = pixels[:, -4:]
    last[...] = np.array([draw.randint(-1, 1) for _ in range(last.size)]).reshape(last.shape)
    for kind, copies, c_out, groups in (
        (WINOGRAD, 0, 9, 1),
        (DIRECT, 0, 9, 1),
        (DIRECT, 1, 9, 1),
        (GROUPED, 1, c_in, 65),
        (DEPTHWISE, 0, c_in, c_in),
    ):
        shape = c_out, c_in // groups, 3, 3
        weight = np.array([4 * draw.randint(-1, 1) for _ in range(int(np.prod(shape)))], np.float32).reshape(shape)
        packed, _ = driver.pack(weight, kind)
        y = driver.make(np.full((2, 2, c_out), np.nan), True)
        x = type("Address", (), {"address": base})
        driver.convolve(
            kind, 1, {"x": x, "weight": packed, "y": y},
            batch=1, c_in=c_in, in_h=height, in_w=width, c_out=c_out, out_h=2, out_w=2, kernel_h=3, kernel_w=3,
            stride_h=1, stride_w=1, dilation_h=1, dilation_w=1, pad_top=0, pad_left=4 - width, block=2, panels=1,
            copies=copies, x_image=height * width * c_in, x_channel=1, x_row=width * c_in, x_column=c_in,
            groups=groups,
        )  # fmt: skip
        truth = reference(last[None], weight, (1, 1), (1, 1), (0, 0, 0, 0), None, None, None, 0, 0, None, None)
        assert np.array_equal(y.array.reshape(truth.shape), truth), f"huge: kind={kind} copies={copies}"
    LIBC.munmap(base, size)


def main():
    path, number, examples, seed, *more = sys.argv[1:]
    driver = Driver(path, int(number), Plain if "plain" in more else Buffer)
    for i in range(int(examples)):
        draw = random.Random(f"{seed} {i}")
        for run in (example, *drive_cpu_layers.EXAMPLES):
            wrong = run(driver, draw)
            if wrong:
                sys.exit(f"example {i} is wrong: {wrong}")
    if "huge" in more:
        huge(driver)
    print(f"{examples} examples right")


if __name__ == "__main__":
    main()
