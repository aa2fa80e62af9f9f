"""Results files as `pytest benchmarks --benchmark-json` writes them, with made-up times: for tests of what reads them."""

import json
import random

STAGES = (("layer1", 3, 64, 56), ("layer2", 4, 128, 28), ("layer3", 6, 256, 14), ("layer4", 3, 512, 7))
PEERS = ("eager", "compile", "compile-max", "eager-graph", "compile-graph", "jax", "onnxruntime")
SPEEDS = {"eager": 1.0, "fused": 1.5, "triton": 1.62, "fused-graph": 1.7, "compile": 1.35, "compile-max": 1.55,
          "eager-graph": 1.1, "compile-graph": 1.4, "jax": 1.2, "onnxruntime": 1.3}  # fmt: skip
OURS = ("fused", "triton", "fused-graph")


def benchmark(
    contender="fused",
    seconds=0.01,
    *,
    level="model",
    subject="resnet50",
    direction="forward",
    size=224,
    batch=8,
    dtype="float32",
    device="cpu (AVX512)",
    rounds=20,
    noise=0.01,
    seed=0,
    kernels=None,
    **more,
):
    """One entry. Rounds share the machine's drift, drawn from `seed`; each contender has noise of its own on top."""
    platform = device.split()[0]
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    case = f"{level}-{direction}-{subject}-{size}px-b{batch}-{short}-{platform}"
    drift, own = random.Random(f"{case} {seed}"), random.Random(f"{case} {contender} {seed}")
    data = [seconds * (1 + 5 * noise * drift.random()) * (1 + noise * own.random()) for _ in range(rounds)]
    info = {
        "schema": 1, "case": case, "system": "torchvision", "level": level, "subject": subject, "direction": direction,
        "dtype": dtype, "batch": batch, "image_size": size, "contender": contender, "label": contender,
        "ours": contender in OURS, "settings": "", "version": "", "device": device, "device_type": platform, "driver": None,
        "torch": "2.13.0", "triton": "3.9.0", "threads": 2, "tf32": False, "parity_error": 2e-7, "parity_budget": 4.8e-7,
        "parity_failure": "", "gflop": 8.2 * batch, "hbm_gb": 0.2 * batch,
        "ceilings": {"tflop_per_s": 0.4, "gb_per_s": 20.0, "source": "measured here: a matmul, a copy"},
    }  # fmt: skip
    if kernels:
        info["kernels"] = kernels
    info.update(more)
    median = sorted(data)[len(data) // 2]
    stats = {"median": median, "min": min(data), "max": max(data), "rounds": rounds, "data": data}
    return {"group": case, "params": {"contender": contender}, "stats": stats, "extra_info": info}


def document(benchmarks, absent=()):
    """A whole file's contents."""
    return {
        "machine_info": {"cpu": {"brand_raw": "Some CPU"}},
        "commit_info": {"id": "0123456789abcdef"},
        "benchmarks": list(benchmarks),
        "datetime": "2026-11-22T06:20:49+00:00",
        "version": "5.3.1",
        "absent": list(absent),
    }


def write(path, contents):
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return path


def kernels_of_resnet50(contender, batch=8, flops_per_s=2e11, training=False):
    """Kernels as a profile has them: a step's path where it is fused, a module's in eager, none where it is compiled."""
    found, chance = [], random.Random(0)
    apart = contender == "eager" or (training and contender == "fused")

    def add(path, kind, flops, moved, times=1):
        seconds = times * max(flops / flops_per_s, moved / (flops_per_s / 20), 1e-6) * (1 + 0.5 * chance.random())
        path = "" if contender == "compile" else path
        found.append(
            {"path": path, "name": f"{kind}_kernel", "kind": kind, "seconds": seconds, "flops": flops or None,
             "hbm_bytes": moved}
        )  # fmt: skip

    def convolution(stem, number, c_in, c_out, pixels, taps=1, add_relu=False):
        flops, y = 2 * batch * c_in * c_out * pixels * taps, 4 * batch * c_out * pixels
        moved = 4 * batch * c_in * pixels + y + 4 * c_in * c_out * taps
        if not apart and contender == "fused":
            tail = "add+relu" if add_relu else "relu"
            add(f"{stem}conv{number}+bn{number}+{tail}", "conv", flops, moved + (y if add_relu else 0))
            return
        add(f"{stem}conv{number}", "conv", flops, moved)
        add(f"{stem}bn{number}", "bn", 0, 2 * y)
        if apart:
            add(f"{stem}relu", "rest", 0, 3 * y if add_relu else 2 * y)
        if training:
            add(f"{stem}conv{number}", "conv", flops, moved, times=2)
            add(f"{stem}bn{number}", "bn", 0, 4 * y)
            add(f"{stem}relu", "rest", 0, 3 * y)

    convolution("", 1, 3, 64, 112 * 112, 49)
    add("maxpool", "rest", 0, 5 * batch * 64 * 112 * 112)
    before = 64
    for stage, blocks, width, size in STAGES:
        for block in range(blocks):
            path, pixels = f"{stage}.{block}.", size * size
            convolution(path, 1, before, width, pixels)
            convolution(path, 2, width, width, pixels, 9)
            convolution(path, 3, width, 4 * width, pixels, add_relu=True)
            before = 4 * width
    add("avgpool", "rest", 0, 4 * batch * 2048 * 49)
    add("fc", "rest", 2 * batch * 2048 * 1000, 4 * 2048 * 1000)
    return found


def few():
    """A CPU's small file: one network, two batches, three contenders, profiles at batch 8."""
    found = []
    for direction, training in (("forward", False), ("forward-backward", True)):
        for batch in (1, 8):
            for contender, speed in (("eager", 1.0), ("fused", 1.36 if batch == 8 else 0.98), ("compile", 1.3)):
                if training and contender == "compile":
                    continue
                speed = 1.0 if training and contender == "fused" else speed
                kernels = kernels_of_resnet50(contender, batch, training=training) if batch == 8 else None
                seconds = (3 if training else 1) * 0.045 * batch / speed
                found.append(benchmark(contender, seconds, batch=batch, direction=direction, kernels=kernels))
    return document(found, [{"contender": "jax", "reason": "not importable here: No module named 'jax'", "cases": []}])


def many():
    """A GPU's whole run: every level, both directions, three dtypes, up to five batches, ten contenders."""
    found, chance = [], random.Random(1)
    gpu = {
        "device": "cuda (Some GPU)",
        "ceilings": {"tflop_per_s": 700.0, "gb_per_s": 4000.0, "source": "measured here"},
    }
    networks = (("resnet18", "torchvision", 224), ("resnet50", "torchvision", 224), ("resnet_v2_50", "slim", 224),
                ("d2l_resnet18", "d2l", 96), ("d2l_resnet18_keras", "d2l-keras", 28))  # fmt: skip
    for subject, system, size in networks:
        for direction in ("forward", "forward-backward"):
            for dtype in ("float32", "bfloat16"):
                for batch in (1, 8, 32, 256) if subject == "resnet50" else (1, 16):
                    for contender, speed in SPEEDS.items():
                        seconds = (0.0008 + batch / 20000) / (speed * (0.8 + 0.5 * chance.random()))
                        where = {"level": "model", "size": size, "direction": direction, "system": system}
                        kernels = None
                        if subject == "resnet50" and batch == 256 and contender in ("eager", "compile", "fused"):
                            kernels = kernels_of_resnet50(contender, batch, 4e14, direction != "forward")
                        found.append(
                            benchmark(contender, seconds, subject=subject, batch=batch, dtype=dtype, kernels=kernels,
                                      **where, **gpu)
                        )  # fmt: skip
    subjects = [("op", f"{kind}_{c}") for kind in ("3x3", "1x1", "add_relu", "batch_norm_relu") for c in (64, 128, 256)]
    subjects += [("block", f"{kind}_{c}") for kind in ("basic", "bottleneck", "residual", "preact") for c in (64, 256)]
    for level, subject in subjects:
        for direction in ("forward", "forward-backward"):
            for contender in ("eager", "fused", "triton", "compile"):
                seconds = 0.0002 / (SPEEDS[contender] * (0.5 + chance.random()))
                where = {"level": level, "subject": subject, "size": 56, "direction": direction, "dtype": "bfloat16"}
                found.append(benchmark(contender, seconds, batch=16, **where, **gpu))
    return document(found)
