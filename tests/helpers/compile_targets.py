"""GPUs that the compile-only tests compile for. None of them has to be present."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Args:
        name: as the table and the tests show it.
        backend: Triton's, "cuda" or "hip".
        arch: the compute capability, or AMD's name.
        warp_size: threads of a warp.
        shared_per_program: bytes of shared memory that one program may have, as the vendor publishes it.
        shared_per_sm: bytes of shared memory of an SM (CU), as the vendor publishes it.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_per_program: int
    shared_per_sm: int

    @property
    def nvidia(self) -> bool:
        return self.backend == "cuda"


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 163 * KIB, 164 * KIB),
    Target("sm_89", "cuda", 89, 32, 99 * KIB, 100 * KIB),
    Target("sm_90", "cuda", 90, 32, 227 * KIB, 228 * KIB),
    Target("sm_100", "cuda", 100, 32, 227 * KIB, 228 * KIB),
    Target("sm_120", "cuda", 120, 32, 99 * KIB, 100 * KIB),
    Target("gfx942", "hip", "gfx942", 64, 64 * KIB, 64 * KIB),
)

TMA_TARGET = "sm_90"
# The convolution by TMA is a candidate there, too.
BLACKWELL_TARGET = "sm_100"
# fp16 and bf16 give nearly equal kernels: see compile_jobs.
FP16_TARGET = "sm_90"
# The planted case takes seconds on each. It spills on sm_90, and also exceeds the shared memory of gfx942.
PLANTED_TARGETS = ("sm_90", "gfx942")
