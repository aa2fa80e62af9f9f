"""The GPU's first minute, rehearsed: every launch goes through Triton's own launcher to a driver that checks and runs nothing.

tests/rehearsal says how. Held: descriptors that a driver takes, arguments that the launcher takes, grids and shared memory
within a compute capability 9.0 device's limits, memory that is alive at the launch, and how many launches a call takes.
"""

import shutil
import sys
from pathlib import Path

import pytest

import resnet_kernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in for libcuda is built for Linux")

PACKAGE = Path(resnet_kernels.__file__).parent
# More would mean that layers left their kernel, or that a call makes what the first one made.
MOST_LAUNCHES = {"resnet18": 23, "resnet50": 60, "resnet_v2_50": 80}
# Launches of a call, by kernel; those of BN's scale and shift are one for each stage, and one for the stem.
RESNET18 = {"_bn_scale_shift_kernel": 5, "_pack_kernel": 1, "_stem_kernel": 1, "_conv_bias_act_tma_kernel": 16}


@pytest.mark.slow
def test_a_networks_launches(rehearse):
    assert rehearse("call", "resnet18") == {"1": RESNET18}


@pytest.mark.slow
def test_a_frozen_networks_launches(rehearse):
    """In both layouts: none writes scales and shifts."""
    count = {name: launches for name, launches in RESNET18.items() if name != "_bn_scale_shift_kernel"}
    assert rehearse("call", "resnet18", "--freeze") == {"1": count}


@pytest.mark.slow
def test_copies_outlive_their_launches(rehearse):
    """Operands in a layout that no kernel reads."""
    found = rehearse("copies")
    assert found and all(found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("what", ("call", "train"))
@pytest.mark.parametrize("model", MOST_LAUNCHES)
def test_every_launch_of_a_network(model, what, rehearse):
    batches = ("1", "2", "256")
    found = rehearse(what, model, "--batch", *batches)
    assert found.keys() == {*batches}
    for count in found.values():
        if what == "call":
            assert sum(count.values()) <= MOST_LAUNCHES[model], count
        else:
            # Each BN has three launches forward and three backward.
            assert len(count) == 6 and len({*count.values()}) == 1, count


@pytest.mark.slow
def test_a_later_launch_costs_the_host_a_fraction_of_tritons(rehearse):
    """Seven times less in a quiet process; a third leaves room for a busy one."""
    microseconds = rehearse("time", "resnet18")
    assert microseconds["of it launching.py"] < microseconds["Triton in its place"] / 3, microseconds


# What each has to be caught by: the command, a module of the kernels, a piece of its source and what is put in its place, and
# words of the error.
BUGS = {
    "a later launch with addresses of freed copies": (
        "call resnet18", "launching", "else tensor.data_ptr() for", "else tensor.clone().data_ptr() for",
        "other addresses than its tensors'",
    ),
    "a view leaves its tensor": (
        "copies", "sm90/tap_sharing", "sides, odd * channels)", "sides, 2 * odd * channels)", "leaves its tensor by 128 bytes",
    ),
    "a stride that no descriptor takes": (
        "copies", "sm90/tap_sharing", "2 * channels, 1)", "2 * channels + 4, 1)", "multiples of 16|16-byte aligned",
    ),
    "an empty grid": (
        "copies", "sm90/conv", "programs = min(n_tiles", "programs = min(0 * n_tiles", "AssertionError",
    ),
    "more shared memory than there is": (
        "copies", "sm90/conv", "num_stages=config.num_stages", "num_stages=16", "shared memory",
    ),
    "a table of freed vectors": (
        "call resnet18", "bn_scale_shift", "tensor.data_ptr() for", "tensor.clone().data_ptr() for",
        "address in it lies in a tensor",
    ),
    "captured launches share counters": (
        "call resnet18", "sm90/split_k_counters", "if _is_capturing(device):", "if False:", "share counters",
    ),
    "a table made inside a capture": (
        "call resnet18", "bn_scale_shift", "return self.eps == eps and", "return False and", "from host memory",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name, tmp_path, rehearse):
    command, module, old, new, words = BUGS[name]
    package = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / "kernels" / f"{module}.py"
    source = path.read_text()
    assert old in source, f"the module no longer has {old!r}: plant this bug anew"
    path.write_text(source.replace(old, new))
    with pytest.raises(RuntimeError, match=words):
        rehearse(*command.split(), package=package)
