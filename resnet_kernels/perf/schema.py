"""Schema of the fields that `pytest benchmarks --benchmark-json=FILE` adds to pytest-benchmark's file.

The benchmarks fill these dataclasses and write their fields side by side into a benchmark's `extra_info`; read_results.py
fills the same dataclasses from a file. A field that may be None may be missing in a file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Version of the layout of extra_info that is written and read.
SCHEMA = 1
# Fields that hold one of a few names.
CHOICES = {
    "level": ("op", "block", "stage", "model"),
    "direction": ("forward", "forward-backward"),
    "device_type": ("cpu", "cuda"),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a profiled call, or on a CPU one operation.

    path: module or fused step that it works for, "" outside of any. kind: "conv", "bn" or "rest". seconds: time in one call.
    name: the kernel's, or several joined by " + ". flops, hbm_bytes: its least work and traffic, None if unknown.
    call: the number of this call of `path`, from 0. layer: the same for eager and fused, "" if none or unknown. backward:
    whether it ran in a backward.
    """

    path: str
    kind: str
    seconds: float
    name: str = ""
    flops: float | None = None
    hbm_bytes: float | None = None
    call: int = 0
    layer: str = ""
    backward: bool = False


@dataclass(frozen=True)
class Ceilings:
    """Highest rates that the machine reaches, None where unknown. source: how they were measured."""

    tflop_per_s: float | None
    gb_per_s: float | None
    source: str

    @property
    def flops_per_s(self) -> float | None:
        """FLOP/s."""
        return self.tflop_per_s and 1e12 * self.tflop_per_s

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes/s from and to memory."""
        return self.gb_per_s and 1e9 * self.gb_per_s


@dataclass(frozen=True, kw_only=True)
class CaseInfo:
    """A case and its machine; the same for all contenders.

    system: "torchvision", "slim", "d2l" or "d2l-keras". level: op, block, stage or model. subject: name of the module or op.
    direction: "forward" or "forward-backward". dtype: "float32". image_size: height and width of the input, in pixels.
    device: "cpu (AVX512)". device_type: "cpu" or "cuda". threads: PyTorch's CPU threads. busy_elsewhere: cores that other
    processes kept busy during the rounds, None if unknown.
    """

    system: str
    level: str
    subject: str
    direction: str
    dtype: str
    batch: int
    image_size: int
    device: str
    device_type: str
    threads: int
    busy_elsewhere: float | None


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions of the software that a time depends on, None if not installed."""

    torch: str
    triton: str | None
    driver: str | None
    cuda: str | None
    cudnn: str | None


@dataclass(frozen=True, kw_only=True)
class ContenderInfo:
    """A contender on a case.

    label: its name in a plot's legend. ours: whether it is this package's. settings: one line. version: its package and
    the package's version. parity_error: relative norm error against fp64. parity_budget: the largest error it may have.
    parity_failure: "" unless the error is over the budget. kernels: a call's time by kernel, empty if not profiled.
    """

    contender: str
    label: str
    ours: bool
    settings: str
    version: str
    parity_error: float | None
    parity_budget: float | None
    parity_failure: str
    kernels: tuple[Kernel, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Median over rounds of a contender's time over another's of the same round; None without such rounds."""

    interleaved_ratio_to_eager: float | None = None
    interleaved_ratio_to_fused: float | None = None


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Ceilings of the machine, and the share: the least time that they allow over the median time."""

    ceilings: Ceilings | None
    roofline_share: float | None


@dataclass(frozen=True, kw_only=True)
class Spread(Ratios):
    """Percentiles of a contender's seconds and ratios. The report computes its own from the samples."""

    p20: float
    p80: float
    interleaved_ratio_to_eager_p20: float | None = None
    interleaved_ratio_to_eager_p80: float | None = None
    interleaved_ratio_to_fused_p20: float | None = None
    interleaved_ratio_to_fused_p80: float | None = None


@dataclass(frozen=True, kw_only=True)
class Rates(Roofline):
    """Work of a call and rates by its median time.

    gflop: 1e9 FLOPs of convolutions and matmuls. hbm_gb: 1e9 bytes that per-layer fusion has to move, None if not counted.
    roofline_seconds: least seconds of a call. roofline_bound: "FLOP" or "HBM", whichever bounds most of it.
    """

    gflop: float
    hbm_gb: float | None
    img_per_s: float
    gflop_per_s: float
    tflop_per_s: float
    gb_per_s: float | None
    roofline_seconds: float
    roofline_bound: str


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Facts about a measurement that the report doesn't show.

    tf32: whether fp32 convolutions may run in TF32. input_copies: copies of the inputs in rotation. prepare_s, gate_s: seconds
    for preparing the contender and comparing it with fp64. saved_mib: MiB kept for the backward, None if unknown.
    """

    case: str
    tf32: bool
    input_copies: int
    prepare_s: float
    gate_s: float
    saved_mib: float | None


@dataclass(frozen=True)
class ExtraInfo:
    """All parts of one benchmark's `extra_info`."""

    case: CaseInfo
    versions: Versions
    contender: ContenderInfo
    spread: Spread
    rates: Rates
    conditions: Conditions

    def to_json(self) -> dict[str, Any]:
        """Returns the fields of all parts side by side, ready for json.dumps."""
        parts = (self.case, self.versions, self.contender, self.spread, self.rates, self.conditions)
        info = {name: value for part in parts for name, value in asdict(part).items()}
        # Most rows have no kernels, and eager has no ratio to itself.
        optional = [name for name in info if name == "kernels" or name.startswith("interleaved_ratio")]
        return {"schema": SCHEMA, **{name: v for name, v in info.items() if v or name not in optional}}


@dataclass(frozen=True)
class Absence:
    """Contender that was not measured, with the reason and the cases."""

    contender: str
    reason: str
    cases: tuple[str, ...]
