"""Random layers for drive_cpu_kernels.py: those that are no convolutions, and programs of several layers.

Each example takes the driver and a random.Random, and returns its description if it is wrong.
"""

import ctypes
import math

import numpy as np

DIRECT, ELEMENTWISE, GATE, MAX_POOL, AVERAGE_POOL = 0, 4, 5, 6, 7
CHANNELS = (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 70, 139)


def integers(draw, *shape, most=3):
    return np.array([draw.randint(-most, most) for _ in range(math.prod(shape))], np.float32).reshape(shape)


def is_equal(found, truth):
    return np.array_equal(found.reshape(truth.shape), truth, equal_nan=True)


# Activations that leave integers integers, by convolution.h's numbers, and the slope of the last one.
ACTIVATIONS, SLOPE = (0, 1, 2, 3), -2
# The one with a slope a channel; and one that runs over stored rows, which leaves multiples of three integers.
PRELU, HARDSWISH = 10, 7


def any_activation(draw):
    """An activation, and a factor: behind the multiples of it results are exact."""
    found = draw.choice((*ACTIVATIONS, 1, PRELU, HARDSWISH, HARDSWISH))
    return found, 3 if found == HARDSWISH else 1


def activated(y, activation, slopes=SLOPE):
    """NaN stays. slopes: one for all channels, or of PRELU one each."""
    if activation in (1, 2):
        return np.clip(y, 0, 6) if activation == 2 else np.maximum(y, 0)
    if activation == HARDSWISH:
        return y * np.clip(y + 3, 0, 6) / 6
    return np.where(y > 0, y, slopes * y) if activation in (3, PRELU) else y


def slopes_of(driver, draw, activation, channels, at_end):
    """Slopes for `activated`, and the buffer of them that PRELU has."""
    if activation != PRELU:
        return SLOPE, {}
    slopes = integers(draw, channels)
    return slopes, {"slopes": driver.make(slopes, at_end)}


def finished(x, scale, bias, residual, activation, slopes=SLOPE, adds_last=False):
    """act(x * scale + bias + residual), or act(x * scale + bias) + residual."""
    y = x if scale is None else x * scale
    y = y if bias is None else y + bias
    residual = 0 if residual is None else residual
    return activated(y, activation, slopes) + residual if adds_last else activated(y + residual, activation, slopes)


def windows(x, kernel, stride, padding, size):
    """For each pooled pixel of (N, H, W, C) in turn: its place, and the pixels inside the image below it."""
    for h in range(size[0]):
        for w in range(size[1]):
            top, left = h * stride - padding[0], w * stride - padding[2]
            yield (h, w), x[:, max(0, top) : top + kernel, max(0, left) : left + kernel]


def elementwise(driver, draw):
    """Images with NaN among them, which no ReLU may take away."""
    n, height, width, channels = draw.randint(1, 3), draw.randint(1, 5), draw.randint(1, 5), draw.choice(CHANNELS)
    activation, factor = any_activation(draw)
    x = factor * integers(draw, n, height, width, channels)
    x.ravel()[[draw.randrange(x.size) for _ in range(draw.randint(0, 3))]] = np.nan
    scale, bias, residual = (
        integers(draw, *shape) if draw.random() < 0.5 else None for shape in ((channels,), (channels,), x.shape)
    )
    bias, residual = (None if values is None else factor * values for values in (bias, residual))
    sizes = dict(
        batch=n, c_in=channels, c_out=channels, out_h=height, out_w=width, block=draw.randint(1, 8),
        activation=activation, slope=SLOPE, adds_last=residual is not None and draw.random() < 0.3,
    )  # fmt: skip
    at_end = draw.random() < 0.7
    buffers = {"x": driver.make(x, at_end), "y": driver.make(np.full(x.shape, np.nan), at_end)}
    for name, values in (("scale", scale), ("bias", bias), ("residual", residual)):
        if values is not None:
            buffers[name] = driver.make(values, at_end)
    if residual is not None and not sizes["adds_last"] and draw.random() < 0.5:
        buffers["y"] = buffers["residual"]
    slopes, more = slopes_of(driver, draw, sizes["activation"], channels, at_end)
    driver.convolve(ELEMENTWISE, draw.choice((1, 1, 1, 2)), buffers | more, **sizes)
    truth = finished(x, scale, bias, residual, sizes["activation"], slopes, sizes["adds_last"])
    return None if is_equal(buffers["y"].array, truth) else f"elementwise {[*buffers]} {sizes}"


def pool(driver, draw):
    """Windows over all four edges; no pixel outside counts."""
    average, n, channels = draw.random() < 0.5, draw.randint(1, 3), draw.choice(CHANNELS)
    height, width, kernel, stride = draw.randint(1, 9), draw.randint(1, 9), draw.randint(1, 4), draw.randint(1, 4)
    # A window further outside would lie in the padding alone.
    padding = tuple(draw.randint(0, kernel - 1) for _ in range(4))
    size = [(height + sum(padding[:2]) - kernel) // stride + 1, (width + sum(padding[2:]) - kernel) // stride + 1]
    if draw.random() < 0.2:
        kernel, stride, padding, size = max(height, width), 1, (0, 0, 0, 0), [1, 1]
    if min(size) < 1:
        return None
    x = integers(draw, n, height, width, channels, most=9)
    if average:  # a multiple of each window's number of pixels
        x *= math.lcm(*range(1, min(kernel, height) + 1)) * math.lcm(*range(1, min(kernel, width) + 1))
    x.ravel()[[draw.randrange(x.size) for _ in range(draw.randint(0, 3))]] = np.nan
    truth = np.empty((n, *size, channels), np.float32)
    for (h, w), pixels in windows(x, kernel, stride, padding, size):
        truth[:, h, w] = pixels.mean((1, 2), np.float64) if average else pixels.max((1, 2))
    sizes = dict(
        batch=n, c_in=channels, in_h=height, in_w=width, c_out=channels, block=draw.randint(1, 4),
        pool_h=size[0], pool_w=size[1], pool_kernel=kernel, pool_stride=stride, pool_top=padding[0], pool_left=padding[2],
        panels=draw.choice((0, 0, 1, 2)),
    )  # fmt: skip
    at_end = draw.random() < 0.7
    buffers = {"x": driver.make(x, at_end), "y": driver.make(np.full(truth.shape, np.nan), at_end)}
    driver.convolve(AVERAGE_POOL if average else MAX_POOL, draw.choice((1, 1, 1, 2)), buffers, **sizes)
    return None if is_equal(buffers["y"].array, truth) else f"average={average} {padding} {sizes}"


# Gates by the kernels' numbers. Where the arguments are odd multiples of three, the results are exact.
GATES = {0: lambda s: s, 9: lambda s: np.clip(s + 3, 0, 6) / 6, 8: lambda s: 1 / (1 + np.exp(-s, dtype=np.float64))}


def gate(driver, draw):
    """Images times a number a channel, and what follows; NaN among all. A sigmoid's results are rounded."""
    n, height, width, channels = draw.randint(1, 3), draw.randint(1, 5), draw.randint(1, 5), draw.choice(CHANNELS)
    x, gates, kind = integers(draw, n, height, width, channels), integers(draw, n, channels), draw.choice([*GATES])
    activation, factor = any_activation(draw)
    x *= 2 * factor
    gates *= 3 if kind == 9 else 1
    residual = factor * integers(draw, *x.shape) if draw.random() < 0.5 else None
    for values in (x, gates):
        values.ravel()[[draw.randrange(values.size) for _ in range(draw.randint(0, 2))]] = np.nan
    sizes = dict(
        batch=n, c_in=channels, c_out=channels, out_h=height, out_w=width, block=draw.randint(1, 30), gate=kind,
        activation=activation, slope=SLOPE,
    )  # fmt: skip
    at_end = draw.random() < 0.7
    buffers = {"x": driver.make(x, at_end), "gates": driver.make(gates, at_end)}
    buffers["y"] = driver.make(np.full(x.shape, np.nan), at_end)
    if residual is not None:
        buffers["residual"] = driver.make(residual, at_end)
        buffers["y"] = buffers["residual"] if draw.random() < 0.5 else buffers["y"]
    slopes, more = slopes_of(driver, draw, sizes["activation"], channels, at_end)
    driver.convolve(GATE, draw.choice((1, 1, 1, 2)), buffers | more, **sizes)
    truth = finished(x * GATES[kind](gates)[:, None, None], None, None, residual, sizes["activation"], slopes)
    found = buffers["y"].array.reshape(truth.shape)
    right = np.allclose(found, truth, rtol=1e-6, atol=1e-5, equal_nan=True) if kind == 8 else is_equal(found, truth)
    return None if right else f"gate {kind} {sizes}"


def program(driver, draw):
    """Layers over four slots of memory, each of which waits for those that use its operands' slots, and for no other one."""
    structure = driver.structure
    place = type("Place", (ctypes.Structure,), {"_fields_": [("base", ctypes.c_int64), ("at", ctypes.c_int64)]})
    fields = [(name, ctypes.c_int64) for name in ("kind", "needs", "tasks")]
    fields += [(name, place) for name in ("x", "residual", "gates", "y")] + [("convolution", structure)]
    n, size, channels, count = draw.randint(1, 3), draw.randint(1, 6), draw.choice(CHANNELS), draw.randint(1, 12)
    layers = (type("Layer", (ctypes.Structure,), {"_fields_": fields}) * count)()
    shape = (n, size, size, channels)
    floats, values = math.prod(shape), {-1: integers(draw, n, size, size, channels)}
    used, written = {slot: 0 for slot in range(-1, 5)}, {slot: 0 for slot in range(-1, 5)}  # by how many first layers
    scale = driver.make([-1.0] * channels, True)
    order = draw.sample(range(channels), channels)
    packed, _ = driver.pack(np.eye(channels, dtype=np.float32)[order].reshape(channels, channels, 1, 1), DIRECT)
    bases = [driver.make(values[-1], True)]
    bases += [driver.make(np.full(many, np.nan), True) for many in (4 * floats, floats)]
    places = {slot: place(1, slot * floats) for slot in range(4)} | {
        -1: place(0, 0),
        4: place(2, 0),
        None: place(-1, 0),
    }
    told, each = [], 0
    for i, layer in enumerate(layers):
        kind, x = draw.choice((DIRECT, ELEMENTWISE, MAX_POOL)), draw.choice([*values])
        last = draw.choice((0, 0, 0, 0, 1, 1, 2, 3))
        residual = draw.choice([None, *(slot for slot in values if slot != x)]) if kind == ELEMENTWISE else None
        y = draw.choice([slot for slot in range(4) if slot != x and (slot != residual or draw.random() < 0.5)])
        y = 4 if i + 1 == count else y
        sizes = dict(
            batch=n, c_in=channels, in_h=size, in_w=size, c_out=channels, out_h=size, out_w=size,
            kernel_h=1, kernel_w=1, stride_h=1, stride_w=1, dilation_h=1, dilation_w=1,
            block=draw.randint(1, 4), panels=1, activation=last, slope=SLOPE,
        )  # fmt: skip
        if kind == MAX_POOL:
            sizes |= dict(pool_h=size, pool_w=size, pool_kernel=3, pool_stride=1, pool_top=1, pool_left=1)
            value = np.empty(shape, np.float32)
            for (h, w), pixels in windows(values[x], 3, 1, (1, 1, 1, 1), (size, size)):
                value[:, h, w] = pixels.max((1, 2))
        elif kind == ELEMENTWISE:
            sizes["scale"] = scale.address
            value = finished(-values[x], None, None, values.get(residual), last)
        else:
            sizes["weight"] = packed.address
            value = activated(values[x][..., order], last)
        layer.convolution = structure(**sizes)
        layer.kind, layer.x, layer.residual, layer.y = kind, places[x], places[residual], places[y]
        layer.gates = places[None]
        layer.tasks = driver.calls.rk_tasks(driver.number, kind, ctypes.byref(layer.convolution))
        each = max(each, driver.calls.rk_scratch(driver.number, kind, ctypes.byref(layer.convolution)))
        layer.needs = max(written[x], used[y], 0 if residual is None else written[residual])
        for slot in (x, y, *([] if residual is None else [residual])):
            used[slot] = i + 1
        written[y], values[y] = i + 1, value
        told.append((kind, x, residual, y, layer.needs, layer.tasks))
    values[4] = value
    threads, each = draw.choice((1, 2, 2, 3)), each + each % 2
    phases = driver.make(np.full(driver.calls.rk_phase() // 4 * count, np.nan), False)
    scratch = driver.make(np.full(each * threads, np.nan), True)
    driver.calls.rk_run(
        driver.number, layers, 0, count, (ctypes.c_void_p * 3)(*(base.address for base in bases)), phases.address, threads,
        driver.parallel, scratch.address, each,
    )  # fmt: skip
    # All slots count: a result may be right although somebody wrote too late.
    found = {4: bases[2].array} | dict(enumerate(bases[1].array.reshape(4, floats)))
    wrong = [slot for slot, value in values.items() if slot >= 0 and not is_equal(found[slot], value)]
    return f"program on {threads} threads, {shape}: {told}: slots {wrong}" if wrong else None


EXAMPLES = (elementwise, gate, pool, program)
