"""A results file of `pytest benchmarks --benchmark-json=FILE`, read and checked.

The report, `--against` and the README's tables see results through this module alone. Files that were written before a
field existed are read, too: what is absent is None or empty, and whoever shows it says so.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# The newest layout of extra_info that is understood; files without the field are older than it.
SCHEMA = 1

_CASE = re.compile(r"(op|block|model)-(forward-backward|forward)-(.+)-(\d+)px-b(\d+)-(fp32|fp16|bf16)-(cpu|cuda)")
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_SYSTEMS = (
    (r"d2l_.*keras", "d2l-keras"),
    (r"d2l_|residual_", "d2l"),
    (r"resnet_v2_|preact_", "slim"),
)
_OURS = ("fused", "triton")  # of files that do not say which contenders are ours


class ResultsError(ValueError):
    """A file that can't be used: its path and the reason, in one line."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a profiled call.

    path: the module that it works for, "" outside of any. kind: "conv", "bn", ... seconds: in one call. flops, hbm_bytes:
    what it has to do and move at least, None if unknown.
    """

    path: str
    name: str
    kind: str
    seconds: float
    flops: float | None
    hbm_bytes: float | None


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at most, FLOP/s and bytes/s, either None if unknown; source: how that is known."""

    flops_per_s: float | None
    bytes_per_s: float | None
    source: str


@dataclass(frozen=True)
class Measurement:
    """A contender's time on a case.

    ours: whether it is this package's. label: its name in words. version: its package and version. median, samples: seconds.
    ratios: its time over that of "eager" and "fused", medians over rounds in which they took turns, where there were such
    rounds. parity_error and parity_budget: None where nothing was compared. parity_failure: "" unless the error is over the
    budget. roofline_share: the least time by the machine's ceilings over the median, None if unknown.
    """

    contender: str
    ours: bool
    label: str
    settings: str
    version: str
    median: float
    samples: tuple[float, ...]
    ratios: Mapping[str, float]
    parity_error: float | None
    parity_budget: float | None
    parity_failure: str
    roofline_share: float | None
    kernels: tuple[Kernel, ...]
    ceilings: Ceilings | None


@dataclass(frozen=True)
class CaseResults:
    """What was measured on a case, by contender.

    level: op, block, stage or model. size: pixels of the input's height and width. dtype: "float32". platform: cpu or cuda.
    interleaved: whether samples of one index are of one round, in all contenders. busy_elsewhere: cores that other
    processes kept busy meanwhile, None if unknown.
    """

    name: str
    level: str
    direction: str
    system: str
    subject: str
    size: int
    batch: int
    dtype: str
    platform: str
    interleaved: bool
    busy_elsewhere: float | None
    contenders: dict[str, Measurement]

    @property
    def label(self) -> str:
        """The case in words, without its level, direction and platform."""
        return f"{self.subject} {self.size}px b{self.batch} {_SHORT.get(self.dtype, self.dtype)}"

    def img_per_s(self, contender: str) -> float:
        return self.batch / self.contenders[contender].median

    def speed(self, ours: str, peer: str) -> float:
        """How many times the peer's speed ours has: the median over rounds where they took turns, else of medians."""
        mine, other = self.contenders[ours], self.contenders[peer]
        if self.interleaved:
            return statistics.median(b / a for a, b in zip(mine.samples, other.samples))
        if ours in other.ratios:
            return other.ratios[ours]
        return 1 / mine.ratios[peer] if peer in mine.ratios else other.median / mine.median

    def best_peer(self, ours: str = "fused") -> str | None:
        """The fastest contender that is not ours, within its error budget or not; None if ours or every peer is missing."""
        peers = [name for name, measurement in self.contenders.items() if not measurement.ours]
        return min(peers, key=lambda name: self.speed(ours, name), default=None) if ours in self.contenders else None


@dataclass(frozen=True)
class Absence:
    """What was not measured: a contender, why, and in which cases."""

    contender: str
    reason: str
    cases: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """A whole file. date: "2026-11-22". devices: platform -> its name. versions: package -> version. cases: by name."""

    path: Path
    date: str
    commit: str
    devices: dict[str, str]
    versions: dict[str, str]
    absent: tuple[Absence, ...]
    cases: dict[str, CaseResults]

    @property
    def contenders(self) -> list[str]:
        """The names of all contenders: eager, ours, the others."""
        found = {name: m.ours for case in self.cases.values() for name, m in case.contenders.items()}
        return sorted(found, key=lambda name: (name != "eager", not found[name]))


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
