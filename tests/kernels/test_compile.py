"""Every shipped kernel configuration compiles, fits, doesn't spill and multiplies where it should, on GPUs that aren't here.

Nothing is launched. tests/compile_kernels.py compiles in a process of its own: this one runs kernels in the interpreter.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.compile_cases import (
    CHAIN_KERNEL,
    EPILOGUE_KERNEL,
    FOLD_KERNEL,
    RING_CHAIN_KERNEL,
    SHARING_KERNEL,
    SPECIALIZED_CHAIN_KERNEL,
    SPECIALIZED_KERNEL,
    SPECIALIZED_STEM_KERNEL,
    STEM_KERNEL,
    STEM_PACK_KERNEL,
    TMA_KERNEL,
    label,
)
from helpers.compile_cases_batch_norm import BATCH_NORM_KERNELS
from helpers.compile_cases_links import chain_label, stem_label
from helpers.compile_targets import BLACKWELL_TARGET, FP16_TARGET, KIB, PLANTED_TARGETS, TARGETS, TMA_TARGET, Target
from helpers.compiled import before_the_wait, find_cuobjdump, overwritten_operands
from helpers.compiled_table import describe, table

pytestmark = pytest.mark.compile_only

SCRIPT = Path(__file__).parents[1] / "compile_kernels.py"
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "tf32": 4}
BY_NAME = {target.name: target for target in TARGETS}


@pytest.fixture(scope="session")
def all_records(tmp_path_factory) -> list[dict]:
    return compiled(tmp_path_factory)


def compiled(tmp_path_factory, *options: str) -> list[dict]:
    pytest.importorskip("triton", reason="Triton is not installed")
    if find_cuobjdump() is None:
        pytest.skip("no cuobjdump, neither in Triton's package nor in the PATH: registers and spills can't be read")
    file = tmp_path_factory.mktemp("compiled") / "records.json"
    # A function that the interpreter took over can't be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(file), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert run.returncode == 0, f"compile_kernels.py failed:\n{run.stderr[-5000:]}"
    records = json.loads(file.read_text())
    print("\n" + table(records))
    return records


@pytest.fixture(scope="session")
def records(all_records) -> list[dict]:
    return [r for r in all_records if not r["planted"]]


# Each check takes a record and its target, and returns what is wrong with it, or None.


def compiles(record: dict, target: Target) -> str | None:
    return record["error"]


def fits_shared_memory(record: dict, target: Target) -> str | None:
    if record["shared"] > target.shared_per_program:
        return f"needs {record['shared'] / KIB:.1f} KiB of shared memory, {target.shared_per_program / KIB:.0f} are to be had"


def does_not_spill(record: dict, target: Target) -> str | None:
    spills = {what: n for what, n in record["spills"].items() if n}
    # A scalar register spilled on AMD goes to a lane of a vector register, not to memory. The fast loop does without even
    # that; where each element of a step has a tap of its own, up to 14 scalars are kept there.
    if not record["constants"].get("WHOLE_CHUNKS", True):
        spills.pop("SGPRs", None)
    if spills:
        return f"spills {spills}, with {record['registers']} registers"


def has_room_for_a_program(record: dict, target: Target) -> str | None:
    if record["programs"] < 1:
        return f"not one program fits on an SM: {record['registers']} registers, {record['num_warps']} warps"


def multiplies_on_tensor_cores(record: dict, target: Target) -> str | None:
    own = (TMA_KERNEL, CHAIN_KERNEL, STEM_KERNEL, SHARING_KERNEL)
    own += (SPECIALIZED_KERNEL, SPECIALIZED_CHAIN_KERNEL, SPECIALIZED_STEM_KERNEL, RING_CHAIN_KERNEL)
    if record["kernel"] not in ("conv_bias_act", *own):
        return None
    # wgmma and tcgen05 take a group of four warps; smaller programs fall back to Ampere's instruction.
    whole_group = record["num_warps"] % 4 == 0
    instruction = {
        "sm_80": "mma.sync",
        "sm_89": "mma.sync",
        "sm_90": "wgmma.mma_async" if whole_group else "mma.sync",
        "sm_100": "tcgen05.mma" if whole_group else "mma.sync",
        "sm_120": "mma.sync",
        "gfx942": "mfma xf32" if record["dtype"] == "tf32" else "mfma",
    }[target.name]
    # IEEE fp32 has no instruction on NVIDIA's tensor cores: any there would be TF32 unasked for.
    expected = [] if record["dtype"] == "fp32" and target.nvidia else [instruction]
    if record["tensor_cores"] != expected:
        return f"multiplies with {record['tensor_cores'] or 'FMA'}, expected {expected or 'FMA'}"


def keeps_the_k_loop_fed(record: dict, target: Target) -> str | None:
    if not record["constants"].get("WHOLE_CHUNKS", False):
        return None
    if not target.nvidia:
        # No asynchronous copies there: loads a step ahead into registers. Nothing narrower than a register, some 16 bytes.
        widths = record["load_bytes"]
        return None if min(widths) >= 4 and max(widths) == 16 else f"loads of {widths} bytes"
    if record["loads_in_loop"] != 0:
        return f"{record['loads_in_loop']} loads of the K loop wait for their data"
    # 16 bytes a thread, or the thread's whole share of a tile.
    constants, threads = record["constants"], 32 * record["num_warps"]
    tiles = [constants[rows] * constants["BLOCK_K"] * BYTES[record["dtype"]] for rows in ("BLOCK_M", "BLOCK_N")]
    expected = sorted({min(16, tile // threads) for tile in tiles})
    if record["copy_bytes"] != expected:
        return f"asynchronous copies of {record['copy_bytes']} bytes, expected {expected}"


def streams_with_wide_loads(record: dict, target: Target) -> str | None:
    streams = record["kernel"] == EPILOGUE_KERNEL and "n_channels" in record["aligned"]
    if streams or (record["kernel"] == FOLD_KERNEL and record["constants"]["ALIGNED"]):
        # Vectors of a number per channel are shared by a tile's rows: any width will do.
        return None if 16 in record["load_bytes"] else f"loads of {record['load_bytes']} bytes, expected 16 among them"
    if record["kernel"] != "add_relu" or "n_elements" not in record["aligned"]:
        return None
    share = record["constants"]["BLOCK_SIZE"] // (target.warp_size * record["num_warps"]) * BYTES[record["dtype"]]
    if record["load_bytes"] != [min(16, share)]:
        return f"loads of {record['load_bytes']} bytes, expected {min(16, share)}"


def training_streams(record: dict, target: Target) -> str | None:
    """16-byte loads of activations; in the reductions ahead of time, into shared memory, by at least two programs an SM."""
    if not record["kernel"].startswith("batch_norm_act") or "n_channels" not in record["aligned"]:
        return None
    if 16 not in record["load_bytes"]:
        return f"loads of {record['load_bytes']} bytes, expected 16 among them"
    if record["programs"] < 2 and "finish" not in record["kernel"]:
        return f"{record['registers']} registers leave room for one program an SM"
    if target.nvidia and record["kernel"].endswith((" statistics", " reduce")) and record["copy_bytes"] != [16]:
        return f"asynchronous copies of {record['copy_bytes']} bytes, expected 16"


def travels_by_tma(record: dict, target: Target) -> str | None:
    """Both operands and the residual come, and the output goes, by descriptor; only scale and bias are read by pointer."""
    if record["kernel"] != TMA_KERNEL:
        return None
    from resnet_kernels.kernels.sm90.conv_tiles import CONFIGS

    constants = record["constants"]
    ranks = {4, 5 if constants["IN_PAIRS"] else 4, 3 if constants["RAGGED"] else 2}
    if "shortcut_w_desc" in record["arguments"]:
        ranks.add(2)
    expected = sorted({"UTMASTG.4D", *(f"UTMALDG.{rank}D" for rank in ranks)})
    if record["tma"] != expected or record["copy_bytes"]:
        return f"moves by {record['tma']} and copies of {record['copy_bytes']} bytes, expected {expected} alone"
    if target.name != TMA_TARGET:
        return None  # tiles and the grid were made for Hopper
    if record["operand_in_registers"] != constants["RAGGED"]:
        return "an operand takes the way through registers, not only that of ragged steps"
    (promised,) = (config.programs_per_sm for config in CONFIGS if label(config) == record["config"])
    if record["programs"] < promised:
        return f"{record['programs']} programs fit on an SM, the grid counts on {promised}"


def chains_by_tma(record: dict, target: Target) -> str | None:
    """Tensors and the vectors of y's channels travel by descriptor; h's and z's are read by pointer, once a tile."""
    if record["kernel"] != CHAIN_KERNEL:
        return None
    from resnet_kernels.kernels.sm90.chain_layout import CONFIGS

    ranks = {1, 2, 4, 5 if record["constants"]["IN_PAIRS"] else 4}
    expected = sorted({"UTMASTG.4D", *(f"UTMALDG.{rank}D" for rank in ranks)})
    if record["tma"] != expected or record["copy_bytes"]:
        return f"moves by {record['tma']} and copies of {record['copy_bytes']} bytes, expected {expected} alone"
    (promised,) = (c.programs_per_sm for kind, c in CONFIGS.items() if chain_label(kind, c) == record["config"])
    if record["programs"] < promised:
        return f"{record['programs']} programs fit on an SM, the grid counts on {promised}"


def shares_by_tma(record: dict, target: Target) -> str | None:
    """All tensors travel by descriptor, and both operands are multiplied where they land."""
    if record["kernel"] != SHARING_KERNEL:
        return None
    from resnet_kernels.kernels.sm90.tap_sharing import CONFIGS

    if record["tma"] != ["UTMALDG.2D", "UTMALDG.4D", "UTMASTG.4D"] or record["copy_bytes"]:
        return f"moves by {record['tma']} and copies of {record['copy_bytes']} bytes"
    if record["operand_in_registers"]:
        return "an operand takes the way through registers"
    (promised,) = (config.programs_per_sm for config in CONFIGS if label(config) == record["config"])
    if record["programs"] < promised:
        return f"{record['programs']} programs fit on an SM, the grid counts on {promised}"


def specialized_warps_only_multiply(record: dict, target: Target) -> str | None:
    """All tensors travel by descriptor. A step is products of a tile's whole width, and little else."""
    if record["kernel"] != SPECIALIZED_KERNEL:
        return None
    constants = record["constants"]
    ranks = {2, 4, 5 if constants["IN_PAIRS"] else 4}
    expected = sorted({"UTMASTG.4D", *(f"UTMALDG.{rank}D" for rank in ranks)})
    if record["tma"] != expected or record["copy_bytes"]:
        return f"moves by {record['tma']} and copies of {record['copy_bytes']} bytes, expected {expected} alone"
    loops = record["k_loops"]
    if {loop["width"] for loop in loops} != {constants["BLOCK_N"]}:
        return f"products are {[loop['width'] for loop in loops]} channels wide, expected {constants['BLOCK_N']}"
    if constants["KERNEL_H"] * constants["KERNEL_W"] * constants["N_CHUNKS"] == 1:
        return None  # a loop of one step is no loop: its instructions are the tile's
    if record["operand_in_registers"]:
        return "an operand takes the way through registers"
    # A tile is 64 pixels for each group of four warps or a multiple: four products of 16 channels each.
    step = max(loops, key=lambda loop: loop["instructions"])
    if step["barriers"] > 2 or step["instructions"] > 40 + 5 * step["products"]:
        return f"a step takes {step}"


def specialized_chains_keep_all_but_pixels(record: dict, target: Target) -> str | None:
    """All tensors travel by descriptor; a block of y takes little more than half of chain.py's instructions."""
    if record["kernel"] not in (SPECIALIZED_CHAIN_KERNEL, RING_CHAIN_KERNEL):
        return None
    constants, arguments = record["constants"], record["arguments"]
    ranks = {2, 4, 5 if constants["IN_PAIRS"] else 4}
    expected = sorted({"UTMASTG.4D", *(f"UTMALDG.{rank}D" for rank in ranks)})
    if record["tma"] != expected or record["copy_bytes"]:
        return f"moves by {record['tma']} and copies of {record['copy_bytes']} bytes, expected {expected} alone"
    # Of four warps. For as many elements of y chain.py takes 281 and more, of eight warps.
    block = max(record["k_loops"], key=lambda loop: loop["instructions"])
    most, most_barriers = 560 if "norm_scale_ptr" in arguments else 330, 5
    if record["kernel"] == RING_CHAIN_KERNEL:  # two products more, and a stage of the ring to wait for and to give away
        most, most_barriers = most + 60, 7
    if block["instructions"] > most or block["barriers"] > most_barriers:
        return f"a block of y takes {block}"


def specialized_stems_multiply_whole_rows(record: dict, target: Target) -> str | None:
    """Rows travel by descriptor. A row of the convolution is 7 x 2 products of 128 columns, without im2col and spills."""
    if record["kernel"] != SPECIALIZED_STEM_KERNEL:
        return None
    expected = ["UTMALDG.2D", "UTMALDG.3D"]
    if record["tma"] != expected or record["copy_bytes"] or record["operand_in_registers"]:
        return f"moves by {record['tma']} and copies of {record['copy_bytes']} bytes, expected {expected} alone"
    rows = [(loop["products"], loop["width"]) for loop in record["k_loops"]]
    if rows != [(14, 128)] * 2:
        return f"(products, columns) of a row are {rows}, for each consumer"
    # Products take 64 cycles each, 896 a row. Both consumers' instructions have to fit in twice that.
    most = max(loop["instructions"] for loop in record["k_loops"])
    if most > 800:
        return f"a row takes {most} instructions"


def stem_windows_stream(record: dict, target: Target) -> str | None:
    """Windows and weights come ahead of time, into shared memory, from where both are multiplied."""
    if record["kernel"] != STEM_KERNEL:
        return None
    from resnet_kernels.kernels.sm90.stem_layout import CONFIGS

    if record["loads_in_loop"] or record["operand_in_registers"]:
        return f"{record['loads_in_loop']} loads wait for their data, or an operand takes the way through registers"
    # By pointer a window is masked behind its seventh pixel, so it comes in pairs of 4 channels: 8 bytes.
    expected = ([16], ["UTMALDG.5D"]) if record["constants"]["DESCRIPTOR"] else ([8, 16], [])
    if (record["copy_bytes"], record["tma"]) != expected:
        return f"copies of {record['copy_bytes']} bytes and {record['tma']}, expected {expected}"
    (promised,) = (config.programs_per_sm for config in CONFIGS if stem_label(config) == record["config"])
    if record["programs"] < promised:
        return f"{record['programs']} programs fit on an SM, the grid counts on {promised}"


def multiplies_while_it_loads(record: dict, target: Target) -> str | None:
    """Every K loop keeps a product in flight over its end, and its stages of both operands in shared memory."""
    if record["kernel"] != TMA_KERNEL or record["constants"]["RAGGED"] or target.name != TMA_TARGET:
        return None
    constants = record["constants"]
    steps = constants["N_CHUNKS"] * constants["KERNEL_H"] * constants["KERNEL_W"]
    if max(steps, constants["SHORTCUT_CHUNKS"]) == 1:
        return None
    if record["loops_in_flight"] != record["dot_loops"]:
        return f"{record['loops_in_flight']} of {record['dot_loops']} loops keep a product in flight"
    pixels = constants["BOX_N"] * constants["BOX_H"] * constants["BOX_W"]
    stages = record["num_stages"] * (pixels + constants["BLOCK_N"]) * constants["BLOCK_K"] * 2
    if min(steps, constants["SHORTCUT_CHUNKS"] or steps) > 1 and record["shared"] < stages:
        return f"{record['shared'] / KIB:.1f} KiB do not hold {record['num_stages']} stages of {stages / KIB:.0f} KiB"


def waits_for_the_launch_before(record: dict, target: Target) -> str | None:
    """A program that starts early asks L2 for its weights, and no more, before the launch in front of it has ended."""
    if record["kernel"] == TMA_KERNEL:
        weights = [] if record["constants"]["RAGGED"] else ["UBLKPF"]
        expected = weights if record["constants"]["EARLY"] else None
        if record["before_the_wait"] != expected:
            return f"{record['before_the_wait']} before its wait for the launch before, expected {expected}"


def keeps_operands_over_loops(record: dict, target: Target) -> str | None:
    if record.get("overwritten"):
        return f"operands that a loop needs again are lost in its first turn: {record['overwritten']}"


CHECKS = (
    compiles,
    waits_for_the_launch_before,
    keeps_operands_over_loops,
    fits_shared_memory,
    does_not_spill,
    has_room_for_a_program,
    multiplies_on_tensor_cores,
    keeps_the_k_loop_fed,
    streams_with_wide_loads,
    training_streams,
    travels_by_tma,
    chains_by_tma,
    shares_by_tma,
    specialized_warps_only_multiply,
    specialized_chains_keep_all_but_pixels,
    specialized_stems_multiply_whole_rows,
    stem_windows_stream,
    multiplies_while_it_loads,
)


def complaints(records: list[dict], check, target: str) -> list[str]:
    """What the check says of each record of a target; what did not compile is `compiles`'s to report."""
    own = [r for r in records if r["target"] == target and (check is compiles or not r["error"])]
    found = [(r, check(r, BY_NAME[target])) for r in own]
    return [f"{describe(r)}: {complaint}" for r, complaint in found if complaint]


_LOSES_R56 = """
        /*0100*/                   LDSM.16.M88.4 R56, [R19+UR32+0x4000] ;
        /*0200*/                   HGMMA.64x32x16.F32.BF16 R40, R56, gdesc[UR12], RZ, !UPT ;
        /*0210*/                   LDSM.16.MT88.4 R56, [R18] ;
        /*0220*/                   HGMMA.64x32x16.F32.BF16 R24, R56, gdesc[UR4], RZ, !UPT ;
        /*0230*/              @P1 BRA 0x200 ;
"""


def test_an_operand_overwritten_in_its_loop_is_found():
    """What ptxas of Triton 3.6.0 made of a chain without a z; and the same put right."""
    assert len(overwritten_operands(_LOSES_R56)) == 1
    assert not overwritten_operands(_LOSES_R56.replace("0x200", "0x100"))  # loaded anew in each turn
    assert not overwritten_operands(_LOSES_R56.replace("MT88.4 R56", "MT88.4 R60"))
    assert not overwritten_operands(_LOSES_R56.replace("@P1 BRA", "MOV R56, R80 ;\n        /*0240*/ @P1 BRA"))


def test_a_read_before_the_wait_is_found():
    line = "        /*{:04x}*/                   {} R2, desc[UR4][R2.64] ;\n"
    code = ["UBLKPF.L2", "ACQBULK", "LDG.E"]
    assert before_the_wait("".join(line.format(16 * i, name) for i, name in enumerate(code))) == ["UBLKPF"]
    assert before_the_wait("".join(line.format(16 * i, name) for i, name in enumerate(reversed(code)))) == ["LDG"]
    assert before_the_wait(line.format(0, "LDG.E")) is None


@pytest.mark.slow
def test_one_configuration_of_each_kernel(tmp_path_factory):
    """All checks, on Hopper, for whatever Triton is installed; the others compile every configuration, layer and target."""
    records = compiled(tmp_path_factory, "--quick")
    found = [complaint for check in CHECKS for complaint in complaints(records, check, TMA_TARGET)]
    assert not found, "\n".join(["", *found])
    kernels = {
        "conv_bias_act",
        "add_relu",
        "bn_scale_shift",
        EPILOGUE_KERNEL,
        FOLD_KERNEL,
        *(f"batch_norm_act {name}" for name in BATCH_NORM_KERNELS),
    }
    own = {TMA_KERNEL, CHAIN_KERNEL, STEM_KERNEL, STEM_PACK_KERNEL, SHARING_KERNEL}
    own |= {SPECIALIZED_KERNEL, SPECIALIZED_CHAIN_KERNEL, SPECIALIZED_STEM_KERNEL, RING_CHAIN_KERNEL}
    assert {r["kernel"] for r in records} == kernels | own and len(records) == len(kernels | own)


@pytest.mark.slow
@pytest.mark.parametrize("target", BY_NAME)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_kernel(check, target, records):
    found = complaints(records, check, target)
    assert not found, "\n".join(["", *found])


@pytest.mark.slow
@pytest.mark.parametrize("target", BY_NAME)
def test_no_configuration_is_left_out(target, records):
    from resnet_kernels.kernels.conv_bias_act import CONFIGS

    compiled = {r["config"] for r in records if r["kernel"] == "conv_bias_act" and r["target"] == target}
    assert compiled == {label(config) for config in CONFIGS}
    if target == TMA_TARGET:
        from resnet_kernels.kernels.sm90.conv_tiles import CONFIGS as TMA_CONFIGS

        own = [r for r in records if r["kernel"] == TMA_KERNEL and r["target"] == target]
        assert {r["config"] for r in own} == {label(config) for config in TMA_CONFIGS}
        forms = {"1x1": lambda c: c["KERNEL_H"] == 1, "3x3": lambda c: c["KERNEL_H"] == 3 and not c["SKEW_H"]}
        forms |= {name: lambda c, name=name: c[name] for name in ("IN_PAIRS", "RAGGED", "SKIP", "SHORTCUT_CHUNKS")}
        assert not [name for name, has in forms.items() if not any(has(r["constants"]) for r in own)]
        parities = [r["constants"]["SKIP"] for r in own if "x11_desc" in r["arguments"]]
        assert {*parities} == {True, False}
        from resnet_kernels.kernels.sm90.chain_layout import CONFIGS as CHAIN_CONFIGS

        chains = [r for r in records if r["kernel"] == CHAIN_KERNEL]
        assert {r["config"] for r in chains} == {chain_label(*of) for of in CHAIN_CONFIGS.items()}
        from resnet_kernels.kernels.sm90.specialized_layout import CONFIGS as SPECIALIZED_CONFIGS

        specialized = [r for r in records if r["kernel"] == SPECIALIZED_KERNEL]
        assert {r["config"] for r in specialized} == {*map(str, SPECIALIZED_CONFIGS)}
        forms = ("IN_PAIRS", "SKIP", "SHORTCUT_CHUNKS", "RESIDENT")
        assert not [name for name in forms if not any(r["constants"][name] for r in specialized)]
        seen = {
            (r["constants"]["BLOCK_K"], r["constants"]["IN_PAIRS"], "norm_scale_desc" in r["arguments"]) for r in chains
        }
        assert seen == set(itertools.product((32, 64), (False, True), (False, True)))
        from resnet_kernels.kernels.sm90.stem_layout import CONFIGS as STEM_CONFIGS
        from resnet_kernels.kernels.sm90.tap_sharing import CONFIGS as SHARING_CONFIGS

        own = {r["config"] for r in records if r["kernel"] == SHARING_KERNEL}
        assert own == {label(config) for config in SHARING_CONFIGS}
        own = {r["config"] for r in records if r["kernel"] == STEM_KERNEL}
        assert own == {stem_label(config) for config in STEM_CONFIGS}
    hopper = {TMA_KERNEL, CHAIN_KERNEL, STEM_KERNEL, STEM_PACK_KERNEL, SHARING_KERNEL}
    hopper |= {SPECIALIZED_KERNEL, SPECIALIZED_CHAIN_KERNEL, SPECIALIZED_STEM_KERNEL, RING_CHAIN_KERNEL}
    if target == BLACKWELL_TARGET:
        tiles = {r["config"] for r in records if r["kernel"] == TMA_KERNEL and r["target"] == target}
        assert tiles == {r["config"] for r in records if r["kernel"] == TMA_KERNEL and r["target"] == TMA_TARGET}
    kernels = {
        *(hopper if target == TMA_TARGET else ()),
        *((TMA_KERNEL,) if target == BLACKWELL_TARGET else ()),
        "conv_bias_act",
        EPILOGUE_KERNEL,
        FOLD_KERNEL,
        "add_relu",
        "bn_scale_shift",
        *(f"batch_norm_act {name}" for name in BATCH_NORM_KERNELS),
    }
    assert {r["kernel"] for r in records if r["target"] == target} == kernels


@pytest.mark.slow
@pytest.mark.parametrize("whole", (True, False), ids=("whole chunks", "ragged"))
def test_both_loops_and_all_dtypes_are_compiled(whole, records):
    for target in BY_NAME:
        own = [r for r in records if r["target"] == target and r["constants"].get("WHOLE_CHUNKS") is whole]
        assert {r["dtype"] for r in own} >= BYTES.keys() - ({"fp16"} if target != FP16_TARGET else set()), target
        assert {r["constants"]["IN_BOUNDS"] for r in own} == {True, False}, target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "target"), [(does_not_spill, name) for name in PLANTED_TARGETS] + [(fits_shared_memory, "gfx942")]
)
def test_a_tile_that_is_too_large_is_noticed(check, target, all_records):
    assert len(complaints([r for r in all_records if r["planted"]], check, target)) == 1
