"""A plan's second launch goes to the compiled kernel that the first one found, and only where Triton would find the same."""

import pytest
import torch

from resnet_kernels.kernels import launching

FIXED, OPTIONS = dict(n=5, BLOCK=16), dict(num_warps=4)
CPU = torch.device("cpu")


class Kernel:
    """A @triton.jit function as far as launches go; notes them. compiles: False for an interpreted one."""

    arg_names = ("x_ptr", "n", "bias_ptr", "BLOCK")

    def __init__(self, compiles=True):
        self.compiles, self.asked, self.launched = compiles, [], []

    def __getitem__(self, grid):
        def run(**arguments):
            self.asked.append((grid, arguments))
            return Compiled(self) if self.compiles else None

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


def vector(offset=0, dtype=torch.float32):
    return torch.zeros(16, dtype=dtype)[offset:]


def launch(kernel, prepared, x, bias):
    launching.launch(kernel, 7, CPU, dict(x_ptr=x, bias_ptr=bias), FIXED, prepared, **OPTIONS)


def test_the_second_launch_asks_nothing():
    kernel, prepared = Kernel(), {}
    first, second = vector(), vector()
    launch(kernel, prepared, first, None)
    assert kernel.asked == [((7,), dict(x_ptr=first, bias_ptr=None, **FIXED, **OPTIONS))] and not kernel.launched
    launch(kernel, prepared, second, None)
    (grid, (x, n, bias, block)) = kernel.launched[0]
    assert len(kernel.asked) == 1 and grid == (7, 1, 1)
    assert x is second and (n, bias, block) == (5, None, 16)


def test_what_compiles_to_another_kernel_is_asked_for():
    """As Triton specialises: by presence, dtype and whether 16 divides the address."""
    kernel, prepared = Kernel(), {}
    kinds = [vector(), None, vector(1), vector(dtype=torch.float16), vector(4)]
    for bias in kinds:
        launch(kernel, prepared, vector(), bias)
    assert len(kernel.asked) == 4 and len(kernel.launched) == 1  # 4 floats on: 16 bytes
    launch(Kernel(), prepared, vector(), None)
    assert len(kernel.launched) == 1, "another kernel of the same plan is another question"


def test_the_interpreter_is_asked_each_time():
    kernel, prepared = Kernel(compiles=False), {}
    for _ in range(2):
        launch(kernel, prepared, vector(), None)
    assert len(kernel.asked) == 2 and not prepared


def test_tritons_own_rule_is_ours():
    """Triton's specialisation of pointers, so that a change of it is noticed."""
    jit = pytest.importorskip("triton.runtime.jit", reason="Triton is not installed")
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this Triton specialises elsewhere")
    from triton.backends.nvidia.compiler import CUDABackend

    def triton_key(tensor):
        return jit.native_specialize_impl(CUDABackend, tensor, False, True, True)

    tensors = [
        vector(),
        vector(1),
        vector(4),
        vector(dtype=torch.float16),
        vector(8, torch.float16),
        vector(1, torch.int64),
    ]
    for a in tensors:
        for b in tensors:
            assert (triton_key(a) == triton_key(b)) == (launching._kind(a) == launching._kind(b))
