"""Reading and checking a results file of `pytest benchmarks --benchmark-json=FILE`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from .results import Absence, CaseResults, Ceilings, Kernel, Measurement, Results, ResultsError

# The newest layout of extra_info that is understood; files without the field are older than it.
SCHEMA = 1
_CASE = re.compile(r"(op|block|model)-(forward-backward|forward)-(.+)-(\d+)px-b(\d+)-(fp32|fp16|bf16)-(cpu|cuda)")


_SYSTEMS = (
    (r"d2l_.*keras", "d2l-keras"),
    (r"d2l_|residual_", "d2l"),
    (r"resnet_v2_|preact_", "slim"),
)


_OURS = ("fused", "triton")  # of files that do not say which contenders are ours


def read(path: Path) -> Results:
    """Returns a results file's contents.

    Raises:
        ResultsError: if it can't be read, is damaged, holds nothing, or is of a schema version that is not known here.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path} is damaged: no UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path} is damaged: {error}" if path.stat().st_size else f"{path} is empty") from error
    if not isinstance(document, dict) or not isinstance(document.get("benchmarks"), list):
        raise ResultsError(f'{path} is not from --benchmark-json: a JSON object with a list "benchmarks" is needed')
    if not document["benchmarks"]:
        raise ResultsError(f"{path} holds no benchmark: the run measured nothing")
    try:
        return _results(path, document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ResultsError):
            raise
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ResultsError(f"{path} is damaged: {what}") from error


def _results(path: Path, document: dict) -> Results:
    devices: dict[str, str] = {}
    versions: dict[str, str] = {}
    entries: dict[str, list[dict]] = {}
    for benchmark in document["benchmarks"]:
        info = benchmark["extra_info"]
        schema = info.get("schema", 0)
        if isinstance(schema, bool) or not isinstance(schema, int) or not 0 <= schema <= SCHEMA:
            raise ResultsError(f"{path} is of schema version {schema!r}, known here are 0 to {SCHEMA}")
        entries.setdefault(benchmark["group"], []).append(benchmark)
        platform, device = _device(info, document)
        if devices.setdefault(platform, device) != device:
            raise ValueError(f"one file from two devices, {device} and {devices[platform]}")
        versions.update(
            (key, str(info[key])) for key in ("torch", "triton", "driver", "cuda", "cudnn") if info.get(key)
        )
    commit = (document.get("commit_info") or {}).get("id") or ""
    absent = tuple(Absence(a["contender"], a["reason"], tuple(a["cases"])) for a in document.get("absent") or ())
    cases = {name: _case(name, benchmarks) for name, benchmarks in entries.items()}
    return Results(path, str(document.get("datetime", ""))[:10], commit[:7], devices, versions, absent, cases)


def _case(name: str, benchmarks: list[dict]) -> CaseResults:
    info = benchmarks[0]["extra_info"]
    measurements = [_measurement(benchmark) for benchmark in benchmarks]
    contenders = {measurement.contender: measurement for measurement in measurements}
    if len(contenders) < len(benchmarks):
        raise ValueError(f"a contender is there twice in {name}")
    if "level" not in info:
        info = {**_fields_of(name), **info}
    # Since schema 1 all contenders of a case take turns. pytest-benchmark's own storage leaves samples out if not told.
    interleaved = info.get("schema", 0) >= 1 and all(measurement.samples for measurement in measurements)
    if interleaved and len({len(measurement.samples) for measurement in measurements}) > 1:
        raise ValueError(f"the contenders of {name} have not the same number of rounds")
    return CaseResults(
        name=name,
        **{key: str(info[key]) for key in ("level", "direction", "system", "subject", "dtype")},
        size=int(info["image_size"]),
        batch=int(info["batch"]),
        platform=_platform(info),
        interleaved=interleaved,
        busy_elsewhere=None
        if info.get("busy_elsewhere") is None
        else _number(info["busy_elsewhere"], "busy_elsewhere"),
        contenders=contenders,
    )


def _fields_of(name: str) -> dict:
    """What a case's name tells, for files without these fields."""
    match = _CASE.fullmatch(name)
    if not match:
        raise ValueError(f"{name!r} is no case of pytest benchmarks")
    level, direction, subject, size, *_ = match.groups()
    system = next((system for pattern, system in _SYSTEMS if re.match(pattern, subject)), "torchvision")
    return {"level": level, "direction": direction, "subject": subject, "image_size": size, "system": system}


def _measurement(benchmark: dict) -> Measurement:
    info, stats, contender = benchmark["extra_info"], benchmark["stats"], benchmark["params"]["contender"]
    ratios = {
        name: info[f"interleaved_ratio_to_{name}"]
        for name in ("eager", "fused")
        if f"interleaved_ratio_to_{name}" in info
    }
    ceilings = info.get("ceilings") or {}
    return Measurement(
        contender=str(contender),
        ours=bool(info.get("ours", contender in _OURS)),
        label=str(info.get("label", contender)),
        settings=str(info.get("settings", "")),
        version=str(info.get("version", "")),
        median=_positive(stats["median"], "a median"),
        samples=tuple(_positive(sample, "a sample") for sample in stats.get("data") or ()),
        ratios={name: _positive(value, "an interleaved ratio") for name, value in ratios.items()},
        parity_error=info.get("parity_error"),
        parity_budget=info.get("parity_budget"),
        parity_failure=info.get("parity_failure") or "",
        roofline_share=_rate(info.get("roofline_share"), 1),
        kernels=tuple(_kernel(kernel) for kernel in info.get("kernels") or ()),
        ceilings=_ceilings(ceilings) if ceilings else None,
    )


def _kernel(kernel: dict) -> Kernel:
    return Kernel(
        path=str(kernel["path"] or ""),
        name=str(kernel["name"]),
        kind=str(kernel["kind"]),
        seconds=_number(kernel["seconds"], "a kernel's seconds"),
        flops=_rate(kernel.get("flops"), 1),
        hbm_bytes=_rate(kernel.get("hbm_bytes"), 1),
    )


def _ceilings(values: dict) -> Ceilings:
    flops, moved = _rate(values.get("tflop_per_s"), 1e12), _rate(values.get("gb_per_s"), 1e9)
    return Ceilings(flops, moved, str(values.get("source") or ""))


def _platform(info: dict) -> str:
    return str(info.get("device_type") or info["device"].split()[0])


def _device(info: dict, document: dict) -> tuple[str, str]:
    """(platform, name); two files are of one machine if the names are the same."""
    platform, device = _platform(info), str(info["device"])
    if platform != "cpu":
        return platform, device
    brand = ((document.get("machine_info") or {}).get("cpu") or {}).get("brand_raw")
    # The same processor with other threads is another machine to whoever compares times.
    return platform, f"{device}{f' {brand}' if brand else ''}, {info['threads']} threads"


def _rate(value: object, unit: float) -> float | None:
    """None and 0, which is as good as unknown, are None."""
    return unit * _positive(value, "a rate, FLOPs or bytes") if value else None


def _positive(value: object, what: str) -> float:
    if not _number(value, what):
        raise ValueError(f"{what} must be above 0, got 0")
    return float(value)


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{what} must be a finite number of at least 0, got {value!r}")
    return float(value)
