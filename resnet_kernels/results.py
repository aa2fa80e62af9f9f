"""A results file of `pytest benchmarks --benchmark-json=FILE`, read and checked.

The report, `--against` and the README's tables see results through this module alone. Files that were written before a
field existed are read, too: what is absent is None or empty, and whoever shows it says so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# The newest layout of extra_info that is understood; files without the field are older than it.
SCHEMA = 1

_CASE = re.compile(r"(op|block|model)-(forward|forward-backward)-(.+)-(\d+)px-b(\d+)-(fp32|fp16|bf16)-(cpu|cuda)")
_SYSTEMS = (
    (r"d2l_.*keras", "d2l, Keras text"),
    (r"d2l_|residual_", "d2l"),
    (r"resnet_v2_|preact_", "TF-slim v2"),
    (r"resnet|resnext|wide_resnet|basic_|bottleneck_", "torchvision"),
)


class ResultsError(ValueError):
    """A file that can't be used, with its path and the reason in one line."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a profiled call.

    name: the kernel's. module: path of the module that it works for, "" outside of any. kind: "conv", "bn", ...
    seconds: in one call. flops, bytes: what it has to do and move at least, None if unknown.
    """

    name: str
    module: str
    kind: str
    seconds: float
    flops: float | None = None
    bytes: float | None = None


@dataclass(frozen=True)
class Roofs:
    """Rates of the machine: FLOP/s and bytes/s, either None if unknown; source: where they are from."""

    flops_per_s: float | None
    bytes_per_s: float | None
    source: str


@dataclass(frozen=True)
class Measurement:
    """A contender's time on a case.

    samples: seconds, one a round, of the contender alone; median: theirs. interleaved: contender -> seconds of rounds in
    which contenders took turns, samples of one index are of one round. ratio_to_eager, ratio_to_fused: its time over
    theirs, medians of such rounds; None if there was no such run. parity_failure: "" if its error is within the budget.
    """

    contender: str
    median: float
    samples: tuple[float, ...]
    interleaved: Mapping[str, tuple[float, ...]]
    ratio_to_eager: float | None
    ratio_to_fused: float | None
    parity_error: float | None
    parity_budget: float | None
    parity_failure: str
    gflop: float | None
    kernels: tuple[Kernel, ...]
    roofs: Roofs | None

    @property
    def is_ours(self) -> bool:
        return self.contender.startswith(("fused", "triton"))


@dataclass(frozen=True)
class CaseResults:
    """All contenders of a case, by name. size: pixels of the input's height and width; scope: op, block or model."""

    name: str
    scope: str
    direction: str
    subject: str
    size: int
    batch: int
    dtype: str
    platform: str
    system: str
    contenders: dict[str, Measurement] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The case in words, as it is written beside a bar."""
        return f"{self.subject} {self.size}px b{self.batch} {self.dtype}"

    def img_per_s(self, contender: str) -> float:
        return self.batch / self.contenders[contender].median

    def speed(self, ours: str, peer: str) -> tuple[float, bool]:
        """How many times the peer's speed ours has, and whether that is of interleaved rounds; else it is of medians."""
        mine, other = self.contenders[ours], self.contenders[peer]
        if peer == "eager" and mine.ratio_to_eager:
            return 1 / mine.ratio_to_eager, True
        if ours == "fused" and other.ratio_to_fused:
            return other.ratio_to_fused, True
        return other.median / mine.median, False

    def best_peer(self, ours: str = "fused") -> str | None:
        """The fastest contender that is not ours, over its error budget or not; None if ours or a peer has no time."""
        if ours not in self.contenders:
            return None
        peers = [name for name, measurement in self.contenders.items() if not measurement.is_ours]
        return min(peers, key=lambda name: self.speed(ours, name)[0], default=None)


@dataclass(frozen=True)
class Results:
    """A whole file. devices: platform -> name, threads with it on a CPU; absent: contender -> why it could not run."""

    path: Path
    date: str
    commit: str
    devices: dict[str, str]
    versions: dict[str, str]
    absent: dict[str, str]
    cases: dict[str, CaseResults]

    @property
    def contenders(self) -> list[str]:
        """The names of all, eager first, ours next."""
        names = dict.fromkeys(name for case in self.cases.values() for name in case.contenders)
        return sorted(names, key=lambda name: (name != "eager", not name.startswith(("fused", "triton")), name))


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
    devices, versions, absent, cases = {}, {}, {}, {}
    for benchmark in document["benchmarks"]:
        info = benchmark["extra_info"]
        schema = info.get("schema", 0)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise ResultsError(f"{path} has schema version {schema}, this resnet_kernels reads up to {SCHEMA}")
        name = benchmark["group"]
        if name not in cases:
            cases[name] = _case(name, info)
        case, measurement = cases[name], _measurement(benchmark, info)
        if measurement.contender in case.contenders:
            raise ValueError(f"{measurement.contender} is there twice in {name}")
        case.contenders[measurement.contender] = measurement
        device = _device(info, document)
        if devices.setdefault(case.platform, device) != device:
            raise ValueError(f"{name} is from {device}, others from {devices[case.platform]}")
        for package in ("torch", "triton", "driver"):
            if info.get(package):
                versions[package] = str(info[package])
        absent.update(info.get("absent") or {})
    commit = (document.get("commit_info") or {}).get("id") or ""
    return Results(path, str(document.get("datetime", ""))[:10], commit[:7], devices, versions, absent, cases)


def _case(name: str, info: dict) -> CaseResults:
    match = _CASE.fullmatch(name)
    if not match:
        raise ValueError(f"{name!r} is no case of pytest benchmarks")
    scope, direction, subject, size, batch, dtype, platform = match.groups()
    system = info.get("system") or next((system for pattern, system in _SYSTEMS if re.match(pattern, subject)), "")
    return CaseResults(name, scope, direction, subject, int(size), int(batch), dtype, platform, system)


def _measurement(benchmark: dict, info: dict) -> Measurement:
    stats, contender = benchmark["stats"], benchmark["params"]["contender"]
    if not isinstance(contender, str):
        raise TypeError(f"a contender must be a name, got {contender!r}")
    interleaved = {name: _seconds(samples, name) for name, samples in (info.get("interleaved") or {}).items()}
    if len({len(samples) for samples in interleaved.values()}) > 1:
        raise ValueError(f"the interleaved samples of {benchmark['group']} are not of the same rounds")
    return Measurement(
        contender=contender,
        median=_positive(stats["median"], "median"),
        samples=_seconds(stats.get("data") or (), "data"),
        interleaved=interleaved,
        ratio_to_eager=_positive(info.get("interleaved_ratio_to_eager"), "interleaved_ratio_to_eager", optional=True),
        ratio_to_fused=_positive(info.get("interleaved_ratio_to_fused"), "interleaved_ratio_to_fused", optional=True),
        parity_error=info.get("parity_error"),
        parity_budget=info.get("parity_budget"),
        parity_failure=info.get("parity_failure") or "",
        gflop=info.get("gflop"),
        kernels=tuple(_kernel(kernel) for kernel in info.get("kernels") or ()),
        roofs=_roofs(info),
    )


def _device(info: dict, document: dict) -> str:
    """The name of what a benchmark ran on: two files are of one machine if it is the same."""
    device = str(info["device"])
    if not device.startswith("cpu"):
        return device
    brand = ((document.get("machine_info") or {}).get("cpu") or {}).get("brand_raw")
    name = f"{brand}, {device[len('cpu') :].strip(' ()')}" if brand else device
    return f"{name}, {info['threads']} threads"


def _kernel(kernel: dict) -> Kernel:
    return Kernel(
        name=str(kernel["name"]),
        module=str(kernel.get("module") or ""),
        kind=str(kernel.get("kind") or "other"),
        seconds=_positive(kernel["seconds"], "a kernel's seconds"),
        flops=_positive(kernel.get("flops") or None, "a kernel's flops", optional=True),
        bytes=_positive(kernel.get("bytes") or None, "a kernel's bytes", optional=True),
    )


def _roofs(info: dict) -> Roofs | None:
    flops = _positive(info.get("peak_flops_per_s"), "peak_flops_per_s", optional=True)
    moved = _positive(info.get("peak_bytes_per_s"), "peak_bytes_per_s", optional=True)
    return Roofs(flops, moved, str(info.get("peak_source") or "")) if flops or moved else None


def _positive(value: object, name: str, optional: bool = False) -> float | None:
    if value is None and optional:
        return None
    # A bool is an int, and a NaN compares false.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def _seconds(samples: object, name: str) -> tuple[float, ...]:
    if not isinstance(samples, (list, tuple)):
        raise TypeError(f"{name} must be a list of seconds, got {type(samples).__name__}")
    return tuple(_positive(sample, f"a sample of {name}") for sample in samples)
