"""Jobs: which cases are compiled for which targets, and compiling them in parallel.

Unless everything is asked for, cases that differ only in stride, batch or image size are compiled once, and fp16 for one
target only. Among all 600 cases (Triton 3.6.0 and 3.9.0), those that differ only so differ by up to 62 registers, fp16 and
bf16 differ by up to 11, and none differ in shared memory.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from helpers.compile_cases import Case
from helpers.compile_cases_activations import activation_cases
from helpers.compile_cases_batch_norm import batch_norm_cases
from helpers.compile_cases_conv import conv_cases, planted_case
from helpers.compile_cases_hopper import sharing_cases, specialized_cases, tma_cases
from helpers.compile_cases_links import chain_cases, specialized_chain_cases, specialized_stem_cases, stem_cases
from helpers.compile_cases_pointwise import pointwise_cases
from helpers.compile_targets import BLACKWELL_TARGET, FP16_TARGET, PLANTED_TARGETS, TARGETS, TMA_TARGET, Target
from helpers.compiled import compile_case

WORKERS = 2


def jobs(everything: bool) -> list[tuple[Case, Target]]:
    """Every case with every target that its kernel is for; the planted case comes first."""
    cases = [*conv_cases(everything), *pointwise_cases(), *batch_norm_cases()]
    cases += activation_cases(cases)
    chosen = [(c, t) for c in cases for t in TARGETS if everything or c.dtype != "fp16" or t.name == FP16_TARGET]
    own = [*tma_cases(everything), *chain_cases(everything), *stem_cases(), *sharing_cases(), *specialized_cases()]
    own += [*specialized_chain_cases(), *specialized_stem_cases()]
    own += activation_cases(own)
    chosen += [(c, t) for c in own for t in TARGETS if t.name == TMA_TARGET]
    chosen += [(c, t) for c in blackwell_cases() for t in TARGETS if t.name == BLACKWELL_TARGET]
    return [(planted_case(), t) for t in TARGETS if t.name in PLANTED_TARGETS] + chosen


def blackwell_cases() -> list[Case]:
    """Every tile of the convolution by TMA once, and every form of its loop. Links are Hopper's alone."""
    found: dict[object, Case] = {}
    for case in tma_cases(False):
        if "shortcut_desc" not in case.arguments:
            form = tuple(case.constants[name] for name in ("KERNEL_H", "IN_PAIRS", "RAGGED", "SKIP"))
            for where in (case.config, form, "x01_desc" in case.arguments):
                found.setdefault(where, case)
    return list({repr(case): case for case in found.values()}.values())


def one_of_each_kernel() -> list[tuple[Case, Target]]:
    """One job of each kernel, on Hopper; they compile in seconds."""
    first: dict[str, tuple[Case, Target]] = {}
    for case, target in jobs(everything=False):
        if target.name == TMA_TARGET and not case.planted:
            first.setdefault(case.kernel, (case, target))
    return [*first.values()]


def compile_all(chosen: list[tuple[Case, Target]]) -> list[dict]:
    """Records of the chosen cases, in their order."""
    # spawn: a fork copies the locks of torch's and LLVM's threads, but not the threads that would release them.
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_case, chosen))
