"""Later launches of a plan go past Triton, and only where Triton would do the same."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from resnet_kernels.kernels import launching
from resnet_kernels.kernels.sm90.descriptors import View

FIXED, OPTIONS = dict(n=5, BLOCK=16), dict(num_warps=4)
VIEWS = {"x_ptr": View((4, 4), (4, 1), (2, 2), 8)}
CPU = torch.device("cpu")


class Kernel:
    """A @triton.jit function as far as launches go; notes them. compiled: what compiling gives, None for an interpreter."""

    arg_names = ("x_ptr", "n", "bias_ptr", "BLOCK")

    def __init__(self, compiled=lambda kernel: Compiled(kernel)):
        self.compiled, self.asked, self.launched, self.called = compiled, [], [], []
        self.fn = object()  # the Python function

    def is_gluon(self):
        return False

    def __getitem__(self, grid):
        def run(**arguments):
            self.asked.append((grid, arguments))
            return self.compiled and self.compiled(self)

        return run


class Compiled:
    """As Triton's, in an unknown version: all that is known is how tutorials launch it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


class PyCUtensorMap:
    """As Triton's: opaque."""

    def __init__(self, address):
        self.address = address


class Launcher:
    """As Triton's: spreads descriptors out and calls a C function. nested: with the kernel's arguments in a tuple (3.9)."""

    def __init__(self, kernel, nested):
        function, self.encoded = kernel.called.append, []

        def launcher(*given):
            function(given)

        def spread(argument):
            if not hasattr(argument, "block_shape"):
                return [argument]
            self.encoded.append(argument.base.data_ptr())
            return [PyCUtensorMap(argument.base.data_ptr()), *argument.shape, *argument.strides]

        def inner(*given):
            head, arguments = given[:8], [value for argument in given[8:] for value in spread(argument)]
            return launcher(*head, tuple(arguments)) if nested else launcher(*head, *arguments)

        self.launch = inner

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, exit, *arguments):
        self.launch(x, y, z, stream, function, "not cooperative", metadata, launch_metadata, *arguments)


def compiled(nested, kernel):
    """As Triton's of a version that we know."""
    made = Compiled(kernel)
    made.metadata = SimpleNamespace(global_scratch_size=0, profile_scratch_size=0)
    made.function, made.packed_metadata, made.run = 7777, "packed", Launcher(kernel, nested)
    kernel.encoded = made.run.encoded
    return made


@pytest.fixture
def stream(monkeypatch):
    """Of the current device; and the kernels here are no interpreted ones."""
    monkeypatch.setattr(launching, "_descriptor_for_the_interpreter", launching._descriptor)
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(SimpleNamespace(get_current_stream=lambda index: 42))
    yield 42
    driver._active = before


def vector(offset=0, dtype=torch.float32):
    return torch.zeros(64, dtype=dtype)[offset:]


def launch(kernel, prepared, x, bias, views=None):
    launching.launch(kernel, (7,), CPU, dict(x_ptr=x, bias_ptr=bias), FIXED, prepared, views, **OPTIONS)


def flat(given):
    return [*given[:-1], *given[-1]] if isinstance(given[-1], tuple) else [*given]


def test_the_first_launch_is_tritons():
    kernel, x = Kernel(), vector()
    launch(kernel, {}, x, None)
    assert kernel.asked == [((7,), dict(x_ptr=x, bias_ptr=None, **FIXED, **OPTIONS))] and not kernel.launched


@pytest.mark.parametrize("nested", [False, True])
def test_later_ones_call_tritons_c_function(nested, stream):
    kernel, prepared = Kernel(lambda kernel: compiled(nested, kernel)), {}
    tensors = [vector(), vector(), vector(8)]
    for x in tensors:
        launch(kernel, prepared, x, x, VIEWS)
    assert len(kernel.asked) == 1 and not kernel.launched
    assert next(iter(prepared.values())).is_direct
    for x, given in zip(tensors[1:], kernel.called, strict=True):
        assert flat(given)[:8] == [7, 1, 1, stream, 7777, "not cooperative", "packed", None]
        tensor_map, *rest = flat(given)[8:]
        # A view's offset is in elements of 4 bytes.
        assert isinstance(tensor_map, PyCUtensorMap) and tensor_map.address == x.data_ptr() + 8 * 4
        assert rest == [4, 4, 4, 1, 5, x.data_ptr(), 16]


def test_a_tensor_map_is_made_once_an_address(stream, monkeypatch):
    monkeypatch.setattr(launching, "_MOST_MAPS", 2)
    kernel, prepared = Kernel(lambda kernel: compiled(True, kernel)), {}
    tensors = [vector() for _ in range(3)]
    for _ in range(2):  # the first one is Triton's, the second one learns from it
        launch(kernel, prepared, tensors[0], None, VIEWS)
    learning = len(kernel.encoded)
    for x in (tensors[1], *tensors[:2]):
        launch(kernel, prepared, x, None, VIEWS)
    assert len(kernel.encoded) == learning + 1
    # The third one has no room beside them.
    launch(kernel, prepared, tensors[2], None, VIEWS)
    launch(kernel, prepared, tensors[0], None, VIEWS)
    assert len(kernel.encoded) == learning + 3
    assert [flat(given)[8].address - 32 for given in kernel.called] == [
        tensors[i].data_ptr() for i in (0, 1, 0, 1, 2, 0)
    ]


def test_another_triton_is_launched_as_in_its_tutorials(stream):
    def made(kernel, change):
        one = compiled(False, kernel)
        change(one)
        return one

    changes = (
        lambda c: setattr(c.metadata, "global_scratch_size", 128),  # a launch needs memory of its own
        lambda c: setattr(c, "run", lambda *given: None),  # no C function to be seen
        lambda c: setattr(c.run, "launch", lambda *given: None),  # a wrapper of another kind
        lambda c: delattr(c, "packed_metadata"),
    )
    for change in changes:
        kernel, prepared = Kernel(lambda kernel, change=change: made(kernel, change)), {}
        first, second = vector(), vector()
        for x in (first, second):
            launch(kernel, prepared, x, x, VIEWS)
        (grid, (x, n, bias, block)) = kernel.launched[0]
        assert len(kernel.asked) == 1 and grid == (7, 1, 1) and not kernel.called
        assert x.base.data_ptr() == second.data_ptr() + 32 and (x.shape, x.strides, x.block_shape) == (
            [4, 4],
            [4, 1],
            [2, 2],
        )
        assert bias is second and (n, block) == (5, 16)


def test_launch_hooks_see_every_launch(stream, monkeypatch):
    kernel, prepared = Kernel(lambda kernel: compiled(False, kernel)), {}
    hook = lambda metadata: None  # noqa: E731
    for hooks in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        launch(kernel, prepared, vector(), None)
        hooks.add(hook)
        launch(kernel, prepared, vector(), None)
        hooks.remove(hook)
    assert len(kernel.asked) == 1 and len(kernel.launched) == 2 and len(kernel.called) == 1
    for other, launched in ((None, 2), (hook, 3)):  # in the place of a chain
        monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", other)
        launch(kernel, prepared, vector(), None)
        assert len(kernel.launched) == launched


def test_what_compiles_to_another_kernel_is_asked_for():
    """As Triton specializes: by presence, dtype and whether 16 divides the address."""
    kernel, prepared = Kernel(), {}
    kinds = [vector(), None, vector(1), vector(dtype=torch.float16), vector(4)]
    for bias in kinds:
        launch(kernel, prepared, vector(), bias)
    assert len(kernel.asked) == 4 and len(kernel.launched) == 1  # 4 floats on: 16 bytes
    launch(Kernel(), prepared, vector(), None)
    assert len(kernel.launched) == 1, "another kernel of the same plan is another question"


def test_the_interpreter_is_asked_each_time():
    kernel, prepared = Kernel(compiled=None), {}
    for _ in range(2):
        launch(kernel, prepared, vector(), None)
    assert len(kernel.asked) == 2 and not prepared


def test_tritons_own_rule_is_ours():
    """Triton's specialization of pointers, so that a change of it is noticed."""
    jit = pytest.importorskip("triton.runtime.jit", reason="Triton is not installed")
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this Triton specializes elsewhere")
    from triton.backends.nvidia.compiler import CUDABackend

    def triton_key(tensor):
        return jit.native_specialize_impl(CUDABackend, tensor, False, True, True)

    def asks_anew(a, b):
        kernel, prepared = Kernel(), {}
        for x in (a, b):
            launch(kernel, prepared, x, None)
        return len(kernel.asked) == 2

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
            assert (triton_key(a) == triton_key(b)) != asks_anew(a, b)
