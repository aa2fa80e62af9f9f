"""What a program that starts early asks L2 for, in the interpreter: all weights of its tile, and nothing else."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from resnet_kernels.kernels.sm90.conv_device import prefetch_weight

pytestmark = pytest.mark.usefixtures("hopper_with_nan_outputs")


@triton.jit
def _prefetch_kernel(
    w_ptr, c_out, tiles_c, STEPS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    program = tl.program_id(0)
    channel = program // SPLIT_K % tiles_c * BLOCK_N
    prefetch_weight(w_ptr, channel, c_out, program % SPLIT_K, STEPS, SPLIT_K, BLOCK_N, BLOCK_K)


@pytest.mark.parametrize("split_k", (1, 4, 16))
@pytest.mark.parametrize(("c_out", "steps"), ((128, 9), (40, 36)))
def test_the_whole_weight_and_no_byte_behind_it(c_out, steps, split_k, device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("only the interpreter says which addresses a program prefetches")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    asked = []

    def note(self, asm, constraints, values, result, is_pure, pack):
        assert "cp.async.bulk.prefetch.L2" in asm and not is_pure
        asked.extend(zip(*(handle.data.ravel().tolist() for handle in values), strict=True))
        zeros = TensorHandle(np.zeros_like(values[1].data), tl.int32)
        return SimpleNamespace(get_result=lambda i: zeros)

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", note)
    weight = torch.zeros(c_out, steps * 64, dtype=torch.float16, device=device)
    tiles_c = triton.cdiv(c_out, 64)
    _prefetch_kernel[(2 * tiles_c * split_k,)](weight, c_out, tiles_c, steps, split_k, 64, 64)
    covered = np.zeros(weight.nbytes, dtype=bool)
    for address, size in asked:
        first = address - weight.data_ptr()
        assert first % 16 == 0 and size % 16 == 0 < size and 0 <= first <= first + size <= weight.nbytes
        covered[first : first + size] = True
    assert covered.all()
    assert sum(size for _, size in asked) == 2 * tiles_c * 64 * steps * 64 * 2, "each program asks for its own share"
