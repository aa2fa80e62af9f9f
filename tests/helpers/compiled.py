"""Compiling a case for a target, and reading the result: registers, spills, shared memory, instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from helpers.compile_cases import (
    CHAIN_KERNEL,
    RING_CHAIN_KERNEL,
    SHARING_KERNEL,
    SPECIALIZED_CHAIN_KERNEL,
    SPECIALIZED_KERNEL,
    SPECIALIZED_STEM_KERNEL,
    STEM_KERNEL,
    TMA_KERNEL,
    Case,
    kernel_named,
)
from helpers.compile_targets import KIB, Target


def find_cuobjdump() -> str | None:
    """Path of NVIDIA's reader of compiled kernels: in Triton's package, or else in the PATH."""
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(shipped) if shipped.exists() else shutil.which("cuobjdump")


def compile_case(job: tuple[Case, Target]) -> dict:
    """Compiles one case for one target.

    Returns:
        The case's record. If it did not compile, `error` says why, and there are no figures.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case, target = job
    fn = kernel_named(case.kernel)
    source: Callable = ASTSource
    if fn.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    attrs = {}
    for i, name in enumerate(fn.arg_names):
        if case.arguments.get(name, "").startswith("*"):
            # A ROCm launch also tells the compiler that a tensor is below 2 GiB, which buffer instructions need.
            attrs[(i,)] = [["tt.divisibility", 16]] + ([] if target.nvidia else [["tt.pointer_range", 32]])
        elif name in case.aligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    record = {**asdict(case), "target": target.name, "error": None}
    try:
        compiled = triton.compile(
            source(
                fn=fn,
                signature={name: case.arguments.get(name, "constexpr") for name in fn.arg_names},
                constexprs=case.constants,
                attrs=attrs,
            ),
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=dict(
                num_warps=case.num_warps,
                num_stages=case.num_stages,
                maxnreg=case.max_registers,
                enable_fp_fusion=True,
            ),
        )
        record["shared"] = compiled.metadata.shared
        # With specialized warps, those that load count as well.
        record["num_warps"] = compiled.metadata.num_warps
        record["operand_in_registers"] = bool(re.search(r"warp_group_dot .*dot_op<", compiled.asm["ttgir"]))
        record["dot_loops"], record["loops_in_flight"] = _dot_loops(compiled.asm["ttgir"])
        record["loads_in_loop"] = _loads_in_loop(compiled.asm["ttgir"])
        on_hopper = case.kernel in (
            TMA_KERNEL, CHAIN_KERNEL, STEM_KERNEL, SHARING_KERNEL,
            SPECIALIZED_KERNEL, SPECIALIZED_CHAIN_KERNEL, SPECIALIZED_STEM_KERNEL, RING_CHAIN_KERNEL,
        )  # fmt: skip
        record |= _read_nvidia(compiled, on_hopper) if target.nvidia else _read_amd(compiled)
        record["programs"] = _programs(record, target)
    except Exception as failure:
        error: BaseException = failure
        # A function that another one calls is to blame more often than its caller.
        while (cause := error.__cause__ or error.__context__) is not None:
            error = cause
        record["error"] = f"{type(error).__name__}: {error}"[:2000]
    return record


def _loads_in_loop(ttgir: str) -> int | None:
    """Number of loads in the first loop that wait for their data; None without a loop."""
    loop = re.search(r"^( *)[^\n]*\bscf\.for\b.*?^\1\}", ttgir, re.S | re.M)
    return None if loop is None else len(re.findall(r"\btt\.load\b|\bbuffer_load\b", loop.group(0)))


def _dot_loops(ttgir: str) -> tuple[int, int]:
    """Number of innermost loops that multiply by wgmma, and of those that keep a product in flight over their end."""
    # An outer loop would be counted for its inner loop's products.
    innermost = re.compile(r"^( *)[^\n]*\bscf\.for\b(?:(?!\bscf\.for\b).)*?^\1\}", re.S | re.M)
    loops = [loop.group(0) for loop in innermost.finditer(ttgir)]
    loops = [loop for loop in loops if "warp_group_dot " in loop]
    return len(loops), sum(bool(re.search(r"warp_group_dot_wait.*pendings = [1-9]", loop)) for loop in loops)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in what the compiler wrote"
    return int(found.group(1))


def _read_nvidia(compiled, on_hopper: bool) -> dict:
    cuobjdump = find_cuobjdump()
    assert cuobjdump, "there is no cuobjdump, neither in Triton's package nor in the PATH"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        # PTX spells TMA in several ways, the machine's own instructions in one.
        disassemble = [cuobjdump, "-sass", file.name]
        sass = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout if on_hopper else ""
    figures = {name: _number(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL")}
    ptx = compiled.asm["ptx"]
    return dict(
        registers=figures["REG"],
        spills={"stack bytes": figures["STACK"], "local bytes": figures["LOCAL"]},
        tensor_cores=sorted(set(re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", ptx))),
        copy_bytes=sorted({int(n, 16) for n in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?(0x\w+)", ptx)}),
        load_bytes=sorted(
            {int(n or 1) * int(b) // 8 for n, b in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)}
        ),
        overwritten=overwritten_operands(sass),
        k_loops=product_loops(sass),
        before_the_wait=before_the_wait(sass),
        tma=sorted(set(re.findall(r"\b(UTMALDG\.\dD|UTMASTG\.\dD)\b", sass))),
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
    )


def _read_amd(compiled) -> dict:
    asm = compiled.asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    figures = {name: _number(rf"\.{name}:\s+(\d+)", asm) for name in names}
    widths = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2}
    loads = set(re.findall(r"\b(?:global|buffer|flat)_load_(?:(dword)(?:x(\d))?|([us]?byte|[us]?short))", asm))
    return dict(
        registers=figures["vgpr_count"],
        spills={
            "VGPRs": figures["vgpr_spill_count"],
            "scratch bytes": figures["private_segment_fixed_size"],
            "SGPRs": figures["sgpr_spill_count"],
        },
        tensor_cores=sorted({"mfma xf32" if xf32 else "mfma" for xf32 in re.findall(r"\bv_mfma_\w+?(xf32)?\b", asm)}),
        copy_bytes=[],
        load_bytes=sorted(4 * int(n or 1) if dword else widths[part] for dword, n, part in loads),
        tensor_memory=0,
    )


def _code_and_loops(sass: str) -> tuple[list[tuple[int, str, str]], list[tuple[int, int]]]:
    """Instructions as (address, name, the rest), and loops as (first address, last one): where a jump leads back."""
    line = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+\s+)?([A-Za-z0-9_.]+)\s*(.*?);")
    code = [(int(at, 16), name, rest) for at, name, rest in line.findall(sass)]
    jumps = [(int(to.group(1), 16), at) for at, n, r in code if n == "BRA" and (to := re.search(r"0x([0-9a-f]+)", r))]
    return code, [(first, last) for first, last in jumps if first < last]


def product_loops(sass: str) -> list[dict[str, int]]:
    """Instructions, barriers (BAR) and products (HGMMA), with their width, of each innermost loop that multiplies."""
    code, loops = _code_and_loops(sass)
    found = []
    for first, last in loops:
        body = [name for at, name, _ in code if first <= at <= last]
        products = [name for name in body if name.startswith("HGMMA")]
        is_innermost = not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
        if products and is_innermost:
            width = int(re.search(r"x(\d+)x", products[0]).group(1))  # type: ignore[union-attr]  # HGMMA.64x128x16
            barriers = sum(name.startswith("BAR") for name in body)
            found.append(dict(instructions=len(body), barriers=barriers, products=len(products), width=width))
    return found


def before_the_wait(sass: str) -> list[str] | None:
    """How global memory is used before the wait for the launch before (ACQBULK); None without such a wait."""
    names = [name.split(".")[0] for _, name, _ in _code_and_loops(sass)[0]]
    if "ACQBULK" not in names:
        return None
    uses = {"LDG", "UTMALDG", "LDGSTS", "ATOMG", "STG", "UTMASTG", "UBLKPF"}  # the last one is a prefetch to L2
    return sorted(uses & set(names[: names.index("ACQBULK")]))


def overwritten_operands(sass: str) -> list[str]:
    """Products whose left operand is loaded before their loop and overwritten in it, so that later turns use wrong data.

    ptxas of Triton 3.6.0 compiled a chain's projection like that, and its results on an H200 were wrong. Only the machine's
    own instructions show it.
    """
    code, loops = _code_and_loops(sass)

    def writes(name: str, rest: str) -> set[int]:
        first = re.match(r"R(\d+)", rest)
        return set(range(int(first.group(1)), int(first.group(1)) + (4 if "88.4" in name else 1))) if first else set()

    lost = []
    for at, name, rest in code:
        left = re.match(r"R\d+, R(\d+), gdesc", rest) if name.startswith("HGMMA") else None
        around = [loop for loop in loops if loop[0] <= at <= loop[1]]
        if left is None or not around:
            continue
        operand = set(range(int(left.group(1)), int(left.group(1)) + 4))
        first, last = min(around, key=lambda loop: loop[1] - loop[0])
        written = [
            (there, n) for there, n, r in code if first <= there <= last and operand & writes(n, r) and "HGMMA" not in n
        ]
        # It is no fault to load the operand anew before the product, or to restore it after (by a move or a plain load).
        if written and written[0][0] > at and "MOV" not in written[-1][1] and not written[-1][1].endswith(".M88.4"):
            lost.append(f"{name} {rest.strip()} at {at:#x}")
    return lost


def _programs(record: dict, target: Target) -> int:
    """Number of programs that fit on one SM (CU): the least that registers, shared memory, threads or slots allow."""
    warps, registers = record["num_warps"], -(-record["registers"] // 8) * 8
    if target.nvidia:
        # Each quarter of an SM has its own registers. The system takes 1 KiB of shared memory for each program.
        by_registers = 4 * (64 * KIB // 4 // (32 * registers)) // warps
        by_tensor_memory = 512 // record["tensor_memory"] if record["tensor_memory"] else 32
        by_shared = target.shared_per_sm // (record["shared"] + KIB)
        return min(by_registers, by_shared, 2048 // (32 * warps), by_tensor_memory, 32)
    # Each of four SIMDs has 512 registers per lane, and room for 8 waves.
    by_registers = 4 * min(8, 512 // registers) // warps
    return min(by_registers, target.shared_per_sm // max(record["shared"], 1))
